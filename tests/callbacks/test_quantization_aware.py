"""Training for few bits: what is quantized when, resuming, order, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_embcompress import EmbeddingCompression, load_compressed, load_from_checkpoint, save_compressed
from lightning_embcompress.callbacks import QuantizationAware
from lightning_embcompress.compression.backbone import backbone_of
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.methods.registry import Quantization
from lightning_embcompress.quantization.aware import convert_qat, converted, prepare_qat
from toys import LanguageModel, Losses, adam, check_resuming, loaders

MakeTrainer = Callable[..., Trainer]
WORKERS = Path(__file__).parent / "workers"


def _two_groups(module: LightningModule) -> Any:
    decayed = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in module.parameters() if parameter.dim() == 1]
    return torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], 0.01)


def _momentum(module: LightningModule) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


CASES: dict[str, Any] = {
    "minmax": (adam, "low_rank", {"backbone": "int8", "freeze_observers_at": 2}),
    "learned": (_two_groups, "group_reduce", {"bits": "int3", "ranges": "learned", "freeze_observers_at": 2}),
    "learned backbone": (_momentum, "low_rank", {"ranges": "learned", "backbone": "int4", "at_epoch": 2}),
    "codes": (adam, "transform_coding", {"backbone": "float16", "freeze_observers_at": 2}),
}


# Compression is due at epoch 1, quantization at 1 or 2, freezing at 2: checkpoints are of before, between, and after.
@pytest.mark.parametrize("case", CASES)
def test_resuming_equals_the_uninterrupted_run(make_trainer: MakeTrainer, tmp_path: Path, case: str) -> None:
    configure, method, options = CASES[case]

    def make() -> list[Any]:
        seed_everything(0, verbose=False)
        model = LanguageModel(cell="LSTM", dropout=0.1, optimizer=configure)
        # However they are listed.
        quantization = QuantizationAware(**{"at_epoch": 1, "group_size": 16, **options})
        return [model, quantization, EmbeddingCompression(method, ratio=3, at_epoch=1, statistics_batches=2)]

    epochs = (0, 1, 2) if case == "minmax" else (1, 2)
    whole = check_resuming(tmp_path, make, epochs, data=loaders(), max_epochs=4)
    assert backbone_of(whole.module) is not None or "backbone" not in options
    assert all(module.is_prepared for module in _factorizations(whole.module))
    _check_files(make_trainer, tmp_path, whole)


def _factorizations(model: nn.Module) -> list[Any]:
    return [module.factorization for module in model.modules() if hasattr(module, "factorization")]


def _check_files(make_trainer: MakeTrainer, folder: Path, run: SimpleNamespace) -> None:
    """Checkpoints of the training are tested as they are; what is saved is converted, and reads the same."""
    ckpt = folder / "whole" / "epoch=3.ckpt"
    data = loaders()["val_dataloaders"]
    (tested,) = make_trainer().test(run.module, data, verbose=False)
    (from_file,) = make_trainer(QuantizationAware()).test(
        LanguageModel(cell="LSTM"), data, ckpt_path=ckpt, verbose=False
    )
    assert from_file == tested
    loaded = load_from_checkpoint(LanguageModel, ckpt)
    assert plan_of(loaded) == plan_of(run.module)
    save_compressed(loaded, folder / "saved")
    assert plan_of(loaded) == plan_of(run.module)
    packed: Any = LanguageModel(cell="LSTM")
    load_compressed(folder / "saved", packed)
    assert not any(factors.is_prepared for factors in _factorizations(packed))
    (from_saved,) = make_trainer().test(packed, data, verbose=False)
    assert from_saved["val_loss"] == pytest.approx(tested["val_loss"], rel=1e-6)
    said = run.report["quantization"]
    with converted(loaded):
        sizes = [table.stored_bytes for table in plan_of(loaded).tables]
    assert [table["stored_bytes"] for table in said["tables"]] == sizes
    assert sum(sizes) < 0.6 * sum(table["stored_bytes"] for table in run.report["tables"])
    # The file has a checksum of its own besides.
    weights = (folder / "saved" / "model.safetensors").stat().st_size
    assert weights <= said["model"]["stored_bytes"] + 200 * len(packed.state_dict())
    assert said["perplexity"]["epoch"] in (1, 2)
    assert said["perplexity"]["before"] != said["perplexity"]["after"]


def _refused(make_trainer: MakeTrainer, model: Any, loaders: Any, *callbacks: Callback, **fit: Any) -> str:
    """What is said before the first step; the model is as it was."""
    steps = Losses()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        make_trainer(*callbacks, steps, max_epochs=6).fit(model, **loaders, **fit)
    assert not steps.values
    if not fit:
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("bits", "int9"),
        ("bits", True),
        ("group_size", 8),
        ("scale_dtype", "float32"),
        ("ranges", "max"),
        ("tables", []),
        ("at_epoch", -1),
        ("freeze_observers_at", 2),
    ],
)
def test_arguments(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        QuantizationAware(**{"at_epoch": 3, argument: value})
    with pytest.raises(ValueError, match="int1"):
        QuantizationAware(backbone="int1")


def test_what_is_refused_before_the_first_step(make_trainer: MakeTrainer) -> None:
    def said(model: Any, *callbacks: Callback) -> str:
        return _refused(make_trainer, model, loaders(), *callbacks)

    compression = EmbeddingCompression("low_rank", ratio=2)
    later = EmbeddingCompression("low_rank", ratio=2, at_epoch=1, refine_at_epochs=[3])
    latest = EmbeddingCompression("low_rank", ratio=2, at_epoch=4)
    own = QuantizationAware("int8", tables="encoder", backbone="int8")
    for expected, *callbacks in (
        ("EmbeddingCompression refines tables at epoch 3", QuantizationAware(at_epoch=2), later),
        ("compresses tables at epoch 4", latest, QuantizationAware(at_epoch=2)),
        ("no compressed tables to quantize", QuantizationAware(at_epoch=2)),
        ("no module 'nowhere'", QuantizationAware(tables=["nowhere"]), compression),
        ("freeze_observers_at=7", QuantizationAware(tables="encoder", freeze_observers_at=7)),
        ("at_epoch asks for epoch 9", QuantizationAware(at_epoch=9)),
        ("two callbacks quantize the tables", QuantizationAware(), own),
        ("two callbacks quantize the backbone", own, QuantizationAware(tables=[], backbone="int8")),
    ):
        assert expected in said(LanguageModel(), *callbacks)
    model = LanguageModel()
    prepare_qat(model, Quantization(bits=8), ["encoder", "decoder"], backbone="int8")
    assert "prepared for quantization already" in said(model, QuantizationAware())
    assert "'mix.weight', ...) are prepared for quantization already" in said(
        model, QuantizationAware(tables=[], backbone="int8")
    )
    convert_qat(model)
    assert "'encoder' is packed in 8 bits, and has no numbers left to train" in said(model, QuantizationAware())
    assert "'mix.weight', ...) are packed already" in said(model, QuantizationAware(tables=[], backbone="int8"))


def test_dense_tables_the_log_and_a_converted_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def callback(**changes: Any) -> QuantizationAware:
        return QuantizationAware(**{"bits": "int8", "tables": ["decoder", "encoder"], "group_size": 16, **changes})

    model = LanguageModel(tied=True, bias=False)
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(callback(backbone="float16"), max_epochs=2)
        trainer.fit(model, **loaders())
    assert model.encoder.factorization is model.decoder.factorization
    said = json.loads((tmp_path / "report.json").read_text())
    table, backbone, whole = (said["quantization"][key] for key in ("tables", "backbone", "model"))
    assert [(one["name"], one["dtype"], one["group_size"]) for one in table] == [("encoder", "int8", 16)]
    assert (backbone["dtype"], backbone["stored_bytes"]) == ("float16", 2 * 16 * 16)
    assert "Table 'encoder' trains for int8: 0.00" in caplog.text
    assert "The backbone (1 weights) trains for float16: 0.001 MB once converted, 2.00x" in caplog.text
    assert f"The whole model: {whole['stored_bytes'] / 1e6:.3f} MB once converted" in caplog.text
    assert said["perplexity"]["final"] == pytest.approx(torch.tensor(_val_loss(make_trainer, model)).exp())
    unconverted = tmp_path / "training.ckpt"
    trainer.save_checkpoint(unconverted)

    convert_qat(model)
    trainer.save_checkpoint(tmp_path / "converted.ckpt")
    for fresh in (callback(backbone="float16"), callback(), QuantizationAware("int4", at_epoch=1)):
        text = _refused(
            make_trainer,
            LanguageModel(tied=True, bias=False),
            loaders(),
            fresh,
            ckpt_path=tmp_path / "converted.ckpt",
        )
        assert "has no numbers left to train" in text
    with pytest.warns(UserWarning, match=r"quantization began with {'bits': 8.*'bits': 3.*comes too late"):
        make_trainer(callback(backbone="float16", bits=3), max_epochs=3).fit(
            LanguageModel(tied=True, bias=False), **loaders(), ckpt_path=unconverted
        )


def _val_loss(make_trainer: MakeTrainer, model: Any) -> float:
    (result,) = make_trainer().validate(model, loaders()["val_dataloaders"], verbose=False)
    return float(result["val_loss"])


def test_state_of_when_backbone_was_called_body_is_found(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def callback() -> QuantizationAware:
        return QuantizationAware(tables="encoder", backbone="int8", freeze_observers_at=1)

    trainer = make_trainer(callback(), max_epochs=2)
    trainer.fit(LanguageModel(), **loaders())
    trainer.save_checkpoint(tmp_path / "now.ckpt")
    checkpoint = torch.load(tmp_path / "now.ckpt")
    state = checkpoint["callbacks"].pop(callback().state_key)
    state["settings"]["body"] = state["settings"].pop("backbone")
    checkpoint["callbacks"]["QuantizationAware{'at_epoch': 0, 'tables': 'encoder', 'body': 'int8'}"] = state
    torch.save(checkpoint, tmp_path / "before.ckpt")
    found, expected = callback(), callback()
    for one, name in ((found, "before.ckpt"), (expected, "now.ckpt")):
        make_trainer(one, max_epochs=3).fit(LanguageModel(), **loaders(), ckpt_path=tmp_path / name)
    assert found.state_dict() == expected.state_dict()


def test_two_processes_hold_the_same(torchrun: Callable[..., str], tmp_path: Path) -> None:
    assert torchrun(WORKERS / "quantize.py", tmp_path).count("the same") == 2
