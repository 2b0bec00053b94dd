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
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_embcompress import EmbeddingCompression
from lightning_embcompress.compression.plan import plan_of
from toys import LanguageModel, adam, loaders, quiet_trainer


def momentum(module: LanguageModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)


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


def fit(folder: Path, case: dict[str, Any], ckpt_path: Path | None = None) -> dict[str, Any]:
    """One run, with a checkpoint of every epoch."""
    seed_everything(0, verbose=False)
    callbacks = [EmbeddingCompression(**arguments) for arguments in case["callbacks"]]
    compare = Compare()
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    strategy = DDPStrategy(**case.get("strategy", {}))
    parallel = {"strategy": strategy, "devices": int(os.environ["WORLD_SIZE"]), "max_epochs": 5}
    trainer = quiet_trainer(folder, *callbacks, compare, keep, enable_checkpointing=True, **parallel)
    optimizer = momentum if case.get("optimizer") == "sgd" else adam
    model = LanguageModel(tied=case.get("tied", False), dropout=0.2, optimizer=optimizer)
    trainer.fit(model, **loaders(), ckpt_path=ckpt_path)
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "perplexity": [callback.state_dict()["perplexity"] for callback in callbacks],
        "tables": [(table.name, table.method, round(table.ratio, 2)) for table in plan_of(model).tables],
        "apart": compare.apart,
        "wrappers": [len(compare.wrappers), compare.alive],
    }


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


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
