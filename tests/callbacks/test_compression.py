"""The callback on modules that were written without it: what it changes, what it refuses, what it reports."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim import lr_scheduler

from lightning_embcompress import EmbeddingCompression, GroupReduce, TensorTrain, TransformCoding, compress
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.methods.registry import TransformCodingConfig
from toys import DIM, VOCAB_SIZE, loaders_of, model_of

MakeTrainer = Callable[..., Trainer]

TABLES = {
    "untied": [("encoder",), ("decoder",)],
    "tied": [("encoder", "decoder")],
    "head": [("decoder",)],
    "embedding": [("encoder",)],
    "bag": [("encoder",)],
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=200),
}


class Watch(Callback):
    """Comes after the compression: takes notes at the start and at the end of every epoch."""

    def __init__(self) -> None:
        self.compressed: list[bool] = []
        self.groups: list[int] = []
        self.at_start: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.steps = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.compressed.append(any(isinstance(module, CompressedLayer) for module in pl_module.modules()))
        self.groups.append(len(trainer.optimizers[0].param_groups))
        self.at_start.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [("untied", "lambda"), ("tied", "one_cycle"), ("head", "lambda"), ("embedding", "one_cycle"), ("bag", "lambda")],
)
def test_foreign_modules(make_trainer: MakeTrainer, kind: str, schedule: str) -> None:
    model = model_of(kind)

    def configure(module: Any) -> Any:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": SCHEDULERS[schedule](optimizer), "interval": "step"}]

    model.optimizer = configure
    dense = {id(model.get_submodule(path).weight) for paths in TABLES[kind] for path in paths}
    watch = Watch()
    # Nobody sees in the data how often tokens are targets.
    counts = torch.ones(VOCAB_SIZE) if kind == "head" else None
    callback = EmbeddingCompression("weighted_low_rank", ratio=2, at_epoch=1, token_counts=counts)
    trainer = make_trainer(callback, watch)
    trainer.fit(model, **loaders_of(kind))

    assert watch.compressed == [False, True, True]
    assert [table.modules for table in plan_of(model).tables] == TABLES[kind]
    assert plan_of(model).ratio >= 2
    (optimizer,) = trainer.optimizers
    assert watch.groups == [1, 1, 1]
    optimized = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    assert optimized == [id(parameter) for parameter in model.parameters()]
    assert not dense & set(optimized)
    assert not dense & {id(parameter) for parameter in optimizer.state}
    factors = [name for name, _ in model.named_parameters() if ".factorization." in name]
    assert factors
    for name in factors:
        moved = model.get_parameter(name) - watch.at_start[1][name]
        assert moved.abs().max() > 1e-3, name
    assert watch.losses[2] < watch.losses[0]


def test_fast_dev_run_does_everything_and_leaves_nothing(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = model_of()
    callback = GroupReduce(ratio=2, at_epoch=5, refine_at_epochs=[6, 7], groups=3)
    make_trainer(callback, fast_dev_run=True).fit(model, **loaders_of())
    state = callback.state_dict()
    assert len(plan_of(model).tables) == 2
    assert state["refined"] == [6, 7]
    assert all(entry["value"] > 1 for entry in state["perplexity"]["refined"])
    assert list(tmp_path.iterdir()) == []


def test_a_frozen_table_stays_frozen(make_trainer: MakeTrainer) -> None:
    model, watch = model_of(), Watch()
    model.encoder.weight.requires_grad_(False)
    make_trainer(EmbeddingCompression("low_rank", ratio=2), watch, max_epochs=1).fit(model, **loaders_of())
    for name, parameter in model.encoder.named_parameters(prefix="encoder"):
        assert not parameter.requires_grad
        assert torch.equal(parameter, watch.at_start[0][name])


def test_one_callback_serves_one_model_after_the_other(make_trainer: MakeTrainer) -> None:
    callback = EmbeddingCompression("low_rank", ratio=2)
    for _ in range(2):
        model = model_of()
        make_trainer(callback, max_epochs=1).fit(model, **loaders_of())
        assert len(plan_of(model).tables) == 2
    trainer = make_trainer(callback, max_epochs=1)
    parameters = dict(model.named_parameters())
    trainer.fit(model, **loaders_of())
    # A second fit of the compressed model goes on with what is there.
    assert {name: id(value) for name, value in model.named_parameters()} == {k: id(v) for k, v in parameters.items()}


def test_report_and_logged_values(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    callback = GroupReduce(size="7kB", at_epoch=1, refine_at_epochs=[2], groups=2)
    model = model_of()
    make_trainer(callback, logger=logger, max_epochs=4).fit(model, **loaders_of())

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [table["name"] for table in report["tables"]] == ["encoder", "decoder"]
    assert sum(table["stored_bytes"] for table in report["tables"]) <= 7000
    whole, rest = report["model"], sum(value.nbytes for value in model_of().state_dict().values())
    assert whole["dense_bytes"] == rest
    assert whole["ratio"] == whole["dense_bytes"] / whole["stored_bytes"]
    perplexity = report["perplexity"]
    assert list(perplexity) == ["dense", "compressed", "refined", "final", "split"]
    assert perplexity["split"] == "validation"
    assert [entry["epoch"] for entry in perplexity["refined"]] == [2]
    assert perplexity["dense"] < perplexity["compressed"]

    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {name: float(row[name]) for row in rows for name in row if row[name]}
    steps = {name: int(row["step"]) for row in rows for name in row if row[name]}
    assert logged["embcompress/perplexity_dense"] == pytest.approx(perplexity["dense"])
    assert logged["embcompress/perplexity_compressed"] == pytest.approx(perplexity["compressed"])
    assert logged["embcompress/perplexity_refined"] == pytest.approx(perplexity["refined"][0]["value"])
    assert logged["embcompress/perplexity_final"] == pytest.approx(perplexity["final"])
    # After one, two and all of four epochs.
    found = [steps[f"embcompress/perplexity_{point}"] for point in ("dense", "compressed", "refined", "final")]
    assert found == [12, 12, 24, 48]
    assert logged["embcompress/encoder/ratio"] == pytest.approx(report["tables"][0]["ratio"])
    assert logged["embcompress/model_ratio"] == pytest.approx(whole["ratio"])
    assert 0 < logged["embcompress/decoder/weighted_error"] < 1


def test_without_validation_data(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    callback = GroupReduce(ratio=2, at_epoch=1, refine_at_epochs=[2], groups=3)
    loader = loaders_of()["train_dataloaders"]
    make_trainer(callback).fit(model_of(), train_dataloaders=loader)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["perplexity"] == {
        "dense": None,
        "compressed": None,
        "refined": [{"epoch": 2, "value": None}],
        "final": None,
        "split": "validation",
    }


def _two_heads(model: Any) -> None:
    model.second = nn.Linear(model.decoder.in_features, model.decoder.out_features)


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        ({"at_epoch": 3}, None, r"at_epoch asks for epoch 3, but max_epochs=3.*at least 4"),
        ({"refine_at_epochs": [1, 9]}, None, r"refine_at_epochs asks for epoch 9"),
        ({"ratio": 500.0}, None, r"'encoder' \(150, 16\).*smallest it can be is"),
        ({}, _two_heads, r"found two or more projections.*'decoder'.*'second'.*Name the modules"),
        ({"token_counts": [1] * 149}, None, r"150 rows of table 'encoder', its shape is \(149,\)"),
    ],
)
def test_refused_before_training_starts(
    make_trainer: MakeTrainer, arguments: Any, change: Any, message: str, tmp_path: Path
) -> None:
    model, watch = model_of(), Watch()
    if change is not None:
        change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback = EmbeddingCompression("weighted_low_rank", **{"ratio": 2, **arguments})
    with pytest.raises(ValueError, match=message):
        make_trainer(callback, watch).fit(model, **loaders_of())
    assert watch.steps == 0
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at_epoch": 2, "refine_at_epochs": [1, 3]}, r"\[1, 3\] must all come after at_epoch=2; 1 does not"),
        ({"at_epoch": -1}, "at_epoch must be a whole number, 0 or more"),
        ({"at_epoch": "2"}, "at_epoch must be a whole number, 0 or more"),
        ({"refine_at_epochs": 3}, "refine_at_epochs must be a list"),
        ({"size": "1MB"}, "exactly one of ratio, size, bits_per_weight"),
        ({"group": 3}, r"unknown option 'group' \(did you mean 'groups'"),
    ],
)
def test_refused_when_it_is_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingCompression("group_reduce", **{"ratio": 2, **arguments})


def test_what_is_large_and_left_is_said_before_the_first_step(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    for tables, said in (("auto", True), (["encoder"], False)):
        model = model_of()
        model.kinds = nn.Embedding(VOCAB_SIZE // 2, DIM)
        callback = EmbeddingCompression("low_rank", ratio=2, tables=tables)
        make_trainer(callback, max_epochs=2).fit(model, **loaders_of())
        # Whoever names tables knows what is left.
        assert ("Stays dense: 'kinds' (75, 16)." in capsys.readouterr().err) == said


def test_a_table_of_nan_is_refused_when_its_epoch_comes(make_trainer: MakeTrainer) -> None:
    model = model_of()

    class Diverge(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.decoder.weight.data[[7, 9]] = math.nan

    with pytest.raises(ValueError, match=r"'decoder' has NaN or infinite values in 2 of its 150 rows \(rows 7, 9\)"):
        make_trainer(Diverge(), EmbeddingCompression("low_rank", ratio=2, at_epoch=1)).fit(model, **loaders_of())
    assert not plan_of(model).tables
    assert model.encoder.weight.isfinite().all()


def test_strategies_that_shard_are_refused(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(devices=2, strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="ModelParallelStrategy.*compress_or_restore.*strategy='ddp'"):
        EmbeddingCompression("low_rank", ratio=2).setup(trainer, model_of(), "fit")


def test_a_model_that_was_compressed_otherwise_is_refused(make_trainer: MakeTrainer) -> None:
    model = model_of()
    compress(model, "low_rank", ratio=2)
    # Not taken for a table: the only Linear that is left.
    with pytest.raises(ValueError, match=r"'encoder', 'decoder' are compressed already, and not by this"):
        make_trainer(EmbeddingCompression("low_rank", ratio=2)).fit(model, **loaders_of())


def test_counts_of_a_data_module_are_read_only_where_they_are_needed(make_trainer: MakeTrainer) -> None:
    loaders = loaders_of()

    class Data(LightningDataModule):
        asked = 0

        @property
        def token_counts(self) -> list[int]:
            self.asked += 1
            return list(range(VOCAB_SIZE, 0, -1))

        def train_dataloader(self) -> Any:
            return loaders["train_dataloaders"]

    for method, asked in (("low_rank", False), ("weighted_low_rank", True)):
        data, model = Data(), model_of()
        make_trainer(EmbeddingCompression(method, ratio=2), max_epochs=1).fit(model, datamodule=data)
        assert bool(data.asked) is asked


def test_tensor_train_by_its_rank(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model = model_of("tied")
    make_trainer(TensorTrain(max_rank=1, at_epoch=1)).fit(model, **loaders_of())
    (table,) = plan_of(model).tables
    assert table.modules == ("encoder", "decoder")
    assert table.spec["ranks"] == [1, 1, 1, 1, 1]
    assert model.encoder.factorization is model.decoder.factorization
    (entry,) = json.loads((tmp_path / "report.json").read_text())["tables"]
    assert entry["parameter_ratio"] == 2


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
