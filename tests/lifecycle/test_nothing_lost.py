"""The dense tables can be kept, folders may be moved, and a full disk takes nothing with it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lifecycle.workers import interrupted as worker
from lightning_embcompress.callbacks import reporting, solving
from lightning_embcompress.compression.reference import open_reference
from lightning_embcompress.integrations.checkpoint_io import AtomicCheckpointIO
from toys import small_files

TIED = {"tied": True, "optimizer": "sgd"}


class Note(Callback):
    """Notes the model at the start of every epoch, before what is due there, and counts steps."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.steps = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("case", [{}, TIED], ids=["untied", "tied"])
def test_the_dense_tables_are_kept(tmp_path: Path, case: dict[str, Any], precision: Any) -> None:
    note, kept = Note(), tmp_path / "kept" / "dense"
    callback = worker.callback(keep_reference=kept, refine_at_epochs=[3])
    worker.fit(tmp_path, note, compression=callback, case=case, max_epochs=4, precision=precision)
    names = ["encoder"] if case else ["decoder", "encoder"]
    assert sorted(path.name for path in kept.iterdir()) == [f"{name}.safetensors" for name in names]
    tables = open_reference(str(kept))
    assert sorted(tables) == names
    for name, table in tables.items():
        expected = note.states[2][f"{name}.weight"]
        assert table.dtype == expected.dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
        assert torch.equal(table, expected)
        # Mapped, not read.
        maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        places = [line[0].split("-") for line in maps if line[-1] == str(kept / f"{name}.safetensors")]
        assert any(int(start, 16) <= table.data_ptr() < int(end, 16) for start, end in places)


def test_tables_of_another_run_are_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    whole = worker.fit(tmp_path / "first", compression=worker.callback(keep_reference=kept))
    before, note = _files(kept), Note()
    message = rf"keep_reference: '{kept}/encoder.safetensors' is there already, from another run.*name another folder"
    with pytest.raises(ValueError, match=message):
        worker.fit(tmp_path / "second", note, compression=worker.callback(keep_reference=kept))
    assert note.steps == 0
    assert _files(kept) == before
    # The same run writes the same once more, or nothing from after the compression.
    for epoch in (1, 2):
        if epoch == 1:
            (kept / "decoder.safetensors").write_bytes(b"half of it")
        checkpoint = tmp_path / "first" / f"epoch={epoch}.ckpt"
        times = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
        resumed = worker.fit(
            tmp_path / f"from{epoch}", ckpt_path=checkpoint, compression=worker.callback(keep_reference=kept)
        )
        worker.assert_equal(resumed, whole)
        assert _files(kept) == before
        assert (times == {path: path.stat().st_mtime_ns for path in kept.iterdir()}) == (epoch == 2)


@pytest.mark.parametrize("planned", [[], [4]])
def test_refinements_that_were_not_planned(tmp_path: Path, planned: list[int]) -> None:
    whole = worker.fit(tmp_path / "whole", compression=worker.callback(keep_reference=tmp_path / "kept"))
    last = max([2, *planned]) + 1

    def first(name: str, **changes: Any) -> Path:
        callback = worker.callback(refine_at_epochs=planned, **changes)
        worker.fit(tmp_path / name, compression=callback, max_epochs=last + 1)
        return tmp_path / name / f"epoch={last}.ckpt"

    dense = tmp_path / "kept" / "dense"
    checkpoint, compression = first("kept", keep_reference=dense), worker.callback(keep_reference=dense)
    worker.assert_equal(worker.fit(tmp_path / "resumed", ckpt_path=checkpoint, compression=compression), whole)
    note, checkpoint = Note(), first("other")
    with pytest.raises(ValueError, match="no residual of table 'encoder' was kept.*use keep_reference"):
        worker.fit(tmp_path / "refused", note, ckpt_path=checkpoint)
    assert note.steps == 0


def _csv(folder: Path) -> dict[str, Any]:
    """Arguments of a run whose files are in `lightning_logs/version_0` and its `checkpoints`."""
    return {"logger": CSVLogger(folder), "dirpath": None}


