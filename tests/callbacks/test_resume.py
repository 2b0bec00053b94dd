"""Resuming at every epoch equals the uninterrupted run, and compressed checkpoints load everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import lr_scheduler

import lightning_embcompress
from lightning_embcompress import EmbeddingCompression, GroupReduce
from lightning_embcompress.compression.plan import plan_of

MakeTrainer = Callable[..., Trainer]


def _adam(module: LightningModule) -> Any:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    return [optimizer], [lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)]


def _two_groups(module: LightningModule) -> Any:
    decayed = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in module.parameters() if parameter.dim() == 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.01], total_steps=100)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def _momentum(module: LightningModule) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    return [optimizer], [lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)]


def _cosine(module: LightningModule) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    return [optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)]


def _plateau(module: LightningModule) -> Any:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)
    return [optimizer], [{"scheduler": schedule, "monitor": "val_loss"}]


class InMemory(Logger):
    """Keeps what is logged, by step."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {}).update(metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def _loaders(foreign: SimpleNamespace) -> dict[str, Any]:
    # A plain loader, shuffled by the global random numbers.
    return foreign.loaders()  # type: ignore[no-any-return]


def _callback() -> EmbeddingCompression:
    return GroupReduce(ratio=2, at_epoch=1, refine_at_epochs=[3, 4], groups=3)


def _run(
    make_trainer: MakeTrainer, foreign: SimpleNamespace, kind: str, configure: Any, folder: Path, **fit: Any
) -> SimpleNamespace:
    model, callback = foreign.model(kind), _callback()
    model.optimizers_of = configure
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    logger = InMemory()
    trainer = make_trainer(
        callback, keep, max_epochs=6, enable_checkpointing=True, default_root_dir=folder, logger=logger
    )
    trainer.fit(model, **_loaders(foreign), **fit)
    return SimpleNamespace(
        parameters=dict(model.state_dict()),
        optimizer=trainer.optimizers[0].state_dict(),
        scheduler=trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        plan=plan_of(model),
        report=json.loads((folder / "report.json").read_text()),
        callback=callback.state_dict(),
        logged=logger.rows,
        trainer=trainer,
        model=model,
    )


# Compression happens at the start of epoch 1, refinements at those of 3 and 4. The checkpoint of epoch 0 is from before
# compression, that of 1 from its epoch, that of 2 from before the first refinement, 3 from between, 4 from after all.
@pytest.mark.parametrize("configure", [_adam, _two_groups, _momentum, _cosine, _plateau])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_resuming_equals_the_uninterrupted_run(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path, kind: str, configure: Any
) -> None:
    whole = _run(make_trainer, foreign, kind, configure, tmp_path / "whole")
    assert set(range(6)) == {int(path.stem[6:]) for path in (tmp_path / "whole").glob("epoch=*.ckpt")}
    for epoch in range(5):
        folder = tmp_path / f"from{epoch}"
        ckpt = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        assert torch.load(ckpt, weights_only=True)
        resumed = _run(make_trainer, foreign, kind, configure, folder, ckpt_path=ckpt)
        for name in ("parameters", "optimizer"):
            torch.testing.assert_close(getattr(resumed, name), getattr(whole, name), rtol=0, atol=0)
        scheduler = resumed.scheduler | {"lr_lambdas": None, "anneal_func": None, "_anneal_func_type": None}
        expected = whole.scheduler | {"lr_lambdas": None, "anneal_func": None, "_anneal_func_type": None}
        assert scheduler == expected
        assert resumed.plan == whole.plan
        assert resumed.report == whole.report
        # What was logged from there on: losses, perplexities, ratios.
        start = 12 * (epoch + 1)
        assert {s: row for s, row in resumed.logged.items() if s >= start} == {
            s: row for s, row in whole.logged.items() if s >= start
        }
        assert max(resumed.logged) >= 71
        assert resumed.callback["refined"] == whole.callback["refined"] == [3, 4]
        assert resumed.report["perplexity"]["refined"][1]["epoch"] == 4


@pytest.mark.parametrize("step", [10, 20])
def test_a_checkpoint_from_within_an_epoch(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path, step: int
) -> None:
    # 12 steps an epoch: step 10 is before the compression, step 20 in the epoch it was done at.
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    make_trainer(_callback(), keep, max_epochs=5, enable_checkpointing=True).fit(foreign.model(), **_loaders(foreign))
    callback, model = _callback(), foreign.model()
    ckpt = tmp_path / f"step={step}.ckpt"
    make_trainer(callback, max_epochs=5).fit(model, **_loaders(foreign), ckpt_path=ckpt)
    assert len(plan_of(model).tables) == 2
    assert callback.state_dict()["refined"] == [3, 4]


