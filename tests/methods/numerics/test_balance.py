"""Balanced factors: the same product, and less is lost when it is rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_embcompress.methods.numerics import balance
from lightning_embcompress.methods.numerics.balance import balanced_factors
from lightning_embcompress.methods.numerics.error_feedback import quantize_factors
from lightning_embcompress.methods.quantizers.integer_quantizer import fake_quantize, from_codes, group_scales


def _factors(
    sizes: tuple[int, ...] = (400,), ranks: tuple[int, ...] = (32,), dim: int = 48
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Coefficients with a falling spectrum, a basis, a metric and weights of rows."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -1.5, max(ranks))
    coefficients = [
        torch.randn(size, rank, generator=generator) * spectrum[:rank] for size, rank in zip(sizes, ranks, strict=True)
    ]
    basis = torch.linalg.qr(torch.randn(dim, max(ranks), generator=generator)).Q.T.contiguous()
    states = torch.randn(4 * dim, dim, generator=generator) * torch.logspace(0, -1, dim)
    weights = [torch.rand(size, generator=generator).double() + 0.1 for size in sizes]
    return coefficients, basis, (states.T @ states / len(states)).double(), weights


def _lost(parts: list[Tensor], basis: Tensor, others: list[Tensor], other: Tensor, matrix: Tensor, q: list[Tensor]):
    total = 0.0
    for part, found, weights in zip(parts, others, q, strict=True):
        error = part.double() @ basis[: part.shape[1]].double() - found.double() @ other[: part.shape[1]].double()
        total += float(((error @ matrix) * error).sum(dim=1) @ weights)
    return total


@pytest.mark.parametrize("ranks", [(32,), (32, 20, 20, 1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_stay_what_they_are(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    coefficients, basis, matrix, weights = _factors((60,) * len(ranks), ranks)
    coefficients, basis = [part.to(dtype) for part in coefficients], basis.to(dtype)
    kept = [part.clone() for part in coefficients]
    moved, turned = balanced_factors(coefficients, basis, matrix, weights)
    for part, found in zip(coefficients, moved, strict=True):
        rank = part.shape[1]
        torch.testing.assert_close(found @ turned[:rank], part @ basis[:rank], rtol=1e-4, atol=1e-5)
        assert found.dtype == dtype
    assert all(torch.equal(part, was) for part, was in zip(coefficients, kept, strict=True))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_components_are_scaled_as_said(exponent: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "_rotation", lambda size, _: torch.eye(size).double())
    coefficients, basis, matrix, (q,) = _factors()
    (moved,), turned = balanced_factors(coefficients, basis, matrix, [q], exponent=exponent)
    energy = (moved.double().T * q) @ moved.double()
    cost = turned.double() @ matrix @ turned.double().T
    # Both are diagonal, and their product is what components are worth, in any basis.
    wide, was = coefficients[0].double(), basis.double() @ matrix @ basis.double().T
    worth = torch.linalg.eigvals((wide.T * q) @ wide @ was).real.sort().values
    for found in (energy, cost):
        off_diagonal = found / (found.diagonal().sqrt().unsqueeze(1) * found.diagonal().sqrt())
        torch.testing.assert_close(off_diagonal, torch.eye(32).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close((energy.diagonal() * cost.diagonal()).sort().values, worth, rtol=1e-3, atol=0)
    expected = worth.pow(1 - exponent)
    torch.testing.assert_close(
        energy.diagonal().sort().values / energy.trace(), expected / expected.sum(), rtol=1e-3, atol=0
    )


def test_sum_of_costs_is_the_least_possible() -> None:
    coefficients, basis, matrix, (q,) = _factors()
    (moved,), turned = balanced_factors(coefficients, basis, matrix, [q])

    def product(part: Tensor, other: Tensor) -> float:
        return float((part.double().square().sum(dim=1) @ q) * ((other.double() @ matrix) * other.double()).sum())

    # (tr (S^½ H S^½)^½)², from the eigenvalues of S H.
    wide, cost = coefficients[0].double(), basis.double() @ matrix @ basis.double().T
    least = float(torch.linalg.eigvals((wide.T * q) @ wide @ cost).real.clamp(min=0).sqrt().sum() ** 2)
    assert product(moved, turned) == pytest.approx(least, rel=1e-4)
    assert product(coefficients[0], basis) > 1.5 * least


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("ranks", [(32,), (32, 20, 20)])
def test_rounding_loses_less(bits: int, ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    parts, basis, matrix, q = _factors((300,) * len(ranks), ranks)

    def lost(others: list[Tensor], other: Tensor) -> float:
        rounded = [fake_quantize(part, group_scales(part, bits, 64), bits, 64) for part in others]
        return _lost(parts, basis, rounded, fake_quantize(other, group_scales(other, 8, 64), 8, 64), matrix, q)

    plain = lost(parts, basis)
    rotated = lost(*balanced_factors(parts, basis, matrix, q))
    assert rotated < 0.6 * plain
    assert rotated < lost(*balanced_factors(parts, basis))
    monkeypatch.setattr(balance, "_rotation", lambda size, _: torch.eye(size).double())
    assert rotated < lost(*balanced_factors(parts, basis, matrix, q)) < 0.9 * plain


@pytest.mark.parametrize("ranks", [(32,), (32, 20, 20, 0)])
@pytest.mark.parametrize("bits", [3, 6])
def test_quantized_factors_lose_far_less_than_nearest(ranks: tuple[int, ...], bits: int) -> None:
    parts, basis, matrix, q = _factors((300,) * len(ranks), ranks)
    for basis_bits in (8, bits):
        found = quantize_factors(parts, basis, matrix, q, bits=bits, basis_bits=basis_bits)
        read = [from_codes(codes, scales, bits, 64) for codes, scales in zip(found.codes, found.scales, strict=True)]
        after = _lost(parts, basis, read, from_codes(found.basis_codes, found.basis_scales, basis_bits, 64), matrix, q)
        rounded = [fake_quantize(part, group_scales(part, bits, 64), bits, 64) for part in parts]
        nearest = fake_quantize(basis, group_scales(basis, basis_bits, 64), basis_bits, 64)
        assert after < 0.35 * _lost(parts, basis, rounded, nearest, matrix, q)
        assert [tuple(codes.shape) for codes in found.codes] == [(300, rank) for rank in ranks]


def test_degenerate_factors_are_left_in_peace() -> None:
    coefficients, basis, _, _ = _factors()
    for parts, other in (
        ([torch.zeros(50, 32)], basis),
        (coefficients, torch.zeros_like(basis)),
        ([coefficients[0][:3]], basis),
        ([torch.zeros(5, 0)], torch.zeros(0, 48)),
    ):
        moved, turned = balanced_factors(parts, other)
        torch.testing.assert_close(moved[0] @ turned, parts[0] @ other, rtol=1e-4, atol=1e-5)
        assert moved[0].isfinite().all()
    # A component that nothing uses does not become huge.
    unused = coefficients[0].clone()
    unused[:, 5] = 0
    (moved,), turned = balanced_factors([unused], basis)
    assert turned.isfinite().all()
    torch.testing.assert_close(moved @ turned, unused @ basis, rtol=1e-3, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    coefficients, basis, matrix, q = _factors()
    with pytest.raises(ValueError, match="exponent"):
        balanced_factors(coefficients, basis, exponent=1.5)
    with pytest.raises(ValueError, match="block 1 has 33 coefficients a row, but the basis only 32"):
        balanced_factors([*coefficients, torch.ones(4, 33)], basis)
    with pytest.raises(ValueError, match="not finite"):
        balanced_factors(coefficients, basis * torch.nan, matrix, q)
