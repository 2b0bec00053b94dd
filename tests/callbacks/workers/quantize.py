"""Trains for few bits in two processes, resumes, and compares what the processes hold."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcompress import EmbeddingCompression
from lightning_embcompress.callbacks import QuantizationAware
from lightning_embcompress.compression.plan import plan_of


class Language(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(120, 16), nn.Linear(16, 120)
        self.lstm, self.mix = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 16)

    def _loss(self, batch: list[Tensor]) -> Tensor:
        (ids,) = batch
        hidden = self.mix(self.lstm(self.encoder(ids[:, :-1]))[0])
        return nn.functional.cross_entropy(self.decoder(hidden).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def fit(folder: Path, method: str, **fit: Any) -> LightningModule:
    seed_everything(0, verbose=False)
    data = TensorDataset(torch.randint(0, 120, (24, 7), generator=torch.Generator().manual_seed(0)))
    ranges: Any = "minmax" if method == "transform_coding" else "learned"
    callbacks = [
        EmbeddingCompression(method, ratio=2, statistics_batches=1),
        QuantizationAware(at_epoch=1, group_size=16, ranges=ranges, backbone="int4", freeze_observers_at=2),
        ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
    ]
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=4,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Language()
    trainer.fit(module, DataLoader(data, 4, shuffle=True), DataLoader(data, 4), **fit)
    assert plan_of(module).backbone is not None
    return module


def main(folder: Path) -> None:
    for method in ("group_reduce", "transform_coding"):
        whole = fit(folder / method, method)
        state = torch.cat([tensor.double().flatten() for tensor in whole.state_dict().values()])
        states = [torch.empty_like(state) for _ in range(2)]
        dist.all_gather(states, state)
        assert torch.equal(*states), method
        for epoch in (1,) if method == "group_reduce" else ():
            again = fit(folder / f"{method}{epoch}", method, ckpt_path=folder / method / f"epoch={epoch}.ckpt")
            torch.testing.assert_close(dict(again.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
        if dist.get_rank() == 0:
            print(f"{method}: the same")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
