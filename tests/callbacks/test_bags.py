"""`nn.EmbeddingBag` compressed in the middle of a training run, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcompress import GroupReduce, plan_of
from lightning_embcompress.layers.bags import CompressedEmbeddingBag
from toys import token_ids

MakeTrainer = Callable[..., Trainer]
_V, _CLASSES = 150, 5


class _Classifier(LightningModule):
    """A class of every bag of words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.EmbeddingBag(_V, 16, mode="mean", padding_idx=0)
        self.classes = nn.Linear(16, _CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.classes(self.words(ids))
        return logits

    def training_step(self, batch: Any) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def _loader() -> DataLoader[Any]:
    ids = token_ids()
    return DataLoader(TensorDataset(ids, ids.sum(1) % _CLASSES), batch_size=16)


def _callback() -> GroupReduce:
    return GroupReduce(ratio=2, at_epoch=1, groups=2, statistics_batches=0)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_classifier_of_bags_is_compressed_and_goes_on(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = _Classifier()
    trainer = make_trainer(_callback(), max_epochs=2)
    trainer.fit(model, _loader())
    assert [table.modules for table in plan_of(model).tables] == [("words",)]
    assert isinstance(model.words, CompressedEmbeddingBag)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    whole = _Classifier()
    make_trainer(_callback(), max_epochs=3).fit(whole, _loader())
    resumed = _Classifier()
    make_trainer(_callback(), max_epochs=3).fit(resumed, _loader(), ckpt_path=str(tmp_path / "half.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
