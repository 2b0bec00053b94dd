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
from torch import nn
from torch.optim import lr_scheduler

from lightning_embcompress import EmbeddingCompression, GroupReduce
from lightning_embcompress.compression.plan import plan_of
from toys import DIM, VOCAB_SIZE, InMemory, LanguageModel, loaders_of, model_of

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


def _plateau(module: LightningModule) -> Any:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.2)
    return [optimizer], [{"scheduler": schedule, "monitor": "val_loss"}]


def _callback() -> EmbeddingCompression:
    return GroupReduce(ratio=2, at_epoch=1, refine_at_epochs=[3, 4], groups=3)


def _run(make_trainer: MakeTrainer, kind: str, configure: Any, folder: Path, **fit: Any) -> SimpleNamespace:
    model, callback = model_of(kind), _callback()
    model.optimizer = configure
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    logger = InMemory()
    trainer = make_trainer(
        callback, keep, max_epochs=6, enable_checkpointing=True, default_root_dir=folder, logger=logger
    )
    trainer.fit(model, **loaders_of(), **fit)
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
@pytest.mark.parametrize(
    ("kind", "configure"), [("untied", _two_groups), ("tied", _momentum), ("untied", _plateau), ("tied", _adam)]
)
def test_resuming_equals_the_uninterrupted_run(
    make_trainer: MakeTrainer, tmp_path: Path, kind: str, configure: Any
) -> None:
    whole = _run(make_trainer, kind, configure, tmp_path / "whole")
    assert set(range(6)) == {int(path.stem[6:]) for path in (tmp_path / "whole").glob("epoch=*.ckpt")}
    for epoch in range(5):
        folder = tmp_path / f"from{epoch}"
        ckpt = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        saved = torch.load(ckpt, weights_only=True)
        assert ("embcompress" in saved) == (epoch > 0)
        assert saved.get("embcompress") == json.loads(json.dumps(saved.get("embcompress")))
        resumed = _run(make_trainer, kind, configure, folder, ckpt_path=ckpt)
        for name in ("parameters", "optimizer"):
            torch.testing.assert_close(getattr(resumed, name), getattr(whole, name), rtol=0, atol=0)
        scheduler = resumed.scheduler | {"lr_lambdas": None, "anneal_func": None, "_anneal_func_type": None}
        expected = whole.scheduler | {"lr_lambdas": None, "anneal_func": None, "_anneal_func_type": None}
        assert scheduler == expected
        assert resumed.plan == whole.plan
        assert resumed.report == whole.report
        # What was logged from there on: losses, perplexities, ratios.
        start = 12 * (epoch + 1)
        assert [row for row in resumed.logged if row[0] >= start] == [row for row in whole.logged if row[0] >= start]
        assert max(step for step, _ in resumed.logged) >= 71
        assert resumed.callback["refined"] == whole.callback["refined"] == [3, 4]
        assert resumed.report["perplexity"]["refined"][1]["epoch"] == 4


@pytest.mark.parametrize("saved", [{"every_n_train_steps": 12}, {"save_on_train_epoch_end": False}])
def test_a_checkpoint_from_between_the_last_step_of_an_epoch_and_its_end(
    make_trainer: MakeTrainer, tmp_path: Path, saved: dict[str, Any]
) -> None:
    def fit(*callbacks: Callback, **changes: Any) -> tuple[Any, Any]:
        model, callback = model_of(), _callback()
        trainer = make_trainer(callback, *callbacks, max_epochs=5, enable_checkpointing=True)
        trainer.fit(model, **loaders_of(), **changes)
        return dict(model.state_dict()), callback.state_dict()["perplexity"]

    whole = fit(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **saved))
    for step in (12, 24, 36, 48):
        resumed = fit(ckpt_path=tmp_path / f"step={step}.ckpt")
        torch.testing.assert_close(resumed[0], whole[0], rtol=0, atol=0)
        assert resumed[1] == whole[1]


@pytest.fixture
def run(make_trainer: MakeTrainer, tmp_path: Path) -> SimpleNamespace:
    """A finished run with a checkpoint of every epoch."""
    return _run(make_trainer, "untied", _adam, tmp_path)


def test_a_fresh_module_evaluates_as_the_report_says(
    make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace
) -> None:
    trainer = make_trainer(_callback())
    trainer.validate(model_of(), loaders_of()["val_dataloaders"], ckpt_path=tmp_path / "epoch=5.ckpt", verbose=False)
    # 48 rows in batches of 8: a mean of means is the mean.
    loss = trainer.callback_metrics["val_loss"]
    assert loss.exp().item() == pytest.approx(run.report["perplexity"]["final"], rel=1e-5)


def test_best_from_before_compression_in_the_same_trainer(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="epoch", mode="min", filename="best")
    trainer, model = make_trainer(_callback(), keep, max_epochs=5, enable_checkpointing=True), model_of()
    trainer.fit(model, **loaders_of())
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    data = loaders_of()["val_dataloaders"]
    final = {name: value.clone() for name, value in model.state_dict().items()}
    (dense,) = trainer.test(model, data, ckpt_path="best", verbose=False)
    assert type(model.encoder) is nn.Embedding
    assert type(model.decoder) is nn.Linear
    (compressed,) = trainer.test(model, data, ckpt_path=tmp_path / "final.ckpt", verbose=False)
    torch.testing.assert_close(dict(model.state_dict()), final, rtol=0, atol=0)
    assert dense["val_loss"] != compressed["val_loss"]


