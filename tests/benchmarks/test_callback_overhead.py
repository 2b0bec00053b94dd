"""What a callback costs in steps in which it does nothing: both sides train in turns in one process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcompress import EmbeddingCompression

pytestmark = pytest.mark.timeout(1800)

VOCAB_SIZE, DIM, STEPS, ROUNDS = 2000, 128, 300, 6


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCAB_SIZE, DIM)
        self.decoder = nn.Linear(DIM, VOCAB_SIZE)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (ids,) = batch
        return nn.functional.cross_entropy(self.decoder(self.encoder(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Times(Callback):
    """Time from step to step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Of the epochs in which nothing is due, without the first steps."""
        steps = torch.tensor(self.ends[STEPS // 10 : 2 * STEPS], dtype=torch.float64).diff()
        return float(steps.median())


def _fit(folder: Path, *callbacks: Callback) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
        default_root_dir=folder,
    )  # fmt: skip
    ids = torch.randint(VOCAB_SIZE, (STEPS * 4, 17), generator=torch.Generator().manual_seed(0))
    trainer.fit(Model(), DataLoader(TensorDataset(ids), 4))
    return trainer


def _step(folder: Path, *callbacks: Callback) -> float:
    times = Times()
    _fit(folder, *callbacks, times)
    return times.median()


def test_steps_in_which_nothing_is_due(benchmark, tmp_path: Path) -> None:
    def compressing() -> float:
        return _step(tmp_path, EmbeddingCompression("low_rank", ratio=4, at_epoch=2))

    benchmark.pedantic(compressing, rounds=1)
    alone = beside = float("inf")
    for _ in range(ROUNDS):
        # One side before and after the other: what comes later is not to be the faster one for it.
        alone, beside = min(alone, _step(tmp_path)), min(beside, compressing())
        beside, alone = min(beside, compressing()), min(alone, _step(tmp_path))
    # Below what two runs differ by: the hook that runs in every step, alone.
    callback, calls = EmbeddingCompression("low_rank", ratio=4, at_epoch=2), 100_000
    trainer = _fit(tmp_path, callback)
    module = trainer.lightning_module
    start = time.perf_counter()
    for _ in range(calls):
        callback.on_train_batch_start(trainer, module, None, 1)
    hook = (time.perf_counter() - start) / calls
    benchmark.extra_info.update(step=alone, ratio=beside / alone, hook=hook)
    print(
        f"\na step takes {alone * 1e3:.3f} ms, with the callback {beside / alone:.4f} times that; its hook takes "
        f"{hook * 1e6:.2f} us, {hook / alone:.3%} of a step"
    )
    assert hook < 0.01 * alone
    assert beside < 1.05 * alone
