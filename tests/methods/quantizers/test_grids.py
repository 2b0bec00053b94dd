"""Grids of other programs against looking at every level, and against the definition of least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_embcompress.integrations.export.gguf import GRIDS
from lightning_embcompress.methods.quantizers.grids import Grid


def _groups(rows: int = 40, groups: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, groups, size, generator=generator) * torch.rand(rows, groups, 1, generator=generator)


@pytest.mark.parametrize("kind", GRIDS)
def test_the_nearest_of_all_levels(kind: str) -> None:
    grid = GRIDS[kind]
    levels = torch.tensor(grid.levels, dtype=torch.float32)
    ratios = torch.randn(500, generator=torch.Generator().manual_seed(0)) * float(levels.abs().max())
    distance = (ratios.unsqueeze(1) - levels).abs()
    assert torch.equal(distance.gather(1, grid.place(ratios).unsqueeze(1)).squeeze(1), distance.amin(dim=1))
    assert torch.equal(grid.nearest(ratios), levels[grid.place(ratios)])


@pytest.mark.parametrize("kind", GRIDS)
def test_scales_that_are_searched_lose_less_than_those_that_cover_everything(kind: str) -> None:
    grid, groups = GRIDS[kind], _groups()
    weights = torch.rand(groups.shape[1:], generator=torch.Generator().manual_seed(1)) + 0.1
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    span = grid.levels[-1] - grid.levels[0]
    if grid.has_minimum:
        covering = ((high - low) / span, low)
    else:
        covering = (torch.where(high >= -low, high, low) / grid.levels[0], torch.zeros_like(low))

    def lost(scales: Tensor, minimums: Tensor) -> Tensor:
        return ((grid.rounded(groups, scales, minimums) - groups).square() * weights).sum(dim=2)

    found, before = lost(*grid.search(groups, weights)), lost(*covering)
    assert float(found.sum()) < 0.95 * float(before.sum())
    # Scales are rounded when they are stored.
    assert (found <= 1.02 * before).all()


@pytest.mark.parametrize("kind", GRIDS)
def test_a_table_of_the_grid_is_found_again(kind: str) -> None:
    grid, generator = GRIDS[kind], torch.Generator().manual_seed(0)
    codes = torch.randint(len(grid.levels), (30, 2, 32), generator=generator)
    codes[..., :2] = torch.tensor([0, len(grid.levels) - 1])
    scales = (torch.rand(30, 2, generator=generator) + 0.5).half().float()
    minimums = torch.randn(30, 2, generator=generator).half().float() if grid.has_minimum else torch.zeros(30, 2)
    groups = grid.table(scales)[codes] * scales.unsqueeze(2) + minimums.unsqueeze(2)
    found = grid.search(groups, torch.ones(2, 32))
    torch.testing.assert_close(grid.rounded(groups, *found), groups, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", GRIDS)
def test_groups_of_equal_values(kind: str) -> None:
    grid = GRIDS[kind]
    for value in (0.0, 2.5, -2.5):
        groups = torch.full((2, 1, 32), value)
        found = grid.rounded(groups, *grid.search(groups, torch.ones(1, 32)))
        torch.testing.assert_close(found, groups, rtol=1e-2, atol=0)


def test_grids_are_compared_by_what_they_are() -> None:
    assert Grid((0, 1)) == Grid((0, 1))
    assert Grid((0, 1)).is_uniform
    assert not Grid((0, 2)).is_uniform
