"""Product quantization of all columns together: every subspace answers to the errors that the others have left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.product_quantization.solver import (
    Space,
    gather_rows,
    nearest,
    subspaces_of,
    usable,
)
from lightning_embcompress.methods.product_quantization.training_sample import Groups, restricted_groups
from lightning_embcompress.utils.division import deal

# Parts of the rows that processes share: few, as their sums are exchanged for every subspace.
_UNITS = 8
# Numbers of rows that are encoded at a time: 4 MiB of float32 errors stay in a cache.
_NUMBERS = 2**20
# How often every subspace is encoded in turn for a codebook that is found: more changes little.
_SWEEPS = 2


@dataclass(frozen=True)
class _Turn:
    """What one subspace would best hold, with all others as they are.

    Attributes:
        space: Its columns.
        toward: `M_ss⁻¹ M_s`, `[size, dim]`.
    """

    space: Space
    toward: Tensor

    @classmethod
    def all_of(cls, dim: int, subspaces: int, metric: Metric, like: Tensor) -> list[_Turn]:
        """Those of all subspaces, in a metric that is `usable`."""
        turns = []
        for space in subspaces_of(dim, subspaces, metric, like):
            columns = space.columns
            inverse = torch.linalg.inv(metric.matrix[columns, columns])
            turns.append(cls(space, (inverse @ metric.matrix[columns]).to(like)))
        return turns

    def choose(self, errors: Tensor, codes: Tensor, groups: Groups, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and what the subspace would best hold, `[count]` and `[count, size]`.

        Args:
            errors: `[dim, count]`, what rows are above what is stored.
            codes: `[count]` as they are.
            groups: Positions of the rows by how many of the centroids they may use.
            codebook: `[num_centroids, dim]`.
        """
        wanted = codebook[:, self.space.columns][codes.long()] + (self.toward @ errors).T
        return nearest(self.space.times_root(wanted), groups, self.space.enter(codebook).contiguous())[0], wanted


def descend(
    weight: Tensor,
    metric: Metric,
    codebook: Tensor,
    codes: Tensor,
    groups: Groups | None = None,
    rounds: int = 3,
    advance: Callable[[float], None] = lambda _: None,
) -> None:
    """Lower the loss of a product quantization in a metric, in place, by coordinate descent over its subspaces.

    K-means in the subspaces, each for itself, cannot see the parts of the metric between them. With all other
    subspaces as they are, `Σ_i q_i δ_iᵀ M δ_i` is, up to a constant, `Σ_i q_i ‖(y_i − C_s[k_i]) M_ss^½‖²` with
    `y_i = ŵ_is + M_ss⁻¹ (M δ_i)_s`: what subspace `s` would best hold to make up for the errors `δ_i = w_i − ŵ_i` of
    the others. Every subspace in turn takes a step of k-means for the `y_i` (the codes exactly, then the centroids
    exactly), and after the last round the codes once more. No step raises the loss, but by the rounding of centroids.

    Processes share the rows, see `utils.division`. Beside the table one of its size, the errors, is kept in memory.

    Args:
        weight: `[vocab_size, dim]` table.
        metric: Row weights and second moment.
        codebook: `[num_centroids, dim]` centroids, float32 or float64, of values that the table's dtype has.
        codes: `[vocab_size, subspaces]` codes.
        groups: Rows by how many of the centroids they may use; None for all of them.
        rounds: How often every subspace gets its turn.
        advance: Called with shares of the work that add up to 1.

    Example:
        >>> from lightning_embcompress.methods.product_quantization.solver import product_quantization
        >>> table = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> metric = Metric(torch.eye(4) + 1, torch.full((100,), 0.01))
        >>> codebook, codes = product_quantization(table, metric.weights, 2, 8, metric=metric)
        >>> before = metric.loss(table, gather_rows(codebook, codes))
        >>> descend(table, metric, codebook, codes)
        >>> metric.loss(table, gather_rows(codebook, codes)) < 0.8 * before
        True
    """
    if not rounds:
        advance(1.0)
        return
    vocab_size, dim = weight.shape
    turns = _Turn.all_of(dim, codes.shape[1], usable(metric), codebook)
    weights = metric.weights.to(codebook)
    groups = groups or Groups([torch.arange(vocab_size, device=weight.device)], [codebook.shape[0]])
    runs = [run for run in torch.arange(vocab_size, device=weight.device).tensor_split(_UNITS) if run.numel()]
    own = [restricted_groups(groups, run, vocab_size) for run in runs]
    # Only the process that has the rows needs their errors; a column of them is one piece of memory.
    errors: list[Tensor | None] = [None] * len(runs)
    costs = [float(run.numel()) for run in runs]

    def turn(subspace: int, moves: bool) -> None:
        """Choose the codes of a subspace, and move its centroids."""
        columns = turns[subspace].space.columns
        centroids = codebook[:, columns].clone()
        sums = [torch.zeros(centroids.shape[0], centroids.shape[1] + 1, dtype=torch.float64) for _ in runs]
        chosen = [torch.empty(run.numel(), dtype=torch.int16, device=codes.device) for run in runs]

        def choose(unit: int) -> None:
            rows = slice(int(runs[unit][0]), int(runs[unit][-1]) + 1)
            error = errors[unit]
            if error is None:
                error = weight[rows].to(codebook.dtype) - gather_rows(codebook, codes[rows])
                error = errors[unit] = error.T.contiguous()
            found, wanted = turns[subspace].choose(error, codes[rows, subspace], own[unit], codebook)
            chosen[unit].copy_(found)
            weighted = torch.cat([wanted, torch.ones_like(wanted[:, :1])], dim=1) * weights[rows].unsqueeze(1)
            added = torch.zeros_like(sums[unit], dtype=codebook.dtype, device=codebook.device)
            sums[unit].copy_(added.index_add_(0, found, weighted))

        deal([[*results] for results in zip(chosen, sums, strict=True)], costs, choose)
        if moves:
            total = torch.stack(sums).sum(dim=0).to(codebook.device)
            means = (total[:, :-1] / total[:, -1:]).to(weight.dtype).to(codebook)
            codebook[:, columns] = torch.where(total[:, -1:] > 0, means, centroids)
        for run, error, found in zip(runs, errors, chosen, strict=True):
            rows = slice(int(run[0]), int(run[-1]) + 1)
            if error is not None:
                error[columns] += (centroids[codes[rows, subspace].long()] - codebook[:, columns][found.long()]).T
            codes[rows, subspace] = found

    steps = (rounds + 1) * len(turns)
    for step in range(steps):
        turn(step % len(turns), step < rounds * len(turns))
        advance(1 / steps)


