"""Tensor-train matrices: shapes, decomposition, and products that never build the table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import tensorly
import torch
from tensorly.decomposition import tensor_train_matrix as tensorly_tensor_train_matrix
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.methods.tensor_train.solver import train_ranks


@cache
def balanced_shape(size: int, num_modes: int) -> tuple[int, ...]:
    """Sizes of modes that are close to each other and whose product is `size`, or a little more.

    A prime or awkward number (50,257 = 29 · 1,733) has no balanced factors. So the modes may multiply to more, and what
    is beyond `size` is padding: up to a hundredth, where that balances them better.

    Args:
        size: What has to fit.
        num_modes: How many modes.

    Returns:
        The modes, the smallest first.

    Example:
        >>> balanced_shape(50257, 3), balanced_shape(768, 3), balanced_shape(7, 2)
        ((34, 37, 40), (8, 8, 12), (2, 4))
    """
    candidates = [modes for modes in _shapes(size, num_modes, 1) if modes[-1] <= 2 * modes[0] or modes[-1] <= 4]
    # The sum is lowest for equal modes.
    return min(candidates, key=lambda modes: (max(math.prod(modes), 1.01 * size), sum(modes), math.prod(modes)))


def _shapes(size: int, num_modes: int, smallest: int) -> list[tuple[int, ...]]:
    """Ascending modes, the last one just large enough."""
    if num_modes == 1:
        return [(max(size, smallest),)]
    most = math.ceil(size ** (1 / num_modes) + 1e-9)
    # Modes below half of the mean are too far from the largest to be chosen.
    least = max(smallest, most // 2)
    return [
        (first, *rest)
        for first in range(least, max(least, most) + 1)
        for rest in _shapes(-(-size // first), num_modes - 1, first)
    ]


def matrix_ranks(vocab_shape: Sequence[int], dim_shape: Sequence[int], max_rank: int) -> list[int]:
    """Ranks of a TT-matrix: the largest rank, but nowhere more than there are entries on either side of a bond.

    Example:
        >>> matrix_ranks((35, 36, 40), (8, 8, 12), 128)
        [1, 128, 128, 1]
    """
    return train_ranks([rows * columns for rows, columns in zip(vocab_shape, dim_shape, strict=True)], max_rank)


def decompose_table(
    weight: Tensor, vocab_shape: Sequence[int], dim_shape: Sequence[int], ranks: Sequence[int]
) -> list[Tensor]:
    """TT-matrix of a table by TT-SVD (Oseledets 2011), through TensorLy.

    Args:
        weight: `[vocab_size, dim]` table; padded with zeros to the product of the shapes.
        vocab_shape: `I_k`, with a product of at least `vocab_size`.
        dim_shape: `J_k`, with a product of at least `dim`.
        ranks: `R_0 … R_N`, the first and the last 1, see `matrix_ranks`.

    Returns:
        Cores `[R_{k-1}, I_k, J_k, R_k]` in float32, or float64 for float64.
    """
    vocab_size, dim = weight.shape
    padding = (0, math.prod(dim_shape) - dim, 0, math.prod(vocab_shape) - vocab_size)
    padded = torch.nn.functional.pad(weight.to(compute_dtype(weight.dtype)), padding)
    # TensorLy's backend is global; this sets it for the thread and the time of the call.
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        folded = padded.reshape(*vocab_shape, *dim_shape)
        cores = tensorly_tensor_train_matrix(folded, list(ranks), svd=_thin_svd).factors
    return [
        core.reshape(left, rows, columns, right)
        for core, left, rows, columns, right in zip(cores, ranks, vocab_shape, dim_shape, ranks[1:], strict=False)
    ]


def _thin_svd(matrix: Tensor, n_eigenvecs: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets of a matrix that is much longer one way than the other.

    Through the eigenvectors of the smaller of `X Xᵀ` and `Xᵀ X`, summed in float64: an SVD of the unfoldings of a table
    would take minutes. The signature is that of TensorLy's SVDs.
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


def rows_of_ids(cores: Sequence[Tensor], ids: Tensor) -> Tensor:
    """Rows by one batched product a core: for few ids, and for graphs, whose shapes must not depend on the ids.

    Args:
        cores: `[R_{k-1}, I_k, J_k, R_k]`.
        ids: `[count]`.

    Returns:
        `[count, ∏ J_k]`.
    """
    digits = _digits(ids, [core.shape[1] for core in cores])
    rows = ids.new_ones(ids.shape[0], 1, 1).to(cores[0].dtype)
    for core, digit in zip(cores, digits, strict=True):
        left, _, columns, right = core.shape
        chosen = core.transpose(0, 1).index_select(0, digit).reshape(-1, left, columns * right)
        rows = torch.bmm(rows, chosen).reshape(ids.shape[0], rows.shape[1] * columns, right)
    return rows.squeeze(2)


def rows_of_distinct_ids(cores: Sequence[Tensor], ids: Tensor) -> Tensor:
    """Rows of distinct ids, where ids that share a beginning share the work for it.

    Every id is a number with digits `i_1 … i_N`. From the left, the products of all beginnings that occur are extended
    by one core: those with the same next digit in one matrix product with that slice of the core. The last two cores
    go together, so that the longest beginnings, which are the bulk of it, are used while they are in the cache.

    Args:
        cores: `[R_{k-1}, I_k, J_k, R_k]`.
        ids: `[count]`, ascending and distinct.

    Returns:
        `[count, ∏ J_k]`.
    """
    if not ids.numel() or len(cores) == 1:
        return rows_of_ids(cores, ids)
    modes = [core.shape[1] for core in cores]
    beginnings, place = ids.new_zeros(1), ids.new_zeros(1)
    rows = cores[0].new_ones(1, 1, 1)
    for level in range(len(cores) - 2):
        extended = torch.unique_consecutive(ids // math.prod(modes[level + 1 :]))
        parents = place[torch.searchsorted(beginnings, extended // modes[level])]
        digits, by_digit = (extended % modes[level]).sort(stable=True)
        counts = torch.bincount(digits, minlength=modes[level]).tolist()
        rows = torch.cat([part for part in _extended(rows, cores[level], parents[by_digit], counts) if part.numel()])
        # They stay in the order of the last digit, and are found by their place in it.
        beginnings, place = extended, _inverse(by_digit)
    core, last = cores[-2:]
    extended = torch.unique_consecutive(ids // modes[-1])
    parents = place[torch.searchsorted(beginnings, extended // modes[-2])]
    digits, by_digit = (extended % modes[-2]).sort(stable=True)
    counts = torch.bincount(digits, minlength=modes[-2]).tolist()
    place = _inverse(by_digit)
    # The ids in the order of the digit before their last one, and which of the beginnings with that digit is theirs.
    positions, by_position = place[torch.searchsorted(extended, ids // modes[-1])].sort()
    endings = last.squeeze(3).transpose(0, 1).index_select(0, (ids % modes[-1])[by_position])
    shares = torch.bincount(digits[positions], minlength=modes[-2]).tolist()
    pieces = []
    start = 0
    for product, count, own, ending in zip(
        _extended(rows, core, parents[by_digit], counts),
        counts,
        torch.split(positions, shares),
        torch.split(endings, shares),
        strict=True,
    ):
        if count:
            pieces.append(torch.bmm(product.index_select(0, own - start), ending).flatten(1))
        start += count
    return torch.cat(pieces).index_select(0, _inverse(by_position))


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


def _inverse(permutation: Tensor) -> Tensor:
    place = torch.empty_like(permutation)
    place[permutation] = torch.arange(len(permutation), device=permutation.device)
    return place


def rows_of_range(cores: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """All rows whose first digit is from `start` to `stop`, by one matrix product a core.

    Args:
        cores: `[R_{k-1}, I_k, J_k, R_k]`.
        start: First digit.
        stop: The digit after the last.

    Returns:
        `[(stop - start) · I_2 … I_N, ∏ J_k]`.
    """
    modes = [stop - start, *(core.shape[1] for core in cores[1:])]
    columns = [core.shape[2] for core in cores]
    rows = cores[0][:, start:stop]
    for core in cores[1:]:
        rows = rows.reshape(-1, core.shape[0]) @ core.flatten(1)
    # Their modes alternate: I_1, J_1, I_2, J_2, ...
    count = len(cores)
    rows = rows.reshape([size for pair in zip(modes, columns, strict=True) for size in pair])
    order = [2 * mode for mode in range(count)] + [2 * mode + 1 for mode in range(count)]
    return rows.permute(order).reshape(math.prod(modes), math.prod(columns))


def contracted_logits(cores: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """Products of hidden states with all rows, by contracting the states with one core after the other from the right.

    Args:
        cores: `[R_{k-1}, I_k, J_k, R_k]`.
        hidden: `[states, ∏ J_k]`.

    Returns:
        `[states, ∏ I_k]`.
    """
    states = hidden.shape[0]
    rest, tail = hidden.shape[1], 1
    for core in reversed(cores):
        left, mode, columns, right = core.shape
        rest //= columns
        folded = hidden.reshape(states, rest, columns, right, tail)
        hidden = torch.einsum("bljrt,qijr->blqit", folded, core)
        tail *= mode
    return hidden.reshape(states, tail)


def contraction_cost(cores: Sequence[Tensor]) -> int:
    """Multiplications of `contracted_logits` for one state."""
    cost, rest, tail = 0, math.prod(core.shape[2] for core in cores), 1
    for core in reversed(cores):
        left, mode, columns, right = core.shape
        cost += rest * right * tail * left * mode
        rest, tail = rest // columns, tail * mode
    return cost


def table_cost(cores: Sequence[Tensor]) -> int:
    """Multiplications that computing every row once takes, see `rows_of_range`."""
    cost, entries = 0, cores[0].shape[1] * cores[0].shape[2]
    for core in cores[1:]:
        cost += entries * core.numel()
        entries *= core.shape[1] * core.shape[2]
    return cost


def _digits(ids: Tensor, modes: Sequence[int]) -> list[Tensor]:
    return [
        ids // math.prod(modes[level + 1 :]) % mode if level else ids // math.prod(modes[1:])
        for level, mode in enumerate(modes)
    ]
