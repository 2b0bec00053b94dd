"""Tensor-train decomposition of many small vectors at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import compute_dtype


def train_ranks(shape: Sequence[int], max_rank: int) -> list[int]:
    """Ranks of a tensor train: the largest rank, but nowhere more than there are entries on either side of a bond.

    Args:
        shape: Sizes of the modes.
        max_rank: Largest rank.

    Returns:
        `len(shape) + 1` ranks; the first and the last are 1.

    Example:
        >>> train_ranks([2] * 10, 4)
        [1, 2, 4, 4, 4, 4, 4, 4, 4, 2, 1]
    """
    bonds = range(len(shape) + 1)
    return [min(max_rank, math.prod(shape[:bond]), math.prod(shape[bond:])) for bond in bonds]


def core_sizes(shape: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """Entries of every core, `r_{k-1} n_k r_k`.

    Example:
        >>> sum(core_sizes([2] * 10, train_ranks([2] * 10, 4)))
        232
    """
    return [left * size * right for left, size, right in zip(ranks, shape, ranks[1:], strict=False)]


def tensor_train(vectors: Tensor, shape: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """TT-SVD of every row by itself (Oseledets 2011, algorithm 1), all rows side by side.

    A row is padded with zeros, folded to an order-N tensor, and decomposed from the left. The left singular vectors of
    an unfolding `X`, which has a few rows only, are the eigenvectors of `X Xᵀ`: a batch of small symmetric problems.
    Where nothing is cut off, no basis has to be found.

    Args:
        vectors: `[count, length]`, `length` at most the product of the shape.
        shape: Sizes of the modes.
        ranks: Ranks of the bonds, the first and the last 1, see `train_ranks`.

    Returns:
        `[count, Σ_k r_{k-1} n_k r_k]`: the cores of a row one after the other, each in the order
        `(r_{k-1}, n_k, r_k)`, in float32, or float64 for float64.

    Example:
        >>> vectors = torch.randn(3, 6)
        >>> cores = tensor_train(vectors, [2, 2, 2], [1, 2, 2, 1])
        >>> torch.allclose(train_rows(cores, [2, 2, 2], [1, 2, 2, 1], 6), vectors, atol=1e-5)
        True
    """
    count, length = vectors.shape
    rest = torch.nn.functional.pad(vectors.to(compute_dtype(vectors.dtype)), (0, math.prod(shape) - length))
    # Squares of very small or large entries would leave the range of the dtype.
    scale = torch.linalg.vector_norm(rest, torch.inf, dim=1, keepdim=True)
    rest = rest / torch.where(scale == 0, 1, scale)
    entries = math.prod(shape)
    cores = []
    for size, left, right in zip(shape[:-1], ranks, ranks[1:], strict=False):
        entries //= size
        rest = rest.reshape(count, left * size, entries)
        if right == left * size:
            basis = torch.eye(right, dtype=rest.dtype, device=rest.device).expand(count, -1, -1)
        elif right == rest.shape[2]:
            basis = rest
            rest = torch.eye(right, dtype=rest.dtype, device=rest.device).expand(count, -1, -1)
        else:
            basis = torch.linalg.eigh(rest @ rest.mT).eigenvectors[..., -right:].flip(-1)
            rest = basis.mT @ rest
        cores.append(basis.flatten(1))
    return torch.cat([*cores, rest.flatten(1) * scale], dim=1)


def train_halves(cores: Tensor, shape: Sequence[int], ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Multiply the cores of every row together, up to the middle of the train and from there on.

    Rows come last, so that every product of two entries is one over all rows: the cores are far too small for matrix
    products of their own.

    Args:
        cores: `[count, Σ_k r_{k-1} n_k r_k]`, see `tensor_train`.
        shape: Sizes of the modes.
        ranks: Ranks of the bonds.

    Returns:
        The left half `[left entries, rank, count]` and the right half `[rank, right entries, count]`.
    """
    middle = (len(shape) + 1) // 2
    count = cores.shape[0]
    pieces = torch.split(cores.T.contiguous(), core_sizes(shape, ranks))
    parts = [
        piece.reshape(left, size, right, count)
        for piece, left, size, right in zip(pieces, ranks, shape, ranks[1:], strict=False)
    ]
    first = parts[0][0]
    for part in parts[1:middle]:
        left, size, right, _ = part.shape
        product = _product(first, part.reshape(left, size * right, count))
        first = product.reshape(first.shape[0] * size, right, count)
    if middle == len(parts):
        return first, torch.ones_like(first[:1])
    second = parts[-1][:, :, 0]
    for part in reversed(parts[middle:-1]):
        left, size, right, _ = part.shape
        product = _product(part.reshape(left * size, right, count), second)
        second = product.reshape(left, size * second.shape[1], count)
    return first, second


def train_rows(cores: Tensor, shape: Sequence[int], ranks: Sequence[int], length: int) -> Tensor:
    """Rows from their cores.

    Args:
        cores: `[count, Σ_k r_{k-1} n_k r_k]`, see `tensor_train`.
        shape: Sizes of the modes.
        ranks: Ranks of the bonds.
        length: Entries of a row; the padding behind them is not computed.

    Returns:
        `[count, length]`.
    """
    first, second = train_halves(cores, shape, ranks)
    needed = -(-length // second.shape[1])
    rows = _product(first[:needed], second)
    return rows.flatten(0, 1)[:length].T


def train_logits(cores: Tensor, hidden: Tensor, shape: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """Products of hidden states with rows that are never computed: from the middle of the train to both ends.

    A state is folded to `[left, right]`. All left halves are multiplied with it in one matrix product, and what comes
    out with the right halves, entry by entry.

    Args:
        cores: `[count, Σ_k r_{k-1} n_k r_k]`, see `tensor_train`.
        hidden: `[states, length]`.
        shape: Sizes of the modes.
        ranks: Ranks of the bonds.

    Returns:
        `[states, count]`.
    """
    first, second = train_halves(cores, shape, ranks)
    states, length = hidden.shape
    needed = -(-length // second.shape[1])
    padded = torch.nn.functional.pad(hidden, (0, needed * second.shape[1] - length))
    folded = padded.reshape(states, needed, second.shape[1])
    products = folded.mT @ first[:needed].flatten(1)
    # [states, right entries, rank, count], as `second` once its first two modes are swapped.
    return (products.reshape(*folded.mT.shape[:2], *first.shape[1:]) * second.transpose(0, 1)).sum(dim=(1, 2))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`[a, r, count]` times `[r, b, count]` is `[a, b, count]`, for every row by itself."""
    total = left[:, 0, None] * right[0]
    for bond in range(1, left.shape[1]):
        total = torch.addcmul(total, left[:, bond, None], right[bond])
    return total
