"""A pretrained language model at 2 bits per weight of its table, trained on, beside the dense one after as many steps.

`EMBCOMPRESS_PRETRAINED=DIRECTORY pytest tests/benchmarks/test_finetuning_pretrained.py -s --benchmark-only`, where the
directory holds a causal language model of transformers and its tokenizer; `EMBCOMPRESS_STATISTICS=FILE` for statistics
that are collected already, `EMBCOMPRESS_FINETUNING_STEPS` for more steps of 512 tokens than 300. All rows take the
same batches, optimizer and schedule, and the last one half of its loss from the dense model as it was; perplexity is
measured on text like that of training, and on news.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import linear, trainer_of
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.compression.plan import compress, plan_of
from lightning_embcompress.methods.registry import Quantization
from lightning_embcompress.modules import CompressedLanguageModel
from lightning_embcompress.quantization.aware import convert_qat, prepare_qat

pytestmark = pytest.mark.timeout(4 * 3600)

SHARED = Path(__file__).parents[3] / "shared" / "data"
PRETRAINED = os.environ.get("EMBCOMPRESS_PRETRAINED")
STEPS = int(os.environ.get("EMBCOMPRESS_FINETUNING_STEPS", "300"))
BLOCK, BATCH, COUNTED = 512, 1, 16_384
BITS = 2.0
BACKBONE_RATE, FACTOR_RATE = 2e-5, 2e-5
# How much of the loss is distillation.
ROWS = {"dense": 0.0, "compressed": 0.0, "distilled": 0.5}
# Text like that of training, and news: files and how many of their tokens are measured.
TEXTS = {
    "wikitext": ("wikitext-2/valid.txt", 16_384),
    "news": ("lm1b/heldout-monolingual.tokenized.shuffled/news.en.heldout-test", 8_192),
}


class Text:
    """Blocks of tokens of the texts."""

    def __init__(self, directory: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.measured = {name: self._ids(file, count) for name, (file, count) in TEXTS.items()}
        self.trained = self._ids("wikitext-2/train.txt", max(COUNTED, STEPS * BATCH * BLOCK))

    def _ids(self, file: str, count: int) -> Tensor:
        """The first of a file."""
        # No token has so many characters on average.
        text = (SHARED / file).read_text(encoding="utf-8")[: 8 * count].replace(" <unk>", " unk")
        ids = torch.tensor(self._tokenizer(text).input_ids[:count])
        assert len(ids) == count
        return ids

    def batches(self) -> list[dict[str, Tensor]]:
        blocks = self.trained[: STEPS * BATCH * BLOCK].view(STEPS, BATCH, BLOCK)
        return [{"input_ids": ids, "labels": ids} for ids in blocks]

    @torch.no_grad()
    def losses(self, model: Any, name: str) -> Tensor:
        """Mean loss in nats of every block of a text."""
        model.eval()
        blocks = self.measured[name].split(BLOCK)
        return torch.tensor([model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in blocks]).double()


class StepTimes(Callback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        if trainer.global_step % 50 == 0:
            sys.stdout.write(f"  step {trainer.global_step}: {sum(self.seconds[-50:]) / 50:.2f} s a step\n")
            sys.stdout.flush()


@pytest.fixture(scope="module")
def text() -> Text:
    if PRETRAINED is None:
        pytest.skip("EMBCOMPRESS_PRETRAINED names no directory of a pretrained model")
    if not (SHARED / "wikitext-2" / "train.txt").is_file():
        pytest.skip(f"no text in {SHARED}")
    return Text(PRETRAINED)


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Tensor]:
    return {}


def pretrained() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(PRETRAINED, dtype=torch.float32)


def statistics(model: Any, text: Text) -> Statistics:
    file = os.environ.get("EMBCOMPRESS_STATISTICS")
    if file is not None:
        return Statistics.load(file)
    blocks = text.trained[:COUNTED].view(-1, 1, BLOCK)
    return collect_statistics(model, [{"input_ids": ids, "labels": ids} for ids in blocks])


@pytest.mark.parametrize("row", ROWS)
def test_training_on(benchmark: Any, text: Text, found: dict[tuple[str, str], Tensor], row: str) -> None:
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    model, is_compressed, share, times = pretrained(), row != "dense", ROWS[row], StepTimes()
    found |= {(name, "as it is"): text.losses(model, name) for name in TEXTS if (name, "as it is") not in found}

    def run() -> None:
        if is_compressed:
            compress(model, "transform_coding", bits_per_weight=BITS, statistics=statistics(model, text))
            found.update({(name, "compressed"): text.losses(model, name) for name in TEXTS})
            prepare_qat(model, Quantization(8))
        torch.manual_seed(0)
        module = CompressedLanguageModel(
            model.train(),
            teacher=pretrained() if share else None,
            cross_entropy_weight=1 - share,
            distillation_weight=share,
            optimizer=partial(torch.optim.AdamW, lr=BACKBONE_RATE, weight_decay=0.0),
            factor_learning_rate=FACTOR_RATE,
            lr_scheduler=partial(linear, steps=STEPS),
            lr_scheduler_interval="step",
            frequency_bands=False,
        )
        trainer = trainer_of(STEPS, times)
        trainer.fit(module, DataLoader(text.batches(), batch_size=None))
        if is_compressed:
            convert_qat(model)
        found.update({(name, f"{row}, trained"): text.losses(model, name) for name in TEXTS})

    benchmark.pedantic(run, rounds=1)
    middle = sorted(times.seconds)[len(times.seconds) // 2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    stored = f"{plan_of(model).bits_per_weight:.2f} bits per weight, " if is_compressed else ""
    sys.stdout.write(f"\n  {row}: {stored}{STEPS} steps, {middle:.2f} s a step, peak of the process {peak:.1f} GB\n")
    for (name, state), losses in found.items():
        change = losses - found[name, "as it is"]
        error = float(change.std() / math.sqrt(len(change)))
        perplexity = math.exp(float(losses.mean()))
        sys.stdout.write(f"  {name}, {state}: {perplexity:.3f} ({float(change.mean()):+.4f} ± {error:.4f} nats)\n")
    sys.stdout.flush()
    if is_compressed:
        assert found["wikitext", f"{row}, trained"].mean() < found["wikitext", "compressed"].mean()
