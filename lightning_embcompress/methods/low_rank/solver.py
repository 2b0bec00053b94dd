"""Plain and weighted low rank of a whole table, weighted by frequency alone or in the metric of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import gram_matrix, project, top_eigenvectors
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.utils.division import deal


def weighted_low_rank(weight: Tensor, rank: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Best approximation of rank `rank` of a table, rows weighted: `min Σ_i q_i ‖w_i − u_i B‖²`.

    The closed form is the truncated SVD of `diag(q)^½ W` (GroupReduce, eq. 3; Eckart-Young), taken here through the
    eigenvectors of `Wᵀ diag(q) W`. With equal weights it is the plain truncated SVD. Processes share both passes over
    the table, see `utils.division`.

    Args:
        weight: `[vocab_size, dim]` table.
        rank: From 0 to `min(vocab_size, dim)`.
        weights: `[vocab_size]` positive row weights `q`.

    Returns:
        `coefficients` `[vocab_size, rank]` and `basis` `[rank, dim]` with orthonormal rows, in the table's dtype.

    Example:
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


def low_rank_in_metric(weight: Tensor, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """Best approximation of rank `rank` of a table in the metric of the loss: `min Σ_i q_i ‖(w_i − u_i B) C‖²`.

    With `C = M^½` that is the truncated SVD of `diag(q)^½ W C`, taken through the leading eigenvectors `P` of
    `C S C`, `S = Wᵀ diag(q) W`: the approximation is `W C P Pᵀ C⁻¹`, and `W C` is never formed. Its right factor
    `Pᵀ C⁻¹` is returned as `Rᵀ Qᵀ` of a QR decomposition, `Rᵀ` multiplied into the coefficients: they then are as
    large as the rows, whatever the units of `M`, and narrow dtypes neither overflow nor lose digits. Processes share
    both passes over the table, see `utils.division`.

    Args:
        weight: `[vocab_size, dim]` table.
        rank: From 0 to `min(vocab_size, dim)`.
        metric: Row weights and second moment.

    Returns:
        `coefficients` `[vocab_size, rank]` and `basis` `[rank, dim]` with orthonormal rows, in the table's dtype.

    Example:
        >>> table = torch.eye(3)
        >>> metric = Metric(torch.diag(torch.tensor([1.0, 9.0, 4.0])), torch.ones(3))
        >>> coefficients, basis = low_rank_in_metric(table, 2, metric)
        >>> (coefficients @ basis).abs().round(decimals=4)
        tensor([[0., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    gram = gram_matrix(weight, metric.weights.to(weight.device))
    basis = gram.new_empty(rank, gram.shape[0])
    left = torch.empty_like(basis)

    def compute(_: int) -> None:
        root, inverse_root = metric.root.to(gram), metric.inverse_root.to(gram)
        moved = root @ gram @ root
        leading = top_eigenvectors((moved + moved.T) / 2, rank)
        orthonormal, triangle = torch.linalg.qr((leading @ inverse_root).T)
        basis.copy_(orthonormal.T)
        left.copy_(triangle @ leading @ root)

    # One process decomposes it: rounding may differ between processors.
    deal([[basis, left]], [1.0], compute)
    return project(weight, left), basis.to(weight.dtype)
