"""Resuming from any step of a run equals the uninterrupted run, with the data modules of the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler

from lightning_embcompress import GroupReduce
from lightning_embcompress.utils.random_state import random_state
from toys import InMemory, assert_same_run, outcome

CPU = torch.device("cpu")
Run = Callable[..., SimpleNamespace]


class CountRows(Callback):
    """Counts in every checkpoint what was logged before."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def state_dict(self) -> dict[str, Any]:
        return {"rows": len(self.logger.rows)}


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def _momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


def _one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=100)


def _cosine(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)


def _plateau(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.1)


@pytest.fixture
def run(
    request: pytest.FixtureRequest, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> Callable[..., SimpleNamespace]:
    """Fit for five epochs, compressed at the start of the second, refined at those of the third and the fifth."""

    def fit(
        folder: str,
        *,
        kind: str = "recurrent",
        model: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        keep: dict[str, Any] | None = None,
        ckpt_path: Path | None = None,
    ) -> SimpleNamespace:
        where, logger, factory = tmp_path / folder, InMemory(), request.getfixturevalue(kind)
        module = factory.model(**{"optimizer": _adam, **(model or {})})
        compression = GroupReduce(ratio=1.3, groups=2, at_epoch=1, refine_at_epochs=[2, 4])
        callbacks: list[Callback] = [compression, CountRows(logger)]
        if keep is not None:
            callbacks.append(ModelCheckpoint(where, save_top_k=-1, filename="{step}", **keep))
        options = {"max_epochs": 5, "logger": logger, "enable_checkpointing": keep is not None}
        engine = make_trainer(*callbacks, **{**options, "default_root_dir": where, **(trainer or {})})
        engine.fit(module, datamodule=factory.data(**(data or {})), ckpt_path=ckpt_path)
        return SimpleNamespace(**vars(outcome(engine, module)), step=engine.global_step, random=random_state(CPU))

    return fit


def _assert_equal(resumed: SimpleNamespace, whole: SimpleNamespace, path: Path) -> None:
    step = int(path.stem[5:])
    assert_same_run(resumed, whole, path)
    torch.testing.assert_close(resumed.random, whole.random, rtol=0, atol=0)
    assert resumed.step == whole.step == 5 * (whole.step // 5)
    # Lightning saves a step before it logs its metrics and validates after it, and goes on with the step that follows.
    before = torch.load(path, weights_only=True)["callbacks"]["CountRows"]["rows"]
    assert resumed.rows == [row for row in whole.rows[before:] if row[0] != step - 1]
    assert resumed.rows


CASES: dict[str, dict[str, Any]] = {
    "full softmax": {},
    "sampled softmax": {"model": {"softmax": "sampled", "num_sampled": 10, "tie_weights": True}},
    "momentum, one cycle": {
        "model": {"optimizer": _momentum, "lr_scheduler": _one_cycle, "lr_scheduler_interval": "step"}
    },
    "cosine, validation twice an epoch": {"model": {"lr_scheduler": _cosine}, "trainer": {"val_check_interval": 0.5}},
    "part of an epoch": {"trainer": {"limit_train_batches": 7, "limit_val_batches": 2}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2}},
    "a process reads ahead": {"data": {"num_workers": 1}},
    "shuffled blocks": {"kind": "transformer"},
    "shuffled blocks, a process reads ahead": {"kind": "transformer", "data": {"num_workers": 1}},
}


def _check(run: Run, folder: Path, whole: SimpleNamespace, steps: Any, options: dict[str, Any]) -> None:
    for step in steps:
        path = folder / f"step={step}.ckpt"
        resumed = run(f"from {step}", ckpt_path=path, **options)
        _assert_equal(resumed, whole, path)


# Fractions of the run: before compression, the last step before it, in its epoch, in that of the first refinement,
# between the two, after the last.
@pytest.mark.parametrize("name", [name for name in CASES if name != "shuffled blocks, a process reads ahead"])
def test_resuming_equals_the_uninterrupted_run(run: Run, tmp_path: Path, name: str) -> None:
    whole = run("whole", keep={"every_n_train_steps": 1}, **CASES[name])
    epoch = whole.step // 5
    steps = [epoch - 1, epoch + 2, 3 * epoch - 1, 4 * epoch + 1]
    if name in ("full softmax", "shuffled blocks"):
        steps += [epoch, 2 * epoch + 1, 4 * epoch]
    if name == "a process reads ahead":
        # Every loader starts processes.
        steps = steps[1:3]
    _check(run, tmp_path / "whole", whole, steps, CASES[name])


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_resuming_from_every_step_equals_the_uninterrupted_run(run: Run, tmp_path: Path, name: str) -> None:
    whole = run("whole", keep={"every_n_train_steps": 1}, **CASES[name])
    _check(run, tmp_path / "whole", whole, range(1, whole.step), CASES[name])


def test_resuming_from_a_validation_within_an_epoch(run: Run, tmp_path: Path) -> None:
    options: dict[str, Any] = {"trainer": {"val_check_interval": 0.3}}
    whole = run("whole", keep={"save_on_train_epoch_end": False}, **options)
    steps = [int(path.stem[5:]) for path in (tmp_path / "whole").glob("*.ckpt")]
    assert len(steps) == 15
    _check(run, tmp_path / "whole", whole, sorted(steps)[1::4], options)


def test_resuming_a_run_that_max_steps_ended_within_an_epoch(run: Run, tmp_path: Path) -> None:
    whole = run("whole", trainer={"max_steps": 55, "max_epochs": None})
    run("first", trainer={"max_steps": 15, "max_epochs": None}, keep={"save_last": True})
    path = tmp_path / "first" / "last.ckpt"
    # Written after the hooks of the epoch's end.
    assert "lstm_state" in torch.load(path, weights_only=True)
    resumed = run("resumed", trainer={"max_steps": 55, "max_epochs": None}, ckpt_path=path)
    assert_same_run(resumed, whole, path)
    torch.testing.assert_close(resumed.random, whole.random, rtol=0, atol=0)
    assert resumed.rows == [row for row in whole.rows if (row[0] or 0) >= 15]


# `FitLoop.on_advance_end` steps it only `if not self.restarting`, which lasts to the end of the epoch in which training
# was resumed. It is right for a checkpoint from an epoch's end, where the monitored metric is not known any more.
def test_resuming_with_a_plateau_scheduler(run: Run, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": {"lr_scheduler": _plateau}}
    whole = run("whole", keep={"every_n_train_steps": 1}, **options)
    _check(run, tmp_path / "whole", whole, [whole.step // 5 + 2], options)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_go_on_where_they_were(
    torchrun: Callable[..., str], make_trainer: Callable[..., Trainer], recurrent: SimpleNamespace, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    keep = ModelCheckpoint(alone, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer = make_trainer(keep, max_epochs=2, enable_checkpointing=True)
    # As the worker makes it, but for one process with the texts of both.
    trainer.fit(recurrent.model(num_layers=1, dropout=0.0, optimizer=_adam), datamodule=recurrent.data())
    trainer.save_checkpoint(alone / "final.ckpt")
    worker = Path(__file__).parent / "workers" / "resume_mid_epoch.py"
    assert torchrun(worker, recurrent.folder, alone).count("passed") == 2
