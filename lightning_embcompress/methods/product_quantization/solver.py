"""Product quantization: k-means of the rows of a table in every subspace, by frequency or in the metric of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.product_quantization.training_sample import Groups
from lightning_embcompress.utils.division import agree, deal

# Distances at a time: 1 MiB of float32 stay in a core's cache.
_DISTANCES = 2**18
# Points whose starting centroids are drawn at a time: 256 KiB of float32 an operation.
_POINTS = 2**16
# Relative error below whose decrease the iteration stops.
_TOLERANCE = 1e-3


def subspace_sizes(dim: int, subspaces: int) -> list[int]:
    """Columns of every subspace: as equal as they can be, the larger ones first.

    Example:
        >>> subspace_sizes(10, 4)
        [3, 3, 2, 2]
    """
    size, larger = divmod(dim, subspaces)
    return [size + 1] * larger + [size] * (subspaces - larger)


def product_quantization(
    weight: Tensor,
    weights: Tensor,
    subspaces: int,
    num_centroids: int,
    groups: Groups | None = None,
    start: Tensor | None = None,
    max_iterations: int = 10,
    advance: Callable[[float], None] = lambda _: None,
    metric: Metric | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted k-means in every subspace of the columns (Jégou, Douze and Schmid 2011; for embeddings DPQ, MGQE).

    In subspace `s` it minimises `Σ_i q_i ‖w_is − C_s[k_is]‖²` by Lloyd's iteration, from k-means++ (Arthur and
    Vassilvitskii 2007) or from centroids there are, until the error has settled. A subspace of one column is sorted.
    Centroids without rows are moved to rows that have an error. Of a large table it is called with a sample of the
    rows, see `Sample`.

    With a metric it minimises `Σ_i q_i ‖(w_is − C_s[k_is]) M_ss^½‖²`, `M_ss` the block of the second moment that
    belongs to the columns of the subspace: k-means of the columns times its root, whose centroids are taken back by the
    inverse.

    With groups, rows of a group use only the first centroids (MGQE, Kang et al. 2020, section 3.3: rare tokens share
    the first centroids of the same codebook). Processes share the subspaces, see `utils.division`.

    Args:
        weight: `[vocab_size, dim]` table.
        weights: `[vocab_size]` positive row weights `q`; a metric does not replace them.
        subspaces: How many, from 1 to `dim`; see `subspace_sizes`.
        num_centroids: Centroids of a subspace.
        groups: Rows by how many centroids they may use; None for all of them.
        start: `[num_centroids, dim]` codebook to start from; None for k-means++.
        max_iterations: Most steps.
        advance: Called with shares of the work that add up to 1.
        metric: Whose second moment measures distances; None for plain ones.

    Returns:
        The codebook `[num_centroids, dim]`, the columns of a subspace holding its centroids, rounded to the table's
        dtype, in float32 or float64; and `[vocab_size, subspaces]` codes, int16.

    Example:
        >>> table = torch.tensor([[0.0, 5.0], [0.1, 5.0], [3.0, 7.0], [3.0, 7.2]])
        >>> codebook, codes = product_quantization(table, torch.ones(4), subspaces=2, num_centroids=2)
        >>> rows = torch.gather(codebook, 0, codes.long())
        >>> torch.allclose(rows, torch.tensor([[0.05, 5.0], [0.05, 5.0], [3.0, 7.1], [3.0, 7.1]]), atol=1e-5)
        True
    """
    vocab_size, dim = weight.shape
    groups = groups or Groups([torch.arange(vocab_size, device=weight.device)], [num_centroids])
    codebook = torch.empty(num_centroids, dim, dtype=compute_dtype(weight.dtype), device=weight.device)
    codes = torch.empty(vocab_size, subspaces, dtype=torch.int16, device=weight.device)
    given = _Points(groups, weights.to(codebook))
    spaces = subspaces_of(dim, subspaces, None if metric is None else usable(metric), codebook)
    if start is None:
        starts = _starting_codebook(weight, given, spaces, num_centroids, torch.Generator().manual_seed(0))
    else:
        starts = torch.cat([space.enter(start.to(codebook)) for space in spaces], dim=1)

    def compute(subspace: int) -> None:
        space = spaces[subspace]
        columns = space.columns
        points, centroids = space.enter(weight), starts[:, columns]
        if points.shape[1] == 1:
            centroids = _sorted_lloyd(points[:, 0], given, centroids[:, 0], 3 * max_iterations).unsqueeze(1)
        else:
            centroids = _lloyd(points, given, centroids, max_iterations)
        # Codes are those of the centroids as they are stored.
        codebook[:, columns] = space.leave(centroids).to(weight.dtype)
        codes[:, subspace] = nearest(points, groups, space.enter(codebook).contiguous())[0]

    places = [space.columns for space in spaces]
    results = [[codebook[:, columns], codes[:, subspace]] for subspace, columns in enumerate(places)]
    deal(results, [columns.stop - columns.start for columns in places], compute, advance)
    return codebook, codes


