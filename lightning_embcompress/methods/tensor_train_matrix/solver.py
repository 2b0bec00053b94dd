"""Tensor-train matrices: ranks, decomposition by TensorLy, and rows of scattered ids."""

from __future__ import annotations

from collections.abc import Sequence

import tensorly
import torch
from tensorly.decomposition import tensor_train_matrix
from torch import Tensor

from lightning_embcompress.methods.numerics.thin_svd import thin_svd
from lightning_embcompress.methods.tensor_train.solver import train_ranks


def matrix_ranks(vocab_shape: Sequence[int], dim_shape: Sequence[int], max_rank: int) -> list[int]:
    """Ranks of a TT-matrix: the largest rank, but nowhere more than there are entries on either side of a bond.

    Example:
        >>> matrix_ranks((35, 36, 40), (8, 8, 12), 128)
        [1, 128, 128, 1]
    """
    return train_ranks([rows * columns for rows, columns in zip(vocab_shape, dim_shape, strict=True)], max_rank)


def tt_matrix(folded: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """TT-matrix of a folded table by TT-SVD (Oseledets 2011).

    Args:
        folded: `[I_1, …, I_N, J_1, …, J_N]`, float32 or float64.
        ranks: `R_0 … R_N`, the first and the last 1, see `matrix_ranks`.

    Returns:
        Cores `[R_{k-1}, I_k, J_k, R_k]`.
    """
    # TensorLy's backend is global; this sets it for the thread and the time of the call.
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        cores = tensor_train_matrix(folded, list(ranks), svd=thin_svd).factors
    # TensorLy drops the ranks at both ends of a train of one core.
    return [
        core.reshape(left, *core.shape[1:3], right) for core, left, right in zip(cores, ranks, ranks[1:], strict=False)
    ]


def aligned_cores(cores: Sequence[Tensor], references: Sequence[Tensor]) -> list[Tensor]:
    """The same train with the singular vectors of every bond turned towards those of another one.

    An optimizer's state for the cores goes on to fit. What turns one core the next one takes back.

    Args:
        cores: `[R_{k-1}, I_k, J_k, R_k]`.
        references: As many, of the same shapes.
    """
    turned = []
    rotation = torch.ones(1, 1).to(cores[0])
    for core, reference in zip(cores[:-1], references, strict=False):
        core = torch.einsum("qr,rijs->qijs", rotation, core)
        left, _, right = torch.linalg.svd(core.flatten(0, 2).T @ reference.to(core).flatten(0, 2))
        rotation = (left @ right).T
        turned.append(core @ rotation.T)
    return [*turned, torch.einsum("qr,rijs->qijs", rotation, cores[-1])]


def scattered_rows(cores: Sequence[Tensor], digits: Sequence[Tensor]) -> Tensor:
    """Rows of ids, those with the same digit multiplied with its slice of a core in one product.

    Args:
        cores: `[R_{k-1}, I_k, J_k, R_k]`.
        digits: As many times `[count]`, the digits of the ids.

    Returns:
        `[count, ∏ J_k]`.
    """
    first, *others = cores
    rows = first.squeeze(0).index_select(0, digits[0])
    for core, digit in zip(others, digits[1:], strict=True):
        left, modes, columns, right = core.shape
        order = digit.argsort(stable=True)
        parts = torch.split(rows.index_select(0, order), torch.bincount(digit, minlength=modes).tolist())
        # Unbound once: the gradient of a slice would be as large as the core.
        products = [
            part.reshape(-1, left) @ own.reshape(left, -1) for part, own in zip(parts, core.unbind(1), strict=True)
        ]
        rows = torch.cat(products).reshape(len(digit), -1, right).index_select(0, order.argsort())
    return rows.flatten(1)
