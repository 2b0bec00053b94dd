"""Quantizers of numbers against those that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.sampling import at_equal_steps, chances, draw
from lightning_embcompress.methods.quantizers.scalar_quantizer import distortion, fit_levels, nearest_level


def _normal(count: int = 20_000) -> Tensor:
    """Quantiles of the normal distribution."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def _fit(values: Tensor, bits: int, weights: Tensor | None = None) -> tuple[Tensor, float]:
    weights = torch.ones_like(values) if weights is None else weights
    levels = fit_levels(values, weights, bits)
    return levels, distortion(values, weights, levels)


# Max 1960, table 1.
@pytest.mark.parametrize(("bits", "wanted"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_normal_distribution_has_the_known_distortion(bits: int, wanted: float) -> None:
    levels, lost = _fit(_normal(), bits)
    assert lost == pytest.approx(wanted, rel=0.01)
    torch.testing.assert_close(levels, -levels.flip(0), rtol=0, atol=2e-3)


def test_one_bit_of_a_normal_distribution_has_the_known_levels() -> None:
    torch.testing.assert_close(_fit(_normal(), 1)[0].abs(), torch.full((2,), 0.7979).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_many_levels_reach_panter_and_dite(bits: int) -> None:
    # The asymptotic distortion of the normal distribution, sqrt(3) pi / 2 / 4^bits.
    assert _fit(_normal(200_000), bits)[1] == pytest.approx(3**0.5 * torch.pi / 2 / 4**bits, rel=0.08)


def test_weights_count_as_copies() -> None:
    values = _normal(501)
    copies = torch.randint(1, 5, (501,), generator=torch.Generator().manual_seed(0))
    weighted, once = _fit(values, 3, copies.double()), _fit(values.repeat_interleave(copies), 3)
    assert weighted[1] == pytest.approx(once[1], rel=5e-3)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_few_values(bits: int) -> None:
    assert _fit(torch.tensor([2.5]), bits)[1] == 0
    assert _fit(torch.tensor([0.0, 0.0]), bits)[1] == 0
    levels, lost = _fit(torch.tensor([-1.0, 3.0, 3.0]), bits)
    assert lost == 0
    assert (levels.diff() >= 0).all()


def test_nearest_level_is_the_nearest() -> None:
    values, levels = _normal(300), fit_levels(_normal(), torch.ones(20_000), 3)
    wanted = (values.unsqueeze(1) - levels).abs().argmin(dim=1)
    assert torch.equal(nearest_level(values, levels), wanted)


def test_nearest_level_of_levels_that_training_has_crossed() -> None:
    values, levels = _normal(300), torch.tensor([-1.0, 0.5, 0.2, 1.0])
    wanted = (values.unsqueeze(1) - levels).abs().argmin(dim=1)
    assert torch.equal(nearest_level(values, levels), wanted)


def test_draws_stand_for_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = 1 / (1 + torch.randperm(5000, generator=generator).double())
    ids, standing = draw(weights, 400)
    assert ids.numel() == ids.unique().numel() == 400
    assert float(standing.sum()) == pytest.approx(float(weights.sum()), rel=1e-2)
    # The heaviest are there for certain, and stand for themselves.
    heaviest = weights.topk(20).indices
    assert set(heaviest.tolist()) <= set(ids.tolist())
    assert torch.equal(standing[:20], weights[heaviest])
    # An average of something else comes out too.
    values = weights.log()
    found, wanted = (standing * values[ids]).sum() / standing.sum(), (weights * values).sum() / weights.sum()
    assert float(found) == pytest.approx(float(wanted), rel=1e-2)
    assert torch.equal(draw(weights, 6000)[0].sort().values, torch.arange(5000))


def test_chances_count_copies() -> None:
    weights, copies = torch.tensor([1.0, 8.0, 2.0, 0.5]).double(), torch.tensor([10, 2, 0, 20])
    found = chances(weights, copies, 7)
    assert float((found * copies).sum()) == pytest.approx(7)
    assert float(found[1]) == 1
    assert float(found[0]) == pytest.approx(2 * float(found[3]))
    item, copy = at_equal_steps(found, copies)
    # As if every copy were an item.
    single, _ = at_equal_steps(found.repeat_interleave(copies), torch.ones(int(copies.sum())))
    assert torch.equal((copies.cumsum(0) - copies)[item] + copy, single)
    assert len(single.unique()) == 7
