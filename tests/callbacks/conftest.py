"""Modules that know nothing of compression, and Trainers to fit them with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

VOCAB_SIZE, DIM, CLASSES = 150, 16, 4


def _text() -> Tensor:
    """`[96, 7]` ids of falling frequency, every one followed by a successor of its own four times in five."""
    generator = torch.Generator().manual_seed(3)
    drawn = (VOCAB_SIZE ** torch.rand(96, 7, generator=generator)).long() - 1
    keep = torch.rand(96, 7, generator=generator) < 0.8
    for column in range(1, 7):
        follows = (drawn[:, column - 1] * 7 + 3) % 50
        drawn[:, column] = torch.where(keep[:, column], follows, drawn[:, column])
    return drawn.clamp_(0, VOCAB_SIZE - 1)


class Foreign(LightningModule):
    """A language model as its author wrote it: plain layers, `nn.CrossEntropyLoss`, batches of a plain DataLoader."""

    def __init__(self, tied: bool = False, bias: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCAB_SIZE, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.mix = nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(DIM, VOCAB_SIZE, bias=bias)
        nn.init.uniform_(self.encoder.weight, -0.5, 0.5)
        if tied:
            self.decoder.weight = self.encoder.weight
        self.loss = nn.CrossEntropyLoss()
        self.optimizers_of: Callable[[Any], Any] = lambda module: torch.optim.Adam(module.parameters(), lr=0.01)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.dropout(torch.tanh(self.mix(self.norm(self.encoder(inputs))))))

    def _loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return self.loss(self(inputs).flatten(0, -2), targets.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss = self._loss(batch)
        self.log("val_loss", loss)
        return loss

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


class HeadOnly(Foreign):
    """Gets features, predicts ids."""

    def __init__(self) -> None:
        super().__init__()
        del self.encoder, self.mix
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.norm(inputs))


class EmbeddingOnly(Foreign):
    """Gets ids, predicts one of a few classes."""

    def __init__(self) -> None:
        super().__init__()
        del self.mix
        self.decoder = nn.Linear(DIM, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.encoder(input=inputs).mean(dim=1))


def _model(kind: str = "untied", **changes: Any) -> Foreign:
    seed_everything(0, verbose=False)
    if kind in ("untied", "tied"):
        return Foreign(tied=kind == "tied", **changes)
    return {"head": HeadOnly, "embedding": EmbeddingOnly}[kind](**changes)


def _dataset(kind: str = "untied") -> TensorDataset:
    text = _text()
    inputs, targets = text[:, :-1], text[:, 1:]
    if kind == "head":
        features = torch.randn(VOCAB_SIZE, DIM, generator=torch.Generator().manual_seed(1))[inputs.flatten()]
        return TensorDataset(features, targets.flatten())
    if kind == "embedding":
        return TensorDataset(inputs, inputs[:, 0] % CLASSES)
    return TensorDataset(inputs, targets)


def _loaders(kind: str = "untied", **changes: Any) -> dict[str, Any]:
    """Keyword arguments of `Trainer.fit`: shuffled training data, and half of it for validation."""
    data = _dataset(kind)
    half = TensorDataset(*(tensor[: len(data) // 2] for tensor in data.tensors))
    size = 12 if kind == "head" else 8
    return {
        "train_dataloaders": DataLoader(data, **{"batch_size": size, "shuffle": True, **changes}),
        "val_dataloaders": DataLoader(half, batch_size=size),
    }


@pytest.fixture
def foreign() -> SimpleNamespace:
    """What the tests of this folder build from."""
    return SimpleNamespace(
        model=_model, loaders=_loaders, dataset=_dataset, text=_text, vocab_size=VOCAB_SIZE, dim=DIM, Foreign=Foreign
    )


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet Trainer on one CPU."""

    def make(*callbacks: Any, **changes: Any) -> Trainer:
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        quiet |= {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_checkpointing": False}
        quiet |= {"default_root_dir": tmp_path, "log_every_n_steps": 1}
        return Trainer(callbacks=list(callbacks), **{**quiet, **changes})

    return make
