"""Perplexity of a compressed model before and after it is fine-tuned, beside the dense one after as many steps.

`pytest tests/benchmarks/test_finetuning.py -s --benchmark-only`: a quarter of an hour a row on one core; `-k` chooses
rows, such as `-k "dense or transform_coding"`. All rows take the same batches, optimizer and schedule.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from finetuning import linear, trainer_of
from torch.utils.data import DataLoader

from lightning_embcompress.compression.plan import compress, plan_of
from lightning_embcompress.methods.registry import Quantization
from lightning_embcompress.modules import CompressedLanguageModel, LSTMLanguageModel
from lightning_embcompress.quantization.aware import convert_qat, prepare_qat

pytestmark = pytest.mark.timeout(7200)

BATCH_SIZE = 40
LEARNING_RATE = 2e-4
STEPS = int(os.environ.get("EMBCOMPRESS_FINETUNING_STEPS", "600"))
TABLES = ["encoder", "decoder"]


@dataclass(frozen=True)
class Row:
    """A way to a small model.

    Attributes:
        method: Of `compress`; None for the tables as they are.
        ratio: Of `compress`.
        options: Of the method.
        bits: Of the factors while they train and afterwards; None for those that the method has.
        group_size: Of their scales.
        statistics: Whether the metric of the loss is used.
        distilled: Weight of what the dense model teaches, and the rest that of the text; the published recipe has only
            the text.
        rate: Learning rate of the factors.
        most: What the perplexity may be above that of the dense model after as many steps.
    """

    method: str | None = None
    ratio: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    bits: int | None = None
    group_size: int = 32
    statistics: bool = False
    distilled: float = 0.0
    rate: float = 2e-4
    most: float | None = None


def ours(ratio: float, rate: float, most: float, distilled: float = 0.5) -> Row:
    return Row("transform_coding", ratio, statistics=True, distilled=distilled, rate=rate, most=most)


def published(ratio: float, bits: int | None) -> Row:
    return Row("group_reduce", ratio, {"groups": 20}, bits)


ROWS = {
    "dense": Row(),
    "dense-distilled": Row(distilled=0.5),
    # The fewer numbers are left, the more each of them has to make up for.
    "transform_coding-4x": ours(4, 2e-5, 0.0),
    "transform_coding-20x": ours(20, 2e-5, 0.0),
    "transform_coding-40x": ours(40, 2e-5, 0.005),
    "transform_coding-80x": ours(80, 1e-4, 0.02),
    "transform_coding-128x": ours(128, 1e-4, 0.05, distilled=0.25),
    "published-5x-int8": published(5.2, 8),
    "published-10x-int4": published(11.5, 4),
    "integers-int4": Row(bits=4),
    "integers-int3": Row(bits=3),
    "integers-int2": Row(bits=2),
}


def train(model: LSTMLanguageModel, teacher: LSTMLanguageModel, batches: list[Any], row: Row) -> float:
    """Train for `STEPS` steps; gives seconds a step."""
    torch.manual_seed(0)
    module = CompressedLanguageModel(
        model,
        teacher=teacher if row.distilled else None,
        cross_entropy_weight=1 - row.distilled,
        distillation_weight=row.distilled,
        optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE),
        factor_learning_rate=row.rate,
        lr_scheduler=partial(linear, steps=STEPS),
        lr_scheduler_interval="step",
        frequency_bands=False,
    )
    trainer = trainer_of(STEPS)
    start = time.perf_counter()
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return (time.perf_counter() - start) / STEPS


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return {}


@pytest.mark.parametrize("name", ROWS)
def test_finetuning(benchmark: Any, wikitext: Any, found: dict[str, float], name: str, request: Any) -> None:
    row = ROWS[name]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    batches = wikitext.windows("train", BATCH_SIZE, STEPS)
    dense, model = wikitext.model(), wikitext.model().train()
    dense_bytes = sum(model.get_submodule(path).get_parameter("weight").nbytes for path in TABLES)
    values: dict[str, float] = {}

    def run() -> None:
        values["dense"] = wikitext.perplexity(dense)
        if row.method is not None:
            known = request.getfixturevalue("statistics") if row.statistics else None
            compress(model, row.method, ratio=row.ratio, token_counts=wikitext.counts, statistics=known, **row.options)
        if row.bits is not None or row.method == "transform_coding":
            quantization = Quantization(row.bits or 8, row.group_size)
            prepare_qat(model, quantization, TABLES if row.method is None else "auto")
        values["before"] = wikitext.perplexity(model)
        model.train()
        values["seconds"] = train(model, wikitext.model(), batches, row)
        if any(factors.is_prepared for factors in factorizations(model)):
            convert_qat(model)
        values["after"] = wikitext.perplexity(model)

    benchmark.pedantic(run, rounds=1)
    plan = plan_of(model)
    ratio = dense_bytes / plan.stored_bytes if plan.tables else 1.0
    benchmark.extra_info.update(values, ratio=ratio)
    before, after = values["before"] / values["dense"] - 1, values["after"] / values["dense"] - 1
    found[name] = values["after"]
    sys.stdout.write(
        f"\n  {name}: {ratio:.2f}x, dense {values['dense']:.2f}, before {values['before']:.2f} ({before:+.2%}), after "
        f"{STEPS} steps {values['after']:.2f} ({after:+.2%}), {values['seconds']:.2f} s a step"
    )
    if "dense" in found:
        sys.stdout.write(f"; {values['after'] / found['dense'] - 1:+.2%} of dense after as many")
        if row.most is not None:
            assert values["after"] <= (1 + row.most) * found["dense"]
    sys.stdout.write("\n")
    sys.stdout.flush()


def factorizations(model: LSTMLanguageModel) -> list[Any]:
    layers = [model.get_submodule(path) for path in TABLES]
    return [layer.factorization for layer in layers if hasattr(layer, "factorization")]
