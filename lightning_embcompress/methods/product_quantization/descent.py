"""Product quantization of all columns together: every subspace answers to the errors that the others have left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.product_quantization.solver import (
    Groups,
    gather_rows,
    nearest,
    restricted_groups,
    subspaces_of,
    usable,
)
from lightning_embcompress.utils.division import deal

# Parts of the rows that processes share: few, as their sums are exchanged for every subspace.
_UNITS = 8


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
    usual = usable(metric)
    spaces = subspaces_of(dim, codes.shape[1], usual, codebook)
    matrix = usual.matrix.to(codebook)
    weights = metric.weights.to(codebook)
    groups = groups or Groups([torch.arange(vocab_size, device=weight.device)], [codebook.shape[0]])
    runs = [run for run in torch.arange(vocab_size, device=weight.device).tensor_split(_UNITS) if run.numel()]
    own = [restricted_groups(groups, run, vocab_size) for run in runs]
    # Only the process that has the rows needs their errors; a column of them is one piece of memory.
    errors: list[Tensor | None] = [None] * len(runs)
    costs = [float(run.numel()) for run in runs]

    def turn(subspace: int, moves: bool) -> None:
        """Choose the codes of a subspace, and move its centroids."""
        space = spaces[subspace]
        columns = space.columns
        inverse = torch.linalg.inv(usual.matrix[columns, columns]).to(codebook)
        toward = (matrix[:, columns] @ inverse).T.contiguous()
        centroids = codebook[:, columns].clone()
        entered = space.enter(codebook).contiguous()
        sums = [torch.zeros(centroids.shape[0], centroids.shape[1] + 1, dtype=torch.float64) for _ in runs]
        chosen = [torch.empty(run.numel(), dtype=torch.int16, device=codes.device) for run in runs]

        def choose(unit: int) -> None:
            rows = slice(int(runs[unit][0]), int(runs[unit][-1]) + 1)
            error = errors[unit]
            if error is None:
                error = weight[rows].to(codebook.dtype) - gather_rows(codebook, codes[rows])
                error = errors[unit] = error.T.contiguous()
            wanted = centroids[codes[rows, subspace].long()] + (toward @ error).T
            found, _ = nearest(space.times_root(wanted), own[unit], entered)
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

    steps = (rounds + 1) * len(spaces)
    for step in range(steps):
        turn(step % len(spaces), step < rounds * len(spaces))
        advance(1 / steps)
