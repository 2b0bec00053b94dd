"""The metric of the loss at the tables of a model, and biases that make up for errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_embcompress.calibration.loss_metric import add_to_biases, bias_of, corrections_of, metric_of
from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.methods.numerics.metric import smoothed_frequencies
from lightning_embcompress.methods.registry import LowRank
from lightning_embcompress.tables.finding import find_tables
from toys import LanguageModel

_VOCAB_SIZE, _DIM = 60, 8


class Bigram(LanguageModel):
    """Its hidden states have a mean."""

    def __init__(self, bias: bool = True, tied: bool = False) -> None:
        super().__init__(_VOCAB_SIZE, _DIM, bias=bias, tied=tied)

    def hidden(self, inputs: Tensor) -> Tensor:
        return super().hidden(inputs) + 0.5


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch[:-1]), batch[1:])


def _batches(count: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(_VOCAB_SIZE ** torch.rand(101, generator=generator)).long().clamp(max=59) for _ in range(count)]


def _collect(model: nn.Module) -> Statistics:
    return collect_statistics(model, _batches(), _loss)


def _information(statistics: Statistics, path: str) -> Tensor:
    """`E[p (1 − p)]` of every token, of tokens that are predicted at least as often as they occur."""
    return statistics.probabilities[path] - statistics.squared_probabilities[path]


def test_moments_of_the_roles() -> None:
    model = Bigram()
    statistics = _collect(model)
    encoder, decoder = find_tables(model)

    def assert_same_but_for_a_factor(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found / found.trace(), expected / expected.trace())

    assert_same_but_for_a_factor(metric_of(model, encoder, statistics).matrix, statistics.gradients["encoder"])
    mean = statistics.hidden_mean["decoder"]
    expected = statistics.hidden["decoder"] - torch.outer(mean, mean)
    assert_same_but_for_a_factor(metric_of(model, decoder, statistics).matrix, expected)
    model = Bigram(bias=False)
    metric = metric_of(model, find_tables(model)[1], _collect(model))
    assert_same_but_for_a_factor(metric.matrix, _collect(model).hidden["decoder"])


def test_a_tied_table_is_the_sum_of_its_roles() -> None:
    """Errors that are the same in all directions of the metric lose what they lose in both roles."""
    model = Bigram(bias=False, tied=True)
    statistics = _collect(model)
    [table] = find_tables(model)
    metric = metric_of(model, table, statistics)
    assert float(metric.weights.sum()) == pytest.approx(1)
    ways = {
        kind: metric_of(model, table, replace(statistics, **{other: {}}))
        for kind, other in (("hidden", "gradients"), ("gradients", "hidden"))
    }
    torch.testing.assert_close(metric.matrix, ways["hidden"].matrix + ways["gradients"].matrix)
    generator = torch.Generator().manual_seed(4)
    sizes = torch.rand(_VOCAB_SIZE, 1, generator=generator, dtype=torch.float64)
    # A direction at a time, so that nothing is left to chance.
    found, expected = 0.0, 0.0
    for direction in metric.inverse_root:
        error = sizes * direction
        found += metric.loss(error, torch.zeros_like(error))
        expected += sum(one.loss(error, torch.zeros_like(error)) for one in ways.values())
    assert found == pytest.approx(expected, rel=1e-4)


def test_weights_follow_gradients_and_doubts() -> None:
    model = Bigram()
    statistics = _collect(model)
    encoder, decoder = find_tables(model)
    frequency = smoothed_frequencies(statistics.token_counts)
    # Of the mean gradient energy nothing is lost: a token of mean gradients keeps its frequency.
    metric = metric_of(model, encoder, statistics)
    assert (metric.weights > 0).all()
    mass = metric.matrix.trace() / statistics.gradients["encoder"].trace()
    assert float(mass) == pytest.approx(1, rel=0.2)
    # A softmax that predicts less than occurs counts by what occurs.
    head = metric_of(model, decoder, statistics)
    mean, square = statistics.probabilities["decoder"], statistics.squared_probabilities["decoder"]
    wanted = torch.maximum(mean, frequency) * (mean - square) / mean
    torch.testing.assert_close(head.predicting, wanted / wanted.sum())
    # Whatever the order of the tokens.
    order = torch.randperm(_VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    energies = {"encoder": statistics.gradient_energies["encoder"][order]}
    permuted = replace(statistics, token_counts=statistics.token_counts[order], gradient_energies=energies)
    torch.testing.assert_close(metric_of(model, encoder, permuted).weights, metric.weights[order])


def test_unseen_tokens_weigh_what_the_model_predicts_of_them() -> None:
    model = Bigram(bias=False)
    statistics = _collect(model)
    decoder = find_tables(model)[1]
    counts = statistics.token_counts.clone()
    rare = counts.argsort()[:20]
    counts[rare] = 0
    unseen = counts == 0
    metric = metric_of(model, decoder, statistics, counts)
    # Half as the model predicts, half in equal parts; twice as much where rows are approximated.
    information = _information(statistics, "decoder")[rare]
    wanted = information + information.mean()
    for weights in (metric.predicting[rare], metric.weights[rare]):
        torch.testing.assert_close(weights / weights.sum(), wanted / wanted.sum())
    expected = float(metric.predicting[unseen].sum())
    assert float(metric.weights[unseen].sum()) == pytest.approx(2 * expected / (1 + expected))
    # Far more than the counts say.
    assert float(metric.weights[unseen].sum()) > 5 * float(smoothed_frequencies(counts)[unseen].sum())
    given = metric_of(model, decoder, statistics, counts, unseen_weight=0.5)
    assert float(given.weights[unseen].sum()) == pytest.approx(0.5)
    torch.testing.assert_close(given.predicting, metric.predicting)
    # Of a softmax whose logits are never computed there are counts alone.
    silent = replace(statistics, probabilities={}, squared_probabilities={})
    torch.testing.assert_close(metric_of(model, decoder, silent, counts).predicting, smoothed_frequencies(counts))
    # What is to be kept weighs as if it had been counted.
    counts[rare[0]] = counts.max()
    kept = metric_of(model, decoder, statistics, counts)
    assert float(kept.weights[rare[0]]) > 3 * float(metric.weights[rare[0]])


def test_the_prediction_is_the_second_order_of_the_loss() -> None:
    """For a head whose words err by themselves, with moments of the very data that the loss is measured on."""
    model = Bigram(bias=False).double()
    # Small logits: one moment for all words leaves out how p (1 - p) goes with the hidden state.
    model.decoder.weight.data.mul_(0.3)
    statistics = collect_statistics(model, _batches(), _loss)
    decoder = find_tables(model)[1]
    hidden = [model.hidden(batch[:-1]) for batch in _batches()]
    logits = torch.cat([part @ model.decoder.weight.T for part in hidden]).detach()
    states = torch.cat(hidden).detach()
    # Counts of as many tokens as the model predicts.
    metric = metric_of(model, decoder, statistics, statistics.probabilities["decoder"] * statistics.num_targets)
    row = int(statistics.token_counts.argmax())
    change = torch.zeros(_VOCAB_SIZE, _DIM, dtype=torch.float64)
    change[row] = 0.01 * torch.randn(_DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # The divergence from what the model predicts, whose first order is zero.
    lost = nn.functional.kl_div(
        (logits - states @ change.T).log_softmax(1), logits.log_softmax(1), log_target=True, reduction="batchmean"
    )
    predicted = metric.loss(model.decoder.weight.detach(), model.decoder.weight.detach() - change)
    assert float(lost) == pytest.approx(predicted, rel=0.3)


@pytest.mark.parametrize("compressed_before", [False, True])
def test_biases_make_up_for_the_mean_error(compressed_before: bool) -> None:
    model = Bigram().eval()
    statistics = _collect(model)
    if compressed_before:
        compress(model, "low_rank", rank=6, tables=["decoder"])
    mean = statistics.hidden_mean["decoder"].float()
    before = model.decoder(mean).detach().clone()
    weight = model.decoder.weight if not compressed_before else model.decoder.factorization.materialize()
    factors = LowRank.decompose(weight.detach(), 900)
    corrections = corrections_of(model, [(["encoder", "decoder"], factors)], statistics)
    add_to_biases(model, corrections)
    bias = bias_of(model, "decoder")
    assert bias is not None
    torch.testing.assert_close(factors.logits(mean) + bias, before, rtol=0, atol=1e-5)
    assert bias_of(model, "encoder") is None


def test_singular_moments_are_floored_and_said(capsys: Any, caplog: Any) -> None:
    model = Bigram(bias=False)
    statistics = Statistics(
        torch.ones(_VOCAB_SIZE),
        hidden={"decoder": torch.diag(torch.tensor([1.0] * 5 + [0.0] * 2 + [-1.0], dtype=torch.float64))},
        hidden_mean={"decoder": torch.zeros(_DIM, dtype=torch.float64)},
    )
    with caplog.at_level("INFO"):
        metric = metric_of(model, find_tables(model)[1], statistics)
    assert metric.floored == 3
    assert "have 3 of 8 eigenvalues" in caplog.text + "".join(capsys.readouterr())
    assert torch.isfinite(metric.inverse_root).all()


def test_statistics_of_another_model_are_refused() -> None:
    model = Bigram()
    other = Statistics(torch.ones(_VOCAB_SIZE + 1), gradients={"encoder": torch.eye(_DIM, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"table 'encoder' \(60, 8\) has 60 rows: they are of another model"):
        metric_of(model, find_tables(model)[0], other)
