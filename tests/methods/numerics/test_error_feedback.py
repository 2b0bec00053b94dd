"""Rounding with feedback against the definition one row at a time, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.error_feedback import quantize_factors, round_with_feedback
from lightning_embcompress.methods.quantizers.integer_quantizer import (
    expand_scales,
    from_codes,
    group_scales,
    to_codes,
)


def _cost(columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4 * columns, columns, generator=generator) * torch.logspace(0, -1, columns)
    return (states @ torch.randn(columns, columns, generator=generator)).double().T.cov()


def _oracle(row: np.ndarray, steps: np.ndarray, cost: np.ndarray, bits: int) -> np.ndarray:
    """Column after column in float64; the rest moves to the least of the quadratic form, by solving for it."""
    order = np.argsort(-np.diag(cost), kind="stable")
    given, cost = cost, cost + 1e-6 * np.diag(cost).mean() * np.eye(len(cost))
    wanted, out = row.copy(), np.zeros_like(row)
    for index, k in enumerate(order):
        out[k] = np.clip(np.round(wanted[k] / steps[k]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        rest = order[index + 1 :]
        error = out[k] * steps[k] - wanted[k]
        wanted[rest] -= np.linalg.solve(cost[np.ix_(rest, rest)], cost[rest, k]) * error
    # What leaves the range may lose more than rounding to nearest.
    nearest = np.clip(np.round(row / steps), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    lost, before = ((found * steps - row) @ given @ (found * steps - row) for found in (out, nearest))
    return out if lost < before else nearest


@pytest.mark.parametrize("columns", [5, 40, 70])
@pytest.mark.parametrize("bits", [3, 4])
def test_is_what_the_definition_gives(columns: int, bits: int) -> None:
    weight = torch.randn(12, columns, generator=torch.Generator().manual_seed(1)).double()
    cost, scales = _cost(columns), group_scales(weight, bits, 64)
    codes = round_with_feedback(weight, scales, cost, bits, 64)
    steps = expand_scales(scales.double(), 12, columns, 64)
    wanted = np.stack([_oracle(*pair, cost.numpy(), bits) for pair in zip(weight.numpy(), steps.numpy(), strict=True)])
    assert codes.dtype == torch.uint8
    np.testing.assert_array_equal(codes.numpy() - 2.0 ** (bits - 1), wanted)


@pytest.mark.parametrize("shape", [(300, 64), (300, 100), (301, 10)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_costs_less_than_rounding_to_nearest(shape: tuple[int, int], bits: int) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    cost, scales = _cost(shape[1]), group_scales(weight, bits, 64, search=True)

    def lost(codes: Tensor) -> float:
        error = from_codes(codes, scales, bits, 64).double() - weight
        return float(((error @ cost) * error).sum())

    nearest = to_codes(weight, scales, bits, 64)
    assert lost(round_with_feedback(weight, scales, cost, bits, 64)) < (0.7 if shape[1] > 10 else 1.0) * lost(nearest)
    # Without products of components there is nothing to make up for.
    diagonal = round_with_feedback(weight, scales, torch.diag(cost.diagonal()), bits, 64)
    assert (diagonal != nearest).float().mean() < 1e-3


def test_pieces_of_a_long_matrix_are_as_one() -> None:
    # Of more rows than are looked at together, in groups of several rows; a short run begins within a group.
    weight = torch.randn(250_001, 5, generator=torch.Generator().manual_seed(1))
    cost, scales = _cost(5), group_scales(weight, 4, 64)
    codes = round_with_feedback(weight, scales, cost, 4, 64)
    tail = 20_000 * 12
    assert torch.equal(codes[tail:], round_with_feedback(weight[tail:], scales[20_000:], cost, 4, 64))


def test_degenerate_costs_and_matrices() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    scales = group_scales(weight, 4, 64)
    nearest = to_codes(weight, scales, 4, 64)
    assert torch.equal(round_with_feedback(weight, scales, torch.zeros(40, 40), 4, 64), nearest)
    # One direction alone costs anything: damping makes it an inverse.
    direction = torch.ones(40, dtype=torch.float64)
    found = from_codes(round_with_feedback(weight, scales, torch.outer(direction, direction), 4, 64), scales, 4, 64)
    lost, before = ((values - weight).sum(dim=1).abs() for values in (found, from_codes(nearest, scales, 4, 64)))
    assert lost.mean() < 0.3 * before.mean()
    assert round_with_feedback(torch.zeros(3, 0), torch.zeros(1, 0), torch.zeros(0, 0), 4, 64).shape == (3, 0)
    zeros = torch.zeros(3, 40)
    assert (round_with_feedback(zeros, group_scales(zeros, 4, 64), _cost(40), 4, 64) == 8).all()


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.ones(3, 40)
    scales = group_scales(weight, 4, 64)
    with pytest.raises(ValueError, match=r"must be of the shape \[40, 40\]"):
        round_with_feedback(weight, scales, torch.eye(41), 4, 64)
    with pytest.raises(ValueError, match="not finite"):
        round_with_feedback(weight * torch.nan, scales, torch.eye(40), 4, 64)
    with pytest.raises(ValueError, match="bits must be from 2 to 8"):
        round_with_feedback(weight, scales, torch.eye(40), 9, 64)
    with pytest.raises(ValueError, match="must be of the shape"):
        round_with_feedback(weight, scales[:2], torch.eye(40), 4, 64)


def test_empty_basis_of_zeros_stays_zero() -> None:
    found = quantize_factors([torch.ones(5, 4)], torch.zeros(4, 16))
    assert from_codes(found.basis_codes, found.basis_scales, 8, 64).abs().max() == 0
