"""Collect statistics in several processes, alone and in a fit; every one saves what it got. Argument: folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcompress.calibration.statistics import collect_statistics
from lightning_embcompress.callbacks.collecting import collect_in_training
from lightning_embcompress.modules.lstm import LSTMLanguageModel
from toys import quiet_trainer


def loss_fn(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0])[0].flatten(0, 1), batch[1].flatten())


class Collect(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        name = "trainer again" if trainer.current_epoch else "trainer"
        statistics = collect_in_training(trainer, pl_module, "auto", None, 100)
        statistics.save(folder / f"{name}-{trainer.global_rank}.safetensors")


def check_mistakes(model: Any, rank: int) -> None:
    # One process without data, with another table, or with an error of its own.
    ids = torch.randint(60, (2, 4, 7))
    batches = [(part[:, :-1], part[:, 1:]) for part in ids]
    found = collect_statistics(model, batches if rank else [], loss_fn)
    assert found.num_targets == 2 * 4 * 6
    with pytest.raises(ValueError, match="yields nothing"):
        collect_statistics(model, [], loss_fn)
    with pytest.raises(ValueError, match="scalar") if rank else pytest.raises(RuntimeError, match="process 1: ValueE"):
        collect_statistics(model, batches, (lambda *_: 1.0) if rank else loss_fn)
    with pytest.raises(ValueError, match="wrapped in DistributedDataParallel.*pass model.module"):
        collect_statistics(DistributedDataParallel(model), batches, loss_fn)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    # No learning: every epoch has the same statistics.
    seed_everything(0, verbose=False)
    model = LSTMLanguageModel(60, 8, 8, carry_state=False, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)).double()
    text = torch.randint(60, (16, 7), generator=torch.Generator().manual_seed(1))
    data = TensorDataset(text[:, :-1], text[:, 1:])
    options: dict[str, Any] = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo"), "max_epochs": 2}
    trainer = quiet_trainer(folder, Collect(), precision="64-true", **options)
    trainer.fit(model, DataLoader(data, batch_size=4))
    rank = dist.get_rank()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if rank == 0:
        torch.save(text, folder / "text.pt")
    own = TensorDataset(text[rank::2, :-1], text[rank::2, 1:])
    statistics = collect_statistics(model, DataLoader(own, batch_size=3), loss_fn)
    statistics.save(folder / f"plain-{rank}.safetensors")
    check_mistakes(model, rank)
