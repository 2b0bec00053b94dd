"""Resuming from within an epoch on two processes equals their uninterrupted run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_embcompress import GroupReduce
from lightning_embcompress.data import TextFiles
from lightning_embcompress.modules import LSTMLanguageModel
from lightning_embcompress.utils.random_state import gather_over_processes
from toys import Losses, quiet_trainer


class SeedByRank(Callback):
    """Lets every process drop other values."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(trainer.global_rank)


def fit(
    folder: Path,
    corpus: Path,
    *callbacks: Callback,
    devices: int = 2,
    dropout: float = 0.3,
    ckpt_path: Path | None = None,
) -> tuple[LSTMLanguageModel, list[float]]:
    files = {"train_files": str(corpus / "train.txt"), "valid_files": str(corpus / "valid.txt")}
    # Four texts in sum, however many processes there are.
    data = TextFiles(**files, batch_size=4 // devices, sequence_length=5, cache_dir=corpus / "cache")
    seed_everything(0, verbose=False)
    model = LSTMLanguageModel(
        data.vocab_size, 12, 12, dropout=dropout, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01)
    )
    losses = Losses()
    options: dict[str, Any] = {"devices": devices, "max_epochs": 2, "strategy": "ddp" if devices > 1 else "auto"}
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    trainer = quiet_trainer(folder, losses, *callbacks, enable_checkpointing=saves, **options)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model, losses.values


def _compression() -> GroupReduce:
    """Compresses at the eleventh step."""
    return GroupReduce(ratio=1.3, groups=2, at_epoch=1)


def resume_on_as_many_as_here(corpus: Path) -> None:
    """All steps equal the uninterrupted run, parameters and losses, on every process."""
    folder = Path.cwd()
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, losses = fit(folder, corpus, SeedByRank(), _compression(), keep)
    first, second = gather_over_processes(losses)
    assert first != second
    for step in (4, 11, 15):
        path = folder / f"step={step}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        assert [part.shape[1] for part in checkpoint["lstm_state"]] == [4, 4]
        resumed, rest = fit(folder, corpus, _compression(), ckpt_path=path)
        torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
        assert rest == losses[step:]
    if whole.global_rank == 0:
        del checkpoint["lstm_state"]
        torch.save(checkpoint, folder / "without.ckpt")
    torch.distributed.barrier()
    _, rest = fit(folder, corpus, _compression(), ckpt_path=folder / "without.ckpt")
    assert rest[0] != losses[15]


def resume_from_one_process(corpus: Path, alone: Path) -> None:
    """A run of one process goes on with two, which share its texts."""
    expected = torch.load(alone / "final.ckpt", weights_only=True)["state_dict"]
    resumed, _ = fit(Path.cwd(), corpus, dropout=0.0, ckpt_path=alone / "step=4.ckpt")
    torch.testing.assert_close(dict(resumed.state_dict()), expected, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    resume_on_as_many_as_here(Path(sys.argv[1]))
    resume_from_one_process(Path(sys.argv[1]), Path(sys.argv[2]))
    print("passed", flush=True)
    # A thread of gloo that is left can abort the interpreter at its end.
    torch.distributed.barrier()
