"""Trellis codes against exhaustive search, windows against strings of bits, and what is lost against the bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.methods.quantizers.trellis import (
    LARGEST,
    WINDOWS,
    decode,
    encode,
    fits,
    spread,
    window_numbers,
    windows,
)
from lightning_embcompress.methods.quantizers.trellis_levels import fit_unit
from toys import normal


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(4, 16), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_windows_are_the_last_bits_of_a_circle(bits: list[int], window: int, seed: int) -> None:
    bits = [min(one, window // 2) for one in bits]
    if not fits(bits, window):
        bits = bits * window
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(2**one, (3,), generator=generator) for one in bits], dim=1)
    found = windows(codes, bits, window)
    for row, seen in zip(codes.tolist(), found.tolist(), strict=True):
        circle = "".join(f"{code:0{width}b}" for code, width in zip(row, bits, strict=True))
        for end, own in zip(itertools.accumulate(bits), seen, strict=True):
            assert f"{own:0{window}b}" == (circle + circle)[len(circle) + end - window : len(circle) + end]
    assert torch.equal(decode(codes, bits, window), window_numbers(window)[found])


@pytest.mark.parametrize("window", WINDOWS)
def test_numbers_of_windows(window: int) -> None:
    numbers = window_numbers(window)
    assert numbers.abs().max() <= LARGEST
    assert numbers.sum() == 0


def test_which_window_has_which_number_stays_what_it_is() -> None:
    """Or files could not be read."""
    assert window_numbers(8)[:8].tolist() == [-6, 28, -11, 32, -9, 14, 8, 42]
    numbers = window_numbers(12).long()
    assert (int((numbers * torch.arange(4096)).sum()), int(numbers.square().sum())) == (3_990_621, 3_411_080)


@given(st.lists(st.integers(1, 2), min_size=4, max_size=6), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_no_other_codes_with_the_same_joint_are_nearer(bits: list[int], seed: int) -> None:
    window = 4
    # Whole numbers in the units of the search: nothing is rounded.
    targets = (4 * normal(1, len(bits), seed=seed) * spread()).round() / 4
    costs = 0.5 ** torch.arange(len(bits)).remainder(3)

    def cost(codes: torch.Tensor) -> torch.Tensor:
        return (costs * (decode(codes, bits, window) - targets).square()).sum(dim=1)

    every = torch.tensor(list(itertools.product(*(range(2**one) for one in bits))))
    found = encode(targets, bits, costs, window)
    low = window - bits[0]
    joint = windows(every, bits, window)[:, -1] & (2**low - 1)
    same = every[joint == (windows(found.long(), bits, window)[:, -1] & (2**low - 1))]
    assert float(cost(found.long())) == float(cost(same).min())


@pytest.mark.parametrize(("bits", "most"), [(1, 1.05), (2, 1.75), (3, 2.7)])
def test_less_is_lost_than_by_levels(bits: int, most: float) -> None:
    """In dB above the bound `4^-bits`; the best levels lose 1.62, 2.74 and 3.45 (Max 1960)."""
    values = normal(96, 128, seed=bits) * spread()
    scale = (1 - 4.0**-bits) ** 0.5
    codes = encode(values / scale, [bits] * 128, torch.ones(128), window=8)
    assert int(codes.max()) < 2**bits
    lost = (decode(codes, [bits] * 128, 8) * scale - values).square().mean() / values.square().mean()
    assert 0 < 10 * math.log10(float(lost)) + 20 * bits * math.log10(2) < most


def test_longer_windows_lose_less() -> None:
    values = normal(2**14, seed=3)
    lost = [fit_unit(values, torch.ones(2**14), 2, window)[1] for window in (6, 8, 10)]
    assert lost[0] > 1.05 * lost[1] > 1.05**2 * lost[2]


def test_rows_do_not_depend_on_each_other_and_numbers_are_found_again() -> None:
    bits = [4] * 5 + [3] * 6 + [2] * 20 + [1] * 9
    values, costs = normal(700, 40, seed=4) * spread(), torch.linspace(1, 0.01, 40)
    codes = encode(values, bits, costs, window=8)
    assert torch.equal(encode(values[137:140], bits, costs, window=8), codes[137:140])
    assert torch.equal(encode(values.bfloat16().float(), bits, costs, 8), encode(values.bfloat16(), bits, costs, 8))
    numbers = decode(codes, bits, 8)
    assert torch.equal(decode(encode(numbers, bits, costs, 8), bits, 8), numbers)


def test_rows_of_zeros_and_values_that_are_far_off() -> None:
    bits = [2] * 40
    far = torch.full((3, 40), 1e30)
    low, zero, high = (
        decode(encode(values, bits, torch.ones(40), 8), bits, 8).float() for values in (-far, 0 * far, far)
    )
    assert zero.abs().mean() < 0.3 * spread()
    assert low.max() < 0 < high.min()
    assert encode(torch.zeros(0, 40), bits, torch.zeros(40), 8).shape == (0, 40)


@pytest.mark.parametrize(
    ("bits", "window"), [([2, 2], 8), ([6] * 9, 12), ([4] * 9, 6), ([0] * 99, 8), ([2] * 99, 3), ([2] * 99, 17)]
)
def test_bits_that_fill_no_window_are_refused(bits: list[int], window: int) -> None:
    with pytest.raises(ValueError, match=f"window of {window}"):
        encode(torch.zeros(1, len(bits)), bits, torch.ones(len(bits)), window)


def test_a_million_rows() -> None:
    targets = torch.randn(1_000_000, 8, generator=torch.Generator().manual_seed(0)) * spread()
    codes = encode(targets, [2] * 8, torch.ones(8), window=4)
    numbers = decode(codes, [2] * 8, window=4)
    assert float((numbers - targets).square().mean()) < 0.15 * float(targets.square().mean())
    some = torch.tensor([0, 499_999, 999_999])
    assert torch.equal(encode(targets[some], [2] * 8, torch.ones(8), window=4), codes[some])
