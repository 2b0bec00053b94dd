"""Budgets in units of the loss: shared between tables, or given as a loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.plan import Plan, compress, plan_of
from lightning_embcompress.compression.search import smallest_within
from lightning_embcompress.compression.tasks import Tasks
from lightning_embcompress.compression.tasks import plan as planned
from lightning_embcompress.methods.registry import SharedBasisBlocks, TransformCodingConfig, get_config

_VOCAB_SIZE, _DIM = 600, 24


class Model(nn.Module):
    """Trained for a moment on text in which a third of the words never occur."""

    def __init__(self, tied: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Embedding(_VOCAB_SIZE, _DIM)
        self.backbone = nn.Sequential(nn.Linear(_DIM, _DIM), nn.Tanh())
        self.decoder = nn.Linear(_DIM, _VOCAB_SIZE, bias=bias)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.backbone(self.encoder(ids)))
        return logits


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch[:-1]), batch[1:])


def _text(length: int, seed: int) -> Tensor:
    """Words by Zipf's law, each likely to be followed by one of a few."""
    generator = torch.Generator().manual_seed(seed)
    used = 2 * _VOCAB_SIZE // 3
    words = (used ** torch.rand(length, generator=generator)).long().clamp(max=used - 1)
    follows = torch.rand(length, generator=generator) < 0.5
    for place in range(1, length):
        if follows[place]:
            words[place] = (7 * words[place - 1] + 3) % used
    return words


def _batches(seed: int, count: int = 8) -> list[Tensor]:
    return list(_text(count * 400, seed).split(400))


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    def train(model: Model) -> tuple[dict[str, Any], Statistics]:
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        for _ in range(12):
            for batch in _batches(1):
                optimizer.zero_grad()
                _loss(model, batch).backward()
                optimizer.step()
        return model.state_dict(), collect_statistics(model, _batches(1), _loss)

    return {"untied": train(Model()), "tied": train(Model(tied=True, bias=False))}


def _model(trained: dict[str, Any], tied: bool = False) -> tuple[Model, Statistics]:
    model = Model(tied=tied, bias=not tied).eval()
    state, statistics = trained["tied" if tied else "untied"]
    model.load_state_dict(state)
    return model, statistics


