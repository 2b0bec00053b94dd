"""The callback beside everything else that a Trainer can do."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcompress import GroupReduce, compress
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.layers.compressed import CompressedLayer
from toys import LanguageModel, sgd

MakeTrainer = Callable[..., Trainer]
VOCAB_SIZE, DIM, BATCHES = 60, 8, 6
COUNTS = torch.arange(VOCAB_SIZE, 0, -1)


def _data(seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    ids = (VOCAB_SIZE ** torch.rand(8 * BATCHES, 5, generator=generator)).long().clamp(max=VOCAB_SIZE - 1)
    return TensorDataset(ids, (ids * 7 + 3) % VOCAB_SIZE)


class Plain(LanguageModel):
    """Without randomness, and with its own data."""

    def __init__(self) -> None:
        super().__init__(VOCAB_SIZE, DIM, optimizer=sgd)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(_data(1), batch_size=8)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(_data(2), batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader


def _callback(**changes: Any) -> GroupReduce:
    fixed: dict[str, Any] = {"ratio": 1.3, "groups": 2, "at_epoch": 1, "token_counts": COUNTS}
    return GroupReduce(**fixed | changes)


def _compress(model: nn.Module) -> None:
    compress(model, "group_reduce", ratio=1.3, groups=2, token_counts=COUNTS)


def _report(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "report.json").read_text())["perplexity"]
    return values


def _assert_equal(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def _by_hand(
    model: Plain,
    *,
    accumulate: int = 1,
    clip: Callable[[Iterable[nn.Parameter]], Any] | None = None,
    autocast: bool = False,
    batches: int = BATCHES,
    steps: int | None = None,
) -> Plain:
    """Three epochs, with `compress` at the start of the second."""
    done = 0
    for epoch in range(3):
        if done == steps:
            return model
        if epoch == 1:
            _compress(model)
        optimizer = model.configure_optimizers()
        for index, batch in enumerate(list(model.train_dataloader())[:batches]):
            if done == steps:
                return model
            with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
                loss = model.loss(batch)
            (loss / accumulate).backward()  # type: ignore[no-untyped-call]
            if (index + 1) % accumulate == 0 or index + 1 == batches:
                if clip is not None:
                    clip(model.parameters())
                optimizer.step()
                optimizer.zero_grad()
                done += 1
    return model


AS_BY_HAND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "accumulate_grad_batches": ({"accumulate_grad_batches": 4}, {"accumulate": 4}),
    "gradient_clip_val, norm": (
        {"gradient_clip_val": 0.1},
        {"clip": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1)},
    ),
    "gradient_clip_val, value": (
        {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
        {"clip": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.001)},
    ),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"autocast": True}),
    "bf16-true": ({"precision": "bf16-true"}, {}),
    "deterministic": ({"deterministic": True}, {}),
    "limit_train_batches": ({"limit_train_batches": 0.5}, {"batches": 3}),
    "max_steps within an epoch": ({"max_steps": 9}, {"steps": 9}),
    "val_check_interval": ({"val_check_interval": 0.5}, {}),
    "limit_val_batches": ({"limit_val_batches": 2}, {}),
    "check_val_every_n_epoch": ({"check_val_every_n_epoch": 2}, {}),
    "reload_dataloaders_every_n_epochs": ({"reload_dataloaders_every_n_epochs": 1}, {}),
    "overfit_batches": ({"overfit_batches": 2}, {"batches": 2}),
    "num_sanity_val_steps": ({"num_sanity_val_steps": -1}, {}),
}


@pytest.mark.parametrize("name", AS_BY_HAND)
def test_training_is_what_a_plain_loop_does(make_trainer: MakeTrainer, tmp_path: Path, name: str) -> None:
    options, by_hand = AS_BY_HAND[name]
    model = Plain()
    trainer = make_trainer(_callback(), **options)
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    try:
        trainer.fit(model)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    expected = Plain()
    _assert_equal(model, _by_hand(expected.bfloat16() if "true" in name else expected, **by_hand))
    assert [table.modules for table in plan_of(model).tables] == [("encoder",), ("decoder",)]
    values = _report(tmp_path)
    assert all(1 < values[point] < 1000 for point in ("dense", "compressed", "final"))
    assert values["dense"] != values["compressed"] != values["final"]


def test_without_training_nothing_is_compressed(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = Plain()
    make_trainer(_callback(at_epoch=0), limit_train_batches=0).fit(model)
    _assert_equal(model, Plain())
    assert not (tmp_path / "report.json").exists()


class Rising(Callback):
    """Logs a loss that is lowest in the first epoch."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("watched", torch.tensor(float(trainer.current_epoch)))


