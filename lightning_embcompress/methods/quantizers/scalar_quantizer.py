"""Quantizers of single numbers: levels by Lloyd's iteration, and what they lose."""

from __future__ import annotations

import torch
from torch import Tensor

_ITERATIONS = 30


def fit_levels(values: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Levels of least weighted squared error (Lloyd 1957, published 1982; Max 1960).

    Args:
        values: `[count]` numbers, at least one.
        weights: `[count]` positive weights.
        bits: Bits of a code: there are `2^bits` levels.

    Returns:
        `[2^bits]` float64, ascending.

    Example:
        >>> fit_levels(torch.tensor([0.0, 0.2, 1.0, 1.2]), torch.ones(4), bits=1)
        tensor([0.1000, 1.1000], dtype=torch.float64)
    """
    values, order = values.double().sort(stable=True)
    weights = weights.double()[order]
    mass = torch.nn.functional.pad(weights.cumsum(0), (1, 0))
    sums = torch.nn.functional.pad((weights * values).cumsum(0), (1, 0))
    # Quantiles of the cube root of the density, which is best for many levels (Panter and Dite 1951): here by
    # weighing a value by the width of its neighbourhood to the power of 2/3.
    count = values.numel()
    reach = max(1, count >> (bits + 2))
    ids = torch.arange(count)
    width = values[(ids + reach).clamp(max=count - 1)] - values[(ids - reach).clamp(min=0)]
    shares = (width.clamp(min=1e-12).pow(2 / 3) * weights.pow(1 / 3)).cumsum(0)
    steps = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = values[torch.searchsorted(shares, steps * shares[-1]).clamp(max=count - 1)]
    for _ in range(_ITERATIONS):
        ends = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), count)])
        cell = mass[ends].diff()
        moved = torch.where(cell > 0, sums[ends].diff() / cell.clamp(min=1e-300), levels).sort().values
        change = float((moved - levels).abs().max())
        levels = moved
        if change <= 1e-4 * float(levels.abs().max()):
            break
    return levels


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    """Code of the nearest level, `[*]` int64.

    Args:
        values: `[*]` numbers.
        levels: `[count]` in any order: training may move one past another.
    """
    ascending, order = levels.sort(stable=True)
    return order[torch.bucketize(values, (ascending[1:] + ascending[:-1]) / 2)]


def distortion(values: Tensor, weights: Tensor, levels: Tensor) -> float:
    """Part of the weighted energy of numbers that is lost at their nearest levels."""
    error = values - levels.to(values)[nearest_level(values, levels.to(values))]
    total = float((weights * values.square()).sum())
    return float((weights * error.square()).sum()) / total if total > 0 else 0.0
