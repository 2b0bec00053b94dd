"""The LSTM language model with compressed tables: checkpoints and resuming."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_embcompress import GroupReduce, compress
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.integrations.checkpoint import keep_structure
from lightning_embcompress.modules import LSTMLanguageModel

VOCAB_SIZE = 50


class Vocabulary(SimpleNamespace):
    def __len__(self) -> int:
        return VOCAB_SIZE


class Windows(LightningDataModule):
    """Consecutive windows of three random texts."""

    def __init__(self, fingerprint: str = "abc") -> None:
        super().__init__()
        text = torch.randint(VOCAB_SIZE, (3, 31), generator=torch.Generator().manual_seed(0))
        self.pairs = list(zip(text[:, :-1].split(5, dim=1), text[:, 1:].split(5, dim=1), strict=True))
        self.vocabulary = Vocabulary(fingerprint=fingerprint)
        self.token_counts = torch.arange(VOCAB_SIZE, 0, -1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.pairs, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.pairs[:2], batch_size=None)  # type: ignore[arg-type]


def _model(**changes: Any) -> LSTMLanguageModel:
    seed_everything(0, verbose=False)
    arguments: dict[str, Any] = {"embedding_dim": 12, "hidden_size": 12, "num_layers": 2, "dropout": 0.0}
    return LSTMLanguageModel(**{"vocab_size": VOCAB_SIZE, **arguments, **changes})


def _trainer(path: Path, **changes: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False}
    return Trainer(default_root_dir=path, **{**quiet, **changes})


def _compressed(**changes: Any) -> LSTMLanguageModel:
    model = _model(**changes)
    compress(model, "group_reduce", ratio=1.3, groups=2, token_counts=torch.arange(VOCAB_SIZE, 0, -1))
    return model


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True}, {"softmax": "sampled", "num_sampled": 20}])
def test_compressed_checkpoints_load_without_a_callback(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, path = _compressed(**changes), tmp_path / "model.ckpt"
    trainer = _trainer(tmp_path)
    trainer.fit(model, datamodule=Windows())
    trainer.save_checkpoint(path, weights_only=True)
    loaded = LSTMLanguageModel.load_from_checkpoint(path)
    assert plan_of(loaded) == plan_of(model)
    assert (loaded.encoder.factorization is loaded.decoder.factorization) == bool(changes.get("tie_weights"))
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    # In a Trainer, with the callback and without it, in a dense module and in a compressed one.
    for fresh in (_model(**changes), _compressed(**changes)):
        for callbacks in ([], [GroupReduce(ratio=1.3)]):
            trainer = _trainer(tmp_path, callbacks=callbacks)
            trainer.validate(fresh, datamodule=Windows(), ckpt_path=path, verbose=False)
            torch.testing.assert_close(dict(fresh.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_the_vocabulary_is_checked_before_the_structure(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    trainer = _trainer(tmp_path)
    trainer.fit(_compressed(), datamodule=Windows())
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"vocabulary of 50 tokens.*vocab_size=60"):
        LSTMLanguageModel.load_from_checkpoint(path, vocab_size=60)
    for callbacks in ([], [GroupReduce(ratio=1.3)]):
        fresh = _model()
        with pytest.raises(ValueError, match="fingerprint xyz"):
            _trainer(tmp_path, callbacks=callbacks).validate(
                fresh, datamodule=Windows(fingerprint="xyz"), ckpt_path=path
            )
        assert isinstance(fresh.encoder, nn.Embedding)


def test_recording_twice_is_recording_once(tmp_path: Path) -> None:
    model = _compressed()
    keep_structure(model)
    keep_structure(model)
    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    once: dict[str, Any] = {}
    LSTMLanguageModel.on_save_checkpoint(model, once)
    assert checkpoint == once
    assert checkpoint["embcompress"] == plan_of(model).to_dict()
    dense: dict[str, Any] = {}
    _model().on_save_checkpoint(dense)
    assert "embcompress" not in dense
    factors = list(model.encoder.parameters())
    model.on_load_checkpoint({**checkpoint, "state_dict": {}})
    assert all(now is before for now, before in zip(model.encoder.parameters(), factors, strict=True))


@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_a_run_that_compresses_resumes_from_after_the_last_step_of_an_epoch(tmp_path: Path, softmax: Any) -> None:
    def run(**fit: Any) -> LSTMLanguageModel:
        model = _model(softmax=softmax, num_sampled=50)
        keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=6, save_top_k=-1, filename="{step}")
        callback = GroupReduce(ratio=1.3, groups=2, at_epoch=1, refine_at_epochs=[3])
        trainer = _trainer(tmp_path, callbacks=[callback, keep], enable_checkpointing=True, max_epochs=4)
        trainer.fit(model, datamodule=Windows(), **fit)
        assert callback.state_dict()["perplexity"]["final"] == pytest.approx(
            float(trainer.callback_metrics["val_perplexity"]), rel=1e-5
        )
        return model

    whole = dict(run().state_dict())
    for step in (6, 12, 18):
        resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        torch.testing.assert_close(dict(resumed.state_dict()), whole, rtol=0, atol=0)
