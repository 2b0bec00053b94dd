"""Methods from callbacks: compressed, refined, resumed, tied and untied; and the arguments of their own callbacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_embcompress import EmbeddingCompression, TensorTrain, TransformCoding
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.methods.registry import TransformCodingConfig
from toys import loaders_of, model_of

MakeTrainer = Callable[..., Trainer]


def test_tensor_train_by_its_rank(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = model_of("tied")
    make_trainer(TensorTrain(max_rank=1, at_epoch=1)).fit(model, **loaders_of())
    (table,) = plan_of(model).tables
    assert table.modules == ("encoder", "decoder")
    assert table.spec["ranks"] == [1, 1, 1, 1, 1]
    assert model.encoder.factorization is model.decoder.factorization
    (entry,) = json.loads((tmp_path / "report.json").read_text())["tables"]
    assert entry["parameter_ratio"] == 2


def test_what_was_untied_is_tied_again_for_a_dense_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = model_of("tied")
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callback = EmbeddingCompression("low_rank", ratio=2, at_epoch=1, tie="untie")
    trainer = make_trainer(callback, keep, max_epochs=2, enable_checkpointing=True)
    trainer.fit(model, **loaders_of())
    assert model.encoder.factorization is not model.decoder.factorization
    data = loaders_of()["val_dataloaders"]
    trainer.test(model, data, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert model.encoder.weight is model.decoder.weight
    trainer.test(model, data, ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert model.encoder.factorization is not model.decoder.factorization


def test_yaml_and_help_show_the_fields_of_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = {"class_path": "TransformCoding", "init_args": {"ratio": 8, "bits": 4, "refine_at_epochs": [2]}}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"trainer": {"callbacks": [callback], "logger": False}}))

    def parse(*words: str) -> LightningCLI:
        return LightningCLI(BoringModel, run=False, args=list(words), save_config_callback=None)

    (found,) = (one for one in parse("--config", str(config)).trainer.callbacks if isinstance(one, TransformCoding))  # type: ignore[attr-defined]
    assert found.config == TransformCodingConfig(bits=4)
    assert found.refine_at_epochs == [2]
    with pytest.raises(SystemExit):
        parse("--trainer.callbacks.help=TransformCoding")
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("callbacks.bits", "every component of every group", "callbacks.at_epoch", "Epoch at whose start"):
        assert part in shown
    assert "callbacks.method" not in shown
    config.write_text(config.read_text().replace('"bits"', '"bit"'))
    with pytest.raises(SystemExit):
        parse("--config", str(config))
    assert "bit" in capsys.readouterr().err
