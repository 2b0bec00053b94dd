"""Scales of coefficients that are not normally distributed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.numerics.projected_table import ProjectedTable
from lightning_embcompress.methods.quantizers.scalar_quantizer import distortion, fit_levels
from lightning_embcompress.methods.shared_basis.level_fitting import widened
from toys import normal

_ROWS, _DIM = 4000, 12


def _lost(values: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """`[dim]` squared errors of values at the nearest levels times a scale."""
    rounded = levels[((values / scales).unsqueeze(2) - levels).abs().argmin(dim=2)] * scales
    return (values - rounded).square().sum(dim=0)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_scales_make_room_for_values_far_beyond_the_levels(bits: int) -> None:
    weight = normal(_ROWS, _DIM, seed=1)
    # In one direction a row that is 40 times as large as the others, in another a few that are 10 times as large.
    weight[7, 3] = 40.0
    weight[20:24, 5] = 10.0
    table = ProjectedTable(weight, Metric(torch.eye(_DIM), torch.full((_ROWS,), 1 / _ROWS)), lambda means: means)
    blocks = torch.zeros(_ROWS, dtype=torch.long)
    table.choose_basis(blocks, 1)
    sums = table.sum_blocks(blocks, 1)
    chosen = torch.full((1, _DIM), bits)
    means, scales = sums.means, sums.scales
    # Levels of a table of many components, of which these are few.
    sample, ones = normal(20_000, seed=2), torch.ones(20_000, dtype=torch.float64)
    levels = fit_levels(sample, ones, bits)
    lost = {bits: distortion(sample, ones, levels)}
    found = widened(table, blocks, chosen, sums.energies, means, scales, {bits: levels}, lost)
    values = table.coefficients(torch.arange(_ROWS), _DIM) - means
    before, after = (_lost(values, one.squeeze(0), levels) for one in (scales, found))
    is_wider = (found > 1.01 * scales).squeeze(0)
    assert float(after.sum()) <= float(before.sum())
    assert torch.equal(after[~is_wider], before[~is_wider])
    # Of few levels the others would lose more than the largest gain.
    assert int(is_wider.sum()) <= (4 if bits > 3 else 0)
    if bits == 6:
        assert float(after[is_wider].sum()) < 0.5 * float(before[is_wider].sum())
