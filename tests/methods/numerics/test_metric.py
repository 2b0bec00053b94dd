"""The metric of the loss against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies
from toys import normal


def _moment(dim: int, rows: int, seed: int = 0) -> Tensor:
    states = normal(rows, dim, seed=seed)
    return states.T @ states / rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_the_weighted_quadratic_form(dtype: torch.dtype) -> None:
    weight, other = normal(50, 6).to(dtype), normal(50, 6, seed=1).to(dtype)
    metric = Metric(_moment(6, 100), smoothed_frequencies(torch.arange(50)))
    change = weight.double() - other.double()
    wanted = 0.5 * float(torch.einsum("i,ij,jk,ik->", metric.weights, change, metric.matrix, change))
    rel = 1e-12 if dtype == torch.float64 else 1e-5
    assert metric.loss(weight, other) == pytest.approx(wanted, rel=rel)
    assert metric.loss(weight, lambda rows: other[rows]) == pytest.approx(wanted, rel=rel)
    assert metric.loss(weight, weight) == 0


def test_roots() -> None:
    metric = Metric(_moment(6, 100), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(metric.root @ metric.root, metric.matrix)
    torch.testing.assert_close(metric.root @ metric.inverse_root, torch.eye(6, dtype=torch.float64))
    assert metric.floored == 0


def test_singular_and_indefinite_moments_are_floored_and_counted() -> None:
    weights = torch.ones(2, dtype=torch.float64)
    turn = torch.linalg.qr(normal(6, 6)).Q
    values = torch.tensor([4.0, 1.0, 1e-3, 1e-9, 0.0, -2.0], dtype=torch.float64)
    metric = Metric(turn @ values.diag() @ turn.T, weights)
    assert metric.floored == 3
    found = torch.linalg.eigvalsh(metric.root @ metric.root).flip(0)
    torch.testing.assert_close(found, values.clamp(min=4e-6), rtol=0, atol=1e-12)
    assert metric.inverse_root.isfinite().all()
    # Fewer states than dimensions.
    assert Metric(_moment(6, 2), weights).floored == 4


@pytest.mark.parametrize("matrix", [torch.zeros(3, 3), -torch.eye(3)])
def test_directions_of_which_nothing_is_known_count_the_same(matrix: Tensor) -> None:
    metric = Metric(matrix, torch.ones(2))
    assert metric.floored == 3
    torch.testing.assert_close(metric.root, torch.eye(3, dtype=torch.float64))


def test_metric_of_some_columns() -> None:
    metric = Metric(_moment(6, 100), smoothed_frequencies(torch.arange(5)))
    change = normal(5, 6)
    change[:, :2] = 0
    part = metric.restricted(slice(2, 6))
    assert part.loss(change[:, 2:], torch.zeros(5, 4)) == pytest.approx(metric.loss(change, torch.zeros(5, 6)))


@pytest.mark.parametrize(
    "counts", [[0, 10**9, 3], [0, 0, 0, 0], [0, 1, 1, 0], [5.0, 0.0], [0.2, 0.5, 0.3, 0.0], [7, 1]]
)
def test_smoothed_frequencies(counts: list[float]) -> None:
    """Never zero, in the order of the counts, and 1 in total; a token that is not counted is below all that are."""
    tensor = torch.tensor(counts)
    found = smoothed_frequencies(tensor)
    assert float(found.sum()) == pytest.approx(1, abs=1e-15)
    assert (found > 0).all()
    order = tensor.argsort(stable=True)
    assert (found[order].diff() >= 0).all()
    seen = tensor > 0
    torch.testing.assert_close(found[seen] / found[seen].sum(), tensor[seen].double() / tensor.sum(dtype=torch.float64))


@pytest.mark.parametrize("length", [5_000, 20_000])
def test_unseen_tokens_weigh_what_the_next_text_has_of_them(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    chances = 1 / torch.arange(1, 20_001, dtype=torch.float64)
    text, following = (chances.multinomial(length, replacement=True, generator=generator) for _ in range(2))
    counts = torch.bincount(text, minlength=len(chances))
    expected = float(smoothed_frequencies(counts)[counts == 0].sum())
    assert expected == pytest.approx(float((counts[following] == 0).double().mean()), rel=0.2)
    # One occurrence for every token would be much more.
    assert expected < 0.7 * float((counts == 0).sum() / (counts.sum() + len(counts)))


def test_weight_of_unseen_tokens() -> None:
    counts = torch.tensor([0, 8, 1, 0, 4])
    found = smoothed_frequencies(counts, 0.3)
    assert float(found[counts == 0].sum()) == pytest.approx(0.3)
    torch.testing.assert_close(found[1:3] / found[4], torch.tensor([2.0, 0.25], dtype=torch.float64))
    # Nothing to share with.
    for counts in (torch.zeros(4), torch.ones(4)):
        torch.testing.assert_close(smoothed_frequencies(counts, 0.3), torch.full((4,), 0.25, dtype=torch.float64))