@pytest.mark.parametrize("saved", [{"every_n_train_steps": 12}, {"save_on_train_epoch_end": False}])
def test_a_checkpoint_from_between_the_last_step_of_an_epoch_and_its_end(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path, saved: dict[str, Any]
) -> None:
    def fit(*callbacks: Callback, **changes: Any) -> tuple[Any, Any]:
        model, callback = foreign.model(), _callback()
        trainer = make_trainer(callback, *callbacks, max_epochs=5, enable_checkpointing=True)
        trainer.fit(model, **_loaders(foreign), **changes)
        return dict(model.state_dict()), callback.state_dict()["perplexity"]

    whole = fit(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **saved))
    for step in (12, 24, 36, 48):
        resumed = fit(ckpt_path=tmp_path / f"step={step}.ckpt")
        torch.testing.assert_close(resumed[0], whole[0], rtol=0, atol=0)
        assert resumed[1] == whole[1]


@pytest.fixture
def run(foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path) -> SimpleNamespace:
    """A finished run with a checkpoint of every epoch."""
    return _run(make_trainer, foreign, "untied", _adam, tmp_path)


@pytest.mark.parametrize("entry", ["validate", "test"])
def test_a_fresh_module_evaluates_any_checkpoint(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace, entry: str
) -> None:
    data = foreign.loaders()["val_dataloaders"]
    for epoch in (0, 5):
        trainer, model = make_trainer(_callback()), foreign.model()
        getattr(trainer, entry)(model, data, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False)
        assert bool(plan_of(model).tables) == (epoch == 5)
    torch.testing.assert_close(dict(model.state_dict()), run.parameters, rtol=0, atol=0)
    loss = trainer.callback_metrics["val_loss"].item()
    # 48 rows in batches of 8: a mean of means is the mean.
    assert torch.tensor(loss).exp().item() == pytest.approx(run.report["perplexity"]["final"], rel=1e-5)


def test_best_from_before_compression_in_the_same_trainer(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="epoch", mode="min", filename="best")
    trainer, model = make_trainer(_callback(), keep, max_epochs=5, enable_checkpointing=True), foreign.model()
    trainer.fit(model, **_loaders(foreign))
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    data = foreign.loaders()["val_dataloaders"]
    final = {name: value.clone() for name, value in model.state_dict().items()}
    (dense,) = trainer.test(model, data, ckpt_path="best", verbose=False)
    assert type(model.encoder) is nn.Embedding
    assert type(model.decoder) is nn.Linear
    (compressed,) = trainer.test(model, data, ckpt_path=tmp_path / "final.ckpt", verbose=False)
    torch.testing.assert_close(dict(model.state_dict()), final, rtol=0, atol=0)
    assert dense["val_loss"] != compressed["val_loss"]


