"""Checkpoints, saved directories and reports survive a full disk and a kill, and damaged ones are told."""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import multiprocessing
import os
import signal
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from torch import nn

from lightning_embcompress import compress, load_compressed, load_from_checkpoint, save_compressed
from lightning_embcompress.compression.report import write_report
from lightning_embcompress.integrations import checkpoint_io
from lightning_embcompress.integrations.checkpoint_io import (
    AtomicCheckpointIO,
    check_checkpoint_file,
    check_whole_file,
    read_mapped,
    use_atomic_checkpoints,
)
from lightning_embcompress.utils import files
from toys import LanguageModel, loaders, small_files

_MEGABYTES = 24


def _checkpoint(number: int, megabytes: int = 1) -> dict[str, Any]:
    """All of whose tensors tell of which one they are."""
    tensors = {f"layer{index}": torch.full((megabytes * 2**18 // 4,), float(number)) for index in range(4)}
    return {"state_dict": tensors, "number": number, "pytorch-lightning_version": "2.6.0"}


def _number(path: Path) -> int:
    """Which checkpoint a file holds, if it holds a whole one."""
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    number: int = checkpoint["number"]
    assert all(bool((tensor == number).all()) for tensor in checkpoint["state_dict"].values())
    return number


def _model(number: int, rows: int = 2000) -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(rows, 16), nn.Linear(16, 4))
    compress(model, "low_rank", rank=4)
    for parameter in model.parameters():
        nn.init.constant_(parameter, number)
    return model


def _loaded_number(folder: Path, rows: int = 2000) -> int:
    model = nn.Sequential(nn.Embedding(rows, 16), nn.Linear(16, 4))
    load_compressed(folder, model)
    (number,) = {value for parameter in model.parameters() for value in parameter.unique().tolist()}
    return int(number)


def _child(target: Callable[..., None], *arguments: Any) -> multiprocessing.Process:
    # A fork: a process of its own that is there at once.
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process  # type: ignore[return-value]


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_file_is_that_of_lightning(tmp_path: Path) -> None:
    # With a name as long as names can be.
    checkpoint, name = _checkpoint(3), "ö" * 125 + ".ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "new" / "folder" / name)
    TorchCheckpointIO().save_checkpoint(checkpoint, tmp_path / "theirs.ckpt")
    assert _names(tmp_path / "new" / "folder") == [name]
    ours, theirs = (torch.load(path, weights_only=True) for path in sorted(tmp_path.rglob("*.ckpt")))
    torch.testing.assert_close(ours.pop("state_dict"), theirs.pop("state_dict"), rtol=0, atol=0)
    assert ours == theirs
    # Both read both, also by the name of a file's URL.
    for path in tmp_path.rglob("*.ckpt"):
        assert _number(path) == TorchCheckpointIO().load_checkpoint(path)["number"] == 3
        assert AtomicCheckpointIO().load_checkpoint(f"file://{path}")["number"] == 3
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "other.ckpt", storage_options={})


def test_urls_are_left_to_lightning() -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint(_checkpoint(7), "memory://folder/last.ckpt")
    assert io.load_checkpoint("memory://folder/last.ckpt")["number"] == 7
    assert read_mapped("memory://folder/last.ckpt")["state_dict"]["layer0"].is_meta
    io.save_checkpoint({"object": argparse.Namespace()}, "memory://folder/last.ckpt")
    with pytest.raises(Exception, match="argparse.Namespace"):
        io.load_checkpoint("memory://folder/last.ckpt")


def test_a_disk_that_is_full_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(checkpoint: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(_checkpoint(1), path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_io.torch, "save", full)
        with pytest.raises(OSError, match=r"last.ckpt' could not.*what was there before is as it was") as no:
            io.save_checkpoint(_checkpoint(2), path)
        assert no.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match=r"new.ckpt' could not be written, and nothing was left there: .*MB are free"):
            io.save_checkpoint(_checkpoint(2), tmp_path / "new.ckpt")
    assert _names(tmp_path) == ["last.ckpt"]
    assert _number(path) == 1
    # Not of the disk, and said as it is.
    with pytest.raises((AttributeError, RuntimeError, TypeError), match="lambda"):
        io.save_checkpoint({"state_dict": lambda: 1}, path)
    assert _names(tmp_path) == ["last.ckpt"]
    assert _number(path) == 1


def test_files_that_cannot_grow(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_compressed(_model(1), folder)
    with small_files(2**14), pytest.raises(OSError, match=r"safetensors' .*what was there before"):
        save_compressed(_model(2), folder)
    assert _names(folder) == ["config.json", "model.safetensors"]
    assert _loaded_number(folder) == 1
    report = tmp_path / "report.json"
    write_report(report, _model(1), {"final": 1.0})
    before = report.read_bytes()
    with small_files(16), pytest.raises(OSError, match="File too large"):
        write_report(report, _model(1), {"final": 2.0})
    assert report.read_bytes() == before
    assert _names(tmp_path) == ["report.json", "saved"]


def _save_checkpoint(number: int, folder: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(_checkpoint(number, _MEGABYTES), folder / "last.ckpt")


def _save_directory(number: int, folder: Path) -> None:
    save_compressed(_model(number, 200_000), folder)


def _save_forever(save: Callable[[int, Path], None], folder: Path) -> None:
    for number in itertools.count(2):
        save(number, folder)


def _kill_while_writing(process: Any, folder: Path, least: int) -> bool:
    """Kill a process while its temporary file is there, but not whole; tell whether that was so."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for file in folder.glob(".*.tmp"):
            try:
                caught = 0 < file.stat().st_size < least
            except FileNotFoundError:
                continue
            if caught:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                return any(file.stat().st_size < least for file in folder.glob(".*.tmp"))
        assert process.is_alive()
    raise AssertionError("the process wrote nothing")


@pytest.mark.parametrize(
    ("save", "number", "names"),
    [
        (_save_checkpoint, lambda folder: _number(folder / "last.ckpt"), ["last.ckpt"]),
        (_save_directory, lambda folder: _loaded_number(folder, 200_000), ["config.json", "model.safetensors"]),
    ],
    ids=["checkpoint", "directory"],
)
def test_a_kill_in_the_middle_of_saving(
    save: Callable[[int, Path], None], number: Callable[[Path], int], names: list[str], tmp_path: Path
) -> None:
    save(1, tmp_path)
    cut, size = 0, (tmp_path / names[-1]).stat().st_size
    for _ in range(20):
        process = _child(_save_forever, save, tmp_path)
        cut += _kill_while_writing(process, tmp_path, size)
        try:
            # Whole: the one before, or the one after if the kill came too late.
            assert number(tmp_path) >= 1
        except ValueError as error:
            # A kill between the renames of two files, see below, is refused.
            if "config.json" not in str(error):
                raise
            save(1, tmp_path)
        assert process.exitcode == -signal.SIGKILL
        if cut == 2:
            break
    assert cut == 2
    assert list(tmp_path.glob(".*.tmp"))
    save(9, tmp_path)
    assert _names(tmp_path) == names
    assert number(tmp_path) == 9


def _save_and_die_at_rename(folder: Path, number: int) -> None:
    replace, count = os.replace, iter(range(10))

    def dying(*paths: Any) -> None:
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    files.os.replace = dying  # type: ignore[attr-defined]
    save_compressed(_model(2), folder)


@pytest.mark.parametrize("renamed", [0, 1])
def test_a_kill_at_either_rename(renamed: int, tmp_path: Path) -> None:
    save_compressed(_model(1), tmp_path)
    _child(_save_and_die_at_rename, tmp_path, renamed).join()
    if renamed == 0:
        assert _loaded_number(tmp_path) == 1
    else:
        model = nn.Sequential(nn.Embedding(2000, 16), nn.Linear(16, 4))
        with pytest.raises(ValueError, match=r"model.safetensors' .*config.json"):
            load_compressed(tmp_path, model)
        assert type(model[0]) is nn.Embedding
    save_compressed(_model(3), tmp_path)
    assert _names(tmp_path) == ["config.json", "model.safetensors"]
    assert _loaded_number(tmp_path) == 3


def test_directories_without_a_checksum_are_loaded(tmp_path: Path) -> None:
    save_compressed(_model(4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert list(config.pop("sha256")) == ["model.safetensors"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert _loaded_number(tmp_path) == 4
    for damaged in (["model.safetensors"], {"other": "0"}, "0"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "sha256": damaged}))
        with pytest.raises(ValueError, match=r"config.json' is damaged: 'sha256' is"):
            _loaded_number(tmp_path)


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "hpc_ckpt_3.ckpt"
    own, prefix = files._host(), files._prefix(path)
    dead = _child(time.sleep, 0)
    dead.join()
    alive = _child(time.sleep, 60)
    try:
        kept = [f"{prefix}{own}.{alive.pid}.tmp", f"{prefix}other-host.{dead.pid}.tmp", f"{prefix}{own}.x.tmp"]
        kept += [".other.tmp", f"{files._prefix(tmp_path / 'other.ckpt')}{own}.{dead.pid}.tmp", "hpc_ckpt_3.ckpt.tmp"]
        gone = [f"{prefix}{own}.{dead.pid}.tmp", f"{prefix}{own}.{os.getpid()}.tmp", f"{prefix}third.host.5.tmp"]
        for name in kept + gone:
            (tmp_path / name).write_bytes(b"left over")
        os.utime(tmp_path / f"{prefix}third.host.5.tmp", (0, 0))
        AtomicCheckpointIO().save_checkpoint(_checkpoint(1), path)
        assert _names(tmp_path) == sorted([*kept, path.name])
    finally:
        alive.kill()
        alive.join()
    # Lightning takes the digits of whatever has "ckpt_" in its name for the number of a checkpoint.
    for name in _names(tmp_path):
        if name.endswith(".tmp") and not name.startswith("hpc"):
            assert "ckpt" not in name
    (tmp_path / "hpc_ckpt_3.ckpt.tmp").unlink()
    assert _CheckpointConnector.hpc_save_path(str(tmp_path)) == str(tmp_path / "hpc_ckpt_4.ckpt")


class _Own(TorchCheckpointIO):
    """A way to write that somebody chose."""


class _Wrapper(_WrappingCheckpointIO):
    """One that adds nothing."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        AsyncCheckpointIO,
        lambda: AsyncCheckpointIO(TorchCheckpointIO()),
        lambda: AsyncCheckpointIO(_Wrapper()),
    ],
    ids=["none", "empty", "given", "nested"],
)
def test_a_trainer_uses_it_also_in_the_background(
    make: Callable[[], Any], make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    save = AtomicCheckpointIO.save_checkpoint

    def noting(self: Any, checkpoint: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        written.append(Path(path))
        save(self, checkpoint, path, *args, **kwargs)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", noting)
    plugin = make()
    trainer = make_trainer(plugins=[plugin] if plugin else None, enable_checkpointing=True, max_epochs=1)
    assert use_atomic_checkpoints(trainer)
    writer = trainer.strategy.checkpoint_io
    inner = getattr(writer, "checkpoint_io", None)
    assert writer is plugin or type(writer) is AtomicCheckpointIO
    # Twice is once.
    assert use_atomic_checkpoints(trainer)
    assert trainer.strategy.checkpoint_io is writer
    assert getattr(writer, "checkpoint_io", None) is inner
    trainer.fit(LanguageModel(), **loaders())
    (path,) = (tmp_path / "checkpoints").iterdir()
    check_whole_file(path)
    assert written == [path]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(LanguageModel(), **loaders(), ckpt_path=path)
    assert trainer.current_epoch == 2


def test_what_somebody_chose_stays(make_trainer: Any) -> None:
    own = _Own()
    for plugin in (own, AsyncCheckpointIO(own)):
        trainer = make_trainer(plugins=[plugin])
        assert not use_atomic_checkpoints(trainer)
        assert trainer.strategy.checkpoint_io is plugin
        assert getattr(plugin, "checkpoint_io", own) is own


def test_every_byte_of_a_checkpoint_counts(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({**_checkpoint(1), "state_dict": _model(1).state_dict()}, path)
    content = path.read_bytes()
    check_whole_file(path)
    with zipfile.ZipFile(path) as archive:
        places = [record.header_offset + 200 for record in archive.infolist() if record.file_size > 300]
    assert places
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"last.ckpt' is damaged .*Copy it again, or take an earlier one"):
            AtomicCheckpointIO().load_checkpoint(path)
    # Records that would fill the memory.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="larger than the file"):
        AtomicCheckpointIO().load_checkpoint(path)
    # Files without checksums are read.
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(_checkpoint(6), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert _number(path) == 6


def test_kinds_of_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint '.*nosuch.ckpt'"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "nosuch.ckpt")
    with pytest.raises(ValueError, match="is a directory, but not a checkpoint of a sharded model: it has no meta.pt"):
        check_checkpoint_file(tmp_path)
    torch.save({"epoch": 3}, tmp_path / "meta.pt")
    check_whole_file(tmp_path)
    assert read_mapped(tmp_path) == {"epoch": 3}
    os.truncate(tmp_path / "meta.pt", 100)
    with pytest.raises(ValueError, match="is damaged"):
        check_whole_file(tmp_path)
    torch.save(_checkpoint(1), tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    for content in (b"", b"hello", b"PK\x05\x06" + bytes(18), whole[: len(whole) * 7 // 10]):
        (tmp_path / "other.ckpt").write_bytes(content)
        said = rf"other.ckpt' is (not a whole checkpoint: .*\({len(content)} bytes\)|damaged)"
        for read in (AtomicCheckpointIO().load_checkpoint, partial(load_from_checkpoint, LanguageModel)):
            with pytest.raises(ValueError, match=said):
                read(tmp_path / "other.ckpt")
    # Files of other machines are left to Lightning.
    check_checkpoint_file("s3://bucket/last.ckpt")
