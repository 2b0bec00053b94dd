"""Tensor-train matrices: ranks, decomposition by TensorLy, and rows of scattered ids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import tensorly
import torch
from tensorly.decomposition import tensor_train_matrix
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import thin_svd
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


def scattered_rows(cores: Sequence[Tensor], ids: Tensor) -> Tensor:
    """Rows of distinct ids, where ids that share a beginning share the work for it.

    Every id is a number with digits `i_1 … i_N`. Beginnings that continue with the same digit are multiplied with its
    slice of a core in one product. The last two cores go together, so that the longest beginnings, which are the bulk
    of it, are used while they are in the cache.

    Args:
        cores: `[R_{k-1}, I_k, J_k, R_k]`.
        ids: `[count]`, ascending and distinct.

    Returns:
        `[count, ∏ J_k]`.
    """
    if len(cores) == 1:
        return cores[0].squeeze(3).squeeze(0).index_select(0, ids)
    modes = [core.shape[1] for core in cores]
    beginnings, rows = ids.new_zeros(1), cores[0].new_ones(1, 1, 1)
    for level, core in enumerate(cores[:-1]):
        extended = torch.unique_consecutive(ids // math.prod(modes[level + 1 :]))
        parents = torch.searchsorted(beginnings, extended // modes[level])
        digits, by_digit = (extended % modes[level]).sort(stable=True)
        products = _extended(rows, core, parents[by_digit], torch.bincount(digits, minlength=modes[level]).tolist())
        place = by_digit.argsort()
        if level < len(cores) - 2:
            beginnings, rows = extended, torch.cat(list(products)).index_select(0, place)
    # The ids in the order of the digit before their last one, and which of the beginnings with that digit is theirs.
    positions, by_position = place[torch.searchsorted(extended, ids // modes[-1])].sort()
    endings = cores[-1].squeeze(3).transpose(0, 1).index_select(0, (ids % modes[-1])[by_position])
    shares = torch.bincount(digits[positions], minlength=modes[-2]).tolist()
    pieces, start = [], 0
    for product, own, ending in zip(
        products, torch.split(positions, shares), torch.split(endings, shares), strict=True
    ):
        pieces.append(torch.bmm(product.index_select(0, own - start), ending).flatten(1))
        start += len(product)
    return torch.cat(pieces).index_select(0, by_position.argsort())


def _extended(rows: Tensor, core: Tensor, parents: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """Products of beginnings with one more core, for every digit of it those that continue with the digit.

    Args:
        rows: `[beginnings, columns so far, R_{k-1}]`.
        core: `[R_{k-1}, I_k, J_k, R_k]`.
        parents: Which beginning is continued, sorted by the digit.
        counts: How many are continued by each of the `I_k` digits.

    Yields:
        `[count, columns so far · J_k, R_k]` for every digit.
    """
    left, _, columns, right = core.shape
    # Unbound once: the gradient of a slice would be as large as the core.
    for some, part in zip(torch.split(parents, list(counts)), core.unbind(1), strict=True):
        product = rows.index_select(0, some).reshape(len(some) * rows.shape[1], left) @ part.reshape(left, -1)
        yield product.reshape(len(some), rows.shape[1] * columns, right)
