"""A table in the grid of another program, in the metric of the loss: no code, scale or minimum could be better alone.

What other programs read leaves scales and codes free. Scales are searched for by what errors cost that the columns
behind make up for, rounding carries errors on (`numerics.feedback`), and then every scale, minimum and code in turn
gets the value of least `eᵀ M e`, `e` the error of the row and all others as they are (coordinate descent). Each step
lowers the predicted loss. Rows are solved by themselves: their weights play no part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.feedback import carry_errors, feedback_factor
from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.methods.quantizers.grids import Grid, over

# Times that every scale and code is looked at again: from the fourth on a hundredth of the error is gained.
_SWEEPS = 3
# Values that are solved at a time.
_VALUES = 2**22


@dataclass(frozen=True)
class GridCodes:
    """A matrix in a grid.

    Attributes:
        grid: Which.
        codes: `[rows, columns]` uint8.
        scales: `[rows, groups]` in the dtype of the grid.
        minimums: Likewise; None where the grid has none.
    """

    grid: Grid
    codes: Tensor
    scales: Tensor
    minimums: Tensor | None

    def materialize(self, rows: slice = slice(None)) -> Tensor:
        """What rows are read as, `[rows, columns]` float32."""
        scales = self.scales[rows].float().unsqueeze(2)
        levels = self.grid.table(scales)[self.codes[rows].long()]
        values = levels.view(*scales.shape[:2], self.grid.group_size) * scales
        if self.minimums is not None:
            values += self.minimums[rows].float().unsqueeze(2)
        return values.flatten(1)


@torch.no_grad()
def fit_grid(
    weight: Tensor, grid: Grid, matrix: Tensor | None = None, advance: Callable[[float], None] = lambda _: None
) -> GridCodes:
    """Find codes and scales of a table, see the top of the module.

    Args:
        weight: `[rows, columns]` of any floating dtype.
        grid: What values can be.
        matrix: `[columns, columns]` second moment `M` of the metric; None where all directions count the same.
        advance: Called with numbers of rows.

    Raises:
        ValueError: If the columns are no multiple of the group size, the moment is of another table, or a value is not
            finite or too large for the scales.

    Example:
        >>> table = torch.randn(100, 64)
        >>> found = fit_grid(table, Grid(tuple(range(-8, 8))), torch.eye(64))
        >>> bool((found.materialize() - table).square().mean() < 0.01)
        True
    """
    rows, columns = weight.shape
    if columns % grid.group_size:
        raise ValueError(f"columns must be a multiple of the group size {grid.group_size}, and the table has {columns}")
    dtype = compute_dtype(weight.dtype)
    cost = torch.eye(columns, dtype=torch.float64) if matrix is None else matrix.double().cpu()
    if cost.shape != (columns, columns):
        raise ValueError(f"the moment must be of the shape {[columns] * 2}, it is {list(cost.shape)}")
    cost = (cost + cost.T) / 2
    cost /= cost.diagonal().mean().clamp(min=1e-300)
    order = cost.diagonal().argsort(descending=True, stable=True)
    factor = feedback_factor(cost[order][:, order])
    made_up = torch.empty(columns, dtype=torch.float64)
    made_up[order] = factor.diagonal().pow(-2)
    place = weight.device
    solver = _Solver(grid, cost.to(place, dtype), factor.to(place, dtype), made_up.to(place, dtype), order.to(place))
    groups = columns // grid.group_size
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=place)
    scales, minimums = (torch.empty(rows, groups, dtype=grid.dtype, device=place) for _ in range(2))
    step = max(1, _VALUES // max(1, columns))
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        part = weight[chunk].to(dtype)
        if not bool(part.isfinite().all()):
            raise ValueError("a value of the table is not finite, and cannot be quantized")
        if part.numel() and float(part.abs().max()) > grid.largest:
            raise ValueError(f"a value of the table is too large for scales in {grid.dtype}: {float(part.abs().max())}")
        codes[chunk], scales[chunk], minimums[chunk] = solver.solve(part)
        advance(chunk.stop - chunk.start)
    return GridCodes(grid, codes, scales, minimums if grid.has_minimum else None)


@dataclass(frozen=True)
class _Solver:
    """What is the same for all rows.

    Attributes:
        grid: What values can be.
        cost: `[columns, columns]` `M`.
        factor: `[columns, columns]` of the columns in the order.
        made_up: `[columns]` what a squared error costs that the columns behind it make up for.
        order: `[columns]` in which errors are carried on.
    """

    grid: Grid
    cost: Tensor
    factor: Tensor
    made_up: Tensor
    order: Tensor

    def solve(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and minimums of rows."""
        size = self.grid.group_size
        weights = self.made_up.view(-1, size)
        scales, minimums = self.grid.search(part.reshape(len(part), len(weights), size), weights)
        # Columns as rows: each step reads and writes what lies together.
        wanted = part.T.contiguous()
        scales, minimums = scales.T.contiguous(), minimums.T.contiguous()
        group = (self.order // size).tolist()

        def nearest(column: int, values: Tensor) -> Tensor:
            scale, minimum = scales[group[column]], minimums[group[column]]
            return self.grid.nearest(over(values - minimum, scale)).mul_(scale).add_(minimum)

        found = torch.empty_like(wanted)
        found[self.order] = carry_errors(wanted[self.order], nearest, self.factor)
        shape = (-1, size, wanted.shape[1])
        levels = self.grid.nearest(over(found.view(shape) - minimums.unsqueeze(1), scales.unsqueeze(1)))
        found = levels * scales.unsqueeze(1) + minimums.unsqueeze(1)
        slope = self.cost @ (wanted - found.view_as(wanted))
        for _ in range(_SWEEPS):
            for index in range(len(levels)):
                self._descend(slope, levels[index], scales[index], minimums[index], index)
        codes = self.grid.place(levels.flatten(0, 1)).T.to(torch.uint8)
        return codes, scales.T, minimums.T

    def _descend(self, slope: Tensor, levels: Tensor, scale: Tensor, minimum: Tensor, index: int) -> None:
        """Minimum, scale and levels of a group, one after the other, in place.

        Args:
            slope: `[columns, rows]` `M e`, of the error of all columns.
            levels: `[group_size, rows]`.
            scale: `[rows]`.
            minimum: `[rows]`.
            index: Of the group.
        """
        run = slice(index * self.grid.group_size, (index + 1) * self.grid.group_size)
        cost = self.cost[run, run]
        before = levels * scale + minimum
        if self.grid.has_minimum:
            gain = slope[run].sum(dim=0) / cost.sum().clamp(min=1e-30)
            minimum.copy_(self.grid.stored(minimum + gain))
        moved = levels * scale + minimum
        own = slope[run] - cost @ (moved - before)
        shared, squares = (levels * own).sum(dim=0), (levels * (cost @ levels)).sum(dim=0)
        scale.copy_(self.grid.stored(scale + torch.where(squares > 0, shared / squares.clamp(min=1e-30), 0)))
        after = levels * scale + minimum
        own -= cost @ (after - moved)
        inverse = over(torch.ones_like(scale), scale)
        for column in range(len(levels)):
            step = own[column] * (inverse / cost[column, column].clamp(min=1e-30))
            found = self.grid.nearest(levels[column] + step)
            own.addr_(cost[column], (found - levels[column]) * scale, alpha=-1)
            levels[column] = found
        slope.addmm_(self.cost[:, run], levels * scale + minimum - before, alpha=-1)