class Space:
    """The columns of a subspace, as they are or times `M_ss^½`: there distances are those of the metric.

    Args:
        columns: Which they are.
        metric: The metric of the whole table; None for plain distances.
        like: A tensor of the dtype and on the device to compute with.
    """

    def __init__(self, columns: slice, metric: Metric | None, like: Tensor) -> None:
        """Keep what columns are multiplied with."""
        self.columns = columns
        self.dtype = like.dtype
        self.roots: tuple[Tensor, Tensor] | None = None
        # The metric of a single column is a factor of all distances.
        if metric is not None and columns.stop - columns.start > 1:
            own = metric.restricted(columns)
            self.roots = own.root.to(like), own.inverse_root.to(like)
            # Rounding may differ between the processors of processes.
            agree(*self.roots)

    def times_root(self, points: Tensor) -> Tensor:
        """Points `[count, size]` where distances are those of the metric."""
        return points if self.roots is None else points @ self.roots[0]

    def enter(self, rows: Tensor) -> Tensor:
        """Columns of rows, `[count, size]`, times the root."""
        return self.times_root(rows[:, self.columns].to(self.dtype))

    def leave(self, points: Tensor) -> Tensor:
        """Points as columns, `[count, size]`."""
        return points if self.roots is None else points @ self.roots[1]


def usable(metric: Metric) -> Metric:
    """A metric without eigenvalues that are too small, so that no subspace has any, and of about the size of 1."""
    matrix = metric.root @ metric.root
    matrix = matrix / matrix.diagonal().mean()
    agree(matrix)
    return Metric(matrix, metric.weights)


def subspaces_of(dim: int, subspaces: int, metric: Metric | None, like: Tensor) -> list[Space]:
    """All subspaces; arguments as `subspace_sizes` and `Space`, the metric a `usable` one."""
    sizes = subspace_sizes(dim, subspaces)
    return [Space(slice(stop - size, stop), metric, like) for size, stop in zip(sizes, accumulate(sizes), strict=True)]


def gather_rows(codebook: Tensor, codes: Tensor) -> Tensor:
    """Rows of codes, `[count, dim]`, from a codebook `[num_centroids, dim]` and codes `[count, subspaces]`."""
    sizes = torch.tensor(subspace_sizes(codebook.shape[1], codes.shape[1]), device=codes.device)
    return codebook.gather(0, codes.long().repeat_interleave(sizes, dim=1))


@dataclass(frozen=True)
class _Points:
    """Weighted points of k-means: groups of their positions, and their weights."""

    groups: Groups
    weights: Tensor


