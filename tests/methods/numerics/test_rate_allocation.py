"""Allocations of bits against all there are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.methods.numerics.rate_allocation import (
    Overheads,
    RateCurve,
    Rates,
    Widths,
    allocate,
    falling,
)

_FLOATS = Widths((0, 32), (1.0, 0.0))
_CODES = Widths((0, 1, 2), (1.0, 0.36, 0.12))


def _energies(blocks: int, dim: int, seed: int, falls: bool = False) -> Tensor:
    found = torch.rand(blocks, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return found.sort(dim=1, descending=True).values if falls else found


def _all(energies: Tensor, sizes: list[int], widths: Widths, overheads: Overheads) -> list[tuple[float, float]]:
    """Bits and loss of every allocation whose widths do not rise within a block."""
    blocks, dim = energies.shape
    rows = [
        row
        for row in itertools.product(range(len(widths.bits)), repeat=dim)
        if all(one >= other for one, other in itertools.pairwise(row))
    ]
    found = []
    for chosen in itertools.product(rows, repeat=blocks):
        index = torch.tensor(chosen)
        rank = int((index > 0).any(dim=0).sum())
        bits = float(rank * overheads.basis)
        for size, row in zip(sizes, chosen, strict=True):
            bits += sum(size * widths.bits[w] + overheads.column * (w > 0) for w in row)
        lost = float((energies * torch.tensor(widths.distortions, dtype=torch.float64)[index]).sum())
        found.append((bits, lost))
    return found


@pytest.mark.parametrize("widths", [_FLOATS, _CODES])
@pytest.mark.parametrize("seed", range(4))
def test_no_allocation_is_better_within_its_bits(widths: Widths, seed: int) -> None:
    energies, sizes, overheads = _energies(2, 4, seed, falls=True), [7, 20], Overheads(3, 40)
    curve, every = RateCurve(energies, sizes, widths, overheads), _all(energies, sizes, widths, overheads)
    for price in (1e-6, 1e-4, 1e-3, 1e-2):
        found = curve.at(price)
        assert found.loss + price * found.bits == pytest.approx(min(lost + price * bits for bits, lost in every))
        # Within the bits that it takes, there is no better one at all.
        assert found.loss <= min(lost for bits, lost in every if bits <= found.bits) + 1e-12
    largest = max(bits for bits, _ in every)
    for part in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0):
        [found] = allocate([curve], part * largest)
        assert found.bits <= part * largest
        best = min(lost for bits, lost in every if bits <= part * largest)
        # What one more step would spare is all that can be missing.
        assert best - 1e-12 <= found.loss <= best + found.price * (20 * max(widths.bits) + 50) + 1e-12


@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 10**6), st.floats(0, 1.2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_holds_of_every_allocation(blocks: int, dim: int, seed: int, part: float, coded: bool) -> None:
    widths = _CODES if coded else _FLOATS
    sizes = torch.randint(1, 50, (blocks,), generator=torch.Generator().manual_seed(seed)).tolist()
    energies = _energies(blocks, dim, seed)
    overheads = Overheads(8, 16 * dim)
    curve = RateCurve(energies, sizes, widths, overheads, rest=0.25)
    most = (sum(sizes) * max(widths.bits) + 8 * blocks + 16 * dim) * dim
    [found] = allocate([curve], part * most)
    assert found.bits <= part * most
    # Widths do not rise, every component of the basis is used, and loss and bits are what they say.
    assert (found.widths.diff(dim=1) <= 0).all()
    assert (found.widths > 0).any(dim=0).all()
    rank = found.widths.shape[1]
    lost = torch.ones(blocks, dim, dtype=torch.float64)
    lost[:, :rank] = torch.tensor(widths.distortions, dtype=torch.float64)[found.widths]
    assert found.loss == pytest.approx(float((energies * lost).sum()) + 0.25, abs=1e-12)
    bits = sum(
        size * widths.bits[w] + 8 * (w > 0) for size, row in zip(sizes, found.widths.tolist(), strict=True) for w in row
    )
    assert found.bits == bits + 16 * dim * rank
    [more] = allocate([curve], (part + 0.1) * most)
    assert more.loss <= found.loss + 1e-9
    if part >= 1:
        assert found.loss == pytest.approx(0.25 + min(widths.distortions) * float(energies.sum()))


def test_nothing_fits() -> None:
    curve = RateCurve(_energies(2, 3, 0), [5, 5], _FLOATS, Overheads(0, 96))
    for bits in (-10, 0, 200):
        [found] = allocate([curve], bits)
        assert found.widths.shape == (2, 0)
        assert found.bits == 0


def test_components_of_equal_worth_are_kept_in_part() -> None:
    curve = RateCurve(torch.ones(2, 10, dtype=torch.float64), [10, 10], _FLOATS, Overheads(0, 0))
    [found] = allocate([curve], 13 * 320)
    assert found.bits == 13 * 320
    assert found.loss == pytest.approx(7)
    # As are those that are pooled because they rise.
    rising = RateCurve(torch.arange(1.0, 11.0).unsqueeze(0), [10], _FLOATS, Overheads(0, 0))
    assert allocate([rising], 4 * 320)[0].widths.shape == (1, 4)


def test_tables_share_a_budget_at_one_price() -> None:
    first, second = _energies(2, 6, 0, falls=True), 0.01 * _energies(3, 5, 1, falls=True)
    curves = [
        RateCurve(first, [10, 20], _CODES, Overheads(8, 60)),
        RateCurve(second, [9, 9, 9], _CODES, Overheads(8, 50)),
    ]
    most = sum(curve.at(1e-12).bits for curve in curves)

    def both(found: list[Rates]) -> tuple[int, float]:
        return sum(rates.bits for rates in found), sum(rates.loss for rates in found)

    for part in (0.3, 0.6, 0.9):
        bits, lost = both(allocate(curves, part * most))
        assert bits <= part * most
        for share in torch.linspace(0, 1, 21).tolist():
            split = [*allocate(curves[:1], share * bits), *allocate(curves[1:], (1 - share) * bits)]
            assert both(split)[1] >= lost * (1 - 2e-2)
    # The table that hardly matters gets less.
    large, small = allocate(curves, 0.4 * most)
    assert large.bits / curves[0].at(1e-12).bits > small.bits / curves[1].at(1e-12).bits


def test_nearest_falling_sequence() -> None:
    values = [5.0, 1.0, 3.0, 0.0, 2.0, 4.0]
    found = falling(values)
    assert found == [5.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert math.isclose(sum(found), sum(values))
    assert falling([]) == []
