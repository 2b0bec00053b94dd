"""Singular value decomposition of matrices that are much longer one way than the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def thin_svd(matrix: Tensor, n_eigenvecs: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets through the eigenvectors of the smaller of `X Xᵀ` and `Xᵀ X`, summed in float64.

    An SVD of the unfoldings of a table would take minutes. The signature is that of TensorLy's SVDs.

    Args:
        matrix: `[m, n]`.
        n_eigenvecs: How many, at most `min(m, n)`.

    Returns:
        Left vectors `[m, count]`, values `[count]` and right vectors `[count, n]`.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    gram = torch.zeros(short.shape[0], short.shape[0], dtype=torch.float64, device=matrix.device)
    for piece in torch.split(short, 2**14, dim=1):
        gram += (piece @ piece.T).double()
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -n_eigenvecs:].flip(1).to(matrix.dtype)
    products = vectors.T @ short
    values = products.norm(dim=1)
    others = products / values.clamp(min=torch.finfo(matrix.dtype).tiny)[:, None]
    return (vectors, values, others) if wide else (others.T, values, vectors.T)