def _checkpoint(folder: Path, epoch: int) -> Path:
    (found,) = folder.rglob(f"epoch={epoch}*.ckpt")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("logs", [True, False], ids=["csv", "root"])
def test_moving_and_copying_the_folder(tmp_path: Path, logs: bool) -> None:
    here, there, copy = (tmp_path / name for name in ("here", "there", "copy"))
    note = Note()
    whole = worker.fit(here, note, **(_csv(here) if logs else {}))
    if logs:
        assert _checkpoint(here, 2) == here / "lightning_logs" / "version_0" / "checkpoints" / "epoch=2.ckpt"
    shutil.move(here, there)
    shutil.copytree(there, copy)
    # From before all, between compression and refinement, between refinements, after all.
    for epoch in (1, 3, 5, 6):
        worker.assert_equal(worker.fit(tmp_path / f"from{epoch}", ckpt_path=_checkpoint(there, epoch)), whole)
    # Going on in the copy's own folder.
    worker.assert_equal(
        worker.fit(copy, ckpt_path=_checkpoint(copy / "lightning_logs" if logs else copy, 3), **_csv(copy)), whole
    )
    assert not here.exists()
    # Where the folder was is another run by now.
    place = _checkpoint(there, 3).parents[1 if logs else 0].relative_to(there)
    shutil.copytree(there / place / "residuals", here / place / "residuals")
    for path in (here / place / "residuals").glob("*/*"):
        path.write_bytes(bytes(path.stat().st_size))
    worker.assert_equal(worker.fit(tmp_path / "again", ckpt_path=_checkpoint(there, 3)), whole)


