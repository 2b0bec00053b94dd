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
from toys import (
    DIM,
    VOCAB_SIZE,
    InMemory,
    LanguageModel,
    Losses,
    assert_same_run,
    check_resuming,
    loaders_of,
    model_of,
    run_with_checkpoints,
)

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


def _callback(tie: Any = "keep") -> EmbeddingCompression:
    return GroupReduce(ratio=2, at_epoch=1, refine_at_epochs=[3, 4], groups=3, tie=tie)


def _run(kind: str, configure: Any, folder: Path, **fit: Any) -> SimpleNamespace:
    gives_up = kind == "tie given up"
    model, callback = model_of("tied" if gives_up else kind), _callback("untie" if gives_up else "keep")
    model.optimizer = configure
    found = run_with_checkpoints(folder, model, callback, max_epochs=6, logger=InMemory(), **fit)
    return SimpleNamespace(**vars(found), callback=callback.state_dict())


# Compression happens at the start of epoch 1, refinements at those of 3 and 4. The checkpoint of epoch 0 is from before
# compression, that of 1 from its epoch, that of 2 from before the first refinement, 3 from between, 4 from after all.
@pytest.mark.parametrize(
    ("kind", "configure"), [("untied", _two_groups), ("tied", _momentum), ("untied", _plateau), ("tie given up", _adam)]
)
def test_resuming_equals_the_uninterrupted_run(tmp_path: Path, kind: str, configure: Any) -> None:
    whole = _run(kind, configure, tmp_path / "whole")
    assert len(whole.plan.tables) == (1 if kind == "tied" else 2)
    assert set(range(6)) == {int(path.stem[6:]) for path in (tmp_path / "whole").glob("epoch=*.ckpt")}
    for epoch in range(5):
        folder = tmp_path / f"from{epoch}"
        ckpt = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        saved = torch.load(ckpt, weights_only=True)
        assert ("embcompress" in saved) == (epoch > 0)
        assert saved.get("embcompress") == json.loads(json.dumps(saved.get("embcompress")))
        resumed = _run(kind, configure, folder, ckpt_path=ckpt)
        assert_same_run(resumed, whole, ckpt)
        # What was logged from there on: losses, perplexities, ratios.
        start = 12 * (epoch + 1)
        assert [row for row in resumed.rows if row[0] >= start] == [row for row in whole.rows if row[0] >= start]
        assert max(step for step, _ in resumed.rows) >= 71
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
def run(tmp_path: Path) -> SimpleNamespace:
    """A finished run with a checkpoint of every epoch."""
    return _run("untied", _adam, tmp_path)


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


def test_refinement_beyond_those_that_were_planned(
    make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace
) -> None:
    # The file of the compression is still there, but it is not what the last refinement left out.
    callback = GroupReduce(ratio=2, at_epoch=1, refine_at_epochs=[3, 4, 7], groups=3)
    with pytest.raises(ValueError, match="table 'encoder'.*refine_at_epochs.*keep_reference"):
        make_trainer(callback, max_epochs=9).fit(model_of(), **loaders_of(), ckpt_path=tmp_path / "epoch=5.ckpt")


def test_resuming_without_the_residual(make_trainer: MakeTrainer, tmp_path: Path, run: SimpleNamespace) -> None:
    files = sorted((tmp_path / "residuals").glob("*/*"), key=lambda path: path.name)
    assert [path.name for path in files] == [
        f"{table}-epoch{epoch}.bin" for table in ("decoder", "encoder") for epoch in (1, 3)
    ]
    for path in files:
        path.unlink()
    steps = Losses()
    trainer = make_trainer(_callback(), steps, max_epochs=6)
    with pytest.raises(FileNotFoundError, match=r"encoder-epoch1.bin' is missing"):
        trainer.fit(model_of(), **loaders_of(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert not steps.values
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


def test_two_callbacks_for_two_tables(tmp_path: Path) -> None:
    def make() -> list[Any]:
        first = EmbeddingCompression("low_rank", ratio=2, tables="encoder", at_epoch=1, refine_at_epochs=[2])
        return [model_of(), first, GroupReduce(ratio=3, tables=["decoder"], at_epoch=2, groups=2)]

    whole = check_resuming(tmp_path, make, (0, 1, 2), max_epochs=4)
    methods = [(table.name, table.method) for table in whole.plan.tables]
    assert methods == [("encoder", "low_rank"), ("decoder", "group_reduce")]


def test_layers_that_are_built_in_configure_model(tmp_path: Path) -> None:
    class Lazy(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            del self.encoder, self.decoder

        def configure_model(self) -> None:
            if not hasattr(self, "encoder"):
                self.encoder = nn.Embedding(VOCAB_SIZE, DIM)
                self.decoder = nn.Linear(DIM, VOCAB_SIZE)

    def make() -> list[Any]:
        seed_everything(0, verbose=False)
        return [Lazy(), _callback()]

    check_resuming(tmp_path, make, (2,), max_epochs=5)


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
