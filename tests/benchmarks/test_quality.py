"""Perplexity of a trained model at equal stored bytes, without retraining.

`pytest tests/benchmarks/test_quality.py -s --benchmark-only`: about half an hour on two cores, most of it for the
k-means of product quantization and for measuring; `-k "quantized or within"` takes a few minutes.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from measure import threads

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.methods.registry import Quantization
from lightning_embcompress.modules import LSTMLanguageModel
from lightning_embcompress.quantization.aware import quantize_tables

pytestmark = pytest.mark.timeout(3600)

PAPER = {
    f"group_reduce, {groups} groups, {rounds} rounds": (
        "group_reduce",
        {"groups": groups, "refine_rounds": rounds},
    )
    for groups in (5, 10, 20)
    for rounds in (0, 5)
}
OTHERS = {
    "low_rank": ("low_rank", {}),
    "weighted_low_rank": ("weighted_low_rank", {}),
    "group_reduce, k-means": ("group_reduce", {"groups": 20, "grouping": "kmeans"}),
    "tensor_train_matrix": ("tensor_train_matrix", {}),
    "product_quantization": ("product_quantization", {}),
}
OURS = {
    "shared_basis": ("shared_basis", {}),
    "product_quantization, metric": ("product_quantization", {}),
    "transform_coding": ("transform_coding", {}),
}


@dataclass
class Problem:
    wikitext: Any
    model: LSTMLanguageModel
    statistics: Statistics
    dense: float

    def say(self, name: str, ratio: float, value: float, more: str = "") -> float:
        sys.stdout.write(f"  {ratio:6.2f}x {name}: {value:.2f} ({value / self.dense - 1:+.2%}){more}\n")
        sys.stdout.flush()
        return value / self.dense - 1

    def excess(self, name: str, method: str, ratio: float, statistics: Statistics | None, **options: Any) -> float:
        smaller = copy.deepcopy(self.model)
        start = time.perf_counter()
        plan = compress(
            smaller, method, ratio=ratio, token_counts=self.wikitext.counts, statistics=statistics, **options
        )
        taken = time.perf_counter() - start
        assert plan.ratio >= ratio
        value = self.wikitext.perplexity(smaller)
        predicted = "" if plan.predicted_loss is None else f", predicted {plan.predicted_loss:.4f}"
        more = f", {taken:.1f} s{predicted}, measured {math.log(value / self.dense):.4f} nats"
        return self.say(name, plan.ratio, value, more)


@pytest.fixture(scope="module")
def problem(wikitext: Any, statistics: Statistics) -> Iterator[Problem]:
    with threads():
        model = wikitext.model()
        dense = wikitext.perplexity(model)
        print(f"\n56,000 tokens of validation text, dense {dense:.2f}")
        yield Problem(wikitext, model, statistics, dense)


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
    assert found["shared_basis"] < baseline / 2
    assert all(found["transform_coding"] < found[name] + 1e-3 for name in PAPER | OTHERS)


def test_quantized_factors(benchmark: Any, problem: Problem) -> None:
    wanted = {20.0: 0.008, 40.0: 0.02, 60.0: 0.04, 80.0: 0.055}
    found: dict[float, float] = {}
    rounded: dict[float, float] = {}

    def run() -> None:
        for bits in (4, 3, 2):
            smaller = copy.deepcopy(problem.model)
            ratio = quantize_tables(smaller, Quantization(bits, group_size=32), ["encoder", "decoder"]).ratio
            rounded[ratio] = problem.say(f"int{bits} of the dense tables", ratio, problem.wikitext.perplexity(smaller))
            found[ratio] = problem.excess("transform_coding", "transform_coding", ratio, problem.statistics)
        for ratio in wanted:
            found[ratio] = problem.excess("transform_coding", "transform_coding", ratio, problem.statistics)

    benchmark.pedantic(run, rounds=1)
    assert all(found[ratio] <= most for ratio, most in wanted.items())
    assert all(found[ratio] <= other + 1e-4 for ratio, other in rounded.items())


def test_within_a_loss(benchmark: Any, problem: Problem) -> None:
    smaller = copy.deepcopy(problem.model)

    def run() -> None:
        plan = compress(
            smaller,
            "transform_coding",
            max_perplexity_increase="1%",
            statistics=problem.statistics,
            evaluate=problem.wikitext.perplexity,
        )
        excess = problem.say("max_perplexity_increase 1%", plan.ratio, problem.wikitext.perplexity(smaller))
        assert 0.008 <= excess <= 0.01

    benchmark.pedantic(run, rounds=1)
