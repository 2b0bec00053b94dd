"""A part that stands for the whole: systematic sampling in proportion to weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw items with a chance in proportion to their weight (Madow 1949), the heaviest for certain.

    Nothing is left to chance: items are taken at equal steps of the sum of their chances, in the order of weights.

    Args:
        weights: `[items]` positive weights.
        count: How many to draw.

    Returns:
        `[count]` ids, all items if there are no more, and the weights with which they stand for all: weight over
        chance.

    Example:
        >>> draw(torch.tensor([1.0, 8.0, 1.0, 1.0, 1.0]), 3)
        (tensor([1, 0, 3]), tensor([8., 2., 2.]))
    """
    if count >= len(weights):
        return weights.argsort(descending=True, stable=True), weights.sort(descending=True).values
    ordered, order = weights.sort(descending=True, stable=True)
    del weights
    certain, behind = _certain(ordered, None, count)
    # In place: of very many items every number takes much memory.
    heaviest = ordered[:certain].clone()
    sums = ordered.mul_(behind)
    sums[:certain] = 1
    drawn, _ = _at_equal_steps(sums.cumsum_(0))
    stands_for = torch.full((len(drawn),), 1 / behind if behind else 1.0, dtype=sums.dtype, device=sums.device)
    is_certain = drawn < certain
    stands_for[is_certain] = heaviest[drawn[is_certain]]
    return order[drawn], stands_for


def chances(weights: Tensor, copies: Tensor, count: int) -> Tensor:
    """Chance of every item to be drawn, in proportion to its weight and at most 1.

    Args:
        weights: `[items]` positive weights.
        copies: `[items]` how many times each is there.
        count: How many are to be drawn.

    Returns:
        `[items]`; times `copies` they add up to `count`, or are all 1.

    Example:
        >>> chances(torch.tensor([1.0, 8.0]), torch.tensor([4.0, 1.0]), 3)
        tensor([0.5000, 1.0000])
    """
    if count >= float(copies.sum()):
        return torch.ones_like(weights)
    weights, order = weights.sort(descending=True, stable=True)
    certain, behind = _certain(weights, copies[order].to(weights), count)
    found = weights * behind
    found[:certain] = 1
    return torch.empty_like(found).scatter_(0, order, found)


def _certain(weights: Tensor, copies: Tensor | None, count: int) -> tuple[int, float]:
    """How many of the heaviest items are drawn for certain, and the chance of the others over their weight.

    Args:
        weights: `[items]`, the heaviest first.
        copies: `[items]` how many times each is there; None for once.
        count: How many are to be drawn.
    """
    mass = weights if copies is None else weights * copies
    # Items that are certain are drawn, so that they are among the first.
    first = weights[:count]
    own = torch.ones_like(first) if copies is None else copies[:count]
    rest = mass[count:].sum() + mass[:count].flip(0).cumsum(0).flip(0)
    left = count - (own.cumsum(0) - own)
    # They are certain while they weigh at least what one of those that are left to draw stands for.
    certain = int((first * left >= rest).int().cumprod(0).sum())
    return certain, float(left[certain] / rest[certain]) if certain < len(left) else 0.0


def at_equal_steps(chance: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """The items, and which of their copies, at which the sum of the chances so far passes a whole number.

    Args:
        chance: `[items]` from 0 to 1.
        copies: `[items]` how many times each is there, one after the other.

    Returns:
        `[drawn]` ids of items and `[drawn]` which copy of each, from 0.

    Example:
        >>> at_equal_steps(torch.tensor([1.0, 0.5]), torch.tensor([1, 4]))
        (tensor([0, 1, 1]), tensor([0, 0, 2]))
    """
    chance = chance.double()
    mass = chance * copies
    sums = mass.cumsum(0)
    item, steps = _at_equal_steps(sums)
    copy = ((steps - (sums - mass)[item]) / chance[item]).ceil().long() - 1
    return item, torch.minimum(copy.clamp(min=0), copies[item].long() - 1)


def _at_equal_steps(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Items at which sums pass a whole number, and the numbers."""
    # Half a step off, so that rounding of the sums decides nothing.
    steps = torch.arange(math.floor(float(sums[-1]) + 0.5), dtype=torch.float64, device=sums.device) + 0.5
    return torch.searchsorted(sums.double(), steps), steps
