"""The callback beside everything else that a Trainer can do."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcompress import GroupReduce, compress
from lightning_embcompress.cli import main as cli
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
    "limit_train_batches, int": ({"limit_train_batches": 4}, {"batches": 4}),
    "limit_train_batches, float": ({"limit_train_batches": 0.5}, {"batches": 3}),
    "max_steps within an epoch": ({"max_steps": 9}, {"steps": 9}),
    "val_check_interval, float": ({"val_check_interval": 0.5}, {}),
    "val_check_interval, int": ({"val_check_interval": 2}, {}),
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


def test_without_validation_nothing_is_measured(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = Plain()
    make_trainer(_callback(), limit_val_batches=0).fit(model)
    _assert_equal(model, _by_hand(Plain()))
    assert [_report(tmp_path)[point] for point in ("dense", "compressed", "final")] == [None] * 3


def test_without_training_nothing_is_compressed(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = Plain()
    make_trainer(_callback(at_epoch=0), limit_train_batches=0).fit(model)
    _assert_equal(model, Plain())
    assert not (tmp_path / "report.json").exists()


def test_fast_dev_run_tries_all(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = Plain()
    callback = _callback(refine_at_epochs=[2])
    make_trainer(callback, fast_dev_run=2).fit(model)
    assert len(plan_of(model).tables) == 2
    assert callback.state_dict()["refined"] == [2]
    assert list(tmp_path.iterdir()) == []


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
def test_a_run_that_ends_before_the_compression_is_told(make_trainer: MakeTrainer, name: str) -> None:
    steps, callbacks, options = ENDS[name]
    model, at_epoch = Plain(), 2 if name == "early stopping" else 1
    trainer = make_trainer(_callback(at_epoch=at_epoch), *callbacks, **options)
    with pytest.warns(UserWarning, match=f"before at_epoch={at_epoch}: nothing was compressed"):
        trainer.fit(model)
    assert trainer.global_step == steps
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


def test_checkpoints_of_all_kinds(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    # The best epoch of all is the first, before the compression; of those after it the best is the first of them.
    best = ModelCheckpoint(tmp_path, monitor="watched", save_top_k=2, save_last=True, filename="{epoch}")
    trainer = make_trainer(_callback(), Rising(), best, enable_checkpointing=True)
    model = Plain()
    trainer.fit(model)
    names = [f"epoch={epoch}.ckpt" for epoch in range(3)]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [*names, "last.ckpt"]
    assert Path(best.best_model_path).name == "epoch=1.ckpt"
    perplexities = {}
    for choice in (None, "last", "best", tmp_path / names[0]):
        (logged,) = trainer.test(model, ckpt_path=choice, verbose=False)
        perplexities[choice] = math.exp(logged["val_loss"])
        assert isinstance(model.encoder, CompressedLayer) == (choice != tmp_path / names[0])
    # The test has the data of the validation.
    assert perplexities[None] == pytest.approx(_report(tmp_path)["final"], rel=1e-5)
    assert perplexities[tmp_path / names[0]] == pytest.approx(_report(tmp_path)["dense"], rel=1e-5)
    assert perplexities["last"] == perplexities[None] != perplexities["best"]
    _assert_equal(model, _by_hand(Plain(), steps=BATCHES))


@pytest.mark.parametrize("progress_bar", [RichProgressBar, TQDMProgressBar])
def test_progress_bars(make_trainer: MakeTrainer, progress_bar: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = Plain()
    make_trainer(_callback(), progress_bar(), enable_progress_bar=True, enable_model_summary=True).fit(model)
    _assert_equal(model, _by_hand(Plain()))
    assert "Compressed at epoch 1" in capsys.readouterr().out


# The step that each is logged at.
METRICS = {
    "embcompress/perplexity_dense": BATCHES,
    "embcompress/perplexity_compressed": BATCHES,
    "embcompress/perplexity_final": 3 * BATCHES,
    "embcompress/tables_ratio": BATCHES,
    "embcompress/encoder/ratio": BATCHES,
}


def test_csv_logger_and_learning_rate_monitor(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    make_trainer(_callback(), LearningRateMonitor("step"), logger=logger).fit(Plain())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, step in METRICS.items():
        (row,) = (row for row in rows if row[name])
        assert int(row["step"]) == step
        assert float(row[name]) > 1
    assert len([row for row in rows if row["lr-SGD"]]) == 3 * BATCHES
    assert (Path(logger.log_dir) / "report.json").is_file()


def test_tensorboard_logger(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the optional package `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    make_trainer(_callback(), logger=logger).fit(Plain())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for name, step in METRICS.items():
        (event,) = events.Scalars(name)
        assert event.step == step
        assert event.value > 1


# Compiling by these backends runs the same operations: a compiler's own arithmetic is not what is tested.
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.full)])
@pytest.mark.parametrize("parts", [["mix"], ["encoder", "mix", "decoder"], ["decoder"]])
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


@pytest.mark.parametrize("tables", ["auto", ["encoder"], ["encoder._orig_mod"]])
def test_a_wrapped_table_is_refused_before_training(make_trainer: MakeTrainer, tables: Any) -> None:
    # The wrapper calls the layer it was made from, whatever takes its place.
    model = Plain()
    model.encoder = torch.compile(model.encoder, backend="eager")
    with pytest.raises(ValueError, match=r"'encoder'.* is a .*OptimizedModule: only"):
        make_trainer(_callback(tables=tables)).fit(model)


class ByHand(Plain):
    """Manual optimization by two optimizers: tables, and all else."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        tables = [*self.encoder.parameters(), *self.decoder.parameters()]
        return torch.optim.SGD(tables, lr=0.5), torch.optim.SGD(self.mix.parameters(), lr=0.5)


