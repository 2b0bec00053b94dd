"""Train, resume and test sharded models. Arguments: folder, names of cases, strategy, accelerator."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from sharded_model import CASES, MORE_CASES, ShardedModel, data, result, strategy_of, trainer


def train(folder: Path, name: str, strategy: str, accelerator: str) -> dict[str, Any]:
    """Train, and resume from after the first epoch; then evaluate that checkpoint."""
    case = (CASES | MORE_CASES)[name]
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results: dict[str, Any] = {}
    checkpoint = folder / name / "epoch=0.ckpt"

    def new_trainer(run: str) -> Trainer:
        chosen = strategy_of(strategy, accelerator, case["directory"], processes)
        return trainer(folder / run, chosen, accelerator, processes)

    def new_model() -> ShardedModel:
        model = ShardedModel(case, str(checkpoint))
        # What the weights are before those of the checkpoint come must not matter.
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        return model

    def validate(fitted: Trainer, model: LightningModule) -> float:
        (values,) = fitted.validate(model, data(rank, processes), ckpt_path=checkpoint, verbose=False)
        return values["val_loss"]

    for run, path, model in (("whole", None, ShardedModel(case)), ("resumed", checkpoint, new_model())):
        fitted = new_trainer(name if path is None else f"{name}-resumed")
        fitted.fit(model, data(rank, processes), data(rank, processes), ckpt_path=path)
        results[run] = result(model, fitted)
        if strategy == "fsdp2":
            # Calls `configure_model` of a module that is sharded. Lightning does not prepare one for FSDP twice.
            results[run]["val_loss_before"] = validate(fitted, model)
    results["val_loss_before"] = validate(new_trainer(f"{name}-evaluated"), new_model())
    return results


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder, names, strategy, accelerator = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3], sys.argv[4]
    for name in names:
        results = train(folder, name, strategy, accelerator)
        if os.environ["RANK"] == "0":
            torch.save(results, folder / f"{name}.pt")
    # A thread of gloo that is left can abort the interpreter at its end.
    dist.barrier()
