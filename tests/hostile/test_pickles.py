"""Pickles that were made by hand: nothing in them runs, whatever is loaded."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress import load_from_checkpoint
from lightning_embcompress.integrations.checkpoint import restore_structure, structure_from_checkpoint
from lightning_embcompress.integrations.checkpoint_io import AtomicCheckpointIO, read_mapped

# What torch says of damaged pickles that it reads nevertheless.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore::DeprecationWarning")


def _zipped(records: dict[str, bytes]) -> bytes:
    """An archive as torch writes it, with checksums that are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _records(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def test_any_pickle(tmp_path: Path, hostile: Any, examples: settings) -> None:
    """Damage that the checksums do not show: the pickle was changed before they were computed."""
    path = tmp_path / "last.ckpt"
    torch.save(hostile.checkpoint("group_reduce"), path)
    records = _records(path.read_bytes())
    (pickled,) = [name for name in records if name.endswith("data.pkl")]

    @examples
    @given(st.data())
    def run(data: Any) -> None:
        name = data.draw(st.sampled_from([pickled] * 9 + sorted(records)))
        path.write_bytes(_zipped({**records, name: hostile.damaged(data.draw, records[name])}))
        for read in (AtomicCheckpointIO().load_checkpoint, read_mapped):
            with hostile.harmless():
                checkpoint = read(path)
                if isinstance(checkpoint, dict):
                    module = hostile.Model()
                    with hostile.unchanged_if_refused(module):
                        restore_structure(module, checkpoint)

    run()


class _Call:
    """An object that calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = (function, arguments)

    def __reduce__(self) -> Any:
        return self.called


@pytest.mark.parametrize("kind", ["system", "eval", "getattr", "exec"])
@pytest.mark.parametrize("where", ["hyper_parameters", "embcompress", "state_dict", "callbacks"])
def test_no_pickle_runs_anything(kind: str, where: str, tmp_path: Path, hostile: Any) -> None:
    marker = tmp_path / "marker"
    touch = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    call = {
        "system": _Call(os.system, f"touch {marker}"),
        "eval": _Call(eval, touch),
        "getattr": _Call(getattr, _Call(__import__, "os"), "system"),
        "exec": _Call(exec, touch),
    }[kind]
    path = tmp_path / "last.ckpt"
    torch.save({**hostile.checkpoint("low_rank"), where: call}, path)
    load = AtomicCheckpointIO().load_checkpoint
    for read in (partial(load_from_checkpoint, hostile.Model), structure_from_checkpoint, read_mapped, load):
        with pytest.raises(ValueError, match=r"last.ckpt' (holds more than tensors and plain values|is damaged)"):
            read(path)
    assert not marker.exists()
    # It is a pickle that would have.
    if kind != "getattr":
        load(path, weights_only=False)
        assert marker.exists()


def test_a_pickle_without_an_archive(tmp_path: Path, hostile: Any) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "last.ckpt").write_bytes(pickle.dumps(_Call(os.system, f"touch {marker}")))
    for read in (partial(load_from_checkpoint, hostile.Model), structure_from_checkpoint):
        with pytest.raises(ValueError, match="is not a whole checkpoint"):
            read(tmp_path / "last.ckpt")
    assert not marker.exists()
