"""Passes over data within a fit leave no trace of themselves."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MaxMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

from lightning_embcompress.callbacks.collecting import collect_in_training
from lightning_embcompress.callbacks.evaluation import stream_token_counts, validation_perplexity
from toys import DIM, VOCAB_SIZE, Notes, loaders_of, model_of


class Passes(Callback):
    """Measures, counts tokens and collects statistics at the start of every epoch, where the compression does."""

    done = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        assert validation_perplexity(trainer, pl_module, None, "Measuring") is not None
        counts = torch.ones(VOCAB_SIZE)
        if hasattr(pl_module, "encoder"):
            counts = stream_token_counts(trainer, pl_module, pl_module.encoder, VOCAB_SIZE)
        collect_in_training(trainer, pl_module, "auto", counts, 5)
        self.done += 1


def _crowded(kind: str) -> Any:
    """A module with everything that its own steps could disturb."""

    class Crowded(type(model_of(kind))):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(dropout=0.3)
            self.batch_norm = nn.BatchNorm1d(DIM)
            self.frozen = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(DIM)).eval()
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))
            self.trained, self.running, self.best = MeanMetric(), MeanMetric(), MaxMetric()
            self.sum = self.running + self.best
            classes: dict[str, Any] = {"num_classes": VOCAB_SIZE, "average": "micro"}
            self.both = MetricCollection([MulticlassAccuracy(**classes), MulticlassPrecision(**classes)])
            self.carried: dict[str, list[Tensor]] = {"state": [torch.zeros(2)]}
            self.counter = torch.zeros(2)
            if kind != "head":
                self.encoder.requires_grad_(False)

        def training_step(self, batch: Any) -> Any:
            inputs, targets = batch
            self.last = torch.rand(()) + random.random() + np.random.rand()
            self.steps += 1
            self.counter += 1
            self.new = self.counter
            self.carried["state"].append(self.carried["state"][-1] + self.counter)
            hidden = self.hidden(inputs).flatten(0, -2)
            hidden = self.batch_norm(hidden + self.carried["state"][-1].mean() * 0.01 * self.last)
            loss = F.cross_entropy(self.decoder(hidden), targets.flatten())
            # In mid-state when the next epoch starts, and when the passes come.
            self.running.update(loss.detach())
            self.trained.update(loss.detach())
            self.log("train_loss", loss, prog_bar=True)
            self.log("train_mean", self.trained)
            self.logger.experiment.log_metrics({"by_hand": float(self.counter[0])}, step=int(self.counter[0]))
            return {"loss": loss, "extra": hidden}

        def on_validation_start(self) -> None:
            self.seen: list[float] = []

        def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.seen.append(float(outputs))

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert not self.trainer.training
            assert not self.decoder.training
            loss = super().validation_step(batch, batch_idx)
            self.running.update(loss * torch.rand(()) + random.random() + np.random.rand())
            self.both.update(self(batch[0]).flatten(0, -2), batch[1].flatten())
            return loss  # type: ignore[no-any-return]

        def on_validation_epoch_end(self) -> None:
            assert self.seen
            self.best.update(self.running.compute())
            self.log("val_best", self.best)
            self.log_dict(self.both)
            self.log("nats", 1e9, prog_bar=True, logger=True)

    seed_everything(0, verbose=False)
    return Crowded()


@pytest.mark.parametrize("kind", ["untied", "head"])
def test_nothing_is_changed(make_trainer: Callable[..., Trainer], tmp_path: Path, kind: str) -> None:
    notes, texts = [], []
    for passes in ([], [Passes()]):
        state, generator, model = Notes(), torch.Generator().manual_seed(5), _crowded(kind)
        logger, loaders = CSVLogger(tmp_path, version=len(passes)), loaders_of(kind, generator=generator)
        make_trainer(*passes, state, logger=logger, num_sanity_val_steps=1).fit(model, **loaders)
        notes.append([*state.notes, generator.get_state(), model.counter, model.carried["state"]])
        texts.append([state.names, (Path(logger.log_dir) / "metrics.csv").read_text()])
    assert passes[0].done == 3
    assert len(notes[0]) == 3 * (1 + len(loaders["train_dataloaders"])) + 3
    torch.testing.assert_close(notes[1], notes[0], rtol=0, atol=0)
    assert texts[1] == texts[0]
