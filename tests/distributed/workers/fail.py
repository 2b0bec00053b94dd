"""One of several processes fails while they solve a table together."""

from __future__ import annotations

import torch.distributed as dist
from cases import small_units, table, tasks

from lightning_embcompress.compression.solution import solve
from lightning_embcompress.methods.group_reduce import solver as group_reduce

if __name__ == "__main__":
    dist.init_process_group("gloo")
    small_units()
    whole = group_reduce.warm_eigenvectors

    def fails(*arguments: object) -> object:
        raise ArithmeticError("the decomposition did not converge")

    if dist.get_rank() == 1:
        group_reduce.warm_eigenvectors = fails
    wanted = tasks(table(), method="group_reduce", ratio=4, groups=4)
    try:
        solve(wanted, together=True)
    finally:
        # Both say what they have to: the first to end has the other one killed, and a thread of gloo that is left can
        # abort the interpreter at its end.
        dist.barrier()
        dist.destroy_process_group()
