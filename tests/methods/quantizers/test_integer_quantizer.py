"""Integers in groups against their definition in float64, and against torchao where it is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.methods.quantizers.integer_quantizer import (
    expand_scales,
    fake_quantize,
    from_codes,
    group_scales,
    group_shape,
    scales_shape,
    to_codes,
)


def _matrix(n: int, columns: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, columns, generator=torch.Generator().manual_seed(seed))


def _group_of(n: int, columns: int, group_size: int) -> np.ndarray:
    """Row and column of the group of every value, counted one by one."""
    rows = 1
    while (rows + 1) * columns <= group_size:
        rows += 1
    width = min(columns, group_size)
    return np.array([[(row // rows, column // width) for column in range(columns)] for row in range(n)])


def _oracle(weight: Tensor, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and step of each, in float64 and one group after the other."""
    values = weight.double().numpy()
    places = _group_of(*values.shape, group_size)
    out, steps = np.zeros_like(values), np.zeros_like(values)
    for group in {tuple(place) for place in places.reshape(-1, 2)}:
        inside = (places == group).all(axis=2)
        step = float(np.float16(np.abs(values[inside]).max() * 2 / (2**bits - 1)))
        if step:
            codes = np.clip(np.round(values[inside] / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            out[inside], steps[inside] = codes * step, step
    return out, steps


@given(
    n=st.integers(1, 9),
    columns=st.integers(1, 70),
    bits=st.integers(2, 8),
    group_size=st.integers(16, 64),
    scale=st.sampled_from([1e-5, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_values_are_those_of_float64(n: int, columns: int, bits: int, group_size: int, scale: float, seed: int) -> None:
    weight = _matrix(n, columns, seed, scale)
    scales = group_scales(weight, bits, group_size)
    codes = to_codes(weight, scales, bits, group_size)
    found = from_codes(codes, scales, bits, group_size, torch.float64).numpy()
    wanted, steps = _oracle(weight, bits, group_size)
    # A value half-way between two integers may go to either, for what float32 makes of it.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1.0001 * steps.max())
    assert (np.abs(found - wanted) > 1e-6 * steps).mean() <= 0.05
    assert int(codes.max()) < 2**bits
    read = fake_quantize(weight, scales, bits, group_size)
    assert torch.equal(read, from_codes(codes, scales, bits, group_size, weight.dtype))


@pytest.mark.parametrize("shape", [(7, 64), (5, 200), (33, 10), (1, 3), (12, 1), (4, 63), (3, 65)])
@pytest.mark.parametrize("bits", [2, 8])
def test_rows_with_a_row_of_scales_each_read_as_the_whole(shape: tuple[int, int], bits: int) -> None:
    places = _group_of(*shape, 64)
    assert scales_shape(*shape, 64) == tuple(places.reshape(-1, 2).max(axis=0) + 1)
    weight = _matrix(*shape)
    scales = group_scales(weight, bits, 64)
    expanded = expand_scales(scales, *shape, 64).numpy()
    np.testing.assert_array_equal(expanded, scales.numpy()[places[..., 0], places[..., 1]])
    codes = to_codes(weight, scales, bits, 64)
    place = torch.arange(shape[0]).flip(0)
    of_rows = scales[place // group_shape(shape[1], 64)[0]]
    assert torch.equal(from_codes(codes[place], of_rows, bits, 64), from_codes(codes, scales, bits, 64)[place])
    assert torch.equal(fake_quantize(weight[place], of_rows, bits, 64), fake_quantize(weight, scales, bits, 64)[place])
    assert torch.equal(to_codes(weight[place], of_rows, bits, 64), codes[place])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_agrees_with_torchao(bits: int) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight, group_size = _matrix(50, 128), 64
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales, zeros = primitives.choose_qparams_affine(
        weight, primitives.MappingType.SYMMETRIC, (1, group_size), torch.int8, least, most, 1e-9, torch.float16
    )
    found = group_scales(weight, bits, group_size)
    assert torch.equal(found, scales.view_as(found))
    integers = primitives.quantize_affine(
        weight, (1, group_size), scales.float(), torch.zeros_like(zeros), torch.int8, least, most
    )
    codes = to_codes(weight, found, bits, group_size).short() - 2 ** (bits - 1)
    # It multiplies with the inverse of the scale, which moves a value half-way between two integers.
    assert (codes - integers).abs().max() <= 1
    assert (codes != integers).float().mean() < 1e-3


def test_scales_that_vanish_and_subnormal_ones() -> None:
    weight = torch.stack([torch.zeros(64), torch.full((64,), 1e-9), torch.ones(64)])
    scales = group_scales(weight, 8, 64)
    assert scales[:2].flatten().tolist() == [0, 0]
    codes = to_codes(weight, scales, 8, 64)
    assert (codes[:2] == 128).all()
    assert from_codes(codes, scales, 8, 64)[:2].abs().max() == 0
    assert fake_quantize(weight, scales, 8, 64)[:2].abs().max() == 0
    weight = _matrix(20, 64, scale=1e-6)
    scales = group_scales(weight, 4, 64)
    assert 0 < float(scales.max()) < torch.finfo(torch.float16).tiny
    found = fake_quantize(weight, scales, 4, 64)
    # Rounded to multiples of 2^-24, a step may be too small for the largest value by half of that for each integer.
    assert ((found - weight).abs() <= 0.5 * scales.float() + 9 * 2**-25).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("search", [False, True])
def test_other_dtypes_are_quantized_as_their_values(dtype: torch.dtype, search: bool) -> None:
    weight = _matrix(6, 100).to(dtype)
    exact = weight.float() if dtype != torch.float64 else weight
    scales = group_scales(weight, 4, 64, search=search)
    assert torch.equal(scales, group_scales(exact, 4, 64, search=search))
    found = fake_quantize(weight, scales, 4, 64)
    assert found.dtype == dtype
    assert torch.equal(found, fake_quantize(exact, scales, 4, 64).to(dtype))
    assert torch.equal(found, from_codes(to_codes(weight, scales, 4, 64), scales, 4, 64, dtype))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape, requires_grad=True)
    for search in (False, True):
        scales = group_scales(weight.detach(), 4, 64, search=search)
        assert tuple(scales.shape) == scales_shape(*shape, 64)
        codes = to_codes(weight.detach(), scales, 4, 64)
        assert codes.shape == from_codes(codes, scales, 4, 64).shape == shape
        fake_quantize(weight, scales.float().requires_grad_(), 4, 64).sum().backward()


@pytest.mark.parametrize("shape", [(6, 128), (5, 70), (14, 10)])
@pytest.mark.parametrize("by_row", [False, True])
def test_gradients_go_straight_through_and_those_of_learned_scales_are_those_of_lsq(
    shape: tuple[int, int], by_row: bool
) -> None:
    bits, group_size = 3, 64
    weight, outer = _matrix(*shape).double().requires_grad_(), _matrix(*shape, seed=1).double()
    covering = group_scales(weight.detach(), bits, group_size)
    (straight,) = torch.autograd.grad(fake_quantize(weight, covering, bits, group_size), weight, outer)
    assert torch.equal(straight, outer)
    # Smaller than what covers everything, so that some values are outside.
    scales = (0.5 * covering).double()
    group_rows = group_shape(shape[1], group_size)[0]
    if by_row:
        scales = scales.repeat_interleave(group_rows, dim=0)[: shape[0]]
    scales.requires_grad_()
    fake_quantize(weight, scales, bits, group_size).backward(outer)

    # The same of autograd, from the definition: s · (clamp(w / s) + constant), whose constant is the rounding.
    of_weight, of_scales = weight.detach().requires_grad_(), scales.detach().requires_grad_()
    clamped = (of_weight / expand_scales(of_scales, *shape, group_size)).clamp(-4, 3)
    ((clamped + (clamped.round() - clamped).detach()) * expand_scales(of_scales, *shape, group_size)).backward(outer)
    assert of_weight.grad is not None
    assert 0 < int((of_weight.grad == 0).sum()) < weight.numel() / 2
    torch.testing.assert_close(weight.grad, of_weight.grad)
    values = min(shape[1], group_size) * group_rows
    torch.testing.assert_close(scales.grad, of_scales.grad / math.sqrt(values * 3))


def test_learned_scale_of_zero_recovers() -> None:
    weight = torch.ones(1, 64)
    scales = torch.zeros(1, 1, requires_grad=True)
    found = fake_quantize(weight, scales, 4, 64)
    assert found.abs().max() == 0
    (found - weight).square().sum().backward()
    # Downhill is up, towards the values.
    assert torch.isfinite(scales.grad).all()
    assert float(scales.grad) < 0


@pytest.mark.parametrize(("bits", "shape"), [(2, (80, 128)), (4, (400, 10)), (8, (80, 128))])
def test_search_loses_less(bits: int, shape: tuple[int, int]) -> None:
    weight = _matrix(*shape).pow(3)
    plain, searched = (group_scales(weight, bits, 64, search=search) for search in (False, True))
    assert (searched.dtype, searched.shape) == (plain.dtype, plain.shape)
    lost = [(fake_quantize(weight, scales, bits, 64) - weight).square().sum() for scales in (searched, plain)]
    assert lost[0] < (0.8 if bits < 6 else 1.0) * lost[1]


def test_pieces_of_a_long_matrix_are_as_one() -> None:
    # Of more rows than are looked at together, in groups of several rows.
    weight = _matrix(250_001, 5)
    scales = group_scales(weight, 4, 64, search=True)
    tail = 5000 * group_shape(5, 64)[0]
    assert torch.equal(scales[5000:], group_scales(weight[tail:], 4, 64, search=True))
    codes = to_codes(weight, scales, 4, 64)
    assert torch.equal(from_codes(codes, scales, 4, 64), fake_quantize(weight, scales, 4, 64))


def test_what_cannot_be_quantized_is_refused() -> None:
    weight = torch.ones(2, 64)
    for bits in (1, 9, 4.0, True):
        with pytest.raises(ValueError, match="bits"):
            group_scales(weight, bits, 32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size"):
        group_scales(weight, 4, 0)
    with pytest.raises(ValueError, match=r"\[2, 1\].*\[3, 1\]"):
        to_codes(weight, torch.ones(3, 1), 4, 64)
    with pytest.raises(ValueError, match="bfloat16"):
        to_codes(1e6 * weight, group_scales(1e6 * weight, 4, 64), 4, 64)
    to_codes(1e6 * weight, group_scales(1e6 * weight, 4, 64, torch.bfloat16), 4, 64)
    with pytest.raises(ValueError, match="not finite"):
        to_codes(weight * math.nan, torch.ones(2, 1), 4, 64)
