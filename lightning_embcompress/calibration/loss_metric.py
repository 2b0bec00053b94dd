"""From the statistics of a model to the metric of the loss at each of its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies
from lightning_embcompress.methods.registry import Factorization
from lightning_embcompress.tables.finding import Table

# Tokens are taken together, in the order of their counts, until they have been seen so often.
_SEEN = 1000


def metric_of(model: nn.Module, table: Table, statistics: Statistics, token_counts: Tensor | None = None) -> Metric:
    """What an error in a table costs, for all the ways in which it is read.

    An embedding adds `E[g gᵀ]`, a head `E[h hᵀ]`; a tied table has both. Of a head with a bias it is the covariance:
    `corrections_of` make up for the rest. Rows count by their smoothed frequency. Those of a table that is only a
    head count less the surer the model is of them: the Fisher information of a logit is `p (1 − p)`, not `p`. Those of
    one that is only an embedding count by how large the gradients of tokens of their frequency are, too.

    Args:
        model: The model.
        table: One of its tables, dense or compressed.
        statistics: Of the model.
        token_counts: `[vocab_size]` counts by which rows count; None for those of the statistics.

    Raises:
        ValueError: If the statistics are of another model or vocabulary.
    """
    statistics.check([table])
    total = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    counts = statistics.counts_of(table.modules)
    weights = smoothed_frequencies(counts if token_counts is None else token_counts)
    heads = [path for path in table.modules if path in statistics.hidden]
    for path in heads:
        total += statistics.hidden[path]
        if bias_of(model, path) is not None:
            mean = statistics.hidden_mean[path]
            total -= torch.outer(mean, mean)
    embeddings = [path for path in table.modules if path in statistics.gradients]
    for path in embeddings:
        total += statistics.gradients[path]
    if not embeddings and len(heads) == 1 and heads[0] in statistics.squared_probabilities:
        weights = weights * _doubts(statistics, heads[0])
    if not heads and len(embeddings) == 1 and embeddings[0] in statistics.gradient_energies:
        weights = weights * _relative_energies(statistics, counts, embeddings[0])
    metric = Metric(total, weights)
    if metric.floored:
        rank_zero_info(
            f"The moments of table {table.name!r} have {metric.floored} of {table.shape[1]} eigenvalues that are too "
            "small or negative; they are raised to a floor. More batches of statistics see more directions."
        )
    return metric


def bias_of(model: nn.Module, path: str) -> Tensor | None:
    """Bias of a head, dense or compressed; None if it has none or is no head."""
    module = model.get_submodule(path)
    return module.bias if isinstance(module, nn.Linear | CompressedLinear) else None


def _doubts(statistics: Statistics, path: str) -> Tensor:
    """`E[p (1 − p)] / E[p]` of every token: 1 for one that is never likely."""
    mean, square = statistics.probabilities[path], statistics.squared_probabilities[path]
    return ((mean - square) / mean.clamp(min=1e-300)).clamp(0.05, 1.0)


def _relative_energies(statistics: Statistics, token_counts: Tensor, path: str) -> Tensor:
    """Mean squared gradient of tokens of about the same frequency, over that of all; 1 where none was seen."""
    counts, energies = token_counts.double(), statistics.gradient_energies[path]
    # The statistics are often of a part of the text that was counted.
    seen = counts * (statistics.num_targets / max(1.0, float(counts.sum())))
    order = torch.argsort(counts, descending=True, stable=True)
    bands = (seen[order].cumsum(0) / _SEEN).ceil().long().clamp(max=max(1, statistics.num_targets // _SEEN))
    # Tokens of equal counts belong together, whatever their order.
    distinct, inverse = torch.unique(counts[order], return_inverse=True)
    first = torch.full((len(distinct),), len(counts), dtype=torch.long)
    first = first.scatter_reduce(0, inverse, bands, reduce="amin")
    bands = first[inverse]
    mass = torch.zeros(int(bands.max()) + 1, dtype=torch.float64).index_add_(0, bands, seen[order])
    energy = torch.zeros_like(mass).index_add_(0, bands, energies[order])
    mean = float(energy.sum() / mass.sum().clamp(min=1e-300))
    relative = torch.where((mass > 0) & (energy > 0), energy / mass.clamp(min=1e-300) / max(mean, 1e-300), 1.0)
    found = torch.empty_like(counts)
    found[order] = relative[bands]
    return found.clamp(0.05, 20.0)


@torch.no_grad()
def corrections_of(
    model: nn.Module, tables: Iterable[tuple[Sequence[str], Factorization[Any]]], statistics: Statistics | None
) -> dict[str, Tensor]:
    """What to add to the biases of heads so that their logits stay right for the mean hidden state.

    An error `δ_i` of a row shifts the logit of token `i` by `δ_iᵀ h`; with `δ_iᵀ E[h]` taken off its bias only what
    varies of `h` is left.

    Args:
        model: The model, with the layers in place that factors are going to replace or change.
        tables: Paths of the modules that read a table, and what they will read.
        statistics: Of the model; None for no corrections.

    Returns:
        Path of each head with a bias to `[vocab_size]`.
    """
    found = {}
    means = {} if statistics is None else statistics.hidden_mean
    for path, factors in ((path, factors) for modules, factors in tables for path in modules if path in means):
        bias = bias_of(model, path)
        if bias is None:
            continue
        hidden = means[path].to(bias.device, factors.dtype)
        with torch.autocast(bias.device.type, enabled=False):
            found[path] = (model.get_submodule(path)(hidden) - bias - factors.logits(hidden)).to(bias.dtype)
    return found


@torch.no_grad()
def add_to_biases(model: nn.Module, corrections: Mapping[str, Tensor]) -> None:
    """Add to the biases of heads, in place: what trains them goes on.

    Args:
        model: The model.
        corrections: What `corrections_of` returned.
    """
    for path, correction in corrections.items():
        bias = bias_of(model, path)
        assert bias is not None
        bias.add_(correction)
