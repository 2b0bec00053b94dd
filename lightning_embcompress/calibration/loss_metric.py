"""From the statistics of a model to the metric of the loss at each of its tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies, weigh_unseen
from lightning_embcompress.methods.registry import Factorization
from lightning_embcompress.tables.finding import Table

# Tokens are taken together, in the order of their counts, until they have been seen so often.
_SEEN = 1000


def metric_of(
    model: nn.Module,
    table: Table,
    statistics: Statistics,
    token_counts: Tensor | None = None,
    unseen_weight: float | None = None,
) -> Metric:
    """What an error in a table costs, for all the ways in which it is read.

    An embedding adds `E[g gᵀ]`, and its rows are expected to count by their frequency `f_i` (`smoothed_frequencies`)
    times how large the gradients of tokens of about that frequency are. A head adds `E[h hᵀ]`; of one with a bias it is
    the covariance, as `corrections_of` make up for the rest. Its rows are expected to count by the Fisher information
    of a logit, `E[p_i (1 − p_i)]`, with `p_i` the probability that the model predicts: models predict far more of the
    tokens that a text lacks than its counts let expect, and lose as much by their errors. A token that was counted more
    often than it is predicted has `f_i` for `p_i`.

    A table that is read in several ways has `M = Σ_r m_r M_r`, `m_r` the sum of the weights of way `r`, and
    `q_i = Σ_r s_r q_ri / m_r`, where `s_r = m_r tr(M⁻¹ M_r) / d` is its part of the loss if all directions lose the
    same.

    Other texts lack others of the tokens. So those that were not counted, of which `u` of 1 is expected (or what
    follows from the counts, if that is more), have half of it in equal parts; and where rows are approximated they
    weigh twice as much as is expected, `2 u / (1 + u)`: as much again for text of other kinds. What is predicted is of
    text like that of the statistics.

    Args:
        model: The model.
        table: One of its tables, dense or compressed.
        statistics: Of the model.
        token_counts: `[vocab_size]` counts by which rows count; None for those of the statistics.
        unseen_weight: What the rows of tokens that were not counted weigh together where rows are approximated, above
            0 and below 1; None for twice what is expected.

    Raises:
        ValueError: If the statistics are of another model or vocabulary.
    """
    biased = {path for path in table.modules if path in statistics.hidden and bias_of(model, path) is not None}
    return metric_of_moments(table, statistics, biased, token_counts, unseen_weight)


def metric_of_moments(
    table: Table,
    statistics: Statistics,
    biased: Collection[str] = (),
    token_counts: Tensor | None = None,
    unseen_weight: float | None = None,
) -> Metric:
    """The same where there is no model: as `metric_of`, with the paths of heads that have a bias."""
    statistics.check([table])
    counts = statistics.counts_of(table.modules)
    weighed = counts if token_counts is None else token_counts
    frequencies, is_unseen = smoothed_frequencies(weighed), weighed == 0
    ways = []
    for path in (path for path in table.modules if path in statistics.hidden):
        moment = statistics.hidden[path]
        if path in biased:
            mean = statistics.hidden_mean[path]
            moment = moment - torch.outer(mean, mean)
        ways.append((moment, _information(statistics, path, frequencies, is_unseen)))
    for path in (path for path in table.modules if path in statistics.gradients):
        ways.append((statistics.gradients[path], frequencies * _relative_energies(statistics, counts, path)))
    moments = torch.stack([float(weights.sum()) * moment for moment, weights in ways])
    metric = Metric(moments.sum(dim=0), torch.zeros_like(frequencies))
    if metric.floored:
        rank_zero_info(
            f"The moments of table {table.name!r} have {metric.floored} of {table.shape[1]} eigenvalues that are too "
            "small or negative; they are raised to a floor. More batches of statistics see more directions."
        )
    shares = (metric.inverse_root @ metric.inverse_root * moments).sum(dim=(1, 2)).clamp(min=1e-300)
    for share, (_, weights) in zip((shares / shares.sum()).tolist(), ways, strict=True):
        metric.weights.add_(weights, alpha=share / float(weights.sum()))
    unseen = float(torch.maximum(metric.weights[is_unseen].sum(), frequencies[is_unseen].sum()))
    metric.weights[is_unseen] += unseen / max(1, int(is_unseen.sum()))
    metric.weights.div_(metric.weights.sum())
    expected = weigh_unseen(metric.weights, is_unseen, unseen)
    metric.weights.copy_(weigh_unseen(metric.weights, is_unseen, unseen_weight))
    return replace(metric, expected=expected)


def bias_of(model: nn.Module, path: str) -> Tensor | None:
    """Bias of a head, dense or compressed; None if it has none or is no head."""
    module = model.get_submodule(path)
    return module.bias if isinstance(module, nn.Linear | CompressedLinear) else None


def _information(statistics: Statistics, path: str, frequencies: Tensor, is_unseen: Tensor) -> Tensor:
    """Fisher information of the logits of a head, `E[p_i (1 − p_i)]`; of one whose logits are not known, `f_i`."""
    if path not in statistics.probabilities:
        return frequencies
    predicted = statistics.probabilities[path]
    mean = torch.where(is_unseen, predicted, torch.maximum(predicted, frequencies))
    mean /= mean.sum()
    if path not in statistics.squared_probabilities:
        return mean
    return mean * (1 - statistics.squared_probabilities[path] / predicted.clamp(min=1e-300)).clamp(0.05, 1.0)


def _relative_energies(statistics: Statistics, token_counts: Tensor, path: str) -> Tensor:
    """Mean squared gradient of tokens of about the same frequency, over that of all; 1 where none was seen."""
    if path not in statistics.gradient_energies:
        return torch.ones(len(token_counts), dtype=torch.float64)
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
