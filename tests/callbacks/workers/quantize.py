"""Trains for few bits in two processes, resumes, and compares what the processes hold."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_embcompress import EmbeddingCompression
from lightning_embcompress.callbacks import QuantizationAware
from lightning_embcompress.compression.plan import plan_of
from toys import LanguageModel, dataset, loaders, quiet_trainer


def fit(folder: Path, method: str, **fit: Any) -> LanguageModel:
    seed_everything(0, verbose=False)
    ranges: Any = "minmax" if method == "transform_coding" else "learned"
    callbacks = [
        EmbeddingCompression(method, ratio=2, statistics_batches=1),
        QuantizationAware(at_epoch=1, group_size=16, ranges=ranges, backbone="int4", freeze_observers_at=2),
        ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
    ]
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 4, "enable_checkpointing": True}
    module = LanguageModel(120, cell="LSTM")
    data = loaders(dataset(lines=24, vocab_size=120), batch_size=4)
    quiet_trainer(folder, *callbacks, **options).fit(module, **data, **fit)
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
