"""Trains with callbacks in every process of a group, and compares the processes, and resumed runs with whole ones."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcompress import EmbeddingCompression
from lightning_embcompress.compression.plan import plan_of

VOCAB_SIZE, DIM = 150, 16


class Model(LightningModule):
    """A plain language model with dropout."""

    def __init__(self, tied: bool, optimizer: str) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCAB_SIZE, DIM)
        self.mix = nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(0.2)
        self.decoder = nn.Linear(DIM, VOCAB_SIZE)
        if tied:
            self.decoder.weight = self.encoder.weight
        self.optimizer = optimizer

    def _loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        hidden = self.dropout(torch.tanh(self.mix(self.encoder(inputs))))
        return nn.functional.cross_entropy(self.decoder(hidden).flatten(0, -2), targets.flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Compare(Callback):
    """Finds how far the parameters of the processes are apart after every epoch, and which wrappers are left."""

    def __init__(self) -> None:
        self.apart: list[float] = []
        self.wrappers: list[weakref.ref[DistributedDataParallel]] = []
        self.alive = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.wrappers.append(weakref.ref(trainer.strategy.model))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.model is not self.wrappers[-1]():
            self.wrappers.append(weakref.ref(trainer.strategy.model))
        gc.collect()
        # One that is left would go on to reduce the gradients of the parameters it knows.
        self.alive = sum(wrapper() is not None for wrapper in self.wrappers)
        values = torch.cat([value.double().flatten() for value in pl_module.state_dict().values()])
        gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, values)
        self.apart.append(max(float((other - gathered[0]).abs().max()) for other in gathered))


def data() -> dict[str, Any]:
    drawn = (VOCAB_SIZE ** torch.rand(96, 7, generator=torch.Generator().manual_seed(3))).long() - 1
    text = TensorDataset(drawn[:, :-1], drawn[:, 1:])
    return {"train_dataloaders": DataLoader(text, 8, shuffle=True), "val_dataloaders": DataLoader(text, 8)}


def fit(folder: Path, case: dict[str, Any], ckpt_path: Path | None = None) -> dict[str, Any]:
    """One run, with a checkpoint of every epoch."""
    seed_everything(0, verbose=False)
    callbacks = [EmbeddingCompression(**arguments) for arguments in case["callbacks"]]
    compare = Compare()
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    strategy = DDPStrategy(**case.get("strategy", {}))
    trainer = Trainer(
        accelerator="cpu", devices=dist_size(), strategy=strategy, max_epochs=5, default_root_dir=folder, logger=False,
        callbacks=[*callbacks, compare, keep], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Model(case.get("tied", False), case.get("optimizer", "adam"))
    trainer.fit(model, **data(), ckpt_path=ckpt_path)
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "perplexity": [callback.state_dict()["perplexity"] for callback in callbacks],
        "tables": [(table.name, table.method, round(table.ratio, 2)) for table in plan_of(model).tables],
        "apart": compare.apart,
        "wrappers": [len(compare.wrappers), compare.alive],
    }


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(value, second[name]) for name, value in first.items())
    if isinstance(first, list):
        return len(first) == len(second) and all(equal(*pair) for pair in zip(first, second, strict=True))
    if isinstance(first, Tensor) and first.is_floating_point():
        # Three or more gradients are added in the order of DDP's buckets, which it finds anew when it is resumed.
        return torch.allclose(first, second, rtol=0, atol=0.0 if dist.get_world_size() <= 2 else 1e-3)
    if isinstance(first, float):
        return math.isclose(first, second, rel_tol=0.0 if dist.get_world_size() <= 2 else 1e-3)
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


def main(folder: Path, cases: dict[str, Any]) -> None:
    said = {}
    for name, case in cases.items():
        whole = fit(folder / name, case)
        resumed = {}
        for epoch in case.get("resume_from", []):
            again = fit(folder / f"{name}{epoch}", case, ckpt_path=folder / name / f"epoch={epoch}.ckpt")
            resumed[epoch] = {key: equal(again[key], whole[key]) for key in ("state", "optimizer", "perplexity")}
        kept = ("perplexity", "tables", "apart", "wrappers")
        said[name] = {"resumed": resumed} | {key: whole[key] for key in kept}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, said)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(every))
    # Threads of gloo that are still there when the interpreter ends may end it with an error.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