@torch.no_grad()
def _perplexity(model: nn.Module) -> float:
    losses = [float(_loss(model, batch)) for batch in _batches(2, 4)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("method", ["transform_coding", "weighted_low_rank"])
def test_one_budget_for_all_tables(trained: dict[str, Any], method: str) -> None:
    model, statistics = _model(trained)
    plan = compress(model, method, ratio=3, statistics=statistics)
    assert plan.stored_bytes <= plan.dense_bytes / 3
    assert plan.ratio < 3.6
    assert plan.predicted_loss is not None
    assert 0 < plan.predicted_loss == sum(table.predicted_loss or 0 for table in plan.tables)
    # The plan says how it was found, and is what it was after a round trip.
    assert Plan.from_dict(plan.to_dict()) == plan == plan_of(model)
    # Shares differ: the two tables are not worth the same.
    tasks = planned(_model(trained)[0], get_config(method), Budget(ratio=3), statistics=statistics)
    first, second = (task.max_bytes for task in tasks)
    assert first != second


def test_sharing_is_better_than_equal_ratios(trained: dict[str, Any]) -> None:
    model, statistics = _model(trained)
    shared = compress(model, "transform_coding", ratio=6, statistics=statistics)
    model, _ = _model(trained)
    parts = [
        compress(model, "transform_coding", ratio=6, tables=[name], statistics=statistics)
        for name in ("encoder", "decoder")
    ]
    equal = sum(table.predicted_loss or 0 for table in parts[-1].tables)
    assert shared.predicted_loss is not None
    assert shared.predicted_loss < equal


@pytest.mark.parametrize("method", ["transform_coding", "shared_basis"])
def test_more_bytes_never_lose_more(trained: dict[str, Any], method: str) -> None:
    found = []
    for ratio in (16, 8, 4, 2):
        model, statistics = _model(trained)
        plan = compress(model, method, ratio=ratio, statistics=statistics)
        found.append((plan.predicted_loss or 0.0, _perplexity(model)))
    predicted, measured = zip(*found, strict=True)
    assert list(predicted) == sorted(predicted, reverse=True)
    assert all(after <= 1.005 * before for before, after in zip(measured, measured[1:], strict=False))


def test_the_metric_of_the_loss_beats_the_published_algorithm(trained: dict[str, Any]) -> None:
    model, statistics = _model(trained)
    dense = _perplexity(model)
    excess = {}
    for method in ("group_reduce", "shared_basis"):
        model, _ = _model(trained)
        plan = compress(model, method, ratio=6, groups=5, statistics=statistics, token_counts=statistics.token_counts)
        assert plan.ratio >= 6
        excess[method] = _perplexity(model) / dense - 1
    assert excess["shared_basis"] < 0.7 * excess["group_reduce"]


def test_words_that_never_occur_do_not_flood_the_softmax(trained: dict[str, Any]) -> None:
    model, statistics = _model(trained)
    unseen = statistics.token_counts == 0
    assert unseen.sum() >= _VOCAB_SIZE // 3

    def mass(model: nn.Module) -> float:
        with torch.no_grad():
            probabilities = torch.cat([model(batch).softmax(1) for batch in _batches(2, 2)])
        return float(probabilities[:, unseen].sum(1).mean())

    before, dense = mass(model), _perplexity(model)
    compress(model, "transform_coding", ratio=6, statistics=statistics)
    assert mass(model) < before + 0.01
    assert _perplexity(model) < 1.1 * dense


def test_the_result_does_not_depend_on_the_order_of_rows(trained: dict[str, Any]) -> None:
    model, statistics = _model(trained)
    order = torch.randperm(_VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    other, _ = _model(trained)
    with torch.no_grad():
        for tensor in (other.encoder.weight, other.decoder.weight, other.decoder.bias):
            tensor.copy_(tensor[order])
    place = torch.empty_like(order)
    place[order] = torch.arange(_VOCAB_SIZE)
    permuted = collect_statistics(other, [place[batch] for batch in _batches(1)], _loss)
    plan = compress(model, "transform_coding", ratio=8, statistics=statistics)
    same = compress(other, "transform_coding", ratio=8, statistics=permuted)
    assert same.predicted_loss == pytest.approx(plan.predicted_loss, rel=0.01)
    assert same.stored_bytes == pytest.approx(plan.stored_bytes, rel=0.01)
    again, _ = _model(trained)
    assert compress(again, "transform_coding", ratio=8, statistics=statistics) == plan


def test_automatic_method_takes_the_least_predicted_loss(trained: dict[str, Any]) -> None:
    model, statistics = _model(trained)
    plan = compress(model, "auto", ratio=8, statistics=statistics)
    assert plan.ratio >= 8
    least = plan.predicted_loss
    assert least is not None
    for method in ("transform_coding", "shared_basis", "product_quantization"):
        other, _ = _model(trained)
        found = compress(other, method, ratio=8, statistics=statistics).predicted_loss
        # Those with floats share the budget otherwise.
        assert least <= 1.1 * (found or 0.0)
    assert all(table.method in ("transform_coding", "shared_basis") for table in plan.tables)


def test_tied_tables_are_untied_only_if_that_loses_less(trained: dict[str, Any]) -> None:
    losses = {}
    for tie in ("keep", "untie", "auto"):
        model, statistics = _model(trained, tied=True)
        plan = compress(model, "transform_coding", ratio=6, tie=tie, statistics=statistics)
        assert plan.stored_bytes <= plan.dense_bytes / 6
        losses[tie] = plan.predicted_loss or 0.0
    assert losses["auto"] == min(losses["keep"], losses["untie"])


@pytest.mark.parametrize("method", ["transform_coding", "shared_basis"])
def test_smallest_model_within_a_loss(trained: dict[str, Any], method: str) -> None:
    model, statistics = _model(trained)
    dense = _perplexity(model)
    plan = compress(model, method, max_perplexity_increase="2%", statistics=statistics, evaluate=_perplexity)
    # Of so few words the perplexity does not quite fall with the size.
    assert 0.008 <= _perplexity(model) / dense - 1 <= 0.02
    assert plan.ratio > 1.5


def test_a_limit_that_cannot_be_met_reports_the_best_and_changes_nothing(trained: dict[str, Any]) -> None:
    model, statistics = _model(trained)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def evaluate(model: nn.Module) -> float:
        return 10.0 if isinstance(model.encoder, nn.Embedding) else 11.0

    with pytest.raises(ValueError, match=r"the perplexity grows by 10.00% at least .* above the limit of 1.00%"):
        compress(model, "transform_coding", max_perplexity_increase=0.01, statistics=statistics, evaluate=evaluate)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_search_is_quick(trained: dict[str, Any]) -> None:
    model, statistics = _model(trained)
    limit = Budget(max_perplexity_increase="1%")
    tasks = planned(model, TransformCodingConfig(), limit, statistics=statistics)
    for factor, power in ((1.0, 1.0), (3.0, 1.0), (0.2, 1.3)):
        calls: list[int] = []

        def measure(sized: Tasks, calls: list[int] = calls, law: Any = (factor, power)) -> tuple[float, Any]:
            calls.append(sized.max_bytes)
            return float(law[0] * tasks.loss_at(calls[-1]) ** law[1]), sized

        found, measured = smallest_within(0.01, tasks, measure)
        assert 0.008 <= measured <= 0.01
        assert len(calls) <= 6
        assert found.max_bytes in calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_perplexity_increase": "1%"}, "max_perplexity_increase needs statistics"),
        ({"method": "auto", "ratio": 4}, "method='auto' minimises what the loss grows by"),
        ({"method": "low_rank", "max_perplexity_increase": "1%"}, "max_perplexity_increase cannot be predicted"),
        ({"max_perplexity_increase": -1}, "max_perplexity_increase must be an increase of the perplexity"),
    ],
)
def test_requests_that_cannot_be_met(arguments: dict[str, Any], message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        compress(model, **arguments)
    assert not plan_of(model).tables


def test_floats_and_codes_are_what_their_names_say(trained: dict[str, Any]) -> None:
    model, statistics = _model(trained)
    compress(model, "shared_basis", ratio=4, statistics=statistics)
    assert isinstance(model.encoder.factorization, SharedBasisBlocks)
    assert not model.encoder.factorization.is_coded
    model, _ = _model(trained)
    compress(model, "transform_coding", ratio=8, bits=4, statistics=statistics)
    assert model.decoder.factorization.widths == [4]


def test_weight_of_unseen_tokens(trained: dict[str, Any]) -> None:
    def errors(unseen_weight: float | None) -> tuple[float, float]:
        model, statistics = _model(trained)
        before = model.decoder.weight.detach().clone()
        compress(model, "transform_coding", ratio=10, statistics=statistics, unseen_weight=unseen_weight)
        lost = (model.decoder.factorization.materialize() - before).square().sum(dim=1)
        unseen = statistics.token_counts == 0
        return float(lost[unseen].sum()), float(lost[~unseen].sum())

    little, much = errors(0.001), errors(0.9)
    assert much[0] < 0.9 * little[0]
    assert little[1] < 0.9 * much[1]
    model, statistics = _model(trained)
    for wrong in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="unseen_weight"):
            compress(model, "transform_coding", ratio=10, statistics=statistics, unseen_weight=wrong)
    # Rows are weighted as published there.
    with pytest.raises(ValueError, match=r"unseen_weight=0.2 .* 'weighted_low_rank'"):
        compress(model, "weighted_low_rank", ratio=4, token_counts=statistics.token_counts, unseen_weight=0.2)
    assert isinstance(model.encoder, nn.Embedding)
    compress(model, "transform_coding", ratio=10, token_counts=statistics.token_counts, unseen_weight=0.2)
