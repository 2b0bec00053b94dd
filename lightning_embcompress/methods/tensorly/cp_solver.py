"""CP decomposition of a folded table, and products with it that never build the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor

# Relative error below whose decrease the iteration stops.
_TOLERANCE = 1e-4
# Added to the diagonal of the normal equations, for a tensor of norm 1: beyond the sizes of the modes components are
# close to dependent, and without it they grow without bound against each other.
_REGULARIZATION = 1e-6


def largest_cp_rank(shape: Sequence[int]) -> int:
    """Rank at which any tensor of a shape is exact: the product of all modes but the largest.

    Example:
        >>> largest_cp_rank([4, 5, 6])
        20
    """
    return math.prod(shape) // max(shape)


def cp(
    tensor: Tensor,
    rank: int,
    start: Sequence[Tensor] | None = None,
    max_iterations: int = 15,
    advance: Callable[[float], None] = lambda _: None,
) -> list[Tensor]:
    """CP decomposition by alternating least squares, through TensorLy.

    It minimises `‖X − Σ_r a_r ∘ b_r ∘ c_r‖` by solving for one factor at a time (Carroll and Chang 1970; Kolda and
    Bader 2009, figure 3.3), from random factors, drawn from a generator of its own, or from factors there are.

    A round costs about `2 N ∏ I_n · rank` operations, and the Khatri-Rao products that TensorLy forms take
    `∏ I_n / min I_n · rank` entries.

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
    # From a factor of zeros nothing leads away.
    if start is None or norm == 0 or not all(bool(factor.any()) for factor in start):
        factors = _random_factors(tensor, rank)
    else:
        scale = norm ** (1 / tensor.dim())
        factors = [factor.to(tensor) / scale for factor in start]
    if norm == 0:
        advance(1.0)
        # One factor of zeros is enough, and with all of them no gradient would ever lead away.
        return [*factors[:-1], torch.zeros_like(factors[-1])]
    done = -1

    def report(*_: object) -> None:
        # Called once before the first round, too.
        nonlocal done
        done += 1
        if done:
            advance(1 / max_iterations)

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
        ).factors
    if done < max_iterations:
        advance(1 - done / max_iterations)
    return _balanced(list(solved), norm)


def _random_factors(tensor: Tensor, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, rank, generator=generator) / math.sqrt(size) for size in tensor.shape]
    return [factor.to(tensor) for factor in drawn]


def _balanced(factors: Sequence[Tensor], norm: Tensor) -> list[Tensor]:
    """Give the columns of every component the same norm in all factors, and the components a common scale.

    The scale of a component can be moved between its factors at will; equal shares train and round best.
    """
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    share = (norms.double().log().mean(dim=0).exp() * norm.double() ** (1 / len(factors))).to(norms)
    # A component of zeros stays one.
    return [factor * torch.where(own > 0, share / own, 0) for factor, own in zip(factors, norms, strict=True)]


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product.

    Args:
        factors: `[I_n, rank]`.

    Returns:
        `[∏ I_n, rank]`, the last factor's rows the fastest.
    """
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(1) * factor).flatten(0, 1)
    return product


def cp_coefficients(factors: Sequence[Tensor], digits: Sequence[Tensor]) -> Tensor:
    """Products of the rows of the vocabulary's factors that the digits of ids name.

    Args:
        factors: `[I_n, rank]`.
        digits: As many times `[count]`.

    Returns:
        `[count, rank]`.
    """
    product = factors[0].index_select(0, digits[0])
    for factor, digit in zip(factors[1:], digits[1:], strict=True):
        product = product * factor.index_select(0, digit)
    return product


def cp_logits(factors: Sequence[Tensor], reduced: Tensor) -> Tensor:
    """Products of states with all rows of the vocabulary's factors.

    Args:
        factors: `[I_n, rank]`.
        reduced: `[states, rank]`, hidden states times the columns of the components.

    Returns:
        `[states, ∏ I_n]`.
    """
    *heads, last = factors
    if not heads:
        return reduced @ last.T
    heads_of_states = (reduced.unsqueeze(1) * khatri_rao(heads)).flatten(0, 1)
    return (heads_of_states @ last.T).reshape(reduced.shape[0], math.prod(factor.shape[0] for factor in factors))
