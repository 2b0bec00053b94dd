"""Groups of words of similar frequency, by k-means instead of by equal size.

Lee, Lee and Moon: Block-wise Word Embedding Compression Revisited: Better Weighting and Structuring, Findings of EMNLP
2021 (DiscBlock) group the words of GroupReduce by k-means on their scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A weight below this part of the largest has the logarithm of this part: words that never occur have tiny weights,
# whose logarithms would only say how tiny.
_LEAST = 1e-9


def kmeans_groups(weights: Tensor, groups: int) -> Tensor:
    """Group rows by k-means of the logarithms of their weights, the heaviest rows in group 0.

    Of numbers k-means has an optimum that is found exactly: cells are ranges of the sorted values, and the best ranges
    follow from those of one cell less (Wang and Song 2011, Ckmeans.1d.dp), here by divide and conquer. Rows of equal
    weight are in one group, except where there are fewer different weights than groups: then the weights that most
    rows have are cut into parts of equal size, in the order of the rows. No group is empty. By Zipf's law the weights
    themselves would give the most frequent words a group each and leave nearly all others in one: with their logarithms
    the perplexity of a language model was lower at equal bytes.

    Args:
        weights: `[vocab_size]` positive row weights or counts; of counts 0 is allowed.
        groups: Number of groups, from 1 to `vocab_size`.

    Returns:
        `[vocab_size]` int64 group of every row, on the device of the weights.

    Raises:
        ValueError: If there are fewer rows than groups, or no groups.

    Example:
        >>> kmeans_groups(torch.tensor([7, 900, 1, 8, 1000, 1]), 3)
        tensor([1, 0, 2, 1, 0, 2])
    """
    if not 1 <= groups <= weights.numel():
        raise ValueError(f"groups must be from 1 to the {weights.numel()} rows of the table, it is {groups}")
    values, level, rows = torch.unique(weights.cpu().double(), return_inverse=True, return_counts=True)
    if values.numel() <= groups:
        return _divided_levels(level, rows, groups).to(weights.device)
    values = values.clamp(min=_LEAST * float(values[-1])).log()
    firsts = _best_cells(values, rows.double(), groups)
    # Cells ascend, groups descend.
    cell = torch.searchsorted(firsts, level, right=True) - 1
    return (groups - 1 - cell).to(weights.device)


def _divided_levels(level: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Every level a group of its own, and those of most rows several.

    Args:
        level: `[vocab_size]` index of every row's weight among the different ones, ascending.
        rows: `[levels]` how many rows each has.
        groups: Number of groups, at least that of levels and at most that of rows.
    """
    parts = torch.ones_like(rows)
    for _ in range(groups - rows.numel()):
        # Groups stay as equal as they can be.
        parts[torch.argmax(rows / parts)] += 1
    order = torch.argsort(level, descending=True, stable=True)
    sizes = [
        len(part)
        for size, count in zip(rows.flip(0).tolist(), parts.flip(0).tolist(), strict=True)
        for part in torch.arange(size).tensor_split(count)
    ]
    group = torch.empty_like(level)
    group[order] = torch.arange(groups).repeat_interleave(torch.tensor(sizes))
    return group


def _best_cells(values: Tensor, weights: Tensor, cells: int) -> Tensor:
    """Cut ascending numbers into cells of the least weighted sum of squares about the means.

    Args:
        values: `[count]` different numbers, ascending.
        weights: `[count]` how often each is there.
        cells: How many, from 1 to `count`.

    Returns:
        `[cells]` index of the first number of every cell.
    """
    count = values.numel()
    # About the middle, sums of squares lose the fewest digits.
    values = values - (values * weights).sum() / weights.sum()
    sums = torch.stack([weights, weights * values, weights * values.square()])
    sums = torch.nn.functional.pad(sums.cumsum(dim=1), (1, 0))

    def squares(first: Tensor, last: Tensor) -> Tensor:
        """Sum of squares about the mean of a cell."""
        mass, total, square = sums[:, last + 1] - sums[:, first]
        found: Tensor = square - total.square() / mass
        return found.clamp(min=0)

    everything = torch.arange(count)
    costs = squares(torch.zeros_like(everything), everything)
    # `starts[k][j]`: where the last of `k + 1` cells that end with number `j` begins.
    starts = [torch.zeros_like(everything)]
    for used in range(1, cells):
        costs, start = _one_more_cell(costs, used, squares)
        starts.append(start)
    firsts = torch.zeros(cells, dtype=torch.long)
    last = count - 1
    for cell in range(cells - 1, -1, -1):
        firsts[cell] = starts[cell][last]
        last = int(firsts[cell]) - 1
    return firsts


def _one_more_cell(costs: Tensor, used: int, squares: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The least cost with one more cell, of all numbers up to each, and where that cell begins.

    Where it begins rises with where it ends: what is found for some ends bounds the search of those between them.

    Args:
        costs: `[count]` least cost of the numbers up to each in `used` cells, infinite for fewer numbers.
        used: How many cells there are.
        squares: Cost of the cells from some numbers to others.
    """
    count = costs.numel()
    best, start = torch.full_like(costs, torch.inf), torch.zeros(count, dtype=torch.long)
    # Ends are visited at smaller and smaller steps, those with twice the step between them before.
    step = 1 << max(0, (count - used).bit_length() - 1)
    while step:
        end = torch.arange(used + step - 1, count, 2 * step)
        before, after = end - step, end + step
        low = torch.where(before >= used, start[before.clamp(min=0)], used)
        high = torch.where(after < count, start[after.clamp(max=count - 1)], end).minimum(end).maximum(low)
        lengths = high - low + 1
        segment = torch.arange(end.numel()).repeat_interleave(lengths)
        first = torch.arange(segment.numel()) + (low - (lengths.cumsum(0) - lengths))[segment]
        cost = costs[first - 1] + squares(first, end[segment])
        best[end] = torch.full_like(best[end], torch.inf).scatter_reduce(0, segment, cost, "amin")
        # Of equal ones the first.
        found = torch.where(cost == best[end][segment], first, count)
        start[end] = torch.full_like(end, count).scatter_reduce(0, segment, found, "amin")
        step //= 2
    return best, start
