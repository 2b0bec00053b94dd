"""CP and Tucker decompositions of a folded table, by TensorLy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tensorly
import torch
from tensorly.cp_tensor import CPTensor, cp_normalize
from tensorly.decomposition import parafac
from tensorly.decomposition import tucker as tensorly_tucker
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import thin_svd

# Change of the relative error below which iterations stop.
_TOLERANCE = 1e-4
# Added to the diagonal of the normal equations of CP, for a tensor of norm 1: beyond the sizes of the modes components
# are close to dependent, and without it they grow without bound against each other.
_REGULARIZATION = 1e-6


def largest_cp_rank(shape: Sequence[int]) -> int:
    """Rank at which any tensor of a shape is exact: the product of all modes but the largest.

    Example:
        >>> largest_cp_rank([4, 5, 6])
        20
    """
    return math.prod(shape) // max(shape)


def possible_tucker_ranks(shape: Sequence[int], ranks: Sequence[float]) -> list[int]:
    """Ranks that have a meaning: from 1 to the size of a mode, and none above the product of the others.

    Args:
        shape: Sizes of the modes.
        ranks: Wanted ranks, rounded to the nearest.

    Returns:
        One rank a mode, at most what was wanted.

    Example:
        >>> possible_tucker_ranks([4, 5, 6], [2, 9, 0.3]), possible_tucker_ranks([4, 5, 6], [2, 1, 6])
        ([2, 2, 1], [2, 1, 2])
    """
    possible = [max(1, min(size, round(rank))) for size, rank in zip(shape, ranks, strict=True)]
    # Only the largest can be above the product of the others.
    largest = max(range(len(possible)), key=possible.__getitem__)
    possible[largest] = min(possible[largest], math.prod(possible) // possible[largest])
    return possible


def cp(
    tensor: Tensor,
    rank: int,
    start: Sequence[Tensor] | None = None,
    max_iterations: int = 15,
    advance: Callable[[float], None] = lambda _: None,
) -> list[Tensor]:
    """CP decomposition by alternating least squares.

    It minimises `‖X − Σ_r a_r ∘ b_r ∘ c_r‖` by solving for one factor at a time (Carroll and Chang 1970; Kolda and
    Bader 2009, figure 3.3), from random factors, drawn from a generator of its own, or from factors there are. A round
    costs about `2 N ∏ I_n · rank` operations, and the memory of `∏ I_n / min I_n · rank` numbers.

    Args:
        tensor: `[I_1, …, I_N]`, float32 or float64.
        rank: Number of components.
        start: Factors `[I_n, rank]` to start from; None for random ones.
        max_iterations: Most rounds over all factors.
        advance: Called with shares of the work that add up to 1.

    Returns:
        Factors `[I_n, rank]`; the columns of a component have the same norm in all of them.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> a, b, c = (torch.rand(size, 2, generator=generator) for size in (5, 6, 7))
        >>> tensor = torch.einsum("ir,jr,kr->ijk", a, b, c)
        >>> factors = cp(tensor, 2, max_iterations=200)
        >>> float((torch.einsum("ir,jr,kr->ijk", *factors) - tensor).norm() / tensor.norm()) < 0.01
        True
    """
    norm = tensor.norm()
    if start is not None and norm > 0 and all(bool(factor.any()) for factor in start):
        factors = [factor.to(tensor) / norm ** (1 / tensor.dim()) for factor in start]
    else:
        # From a factor of zeros nothing leads away.
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(size, rank, generator=generator) / math.sqrt(size) for size in tensor.shape]
        factors = [factor.to(tensor) for factor in drawn]
    if norm == 0:
        advance(1.0)
        # One factor of zeros is enough, and with all of them no gradient would ever lead away.
        return [*factors[:-1], torch.zeros_like(factors[-1])]
    done = 0

    def report(*_: object) -> None:
        nonlocal done
        # Called once before the first round, too.
        if done:
            advance(1 / max_iterations)
        done += 1

    # TensorLy's backend is global; this sets it for the thread and the time of the call.
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        solved = parafac(
            tensor / norm,
            rank,
            n_iter_max=max_iterations,
            init=CPTensor((None, factors)),
            tol=_TOLERANCE,
            l2_reg=_REGULARIZATION,
            callback=report,
        )
        weights, factors = cp_normalize(solved)
    advance(1 - max(done - 1, 0) / max_iterations)
    # Equal shares of a component's scale train and round best.
    return [factor * (weights * norm) ** (1 / len(factors)) for factor in factors]


def tucker(
    tensor: Tensor, ranks: Sequence[int], start: Sequence[Tensor] | None = None, max_iterations: int = 5
) -> tuple[Tensor, list[Tensor]]:
    """Tucker decomposition by higher-order orthogonal iteration.

    It minimises `‖X − G ×_1 A_1 … ×_N A_N‖` over orthonormal factors by improving one of them at a time (De Lathauwer,
    De Moor and Vandewalle 2000b, algorithm 4.2), from the truncated higher-order SVD (2000a) or from factors there are.

    Args:
        tensor: `[I_1, …, I_N]`, float32 or float64.
        ranks: `R_n`, see `possible_tucker_ranks`.
        start: Factors `[I_n, R_n]` to start from; None for the higher-order SVD.
        max_iterations: Most rounds over all factors.

    Returns:
        The core `[R_1, …, R_N]`, and the factors `[I_n, R_n]` with orthonormal columns.

    Example:
        >>> tensor = torch.einsum("abc,ia,jb,kc->ijk", *map(torch.randn, [(2, 2, 2), (5, 2), (6, 2), (7, 2)]))
        >>> core, factors = tucker(tensor, [2, 2, 2])
        >>> torch.allclose(torch.einsum("abc,ia,jb,kc->ijk", core, *factors), tensor, atol=1e-4)
        True
    """
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        init: str | tuple[Tensor, list[Tensor]] = "svd"
        if start is not None:
            factors = [torch.linalg.qr(factor.to(tensor)).Q for factor in start]
            init = tensorly.tenalg.multi_mode_dot(tensor, factors, transpose=True), factors
        core, factors = tensorly_tucker(
            tensor, list(ranks), n_iter_max=max_iterations, init=init, svd=thin_svd, tol=_TOLERANCE
        )
    return core, list(factors)
