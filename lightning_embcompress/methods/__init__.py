"""Ways of storing a table in fewer bytes: one folder a method, and what they share.

A method is a folder with its config, its solver, and the factorization that stores what the solver finds; one line in
`METHODS` makes it known to everything else. Folders that are no methods: `numerics` (linear algebra, the metric of the
loss, allocation), `quantizers` (integers in place of numbers), `kernels` (GPUs), `automatic` (chooses among methods).

Rows are looked up by `rows` of every factorization: in `blocks` for those with blocks of rows, in `folding` for folded
tables, in `quantizers.factors` and `quantizers.packed_rows` for integers.
"""