def test_several_optimizers_and_manual_optimization(make_trainer: MakeTrainer) -> None:
    model = ByHand()
    trainer = make_trainer(_callback())
    trainer.fit(model)
    _assert_equal(model, _by_hand(Plain()))
    tables, others = (optimizer.param_groups[0]["params"] for optimizer in trainer.optimizers)
    assert [id(one) for one in others] == [id(one) for one in model.mix.parameters()]
    expected = [*model.encoder.parameters(), *model.decoder.parameters()]
    assert {id(one) for one in tables} == {id(one) for one in expected}


def test_a_frozen_table(make_trainer: MakeTrainer) -> None:
    model, once = Plain(), Plain()
    model.encoder.requires_grad_(False)
    make_trainer(_callback()).fit(model)
    _compress(once)
    _assert_equal(model.encoder, once.encoder)
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())


def test_predictions_after_training(make_trainer: MakeTrainer) -> None:
    model, trainer = Plain(), make_trainer(_callback())
    trainer.fit(model)
    predicted = trainer.predict(model)
    assert predicted is not None
    expected = _by_hand(Plain())
    for batch, ids in zip(model.predict_dataloader(), predicted, strict=True):
        assert torch.equal(expected(batch[0]).argmax(dim=-1), ids)


def test_the_saved_configuration_runs_again(
    recurrent: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = recurrent.folder
    Path("recipe.yaml").write_text(
        f"""
        trainer:
          default_root_dir: first
          max_epochs: 3
          logger: false
          accelerator: cpu
          enable_progress_bar: false
          callbacks:
            - class_path: GroupReduce
              init_args: {{ratio: 1.3, groups: 2, at_epoch: 1, refine_at_epochs: [2]}}
        model:
          class_path: LSTMLanguageModel
          init_args: {{embedding_dim: 12, hidden_size: 12, dropout: 0.3, softmax: sampled, num_sampled: 10}}
        data:
          class_path: TextFiles
          init_args:
            train_files: {folder}/train.txt
            valid_files: {folder}/valid.txt
            test_files: {folder}/valid.txt
            batch_size: 4
            sequence_length: 5
            cache_dir: {folder}/cache
        """
    )
    assert cli.main(["run", "recipe.yaml"]) == 0
    assert cli.main(["run", "first/config.yaml", "--trainer.default_root_dir=second"]) == 0
    first, second = (json.loads(Path(name, "report.json").read_text()) for name in ("first", "second"))
    assert first == second
    assert len(first["tables"]) == 2
    assert first["perplexity"]["refined"][0]["epoch"] == 2
