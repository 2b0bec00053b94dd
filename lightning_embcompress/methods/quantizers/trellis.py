"""Trellis codes: every value is read from a window of bits that slides along a row (Marcellin and Fischer 1990).

A bitshift trellis (Mao and Gray 2010; Tseng et al. 2024, arXiv 2406.11235): component `t` of a row shifts its `K_t`
bits into a window of the last `L`, and its value is what one table has for that window. Neighbours share bits, so that
values are not chosen each by itself, but whole rows of them, by dynamic programming over `2^L` windows (Viterbi 1967):
at equal bits the error is nearer to the bound of rate-distortion theory than that of any quantizer of single values.
The window of the first component begins with the last bits of the row (tail-biting): no bits are spent on a start, and
every component of every row is decoded by itself.

Values are whole numbers, so that one byte holds one, and the search is done in whole numbers: its result is the same on
every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

# Bits of a window, and of a component: what costs in whole numbers have a place for.
WINDOWS = range(4, 17)
WIDEST = 5
# The largest number of the table, and how finely targets are rounded: steps between two numbers.
LARGEST, _STEPS = 127, 16
# The lowest bits of costs say which predecessor they are of.
_PICKS = 2**WIDEST
# More than any difference of costs between windows.
_FAR = 2**29
# Steps between two times that the least cost is taken off all.
_SETTLE = 8
# Costs of all windows of the rows that are searched at a time, which stay in the cache of a core; and of how many rows.
_COSTS, _FEWEST = 2**17, 16
# Components on both sides of the end of a row from which the bits that it shares with the start are guessed.
_SEAM = 24


@cache
def spread() -> float:
    """Standard deviation of the numbers of the tables."""
    numbers = window_numbers(WINDOWS[-1]).double()
    return float(numbers.square().mean().sqrt())


@cache
def window_numbers(window: int) -> Tensor:
    """What every window stands for, `[2^window]` int32 from -127 to 127: quantiles of a normal distribution, mixed.

    Args:
        window: Bits of a window.
    """
    count = 2**window
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    # That of 2^16 windows has the largest number at 4.3 standard deviations.
    numbers = (quantiles * (LARGEST / 4.4)).round().to(torch.int32)
    mixed = torch.empty_like(numbers)
    mixed[_mixed(torch.arange(count) + 1).argsort()] = numbers
    return mixed


def _mixed(values: Tensor) -> Tensor:
    """A permutation of the numbers below 2^32 in which neighbours are far apart: shifts and products by odd numbers."""
    mask = 2**32 - 1
    values = ((values ^ (values >> 16)) * 0x7FEB352D) & mask
    values = ((values ^ (values >> 15)) * 0x846CA68B) & mask
    return values ^ (values >> 16)


def windows(codes: Tensor, bits: Sequence[int], window: int) -> Tensor:
    """The window of every component, `[n, T]` int32.

    Args:
        codes: `[n, T]` integers of rows.
        bits: `[T]` bits of every component.
        window: Bits of a window.

    Example:
        >>> windows(torch.tensor([[1, 0, 1, 1]]), [1, 1, 1, 1], window=4)
        tensor([[ 7, 14, 13, 11]], dtype=torch.int32)
    """
    found: Tensor = codes.to(torch.int32)
    seen = torch.tensor(bits, dtype=torch.int32, device=codes.device)
    span, mask = 1, 2**window - 1
    # Windows of twice as many components are made of two; rows are circles.
    while int(seen.min()) < window:
        found = (found | (found.roll(span, 1) << seen.clamp(max=window))) & mask
        seen = (seen + seen.roll(span)).clamp(max=window)
        span *= 2
    return found


def decode(codes: Tensor, bits: Sequence[int], window: int) -> Tensor:
    """The numbers that codes stand for, `[n, T]` int32 from -127 to 127; arguments as of `windows`."""
    numbers: Tensor = window_numbers(window).to(codes.device)[windows(codes, bits, window)]
    return numbers


def widest(window: int) -> int:
    """The most bits of a component for which windows tell enough values apart to be worth it; 0 without windows."""
    return 0 if not window else min(WIDEST, window // 2)


def fits(bits: Sequence[int], window: int) -> bool:
    """Whether rows of these bits fill a window, and have none that are too wide."""
    return window in WINDOWS and sum(bits) >= window and all(1 <= one <= widest(window) for one in bits)


def encode(targets: Tensor, bits: Sequence[int], weights: Tensor, window: int) -> Tensor:
    """The codes of least weighted squared error, `[n, T]` uint8.

    Dynamic programming is exact up to the bits that the end of a row shares with its start: those are guessed from the
    components around it.

    Args:
        targets: `[n, T]` numbers, those above `LARGEST` cut off.
        bits: `[T]` bits of every component.
        weights: `[T]` what a squared error of a component costs, not negative.
        window: Bits of a window.

    Raises:
        ValueError: If the bits do not fill a window, or there are too many for a component.

    Example:
        >>> targets = torch.randn(100, 64) * spread()
        >>> codes = encode(targets, [2] * 64, torch.ones(64), window=8)
        >>> bool((decode(codes, [2] * 64, 8) - targets).square().mean() < 0.1 * targets.square().mean())
        True
    """
    if not fits(bits, window):
        raise ValueError(f"bits must be 1 to {widest(window)} each and fill a window of {window}, not {list(bits)}")
    device = targets.device
    share = (weights.double() / weights.double().max().clamp(min=1e-300)).to(device)
    # Costs are `n² - 2 n x`, `n` the number of a window and `x` the target: all of `(n - x)²` that depends on `n`.
    numbers = window_numbers(window).to(device)
    squares = (share[:, None] * (_STEPS * numbers.double().square())).round().to(torch.int32) * _PICKS
    steps = (targets.double().clamp(-LARGEST, LARGEST) * _STEPS).round()
    places = (steps * (2 * share)).round().to(torch.int32).T * _PICKS
    found = torch.empty(targets.shape, dtype=torch.uint8, device=device)
    masks = torch.tensor([2**one - 1 for one in bits], device=device).unsqueeze(1)
    seam, low = max(1, min(_SEAM, len(bits) // 2)), window - bits[0]
    around = [place % len(bits) for place in range(-seam, seam)]
    count = max(_FEWEST, _COSTS >> window)
    for start in range(0, len(targets), count):
        part = places[:, start : start + count].contiguous()
        joint = _search(squares, numbers, part, bits, window, around)[seam - 1] & (2**low - 1)
        states = _search(squares, numbers, part, bits, window, range(len(bits)), joint)
        found[start : start + count] = (states & masks).T.to(torch.uint8)
    return found


def _search(
    squares: Tensor,
    numbers: Tensor,
    places: Tensor,
    bits: Sequence[int],
    window: int,
    order: Sequence[int],
    joint: Tensor | None = None,
) -> Tensor:
    """The windows of least cost, `[len(order), B]` int64, of components in an order.

    Args:
        squares: `[T, 2^window]`.
        numbers: `[2^window]`.
        places: `[T, B]`.
        bits: `[T]`.
        window: Bits of a window.
        order: Components.
        joint: `[B]` last bits before the first one, which those after the last one have to be too; None if free.
    """
    count, rows = 2**window, places.shape[1]
    own = torch.arange(count, dtype=torch.int32, device=places.device)
    low = window - bits[order[0]]
    if joint is None:
        costs = places.new_zeros(count, rows)
    else:
        costs = torch.where((own & (2**low - 1))[:, None] == joint, 0, _FAR).to(torch.int32)
    costs += (own >> low)[:, None]
    new, picks = torch.empty_like(costs), []
    for step, place in enumerate(order):
        width = bits[place]
        best = costs
        for _ in range(width):
            best = torch.minimum(*best.view(2, -1, rows))
        picks.append((best & (_PICKS - 1)).to(torch.uint8))
        best &= -_PICKS
        if step % _SETTLE == 0:
            best -= best.amin(0)
        after = bits[order[step + 1]] if step + 1 < len(order) else 0
        shift = squares[place] + (own >> (window - after))
        into = new.view(-1, 2**width, rows)
        torch.addcmul(shift.view(-1, 2**width, 1), numbers.view(-1, 2**width, 1), places[place], value=-1, out=into)
        into += best[:, None]
        costs, new = new, costs
    if joint is None:
        state = costs.argmin(0)
    else:
        ends = costs.view(-1, 2**low, rows).gather(1, joint.expand(count >> low, 1, rows))[:, 0]
        state = (ends.argmin(0) << low) | joint
    states = torch.empty(len(order), rows, dtype=torch.long, device=places.device)
    for step in reversed(range(len(order))):
        states[step] = state
        width = bits[order[step]]
        before = state >> width
        state = (picks[step].gather(0, before[None])[0].long() << (window - width)) | before
    return states
