"""Tucker decomposition of a folded table, and products with it that never build the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tensorly
import torch
from tensorly.decomposition import tucker as tensorly_tucker
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import gram_matrix, top_eigenvectors

# Relative error below whose decrease the iteration stops, as in TensorLy.
_TOLERANCE = 1e-4


def possible_ranks(shape: Sequence[int], ranks: Sequence[float]) -> list[int]:
    """Ranks that have a meaning: from 1 to the size of a mode, and none above the product of the others.

    Args:
        shape: Sizes of the modes.
        ranks: Wanted ranks, rounded to the nearest.

    Returns:
        One rank a mode, at most what was wanted.

    Example:
        >>> possible_ranks([4, 5, 6], [2, 9, 0.3]), possible_ranks([4, 5, 6], [2, 1, 6])
        ([2, 2, 1], [2, 1, 2])
    """
    possible = [max(1, min(size, round(rank))) for size, rank in zip(shape, ranks, strict=True)]
    # Only the largest can be above the product of the others.
    largest = max(range(len(possible)), key=possible.__getitem__)
    possible[largest] = min(possible[largest], math.prod(possible) // possible[largest])
    return possible


def tucker_elements(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Entries of the core and the factors together, `∏ R_n + Σ I_n R_n`."""
    return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True))


def proportional_ranks(shape: Sequence[int], fits: Callable[[list[int]], bool]) -> list[int]:
    """The largest ranks that are to the sizes of their modes as one number, and that fit.

    Args:
        shape: Sizes of the modes.
        fits: Whether ranks fit; it must not become true again as they grow.

    Returns:
        One rank a mode, 1 where nothing fits.

    Example:
        >>> proportional_ranks([40, 50, 64], lambda ranks: tucker_elements([40, 50, 64], ranks) <= 16_000)
        [18, 23, 29]
    """
    low, high = 0.0, 1.0
    if fits(possible_ranks(shape, shape)):
        return possible_ranks(shape, shape)
    # Half a rank of the largest mode is the finest step there is, up to where two modes round at once.
    while (high - low) * max(shape) > 1e-3:
        middle = (low + high) / 2
        if fits(possible_ranks(shape, [middle * size for size in shape])):
            low = middle
        else:
            high = middle
    return possible_ranks(shape, [low * size for size in shape])


def tucker(
    tensor: Tensor,
    ranks: Sequence[int],
    start: Sequence[Tensor] | None = None,
    max_iterations: int = 5,
    advance: Callable[[float], None] = lambda _: None,
) -> tuple[Tensor, list[Tensor]]:
    """Tucker decomposition by higher-order orthogonal iteration, through TensorLy.

    It minimises `‖X − G ×_1 A_1 … ×_N A_N‖` over orthonormal factors by improving one of them at a time (De Lathauwer,
    De Moor and Vandewalle 2000b, algorithm 4.2), from the truncated higher-order SVD (2000a) or from factors there are.

    Args:
        tensor: `[I_1, …, I_N]`, float32 or float64.
        ranks: `R_n`, see `possible_ranks`.
        start: Factors `[I_n, R_n]` to start from; None for the higher-order SVD.
        max_iterations: Most rounds over all factors.
        advance: Called with shares of the work that add up to 1.

    Returns:
        The core `[R_1, …, R_N]`, and the factors `[I_n, R_n]` with orthonormal columns.

    Example:
        >>> tensor = torch.einsum("abc,ia,jb,kc->ijk", *map(torch.randn, [(2, 2, 2), (5, 2), (6, 2), (7, 2)]))
        >>> core, factors = tucker(tensor, [2, 2, 2])
        >>> torch.allclose(torch.einsum("abc,ia,jb,kc->ijk", core, *factors), tensor, atol=1e-4)
        True
    """
    steps = max_iterations + 1
    # TensorLy's backend is global; this sets it for the thread and the time of the call.
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        if start is None:
            factors = [_leading_vectors(tensor, mode, rank) for mode, rank in enumerate(ranks)]
        else:
            factors = [torch.linalg.qr(factor.to(tensor)).Q for factor in start]
        core = tensorly.tenalg.multi_mode_dot(tensor, factors, transpose=True)
        advance(1 / steps)
        error = math.inf
        for iteration in range(max_iterations):
            (core, factors), errors = tensorly_tucker(
                tensor, list(ranks), n_iter_max=1, init=(core, list(factors)), tol=0, return_errors=True
            )
            previous, error = error, float(errors[-1])
            # Not a number for a table of zeros.
            if not previous - error >= _TOLERANCE:
                advance((max_iterations - iteration) / steps)
                break
            advance(1 / steps)
    return core, list(factors)


