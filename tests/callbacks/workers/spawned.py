"""Fit in processes that Lightning starts by itself, and look at what comes back. Arguments: folder, case."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_embcompress import EmbeddingCompression, QuantizationAware, compress, load_from_checkpoint, plan_of
from lightning_embcompress.integrations.sharding import compress_or_restore
from toys import LanguageModel, loaders, quiet_trainer

CASES: dict[str, dict[str, Any]] = {
    "spawned": {"strategy": "ddp_spawn"},
    "forked": {"strategy": "ddp_fork", "quantize": True},
    "tied": {"strategy": "ddp_fork", "tied": True},
    "untied": {"strategy": "ddp_fork", "tied": True, "tie": "untie"},
    "compressed": {"strategy": "ddp_fork", "compressed": True},
    "configured": {"strategy": "ddp_fork", "configured": True},
}


class Configured(LanguageModel):
    def configure_model(self) -> None:
        compress_or_restore(self, "low_rank", ratio=3)


def main(folder: Path, strategy: str, tied: bool = False, tie: Any = "keep", **given: Any) -> None:
    seed_everything(0, verbose=False)
    model = (Configured if given.get("configured") else LanguageModel)(tied=tied)
    if given.get("compressed"):
        compress(model, "low_rank", ratio=3)
    callbacks: list[Any] = [EmbeddingCompression("low_rank", ratio=3, at_epoch=1, tie=tie)]
    if given.get("configured"):
        callbacks.clear()
    if given.get("quantize"):
        callbacks.append(QuantizationAware("int8", at_epoch=2, group_size=16, backbone="int8"))
    keep = ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True)
    options = {"devices": 2, "strategy": strategy, "enable_checkpointing": True}
    trainer = quiet_trainer(folder, *callbacks, keep, **options)
    try:
        trainer.fit(model, **loaders())
    except Exception as error:
        print("refused:", error)
        return
    assert not plan_of(model).tables
    assert type(model.encoder) is nn.Embedding
    assert (model.encoder.weight is model.decoder.weight) == tied
    compressed = load_from_checkpoint(LanguageModel, folder / "last.ckpt")
    assert plan_of(compressed).tables
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids), compressed.eval()(ids))
    trainer = quiet_trainer(folder)
    logged = trainer.validate(model, loaders()["val_dataloaders"], verbose=False)
    assert logged == quiet_trainer(folder).validate(compressed, loaders()["val_dataloaders"], verbose=False)
    print("the same")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), **CASES[sys.argv[2]])
