"""Perplexity of a trained model at equal stored bytes, without retraining.

`pytest tests/benchmarks/test_quality.py -s --benchmark-only`: about half an hour on two cores, most of it for the
k-means of product quantization and for measuring; `-k "quantized or within"` takes a few minutes.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.methods.registry import Quantization
from lightning_embcompress.quantization.aware import quantize_tables

pytestmark = pytest.mark.timeout(3600)

STREAMS, STEPS, WINDOWS = 40, 35, 40

PAPER = {
    f"group_reduce paper, {groups} groups, {rounds} rounds": (
        "group_reduce",
        {"groups": groups, "refine_rounds": rounds},
    )
    for groups in (5, 10, 20)
    for rounds in (0, 5)
}
OTHERS = {
    "low_rank": ("low_rank", {}),
    "weighted_low_rank": ("weighted_low_rank", {}),
    "group_reduce paper, k-means": ("group_reduce", {"groups": 20, "grouping": "kmeans"}),
    "tensor_train_matrix": ("tensor_train_matrix", {}),
    "product_quantization": ("product_quantization", {}),
}
OURS = {
    "group_reduce loss": ("shared_basis", {}),
    "product_quantization, metric": ("product_quantization", {}),
    "transform_coding": ("transform_coding", {}),
}


class Model(nn.Module):
    def __init__(self, vocab_size: int, dim: int, layers: int) -> None:
        super().__init__()
        self.encoder = nn.Embedding(vocab_size, dim)
        self.lstm = nn.LSTM(dim, dim, layers)
        self.decoder = nn.Linear(dim, vocab_size)


@dataclass
class Problem:
    model: Model
    counts: Tensor
    text: Tensor
    statistics: Statistics
    dense: float

    def say(self, name: str, ratio: float, value: float, more: str = "") -> float:
        sys.stdout.write(f"  {ratio:6.2f}x {name}: {value:.2f} ({value / self.dense - 1:+.2%}){more}\n")
        sys.stdout.flush()
        return value / self.dense - 1

    def excess(self, name: str, method: str, ratio: float, statistics: Statistics | None, **options: Any) -> float:
        smaller = copy.deepcopy(self.model)
        start = time.perf_counter()
        plan = compress(smaller, method, ratio=ratio, token_counts=self.counts, statistics=statistics, **options)
        taken = time.perf_counter() - start
        assert plan.ratio >= ratio
        value = perplexity(smaller, self.text)
        predicted = "" if plan.predicted_loss is None else f", predicted {plan.predicted_loss:.4f}"
        more = f", {taken:.1f} s{predicted}, measured {math.log(value / self.dense):.4f} nats"
        return self.say(name, plan.ratio, value, more)


@torch.no_grad()
def perplexity(model: nn.Module, text: Tensor) -> float:
    state, total, count = None, 0.0, 0
    for start in range(0, len(text) - 1, STEPS):
        targets = text[start + 1 : start + 1 + STEPS]
        hidden, state = model.lstm(model.encoder(text[start : start + len(targets)]), state)
        logits = model.decoder(hidden)
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    return math.exp(total / count)


class _Loss:
    """The mean loss of windows that follow each other."""

    state: Any = None

    def __call__(self, model: Model, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        hidden, state = model.lstm(model.encoder(inputs), self.state)
        self.state = tuple(part.detach() for part in state)
        return nn.functional.cross_entropy(model.decoder(hidden.flatten(0, 1)), targets.flatten())


@pytest.fixture(scope="module")
def problem(wikitext: Any) -> Iterator[Problem]:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    config, counts = wikitext.saved["config"], wikitext.counts
    model = Model(config["vocab_size"], config["dim"], config["layers"]).eval()
    model.load_state_dict(wikitext.state_dict)
    train = wikitext.streams("train", 20)
    starts = range(0, 200 * STEPS, STEPS)
    batches = [(train[start : start + STEPS], train[start + 1 : start + STEPS + 1]) for start in starts]
    start = time.perf_counter()
    statistics = collect_statistics(model, batches, _Loss(), token_counts=counts)
    taken = time.perf_counter() - start
    text = wikitext.streams("valid", STREAMS)[: STEPS * WINDOWS]
    dense = perplexity(model, text)
    sys.stdout.write(f"\n{text.numel()} tokens of validation text, dense {dense:.2f}; statistics in {taken:.0f} s\n")
    yield Problem(model, counts, text, statistics, dense)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("ratio", [4.0, 8.0, 16.0])
def test_equal_bytes(benchmark: Any, problem: Problem, ratio: float) -> None:
    found: dict[str, float] = {}

    def run() -> None:
        for name, (method, options) in (PAPER | OTHERS).items():
            found[name] = problem.excess(name, method, ratio, None, **options)
        for name, (method, options) in OURS.items():
            found[name] = problem.excess(name, method, ratio, problem.statistics, **options)

    benchmark.pedantic(run, rounds=1)
    baseline = min(found[name] for name in PAPER)
    sys.stdout.write(f"  at {ratio}x, of the best published setting's excess ({baseline:.2%}): ")
    sys.stdout.write(", ".join(f"{name} {found[name] / baseline:.3f}" for name in OURS) + "\n")
    assert found["transform_coding"] < baseline / 6
    assert found["group_reduce loss"] < baseline / 2
    assert all(found["transform_coding"] < found[name] + 1e-3 for name in PAPER | OTHERS)


def test_quantized_factors(benchmark: Any, problem: Problem) -> None:
    wanted = {20.0: 0.008, 40.0: 0.02, 60.0: 0.04, 80.0: 0.055}
    found: dict[float, float] = {}
    rounded: dict[float, float] = {}

    def run() -> None:
        for bits in (4, 3, 2):
            smaller = copy.deepcopy(problem.model)
            ratio = quantize_tables(smaller, Quantization(bits, group_size=32), ["encoder", "decoder"]).ratio
            rounded[ratio] = problem.say(f"int{bits} of the dense tables", ratio, perplexity(smaller, problem.text))
            found[ratio] = problem.excess("transform_coding", "transform_coding", ratio, problem.statistics)
        for ratio in wanted:
            found[ratio] = problem.excess("transform_coding", "transform_coding", ratio, problem.statistics)

    benchmark.pedantic(run, rounds=1)
    assert all(found[ratio] <= most for ratio, most in wanted.items())
    assert all(found[ratio] <= other + 1e-4 for ratio, other in rounded.items())


def test_within_a_loss(benchmark: Any, problem: Problem) -> None:
    smaller = copy.deepcopy(problem.model)

    def evaluate(model: nn.Module) -> float:
        return perplexity(model, problem.text)

    def run() -> None:
        plan = compress(
            smaller, "transform_coding", max_perplexity_increase="1%", statistics=problem.statistics, evaluate=evaluate
        )
        excess = problem.say("max_perplexity_increase 1%", plan.ratio, evaluate(smaller))
        assert 0.008 <= excess <= 0.01

    benchmark.pedantic(run, rounds=1)
