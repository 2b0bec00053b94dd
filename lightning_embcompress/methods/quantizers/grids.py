"""Grids of other programs: what a group of values of a row can be, a scale times one of some levels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Parts of the largest value of a group, or of its range, that the outermost levels are tried at. Above 1 the largest
# value lies between two levels; 1 finds a table again that was in the grid.
_SHRINKS = (0.6, 0.68, 0.76, 0.84, 0.92, 1.0, 1.08, 1.16)


@dataclass(frozen=True)
class Grid:
    """Values that a group of neighbours in a row can have: `scale · level`, or `scale · level + minimum`.

    Attributes:
        levels: Ascending; a code is the place of one of them.
        group_size: Values that share a scale; columns are a multiple of it.
        has_minimum: Whether a group has a minimum too.
        dtype: Of scales and minimums.

    Example:
        >>> grid = Grid(levels=tuple(range(-8, 8)), group_size=32)
        >>> grid.place(torch.tensor([-9.0, 0.2, 6.7])).tolist()
        [0, 8, 15]
    """

    levels: tuple[int, ...]
    group_size: int = 32
    has_minimum: bool = False
    dtype: torch.dtype = torch.float16

    @property
    def is_uniform(self) -> bool:
        """Whether levels are whole numbers without gaps."""
        return self.levels == tuple(range(self.levels[0], self.levels[0] + len(self.levels)))

    @property
    def largest(self) -> float:
        """Above it values have no place."""
        reach = 1 if self.has_minimum else max(-self.levels[0], self.levels[-1])
        return reach * torch.finfo(self.dtype).max / 2

    def table(self, like: Tensor) -> Tensor:
        """`[levels]` levels in the dtype and on the device of a tensor."""
        return torch.tensor(self.levels, dtype=like.dtype, device=like.device)

    def place(self, ratios: Tensor) -> Tensor:
        """Codes of the levels nearest to values over their scales, `[*]` int64."""
        first, last = self.levels[0], self.levels[-1]
        if self.is_uniform:
            return (ratios - first).round().clamp(0, last - first).long()
        # Between whole numbers and their halves nothing changes.
        return self._steps(ratios.device)[(ratios * 2).floor().clamp(2 * first, 2 * last).long() - 2 * first]

    def nearest(self, ratios: Tensor) -> Tensor:
        """The levels nearest to values over their scales, `[*]`."""
        if self.is_uniform:
            return ratios.round().clamp(self.levels[0], self.levels[-1])
        return self.table(ratios)[self.place(ratios)]

    @cache  # noqa: B019 - grids are few and stay
    def _steps(self, device: torch.device) -> Tensor:
        """Codes of all multiples of a half from the first level to the last."""
        levels = torch.tensor(self.levels, dtype=torch.float64)
        halves = torch.arange(2 * self.levels[0], 2 * self.levels[-1] + 1, dtype=torch.float64) / 2
        return torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2, right=True).to(device)

    def stored(self, values: Tensor) -> Tensor:
        """Scales or minimums as they are once they were stored, in the dtype that they have."""
        return values.to(self.dtype).to(values.dtype)

    def search(self, groups: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and minimums of least weighted squared error of some that are tried.

        Args:
            groups: `[rows, groups, group_size]`.
            weights: `[groups, group_size]` what a squared error costs in a column.

        Returns:
            `[rows, groups]` scales, and minimums; zeros without minimums.
        """
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        least = torch.full_like(low, torch.inf)
        scales, minimums = torch.zeros_like(low), torch.zeros_like(low)
        first, last = float(self.levels[0]), float(self.levels[-1])
        largest = torch.where(high >= -low, high, low)
        middle = (low + high) / 2
        for shrink in _SHRINKS:
            if self.has_minimum:
                scale = (high - low) * (shrink / (last - first))
                starts = [(scale, middle - scale * ((first + last) / 2))]
            else:
                # The largest value at one end of the levels or at the other: a scale may be negative.
                starts = [(largest * (shrink / end), torch.zeros_like(low)) for end in (first, last) if end]
            for scale, minimum in starts:
                fitted = self._fitted(groups, weights, scale, minimum)
                errors = (self.rounded(groups, *fitted) - groups).square_()
                lost = (errors * weights).sum(dim=2)
                better = lost < least
                least = torch.where(better, lost, least)
                scales = torch.where(better, fitted[0], scales)
                minimums = torch.where(better, fitted[1], minimums)
        return scales, minimums

    def rounded(self, groups: Tensor, scales: Tensor, minimums: Tensor) -> Tensor:
        """`[rows, groups, group_size]` the nearest values that groups can have."""
        scale, minimum = scales.unsqueeze(-1), minimums.unsqueeze(-1)
        return self.nearest(over(groups - minimum, scale)).mul_(scale).add_(minimum)

    def _fitted(self, groups: Tensor, weights: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and minimums of least squared error at the levels that some give, as they are stored."""
        levels = self.nearest(over(groups - minimum.unsqueeze(2), scale.unsqueeze(2)))
        if not self.has_minimum:
            weighted = weights * levels
            squares, shared = (weighted * levels).sum(dim=2), (weighted * groups).sum(dim=2)
            return self.stored(torch.where(squares > 0, over(shared, squares), scale)), minimum
        total = weights.sum(dim=1).clamp(min=1e-30)
        mean_level, mean_value = ((weights * one).sum(dim=2) / total for one in (levels, groups))
        centered = levels - mean_level.unsqueeze(2)
        weighted = weights * centered
        squares = (weighted * centered).sum(dim=2)
        shared = (weighted * (groups - mean_value.unsqueeze(2))).sum(dim=2)
        # Of equal levels nothing but the minimum follows.
        fitted = self.stored(torch.where(squares > 0, over(shared, squares), scale))
        return fitted, self.stored(mean_value - fitted * mean_level)


def over(values: Tensor, scales: Tensor) -> Tensor:
    """Values over their scales; 0 where the scale is 0."""
    return values / torch.where(scales == 0, torch.inf, scales)
