"""Tables that are written a few rows at a time, and how far that is."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_embcompress.compression.plan import PLAN_VERSION
from lightning_embcompress.compression.records import check_tables
from lightning_embcompress.methods.registry import Factorization
from lightning_embcompress.utils.files import read_json, synchronize
from lightning_embcompress.utils.progress import say_line
from lightning_embcompress.utils.storage import set_tensor
from lightning_embcompress.utils.tensor_files import NAMES, TensorFile

JOURNAL = "journal.json"
"""Where it is noted how far it is."""


class Journal:
    """What was written of the tables so far, for the same request to go on from."""

    def __init__(self, file: Path, request: Mapping[str, Any], tables: dict[str, Any]) -> None:
        """Keep what there is."""
        self.file, self.request, self.tables = file, request, tables

    @classmethod
    def read(cls, work: Path, request: dict[str, Any]) -> Journal:
        """Go on from what there is of the same request; else begin, without what there is."""
        file = work / JOURNAL
        request = json.loads(json.dumps({**request, "version": PLAN_VERSION}))
        with suppress(OSError, ValueError):
            found = read_json(file)
            if found.get("request") == request:
                check_tables(
                    [{**one["plan"], "untied": None, "predicted_loss": None} for one in found["tables"].values()]
                )
                return cls(file, request, found["tables"])
            say_line("What was written before was of other tables or arguments, and is begun anew")
        for old in work.iterdir():
            if old.name != "lock":
                old.unlink()
        return cls(file, request, {})

    def note(self, name: str, what: dict[str, Any]) -> None:
        """Note a table whose structure is on the disk."""
        self.tables[name] = what
        self._write()

    def filled(self, name: str, rows: int) -> None:
        """Note how many rows of a table are on the disk."""
        self.tables[name]["filled"] = rows
        self._write()

    def _write(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"request": self.request, "tables": self.tables}), encoding="utf-8")
        synchronize(temporary)
        os.replace(temporary, self.file)


class WrittenTable:
    """A file of safetensors in which the tensors of a factorization have their memory while they are computed."""

    def __init__(self, path: Path, name: str, factors: Factorization[Any]) -> None:
        """Let the tensors have their memory in a file that has room for them."""
        entries = TensorFile(path).entries
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._bytes: Tensor | None = torch.frombuffer(self._map, dtype=torch.uint8)
        for own, tensor in factors.state_dict(keep_vars=True).items():
            entry = entries[f"{name}.factorization.{own}"]
            memory = self._bytes[entry.start : entry.start + entry.nbytes].view(entry.dtype).view(entry.shape)
            if not tensor.is_meta:
                memory.copy_(tensor.detach())
            set_tensor(factors, own, memory)
        for part in factors.modules():
            for own, buffer in part._buffers.items():
                # What follows from the others, and is in no file.
                if buffer is not None and buffer.is_meta and own == "unit":
                    part._buffers[own] = torch.empty_like(buffer, device="cpu")

    @classmethod
    def create(cls, path: Path, name: str, factors: Factorization[Any]) -> WrittenTable:
        """Make the file, with room for all of it on the disk, and what of it is known."""
        state = factors.state_dict()
        # Those of the widest numbers first, so that all of them begin at a multiple of their size.
        order = sorted(state, key=lambda own: (-state[own].dtype.itemsize, own))
        header: dict[str, Any] = {}
        place = 0
        for own in order:
            tensor, stop = state[own], place + state[own].numel() * state[own].dtype.itemsize
            header[f"{name}.factorization.{own}"] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [place, stop],
            }
            place = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "w+b") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.flush()
            size = 8 + len(text) + place
            # A page of a map that finds no room on the disk would end the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        written = cls(path, name, factors)
        written.flush()
        return written

    @classmethod
    def open(cls, path: Path, name: str, factors: Factorization[Any]) -> WrittenTable:
        """Go on with a file that `create` has made."""
        return cls(path, name, factors)

    def release(self) -> None:
        """Let go of the pages, which stay in the system's cache until they are on the disk."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """Wait until all of it is on the disk."""
        self._map.flush()

    def close(self) -> None:
        """Wait until it is on the disk, and let go of it."""
        self.flush()
        self.release()