def _leading_vectors(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """Leading left singular vectors of an unfolding, through its Gram matrix: an SVD would take minutes."""
    unfolded = tensor.movedim(mode, 0).flatten(1)
    weights = torch.ones(unfolded.shape[1], dtype=torch.float64, device=tensor.device)
    return top_eigenvectors(gram_matrix(unfolded.T, weights), rank).T.to(tensor)


def expanded(tensor: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Multiply all modes of a tensor but the first with factors, `X ×_2 A_1 ×_3 A_2 …`.

    Args:
        tensor: `[count, R_1, …, R_N]`.
        factors: `[I_n, R_n]`.

    Returns:
        `[count, I_1, …, I_N]`.
    """
    for factor in factors:
        # The first mode that is left goes to the end, so that they end up in their order.
        tensor = tensor.movedim(1, -1) @ factor.T
    return tensor


def tucker_rows_of_ids(core: Tensor, factors: Sequence[Tensor], digits: Sequence[Tensor]) -> Tensor:
    """Rows by batched products: for graphs, whose shapes must not depend on the ids.

    Args:
        core: `[R_1, …, R_m, Q_1, …]`.
        factors: Those of the `m` modes of the vocabulary, then those of the modes of the columns.
        digits: `m` times `[count]`, the digits of the ids.

    Returns:
        `[count, ∏ J_k]`.
    """
    ranks, columns = core.shape[: len(digits)], core.shape[len(digits) :]
    rows = factors[0].index_select(0, digits[0]) @ core.flatten(1)
    for rank, factor, digit in zip(ranks[1:], factors[1:], digits[1:], strict=False):
        chosen = factor.index_select(0, digit).unsqueeze(1)
        rows = torch.bmm(chosen, rows.reshape(rows.shape[0], rank, rows.shape[1] // rank)).squeeze(1)
    return expanded(rows.reshape(-1, *columns), factors[len(digits) :]).flatten(1)


def tucker_rows_of_distinct_ids(
    core: Tensor, factors: Sequence[Tensor], digits: Sequence[Tensor], heads: Tensor
) -> Tensor:
    """Rows of distinct ids, where ids that share all digits but the last share the contraction of the core.

    Args:
        core: `[R_1, …, R_m, Q_1, …]`.
        factors: Those of the `m` modes of the vocabulary, then those of the modes of the columns.
        digits: `m` times `[count]`, the digits of the ids.
        heads: `[count]` ids without their last digit, ascending.

    Returns:
        `[count, ∏ J_k]`.
    """
    if len(digits) == 1 or not heads.numel():
        return tucker_rows_of_ids(core, factors, digits)
    _, counts = torch.unique_consecutive(heads, return_counts=True)
    first = counts.cumsum(0) - counts
    rank, columns = core.shape[len(digits) - 1], core.shape[len(digits) :]
    shared = tucker_rows_of_ids(
        core.flatten(len(digits) - 1), factors[: len(digits) - 1], [digit[first] for digit in digits[:-1]]
    )
    last = torch.split(factors[len(digits) - 1].index_select(0, digits[-1]), counts.tolist())
    parts = [part @ product for part, product in zip(last, shared.reshape(len(first), rank, -1).unbind(), strict=True)]
    return expanded(torch.cat(parts).reshape(-1, *columns), factors[len(digits) :]).flatten(1)


def tucker_logits(core: Tensor, factors: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """Products of hidden states with all rows: states are contracted with columns, core and vocabulary in turn.

    Args:
        core: `[R_1, …, R_m, Q_1, …]`.
        factors: Those of the `m` modes of the vocabulary, then those of the modes of the columns.
        hidden: `[states, J_1, …]`.

    Returns:
        `[states, ∏ I_k]`.
    """
    count = hidden.dim() - 1
    vocab, columns = factors[: len(factors) - count], factors[len(factors) - count :]
    reduced = expanded(hidden, [factor.T for factor in columns]).flatten(1)
    products = reduced @ core.reshape(-1, reduced.shape[1]).T
    return expanded(products.reshape(-1, *core.shape[: len(vocab)]), vocab).flatten(1)
