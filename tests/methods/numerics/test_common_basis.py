"""One basis for several blocks, against bases that are known and all rotations of a plane."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.methods.numerics.common_basis import Valued, common_basis
from toys import normal


def _filling(level: float) -> Callable[[Tensor], Valued]:
    """What is lost, and what one more bit spares, by reverse water-filling."""

    def value(energies: Tensor) -> Valued:
        bits = (energies / level).clamp(min=1).log()
        loss = torch.minimum(energies, level * (1 + bits))
        return Valued(float(loss.sum()), (level / energies).clamp(max=1), bits.sum(dim=0).argsort(descending=True))

    return value


def _fixed(parts: Tensor) -> Callable[[Tensor], Valued]:
    """Components that stay where they are lose the same part of their energy whatever that is."""
    return lambda energies: Valued(float((energies * parts).sum()), parts, torch.arange(energies.shape[1]))


def _rotation(angle: float) -> Tensor:
    cosine, sine = math.cos(angle), math.sin(angle)
    return torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)


def _lost(moments: Tensor, basis: Tensor, parts: Tensor) -> float:
    seen = basis.T @ moments.double() @ basis
    return float((0.5 * seen.diagonal(dim1=1, dim2=2) * parts).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [2, 9, 24])
def test_blocks_that_have_a_basis_in_common_get_it(dim: int, dtype: torch.dtype) -> None:
    known = torch.linalg.qr(normal(dim, dim, seed=1)).Q
    spectra = torch.exp(normal(5, dim, seed=2))
    moments = ((known * spectra.unsqueeze(1)) @ known.T).to(dtype)
    begin = torch.linalg.eigh(moments.double().sum(dim=0)).eigenvectors
    basis = begin @ common_basis((begin.T @ moments.double() @ begin).to(dtype), _filling(1e-3))
    # Each of its directions is one of those that are known.
    found = (basis.T @ known).abs()
    torch.testing.assert_close(found.max(dim=1).values, torch.ones(dim, dtype=torch.float64), rtol=0, atol=2e-2)
    rates = (known.T @ moments.double() @ known).diagonal(dim1=1, dim2=2).log().sum(dim=0).sort(descending=True).values
    mine = (basis.T @ moments.double() @ basis).diagonal(dim1=1, dim2=2).log().sum(dim=0)
    torch.testing.assert_close(mine, rates, rtol=0, atol=0.05)


@pytest.mark.parametrize("seed", range(6))
def test_no_rotation_of_a_plane_is_better(seed: int) -> None:
    roots = normal(3, 2, 4, seed=seed)
    moments = roots @ roots.mT
    # Blocks that keep one of two components, or both, or lose some of each.
    parts = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.1, 0.7]], dtype=torch.float64)
    basis = common_basis(moments.clone(), _fixed(parts))
    every = [_lost(moments, _rotation(angle), parts) for angle in torch.linspace(0, math.pi, 2000).tolist()]
    assert _lost(moments, basis, parts) <= 1.01 * min(every)
    assert max(every) > 1.1 * min(every)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([0.0, 1e-12, 1.0, 1e12]))
@settings(max_examples=40, deadline=None)
def test_it_is_orthonormal_and_no_worse_than_the_start(blocks: int, dim: int, seed: int, size: float) -> None:
    roots = normal(blocks, dim, dim, seed=seed)
    moments = size * roots @ roots.mT
    parts = torch.rand(blocks, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = parts.sort(dim=1).values
    basis = common_basis(moments.clone(), _fixed(parts))
    identity = torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-9)
    assert _lost(moments, basis, parts) <= _lost(moments, identity, parts) * (1 + 1e-9)