def test_refinement_beyond_those_that_were_planned(
    make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace
) -> None:
    # The file of the compression is still there, but it is not what the last refinement left out.
    callback = GroupReduce(ratio=2, at_epoch=1, refine_at_epochs=[3, 4, 7], groups=3)
    with pytest.raises(
        ValueError,
        match="no residual of table 'encoder' was kept.*refine_at_epochs that the run had, or use keep_reference",
    ):
        make_trainer(callback, max_epochs=9).fit(model_of(), **loaders_of(), ckpt_path=tmp_path / "epoch=5.ckpt")


def test_resuming_without_the_residual(make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace) -> None:
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
        trainer.fit(model_of(), **loaders_of(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert not steps
    # From after the last refinement nobody needs it.
    make_trainer(_callback(), max_epochs=7).fit(model_of(), **loaders_of(), ckpt_path=tmp_path / "epoch=5.ckpt")


def test_resuming_with_another_epoch_of_compression(
    make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace
) -> None:
    other = GroupReduce(ratio=2, at_epoch=2, groups=3)
    with pytest.raises(ValueError, match="compressed already.*resume with the method, at_epoch and tables of the run"):
        make_trainer(other, max_epochs=8).fit(model_of(), **loaders_of(), ckpt_path=tmp_path / "epoch=5.ckpt")
    # From before the compression any epoch will do; what comes too late for a refinement is said and left out.
    model, late = model_of(), GroupReduce(ratio=2, at_epoch=0, refine_at_epochs=[1, 3], groups=3)
    ckpt = tmp_path / "epoch=1.ckpt"
    dense = make_trainer(max_epochs=2)
    dense.fit(model_of(), **loaders_of())
    dense.save_checkpoint(ckpt)
    with pytest.warns(UserWarning, match="refinement at epoch 1 is left out: training is at epoch 2 already"):
        make_trainer(late, max_epochs=4).fit(model, **loaders_of(), ckpt_path=ckpt)
    assert len(plan_of(model).tables) == 2
    assert [entry["epoch"] for entry in late.state_dict()["perplexity"]["refined"]] == [3]


def test_two_callbacks_for_two_tables(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [
            EmbeddingCompression("low_rank", ratio=2, tables="encoder", at_epoch=1, refine_at_epochs=[2]),
            EmbeddingCompression("group_reduce", ratio=3, tables=["decoder"], at_epoch=2, groups=2),
        ]

    whole, resumed = model_of(), model_of()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    make_trainer(*callbacks(), keep, max_epochs=4, enable_checkpointing=True).fit(whole, **loaders_of())
    assert [(table.name, table.method) for table in plan_of(whole).tables] == [
        ("encoder", "low_rank"),
        ("decoder", "group_reduce"),
    ]
    for epoch in (0, 1, 2):
        resumed = model_of()
        ckpt = tmp_path / f"epoch={epoch}.ckpt"
        make_trainer(*callbacks(), max_epochs=4).fit(resumed, **loaders_of(), ckpt_path=ckpt)
        torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)


def test_layers_that_are_built_in_configure_model(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Lazy(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            del self.encoder, self.decoder

        def configure_model(self) -> None:
            if not hasattr(self, "encoder"):
                self.encoder = nn.Embedding(VOCAB_SIZE, DIM)
                self.decoder = nn.Linear(DIM, VOCAB_SIZE)

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)

    def fit(*callbacks: Callback, **changes: Any) -> Any:
        seed_everything(0, verbose=False)
        model = Lazy()
        trainer = make_trainer(_callback(), *callbacks, max_epochs=5, enable_checkpointing=True)
        trainer.fit(model, **loaders_of(), **changes)
        return model

    whole = fit(keep)
    resumed = fit(ckpt_path=tmp_path / "epoch=2.ckpt")
    torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)


def test_other_settings_come_too_late(make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace) -> None:
    model, other = model_of(), GroupReduce(ratio=8, at_epoch=1, refine_at_epochs=[3, 4], groups=2)
    with pytest.warns(UserWarning, match=r"'ratio': 8.*ignored.*'ratio': 2"):
        make_trainer(other, max_epochs=7).fit(model, **loaders_of(), ckpt_path=tmp_path / "epoch=5.ckpt")
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
    make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace, damage: Any
) -> None:
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    saved["embcompress_run"] = damage
    torch.save(saved, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match="damaged"):
        make_trainer(_callback(), max_epochs=6).fit(model_of(), **loaders_of(), ckpt_path=tmp_path / "damaged.ckpt")
    # Of an older version there is none.
    del saved["embcompress_run"]
    torch.save(saved, tmp_path / "older.ckpt")
    make_trainer(_callback(), max_epochs=6).fit(model_of(), **loaders_of(), ckpt_path=tmp_path / "older.ckpt")


def test_residuals_need_a_folder_of_this_machine(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="'memory://bucket/run' is no folder of this machine: name a local one"):
        make_trainer(_callback(), max_epochs=6, default_root_dir="memory://bucket/run").fit(model_of(), **loaders_of())
    trainer = make_trainer(GroupReduce(ratio=2, groups=3), max_epochs=1, default_root_dir="memory://bucket/run")
    with pytest.warns(UserWarning, match="report.json is not written"):
        trainer.fit(model_of(), **loaders_of())