def test_weights_only_checkpoints(foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_weights_only=True, filename="weights")
    model = foreign.model("tied")
    make_trainer(_callback(), keep, max_epochs=5, enable_checkpointing=True).fit(model, **_loaders(foreign))
    path = tmp_path / "weights.ckpt"
    assert "callbacks" not in torch.load(path, weights_only=True)
    loaded = lightning_embcompress.load_from_checkpoint(foreign.Foreign, path, tied=True)
    assert type(loaded) is foreign.Foreign
    assert loaded.encoder.factorization is loaded.decoder.factorization
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    fresh = foreign.model("tied")
    data = foreign.loaders()["val_dataloaders"]
    make_trainer(_callback()).validate(fresh, data, ckpt_path=path, verbose=False)
    torch.testing.assert_close(dict(fresh.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_a_checkpoint_holds_tensors_and_primitives_only(tmp_path: Path, run: SimpleNamespace) -> None:
    for epoch in (0, 1, 5):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert ("embcompress" in saved) == (epoch > 0)
    assert saved["embcompress"] == json.loads(json.dumps(saved["embcompress"]))


def test_refinement_beyond_those_that_were_planned(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace
) -> None:
    # The file of the compression is still there, but it is not what the last refinement left out.
    callback = GroupReduce(ratio=2, at_epoch=1, refine_at_epochs=[3, 4, 7], groups=3)
    with pytest.raises(
        ValueError,
        match="no residual of table 'encoder' was kept.*refine_at_epochs that the run had, or use keep_reference",
    ):
        make_trainer(callback, max_epochs=9).fit(
            foreign.model(), **_loaders(foreign), ckpt_path=tmp_path / "epoch=5.ckpt"
        )


def test_resuming_without_the_residual(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace
) -> None:
    files = sorted((tmp_path / "residuals").glob("*/*"), key=lambda path: path.name)
    assert [path.name for path in files] == [
        f"{table}-epoch{epoch}.bin" for table in ("decoder", "encoder") for epoch in (1, 3)
    ]
    for path in files:
        path.unlink()
    steps: list[int] = []

    class Steps(Callback):
        def on_train_batch_start(self, *_: Any, **__: Any) -> None:
            steps.append(1)

    trainer = make_trainer(_callback(), Steps(), max_epochs=6)
    with pytest.raises(FileNotFoundError, match=r"encoder-epoch1.bin' is missing"):
        trainer.fit(foreign.model(), **_loaders(foreign), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert not steps
    # From after the last refinement nobody needs it.
    make_trainer(_callback(), max_epochs=7).fit(
        foreign.model(), **_loaders(foreign), ckpt_path=tmp_path / "epoch=5.ckpt"
    )


def test_resuming_with_another_epoch_of_compression(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace
) -> None:
    other = GroupReduce(ratio=2, at_epoch=2, groups=3)
    with pytest.raises(ValueError, match="compressed already.*resume with the method, at_epoch and tables of the run"):
        make_trainer(other, max_epochs=8).fit(foreign.model(), **_loaders(foreign), ckpt_path=tmp_path / "epoch=5.ckpt")
    # From before the compression any epoch will do; what comes too late for a refinement is said and left out.
    model, late = foreign.model(), GroupReduce(ratio=2, at_epoch=0, refine_at_epochs=[1, 3], groups=3)
    ckpt = tmp_path / "epoch=1.ckpt"
    dense = make_trainer(max_epochs=2)
    dense.fit(foreign.model(), **_loaders(foreign))
    dense.save_checkpoint(ckpt)
    with pytest.warns(UserWarning, match="refinement at epoch 1 is left out: training is at epoch 2 already"):
        make_trainer(late, max_epochs=4).fit(model, **_loaders(foreign), ckpt_path=ckpt)
    assert len(plan_of(model).tables) == 2
    assert [entry["epoch"] for entry in late.state_dict()["perplexity"]["refined"]] == [3]


def test_two_callbacks_for_two_tables(foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [
            EmbeddingCompression("low_rank", ratio=2, tables="encoder", at_epoch=1, refine_at_epochs=[2]),
            EmbeddingCompression("group_reduce", ratio=3, tables=["decoder"], at_epoch=2, groups=2),
        ]

    whole, resumed = foreign.model(), foreign.model()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    make_trainer(*callbacks(), keep, max_epochs=4, enable_checkpointing=True).fit(whole, **_loaders(foreign))
    assert [(table.name, table.method) for table in plan_of(whole).tables] == [
        ("encoder", "low_rank"),
        ("decoder", "group_reduce"),
    ]
    for epoch in (0, 1, 2):
        resumed = foreign.model()
        ckpt = tmp_path / f"epoch={epoch}.ckpt"
        make_trainer(*callbacks(), max_epochs=4).fit(resumed, **_loaders(foreign), ckpt_path=ckpt)
        torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)


def test_layers_that_are_built_in_configure_model(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    class Lazy(foreign.Foreign):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            del self.encoder, self.decoder

        def configure_model(self) -> None:
            if not hasattr(self, "encoder"):
                self.encoder = nn.Embedding(foreign.vocab_size, foreign.dim)
                self.decoder = nn.Linear(foreign.dim, foreign.vocab_size)

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)

    def fit(*callbacks: Callback, **changes: Any) -> Any:
        seed_everything(0, verbose=False)
        model = Lazy()
        trainer = make_trainer(_callback(), *callbacks, max_epochs=5, enable_checkpointing=True)
        trainer.fit(model, **_loaders(foreign), **changes)
        return model

    whole = fit(keep)
    resumed = fit(ckpt_path=tmp_path / "epoch=2.ckpt")
    torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)


def test_other_settings_come_too_late(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace
) -> None:
    model, other = foreign.model(), GroupReduce(ratio=8, at_epoch=1, refine_at_epochs=[3, 4], groups=2)
    with pytest.warns(UserWarning, match=r"'ratio': 8.*ignored.*'ratio': 2"):
        make_trainer(other, max_epochs=7).fit(model, **_loaders(foreign), ckpt_path=tmp_path / "epoch=5.ckpt")
    assert [table.ratio for table in plan_of(model).tables] == [table.ratio for table in run.plan.tables]


@pytest.mark.parametrize(
    "damage",
    [
        5,
        {"random_states": 5, "plateau": []},
        {"random_states": []},
        {"random_states": [{}], "plateau": []},
        {"random_states": [], "plateau": [{"scheduler": 0, "value": "1", "after": 0}]},
    ],
)
def test_a_damaged_record_of_the_run(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace, damage: Any
) -> None:
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    saved["embcompress_run"] = damage
    torch.save(saved, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match="damaged"):
        make_trainer(_callback(), max_epochs=6).fit(
            foreign.model(), **_loaders(foreign), ckpt_path=tmp_path / "damaged.ckpt"
        )
    # Of an older version there is none.
    del saved["embcompress_run"]
    torch.save(saved, tmp_path / "older.ckpt")
    make_trainer(_callback(), max_epochs=6).fit(foreign.model(), **_loaders(foreign), ckpt_path=tmp_path / "older.ckpt")


def test_residuals_need_a_folder_of_this_machine(foreign: SimpleNamespace, make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="'memory://bucket/run' is no folder of this machine: name a local one"):
        make_trainer(_callback(), max_epochs=6, default_root_dir="memory://bucket/run").fit(
            foreign.model(), **_loaders(foreign)
        )
    trainer = make_trainer(GroupReduce(ratio=2, groups=3), max_epochs=1, default_root_dir="memory://bucket/run")
    with pytest.warns(UserWarning, match="report.json is not written"):
        trainer.fit(foreign.model(), **_loaders(foreign))