def encode(
    weight: Tensor,
    codebook: Tensor,
    subspaces: int,
    groups: Groups,
    metric: Metric | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> Tensor:
    """Codes of rows for a codebook that stays what it is.

    Without a metric they are those of the nearest centroids. With one, every subspace in turn makes up for the errors
    that the others have left, as in `descend`. A few rows at a time: nothing of the table's size is kept but the codes.

    Args:
        weight: `[vocab_size, dim]` table.
        codebook: `[num_centroids, dim]` centroids, float32 or float64.
        subspaces: How many.
        groups: Rows by how many of the centroids they may use.
        metric: Of the table; its row weights do not matter.
        advance: Called with shares of the work that add up to 1.

    Returns:
        `[vocab_size, subspaces]` codes, int16.

    Example:
        >>> codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> encode(torch.tensor([[0.2, 0.9]]), codebook, 2, Groups([torch.arange(1)], [2]))
        tensor([[0, 1]], dtype=torch.int16)
    """
    vocab_size, dim = weight.shape
    codes = torch.empty(vocab_size, subspaces, dtype=torch.int16, device=weight.device)
    turns = [] if metric is None else _Turn.all_of(dim, subspaces, usable(metric), codebook)
    spaces = [turn.space for turn in turns] or subspaces_of(dim, subspaces, None, codebook)
    entered = [space.enter(codebook).contiguous() for space in spaces]
    runs = torch.split(torch.arange(vocab_size, device=weight.device), max(1, _NUMBERS // dim))

    def compute(unit: int) -> None:
        rows = slice(int(runs[unit][0]), int(runs[unit][-1]) + 1)
        own = restricted_groups(groups, runs[unit], vocab_size)
        part, found = weight[rows].to(codebook.dtype), codes.new_empty(subspaces, runs[unit].numel())
        for subspace, space in enumerate(spaces):
            found[subspace] = nearest(space.enter(part), own, entered[subspace])[0]
        errors = (part - gather_rows(codebook, found.T)).T.contiguous() if turns else part
        for subspace, turn in [*enumerate(turns)] * _SWEEPS:
            chosen, _ = turn.choose(errors, found[subspace], own, codebook)
            centroids = codebook[:, turn.space.columns]
            errors[turn.space.columns] += (centroids[found[subspace].long()] - centroids[chosen]).T
            found[subspace] = chosen
        codes[rows] = found.T

    parts = [codes[int(run[0]) : int(run[-1]) + 1] for run in runs]
    deal([[part] for part in parts], [float(run.numel()) for run in runs], compute, advance)
    return codes
