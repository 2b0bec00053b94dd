"""Fine-tunes with a teacher in every process of a group, and resumes from within an epoch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_embcompress import compress
from lightning_embcompress.data import TextFiles
from lightning_embcompress.modules import CompressedLanguageModel, LSTMLanguageModel
from lightning_embcompress.utils.random_state import gather_over_processes
from toys import Losses, quiet_trainer


def fit(
    folder: Path, files: dict[str, str], shares: bool, *callbacks: Callback, ckpt_path: Path | None = None
) -> tuple[LightningModule, list[float]]:
    data = TextFiles(**files, batch_size=2, sequence_length=5, cache_dir=folder / "cache")
    data.prepare_data()
    seed_everything(0, verbose=False)
    dense, small = (LSTMLanguageModel(data.vocab_size, 12, 12, dropout=0.0) for _ in range(2))
    small.load_state_dict(dense.state_dict())
    compress(small, "low_rank", ratio=2)
    model = CompressedLanguageModel(
        small,
        teacher=dense,
        teacher_shares_backbone=shares,
        freeze="backbone" if shares else None,
        distillation_weight=1.0,
        reconstruction_weight=0.1,
        reconstruction_rows=8,
        factor_learning_rate=0.02,
    )
    losses = Losses()
    changes: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(folder, losses, *callbacks, enable_checkpointing=bool(callbacks), **changes)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model, losses.values


def main(train: str, valid: str) -> None:
    folder, files = Path.cwd(), {"train_files": train, "valid_files": valid}
    for shares in (False, True):
        keep = ModelCheckpoint(folder / str(shares), every_n_train_steps=1, save_top_k=-1, filename="{step}")
        whole, losses = fit(folder, files, shares, keep)
        first, second = gather_over_processes(losses)
        assert first != second, "both processes read the same text"
        states = gather_over_processes({name: value.tolist() for name, value in whole.state_dict().items()})
        assert states[0] == states[1], "the processes are apart"
        path = folder / str(shares) / "step=3.ckpt"
        saved = torch.load(path, weights_only=True)
        assert [part.shape[1] for part in saved["embcompress_teacher"]["lstm_state"]] == [4, 4]
        assert not torch.equal(saved["embcompress_teacher"]["lstm_state"][0], saved["lstm_state"][0])
        if shares:
            continue
        resumed, rest = fit(folder, files, shares, ckpt_path=path)
        assert rest == losses[3:], (rest, losses)
        torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    print("well")


if __name__ == "__main__":
    main(*sys.argv[1:])