# With the steps of a run, and what ends it there.
ENDS: dict[str, tuple[int, list[Any], dict[str, Any]]] = {
    "max_steps within an epoch": (BATCHES - 1, [], {"max_steps": BATCHES - 1}),
    "max_steps": (BATCHES, [], {"max_steps": BATCHES}),
    "a timer": (BATCHES, [Timer(timedelta(seconds=1e-6), interval="epoch")], {}),
    "early stopping": (2 * BATCHES, [Rising(), EarlyStopping("watched", patience=1)], {"num_sanity_val_steps": 0}),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_run_that_ends_before_the_compression_is_told(make_trainer: MakeTrainer, tmp_path: Path, name: str) -> None:
    steps, callbacks, options = ENDS[name]
    model, at_epoch = Plain(), 2 if name == "early stopping" else 1
    trainer = make_trainer(_callback(at_epoch=at_epoch), *callbacks, **options)
    with pytest.warns(UserWarning, match=f"before at_epoch={at_epoch}: nothing was compressed"):
        trainer.fit(model)
    assert trainer.global_step == steps
    assert not (tmp_path / "report.json").exists()
    assert isinstance(model.encoder, nn.Embedding)
    if steps <= BATCHES:
        _assert_equal(model, _by_hand(Plain(), steps=steps))


def test_early_stopping_and_a_timer_after_the_compression(make_trainer: MakeTrainer) -> None:
    model, timer, stopping = Plain(), Timer(timedelta(hours=1)), EarlyStopping("watched", patience=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "nothing was compressed")
        make_trainer(_callback(), Rising(), timer, stopping, max_epochs=8, num_sanity_val_steps=0).fit(model)
    assert stopping.stopped_epoch == 2
    assert 0 < timer.time_elapsed("train") < 3600
    _assert_equal(model, _by_hand(Plain()))


@pytest.mark.parametrize("progress_bar", [RichProgressBar, TQDMProgressBar])
def test_progress_bars(make_trainer: MakeTrainer, progress_bar: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = Plain()
    make_trainer(_callback(), progress_bar(), enable_progress_bar=True, enable_model_summary=True).fit(model)
    _assert_equal(model, _by_hand(Plain()))
    assert "Compressed at epoch 1" in capsys.readouterr().out


# Compiling by these backends runs the same operations: a compiler's own arithmetic is not what is tested.
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.full)])
@pytest.mark.parametrize("parts", [["mix"], ["encoder", "mix", "decoder"]])
def test_compiled_submodules(make_trainer: MakeTrainer, parts: list[str], backend: str) -> None:
    model = Plain()
    for part in parts:
        model.get_submodule(part).compile(backend=backend)
    try:
        make_trainer(_callback()).fit(model)
    finally:
        torch.compiler.reset()
    # The layer that takes the place of a compiled one is compiled by who wants it.
    _assert_equal(model, _by_hand(Plain()))
    assert (model.mix._compiled_call_impl is not None) == ("mix" in parts)
    assert isinstance(model.decoder, CompressedLayer)
    loss = model.loss(_data(1)[:8])
    model.decoder.compile(backend=backend)
    torch.testing.assert_close(model.loss(_data(1)[:8]), loss)
    torch.compiler.reset()
