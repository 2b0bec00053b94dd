"""Tables in grids: no single code is better in float64, and what is lost against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.integrations.export.gguf import GRIDS
from lightning_embcompress.methods.numerics.grid_rounding import GridCodes, fit_grid
from lightning_embcompress.methods.quantizers.grids import Grid


def _moment(columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4 * columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    return (states @ torch.randn(columns, columns, generator=generator)).double().T.cov()


def _table(rows: int = 60, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _lost(table: Tensor, found: Tensor, moment: Tensor) -> Tensor:
    error = table.double() - found.double()
    return ((error @ moment) * error).sum(dim=1)


def _nearest(table: Tensor, grid: Grid) -> Tensor:
    groups = table.view(len(table), -1, grid.group_size)
    return grid.rounded(groups, *grid.search(groups, torch.ones(groups.shape[1:]))).flatten(1)


@pytest.mark.parametrize("kind", GRIDS)
def test_no_single_code_is_better(kind: str) -> None:
    grid, table, moment = GRIDS[kind], _table(), _moment(64)
    # Whichever order they are looked at in: after more sweeps than are made nothing moves.
    found = fit_grid(table, grid, moment)
    values = found.materialize().double()
    slope = (table.double() - values) @ moment
    step = slope / moment.diagonal()
    scales = found.scales.double().repeat_interleave(32, dim=1)
    levels = grid.table(scales)[found.codes.long()]
    wanted = grid.nearest(levels + step / scales)
    moved = (wanted - levels) * scales
    gain = 2 * moved * slope - moved.square() * moment.diagonal()
    # What is left to be gained by one code is a small part of what a row loses.
    assert float(gain.amax(dim=1).sum()) < 0.02 * float(_lost(table, values, moment).sum())


@pytest.mark.parametrize("kind", GRIDS)
def test_less_is_lost_than_by_rounding(kind: str) -> None:
    grid, table, moment = GRIDS[kind], _table(), _moment(64)
    found = fit_grid(table, grid, moment).materialize()
    before = _lost(table, _nearest(table, grid), moment)
    assert float(_lost(table, found, moment).sum()) < 0.4 * float(before.sum())
    plain = fit_grid(table, grid).materialize()
    assert float((plain - table).square().sum()) <= float((_nearest(table, grid) - table).square().sum())


@given(
    kind=st.sampled_from(sorted(GRIDS)),
    rows=st.integers(0, 5),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_any_table(kind: str, rows: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    grid = GRIDS[kind]
    table = _table(rows, 32 * groups, seed).to(dtype)
    table[1:2] = 0
    found = fit_grid(table, grid, _moment(32 * groups, seed))
    assert found.codes.shape == table.shape
    assert found.scales.shape == (rows, groups)
    values = found.materialize()
    assert values.isfinite().all()
    assert not values[1:2].any()
    # Rows are solved by themselves.
    for row in range(rows):
        alone = fit_grid(table[row : row + 1], grid, _moment(32 * groups, seed)).materialize()
        torch.testing.assert_close(alone[0], values[row], rtol=0.3, atol=0.3 * float(table.float().abs().max()))


def test_a_moment_that_knows_little() -> None:
    table = _table()
    state = torch.randn(64, 1, generator=torch.Generator().manual_seed(3)).double()
    for moment in (torch.zeros(64, 64), state @ state.T):
        found = fit_grid(table, GRIDS["Q4_0"], moment).materialize()
        assert found.isfinite().all()
        assert float((found - table).square().sum()) < float(table.square().sum())


def test_scales_in_bfloat16() -> None:
    grid = Grid(tuple(range(-8, 8)), 32, dtype=torch.bfloat16)
    found: GridCodes = fit_grid(_table() * 1e6, grid)
    assert found.scales.dtype == torch.bfloat16
    assert float((found.materialize() - _table() * 1e6).square().mean().sqrt()) < 2e5


def test_mistakes_are_refused() -> None:
    grid = GRIDS["Q4_0"]
    with pytest.raises(ValueError, match="columns must be a multiple of the group size 32"):
        fit_grid(torch.zeros(2, 40), grid)
    with pytest.raises(ValueError, match=r"moment must be of the shape \[32, 32\]"):
        fit_grid(torch.zeros(2, 32), grid, torch.eye(8))
    with pytest.raises(ValueError, match="not finite"):
        fit_grid(torch.full((2, 32), torch.nan), grid)
    with pytest.raises(ValueError, match="too large for scales in torch.float16"):
        fit_grid(torch.full((2, 32), 1e9), grid)
