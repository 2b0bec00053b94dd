"""Plain and frequency-weighted low rank of a whole table."""

from __future__ import annotations

from torch import Tensor

from lightning_embcompress.solvers.division import deal
from lightning_embcompress.solvers.gram import compute_dtype, gram_matrix, row_units, run_of, top_eigenvectors


def weighted_low_rank(weight: Tensor, rank: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Best approximation of rank `rank` of a table, rows weighted: `min Σ_i q_i ‖w_i − u_i B‖²`.

    The closed form is the truncated SVD of `diag(q)^½ W` (GroupReduce, eq. 3; Eckart-Young), taken here through the
    eigenvectors of `Wᵀ diag(q) W`. With equal weights it is the plain truncated SVD. Processes share both passes over
    the table, see `solvers.division`.

    Args:
        weight: `[vocab_size, dim]` table.
        rank: From 0 to `min(vocab_size, dim)`.
        weights: `[vocab_size]` positive row weights `q`.

    Returns:
        `coefficients` `[vocab_size, rank]` and `basis` `[rank, dim]` with orthonormal rows, in the table's dtype.

    Example:
        >>> import torch
        >>> table = torch.randn(50, 3) @ torch.randn(3, 8)
        >>> coefficients, basis = weighted_low_rank(table, 3, torch.ones(50))
        >>> torch.allclose(coefficients @ basis, table, atol=1e-4)
        True
    """
    gram = gram_matrix(weight, weights)
    basis = gram.new_empty(rank, gram.shape[0])
    # One process decomposes it: rounding may differ between processors.
    deal([[basis]], [1.0], lambda _: basis.copy_(top_eigenvectors(gram, rank)))
    return project(weight, basis), basis.to(weight.dtype)


def project(weight: Tensor, basis: Tensor, rows: Tensor | None = None) -> Tensor:
    """Coefficients `w_i Bᵀ` of a table's rows in an orthonormal basis.

    Args:
        weight: `[vocab_size, dim]` table.
        basis: `[rank, dim]` orthonormal rows.
        rows: Ids of the rows wanted; None for all.

    Returns:
        `[rows, rank]` in the table's dtype.
    """
    num_rows = weight.shape[0] if rows is None else rows.numel()
    dtype = compute_dtype(weight.dtype)
    right = basis.to(dtype).T
    out = weight.new_empty(num_rows, basis.shape[0])
    units = row_units(num_rows, weight.shape[1])

    def compute(unit: int) -> None:
        for chunk in units[unit]:
            ids = chunk if rows is None else rows[chunk]
            out[chunk] = (weight[ids].to(dtype) @ right).to(weight.dtype)

    runs = [run_of(chunks) for chunks in units]
    deal([[out[run]] for run in runs], [run.stop - run.start for run in runs], compute)
    return out
