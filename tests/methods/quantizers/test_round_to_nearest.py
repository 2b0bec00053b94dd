"""Plain quantization against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.methods.quantizers.round_to_nearest import round_to_nearest, rounded_bytes


@given(
    rows=st.integers(1, 6),
    dim=st.integers(1, 70),
    bits=st.integers(2, 8),
    group=st.integers(1, 40),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_nearest_multiple_of_a_16_bit_scale(
    rows: int, dim: int, bits: int, group: int, scale: float, seed: int
) -> None:
    weight = scale * torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    found = round_to_nearest(weight, bits, group).numpy()
    largest = 2 ** (bits - 1) - 1
    for row, values in enumerate(weight.double().numpy()):
        for start in range(0, dim, group):
            part = values[start : start + group]
            step = float(np.float16(np.abs(part).max() / largest))
            if step == 0:
                assert np.abs(found[row, start : start + group]).max() == 0
                continue
            levels = np.clip(np.round(part / step), -largest, largest)
            # A value half-way between two levels may go to either, for what float32 makes of it.
            assert np.abs(found[row, start : start + group] - levels * step).max() <= step * 1.0001
            # The scale is rounded to 11 bits, or, below 6e-5, to multiples of 2^-24; the largest value shows it most.
            rounded = largest * max(step / 2000, 2**-25)
            assert np.abs(found[row, start : start + group] - part).max() <= 0.51 * step + 1.01 * rounded
            assert np.abs(found[row, start : start + group] / step).max() <= largest + 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keeps_dtype_and_zero_rows(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 33).to(dtype)
    weight[2] = 0
    before = weight.clone()
    found = round_to_nearest(weight, 4)
    assert found.dtype == dtype
    assert found.shape == weight.shape
    assert found[2].abs().max() == 0
    assert torch.equal(weight, before)
    assert (found - weight).abs().max() < 0.5


def test_groups_that_vanish_in_16_bits_are_zero() -> None:
    assert round_to_nearest(torch.full((2, 8), 1e-9), 8).abs().max() == 0


def test_more_bits_are_closer_and_larger() -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    errors = [float((round_to_nearest(weight, bits) - weight).norm()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    # 4 bits and half a bit of scale: 7.11x less than 32.
    assert 4 * weight.numel() / rounded_bytes(50, 64, 4) == pytest.approx(32 / 4.5)
    assert 4 * weight.numel() / rounded_bytes(50, 64, 8) == pytest.approx(32 / 8.5)
    # The last byte and the last group of a row are its own.
    assert rounded_bytes(3, 33, 4) == 3 * (17 + 4)


@pytest.mark.parametrize(("bits", "group"), [(1, 32), (9, 32), (4, 0)])
def test_out_of_range(bits: int, group: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        round_to_nearest(torch.ones(2, 2), bits, group)
    with pytest.raises(ValueError, match="must be"):
        rounded_bytes(2, 2, bits, group)