@pytest.mark.slow
def test_moving_a_folder_with_a_run_that_was_resumed(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    whole = worker.fit(tmp_path / "whole")
    worker.fit(here, max_epochs=7, **_csv(here))
    worker.fit(here, ckpt_path=_checkpoint(here / "lightning_logs" / "version_0", 2), max_epochs=7, **_csv(here))
    shutil.move(here, there)
    # Its residuals of the compression are those of the first version.
    second = there / "lightning_logs" / "version_1"
    assert not list((second / "residuals").glob("*/encoder-epoch2.bin"))
    worker.assert_equal(worker.fit(there, ckpt_path=_checkpoint(second, 3), **_csv(there)), whole)


def test_resuming_again_what_was_resumed_from_a_moved_folder(tmp_path: Path) -> None:
    here, there, third = (tmp_path / name for name in ("here", "there", "third"))
    whole = worker.fit(here)
    shutil.move(here, there)
    worker.fit(third, ckpt_path=there / "epoch=2.ckpt", max_epochs=7)
    worker.assert_equal(worker.fit(third, ckpt_path=third / "epoch=3.ckpt"), whole)


@contextmanager
def _no_synchronizing() -> Iterator[None]:
    """A disk that says only at the end that it is full, as those of a network do."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


DISKS: dict[str, Callable[[], Any]] = {"limit": small_files, "network": _no_synchronizing}
BEFORE = {False: "nothing was left there", True: "what was there before is as it was", None: ""}


class FullDisk(Callback):
    """Lets a disk be full while one function writes in one epoch.

    Notes the files that were there when the epoch started, and when the function was called.
    """

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, epoch: int, call: int, disk: str) -> None:
        self.patch, self.owner, self.name = patch, owner, name
        self.epoch, self.call, self.disk = epoch, call, DISKS[disk]
        self.at_start: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        original, calls = getattr(self.owner, self.name), []

        def write(*args: Any, **kwargs: Any) -> Any:
            now = trainer.current_epoch == self.epoch
            calls.extend([1] * now)
            if not now or len(calls) != self.call:
                return original(*args, **kwargs)
            self.files = _files(Path(trainer.default_root_dir))
            with self.disk():
                return original(*args, **kwargs)

        self.patch.setattr(self.owner, self.name, write)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.at_start = _files(Path(trainer.default_root_dir))


# Which function writes, in which epoch, at which call there (a refinement writes its targets first), whether its file
# was there before (None: no matter), and whether the model has changed by then.
WRITES = {
    "residual": (solving, "write_table", 2, 2, False, False),
    "reference": (solving, "write_reference", 2, 2, False, False),
    "checkpoint": (AtomicCheckpointIO, "save_checkpoint", 2, 1, False, True),
    "target-of-refinement": (solving, "write_table", 4, 2, False, False),
    "residual-of-refinement": (solving, "write_table", 4, 4, None, False),
    "last-checkpoint": (AtomicCheckpointIO, "save_checkpoint", 4, 2, True, True),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    return worker.fit(folder, compression=worker.callback(keep_reference=folder / "kept"))  # type: ignore[no-any-return]


def _assert_survives(
    whole: SimpleNamespace, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, disk: str
) -> None:
    owner, name, epoch, call, was_there, changed = WRITES[what]
    note, models = Note(), []

    class Keep(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            models.append(pl_module)

    def callback() -> Any:
        return worker.callback(keep_reference=folder / "kept")

    with monkeypatch.context() as patch:
        full = FullDisk(patch, owner, name, epoch, call, disk)
        with pytest.raises(OSError, match=f"could not be written, and {BEFORE[was_there]}.*: .*make room") as raised:
            worker.fit(folder, note, full, Keep(), compression=callback())
    # Neither torch nor safetensors keep the number of what they meet while they write.
    numbers = {errno.EFBIG, None} if disk == "limit" else {errno.ENOSPC}
    assert raised.value.errno in numbers
    # Everything that was on the disk is there as it was, and nothing half.
    kept = full.files if changed else full.at_start
    assert full.files
    assert kept.items() <= _files(folder).items()
    assert not list(folder.rglob("*.tmp"))
    assert (note.steps > epoch * worker.STEPS) == (name == "save_checkpoint")
    # The model is what it was: no table replaced, or every one.
    tables = sum(f"{table}.weight" in dict(models[0].named_parameters()) for table in ("encoder", "decoder"))
    assert tables == (2 if epoch == 2 and not changed else 0)
    if not changed:
        torch.testing.assert_close(dict(models[0].state_dict()), note.states[epoch], rtol=0, atol=0)
    resumed = worker.fit(folder, ckpt_path=folder / f"epoch={epoch - 1}.ckpt", compression=callback())
    worker.assert_equal(resumed, whole)
    assert {path.name for path in folder.rglob("*-epoch*")} == {
        f"{table}-epoch{at}.bin" for table in ("encoder", "decoder") for at in (2, 4, 6)
    }


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk(whole: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    _assert_survives(whole, tmp_path, monkeypatch, what, "limit")


def test_a_report_that_cannot_be_written_is_no_reason_to_stop(
    whole: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full = FullDisk(patch, reporting, "write_report", 2, 1, "limit")
        with pytest.warns(UserWarning, match="report.json' could not be written, and nothing was left there"):
            run = worker.fit(tmp_path, full, compression=worker.callback(keep_reference=tmp_path / "kept"))
    # Later there was room again.
    worker.assert_equal(run, whole)


@pytest.mark.full
@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_of_a_network(
    whole: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    _assert_survives(whole, tmp_path, monkeypatch, what, "network")


def test_refining_again_in_the_same_folder_leaves_later_checkpoints_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worker.fit(tmp_path)
    before = _files(tmp_path / "residuals")
    full = FullDisk(monkeypatch, solving, "write_table", 4, 3, "limit")
    with pytest.raises(OSError, match="could not be written"):
        worker.fit(tmp_path, full, ckpt_path=tmp_path / "epoch=3.ckpt")
    monkeypatch.undo()
    assert full.files
    assert before.items() <= _files(tmp_path / "residuals").items()
    worker.assert_equal(worker.fit(tmp_path, ckpt_path=tmp_path / "epoch=4.ckpt"), whole)


def test_a_shorter_plan_in_the_same_folder_leaves_later_checkpoints_whole(tmp_path: Path) -> None:
    whole = worker.fit(tmp_path)
    shorter = worker.callback(refine_at_epochs=[4])
    worker.fit(tmp_path, ckpt_path=tmp_path / "epoch=3.ckpt", compression=shorter, max_epochs=5)
    worker.assert_equal(worker.fit(tmp_path, ckpt_path=tmp_path / "epoch=5.ckpt"), whole)