def _starting_codebook(
    weight: Tensor,
    given: _Points,
    spaces: Sequence[Space],
    num_centroids: int,
    generator: torch.Generator,
) -> Tensor:
    """K-means++ for a few subspaces of one size at a time: one by one, small steps would take longer than the work."""
    starts = torch.empty(num_centroids, weight.shape[1], dtype=given.weights.dtype, device=weight.device)
    sizes = subspace_sizes(weight.shape[1], len(spaces))
    step = max(1, _POINTS // weight.shape[0])
    subspace = 0
    units = []
    while subspace < len(spaces):
        count = min(step, sizes[subspace:].count(sizes[subspace]))
        drawn = torch.rand(count, num_centroids, generator=generator, dtype=torch.float64).to(starts)
        some = spaces[subspace : subspace + count]
        units.append((slice(some[0].columns.start, some[-1].columns.stop), some, drawn))
        subspace += count

    def compute(unit: int) -> None:
        columns, some, drawn = units[unit]
        points = torch.stack([space.enter(weight).T for space in some])
        starts[:, columns] = _plus_plus(points, given, drawn).flatten(0, 1).T

    # Subspaces of a unit have one size.
    deal([[starts[:, columns]] for columns, _, _ in units], [len(some) for _, some, _ in units], compute)
    return starts


def _plus_plus(points: Tensor, given: _Points, drawn: Tensor) -> Tensor:
    """Starting centroids by k-means++: the next one is drawn by weight and squared distance to those there are.

    Args:
        points: `[subspaces, size, count]`; all subspaces go side by side.
        given: Their groups and weights. Centroids which a group may not use are drawn from the others.
        drawn: `[subspaces, num_centroids]` numbers from 0 to 1.

    Returns:
        `[subspaces, size, num_centroids]`.
    """
    _, size, count = points.shape
    squares = points.square().sum(dim=1)
    distances = torch.ones_like(squares)
    weights = given.weights
    centroids = []
    for index in range(drawn.shape[1]):
        if index in given.groups.limits:
            weights = weights.clone()
            for rows, limit in zip(given.groups.rows, given.groups.limits, strict=True):
                if limit <= index:
                    weights[rows] = 0
        total = (weights * distances).cumsum(1)
        place = torch.searchsorted(total, drawn[:, index, None] * total[:, -1:], right=True).clamp(max=count - 1)
        centroid = points.gather(2, place.unsqueeze(1).expand(-1, size, 1))
        centroids.append(centroid)
        # Batched products of single numbers are slow.
        products = (centroid.mT @ points if size > 1 else centroid * points).squeeze(1)
        distance = torch.add(squares + centroid.square().sum(dim=1), products, alpha=-2).clamp_(min=0)
        distances = distance if index == 0 else torch.minimum(distances, distance)
    return torch.cat(centroids, dim=2)


def _lloyd(points: Tensor, given: _Points, centroids: Tensor, max_iterations: int) -> Tensor:
    """Lloyd's iteration: every point to its nearest centroid, every centroid to the mean of its points."""
    previous = torch.inf
    for _ in range(max_iterations):
        codes, errors = nearest(points, given.groups, centroids)
        errors = errors * given.weights
        error = float(errors.sum())
        if not previous - error > _TOLERANCE * error:
            break
        previous = error
        mass = torch.zeros_like(centroids[:, 0]).index_add_(0, codes, given.weights)
        sums = torch.zeros_like(centroids).index_add_(0, codes, points * given.weights.unsqueeze(1))
        centroids = torch.where(mass.unsqueeze(1) > 0, sums / mass.unsqueeze(1), centroids)
        _reseed(points, errors, given.groups, mass, centroids)
    return centroids


def nearest(points: Tensor, groups: Groups, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of every point, among those that its group may use, and the squared distance to it.

    Returns:
        `[count]` codes, int64, and `[count]` distances.
    """
    codes = torch.empty(points.shape[0], dtype=torch.long, device=points.device)
    distances = points.new_empty(points.shape[0])
    for rows, limit in zip(groups.rows, groups.limits, strict=True):
        some = points if len(groups.rows) == 1 else points[rows]
        if points.shape[1] == 1:
            found = _nearest_of_sorted(some[:, 0].contiguous(), centroids[:limit, 0])
            distance = (some[:, 0] - centroids[found, 0]).square()
        else:
            found, distance = _nearest_of_all(some, centroids[:limit])
        codes[rows], distances[rows] = found, distance
    return codes, distances


def _nearest_of_all(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    squares, right = centroids.square().sum(dim=1), centroids.T.contiguous()
    codes = torch.empty(points.shape[0], dtype=torch.long, device=points.device)
    values = points.new_empty(points.shape[0])
    step = max(1, _DISTANCES // centroids.shape[0])
    # `‖x‖²` is the same for all centroids, and added at the end.
    scores = points.new_empty(min(step, points.shape[0]), centroids.shape[0])
    for start in range(0, points.shape[0], step):
        part = points[start : start + step]
        out = torch.addmm(squares, part, right, alpha=-2, out=scores[: part.shape[0]])
        torch.min(out, dim=1, out=(values[start : start + step], codes[start : start + step]))
    return codes, (values + points.square().sum(dim=1)).clamp_(min=0)


def _nearest_of_sorted(points: Tensor, centroids: Tensor) -> Tensor:
    values, order = centroids.sort(stable=True)
    return order[torch.bucketize(points, (values[1:] + values[:-1]) / 2)]


def _sorted_lloyd(points: Tensor, given: _Points, centroids: Tensor, max_iterations: int) -> Tensor:
    """Lloyd's iteration of single numbers: cells are ranges of the sorted points, and their means come from sums.

    Args:
        points: `[count]`.
        given: Their groups and weights.
        centroids: `[num_centroids]`.
        max_iterations: Most steps.

    Returns:
        `[num_centroids]`.
    """
    runs = []
    for rows, limit in zip(given.groups.rows, given.groups.limits, strict=True):
        values, order = points[rows].sort()
        weights = given.weights[rows][order].double()
        sums = [torch.nn.functional.pad(part.cumsum(0), (1, 0)) for part in (weights, weights * values)]
        runs.append((values, limit, sums[0], sums[1]))
    for _ in range(max_iterations):
        mass, total = torch.zeros_like(centroids, dtype=torch.float64), torch.zeros_like(centroids, dtype=torch.float64)
        for values, limit, weight_sums, value_sums in runs:
            ascending, order = centroids[:limit].sort(stable=True)
            ends = torch.searchsorted(values, (ascending[1:] + ascending[:-1]) / 2, right=True)
            ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), values.numel())])
            mass[order] += weight_sums[ends].diff()
            total[order] += value_sums[ends].diff()
        moved = torch.where(mass > 0, total / mass, centroids.double()).to(centroids)
        if not bool((mass > 0).all()):
            column = moved.unsqueeze(1)
            errors = nearest(points.unsqueeze(1), given.groups, column)[1] * given.weights
            _reseed(points.unsqueeze(1), errors, given.groups, mass, column)
            moved = column[:, 0]
        change = float((moved - centroids).abs().max())
        centroids = moved
        if change <= 1e-6 * float(centroids.abs().max()):
            break
    return centroids


def _reseed(points: Tensor, errors: Tensor, groups: Groups, mass: Tensor, centroids: Tensor) -> None:
    """Move centroids without points, in place, to points that are spread over the error as it is."""
    empty = (mass == 0).nonzero().flatten()
    for rows, limit in zip(groups.rows, groups.limits, strict=True):
        own = empty[empty < limit]
        if not own.numel() or not rows.numel():
            continue
        total = errors[rows].double().cumsum(0)
        steps = (torch.arange(own.numel(), device=total.device) + 0.5) / own.numel()
        # Points of no error have no share; where there is none at all, centroids stay where they are.
        places = torch.searchsorted(total, steps * total[-1], right=True)
        chosen = rows[torch.unique_consecutive(places[places < rows.numel()])]
        own = own[: chosen.numel()]
        centroids[own] = points[chosen]
        empty = empty[~torch.isin(empty, own)]
