"""Tensors in files that are larger than the memory, read a few bytes at a time."""

from __future__ import annotations

import ast
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_embcompress.utils.chunk_sums import ChunkSums

# Bytes between two pieces up to which both are read at once: those of a page are read anyway.
_GAP = 2**12
# Most bytes that are read at once.
_AT_ONCE = 2**25
_LONGEST_HEADER = 100 * 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""How safetensors calls dtypes."""
_OF_NUMPY = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "<i8": torch.int64, "<i4": torch.int32}


def _pread(descriptor: int, buffers: tuple[memoryview], offset: int) -> int:
    found = os.pread(descriptor, len(buffers[0]), offset)
    buffers[0][: len(found)] = found
    return len(found)


# Not every system reads into memory that is there.
_pread_into: Callable[[int, tuple[memoryview], int], int] = getattr(os, "preadv", _pread)


class Rows(Protocol):
    """A table that solvers read a few rows at a time: a tensor, or one in a file."""

    @property
    def shape(self) -> torch.Size:
        """`[rows, columns]`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""

    @property
    def device(self) -> torch.device:
        """Where rows are once they are read."""

    def element_size(self) -> int:
        """Bytes of a number."""

    def __getitem__(self, rows: Any, /) -> Tensor:
        """Some rows: a slice, or `[n]` int64 of them."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor is in a file.

    Attributes:
        dtype: Of the numbers.
        shape: Of the tensor.
        start: Of its first byte.
    """

    dtype: torch.dtype
    shape: torch.Size
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.shape.numel() * self.dtype.itemsize


class TensorFile:
    """A file of safetensors, or an array of NumPy (`.npy`), whose tensors are read by `pread`, never mapped.

    Reading a mapped file that was cut short kills the process; here it is an error. So is one that was written to
    since it was opened. A file that another has taken the place of stays the one that was opened.

    Args:
        path: The file.
        sums: Checksums of its chunks, each of which is compared when it is read for the first time; None for none.

    Raises:
        ValueError: If it is damaged, cut short, or another kind of file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"table": torch.arange(6.0).view(3, 2)}, Path(folder, "one.safetensors"))
        ...     TensorFile(Path(folder, "one.safetensors"))["table"][torch.tensor([2, 0])]
        tensor([[4., 5.],
                [0., 1.]])
    """

    def __init__(self, path: str | os.PathLike[str], sums: ChunkSums | None = None) -> None:
        """Read where everything is."""
        self.path, self.sums = Path(path), sums
        self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            self._stamp = self._now()
            if sums is not None and sums.size != self.size:
                raise self._damaged(f"it has {self.size} bytes, and had {sums.size} when it was written")
            self.entries: Mapping[str, Entry] = dict(self._read_header())
            for name, entry in self.entries.items():
                if entry.start + entry.nbytes > self.size:
                    raise self._damaged(f"it ends within {name!r}")
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = -1
            raise

    def __del__(self) -> None:
        """Close it."""
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles open it again."""
        return TensorFile, (self.path, self.sums)

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._stamp[0]

    def __getitem__(self, name: str) -> TensorOnDisk:
        """A tensor.

        Raises:
            ValueError: If there is none of this name.
        """
        if name not in self.entries:
            known = ", ".join(map(repr, list(self.entries)[:6]))
            raise ValueError(f"{str(self.path)!r} has no tensor {name!r}; it has {known or 'none'}")
        return TensorOnDisk(self, self.entries[name])

    def read(self, start: int, stop: int) -> Tensor:
        """`[stop - start]` bytes.

        Raises:
            ValueError: If they are not what was written, or the file was written to since it was opened.
        """
        out = torch.empty(stop - start, dtype=torch.uint8, device="cpu")
        self.check_unchanged()
        self._check_sums(torch.tensor([start], device="cpu"), torch.tensor([stop], device="cpu"))
        self._fill(_memory(out), start)
        return out

    def ranges(self, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Read ranges of bytes in the order in which they are in the file; what is near to each other at once.

        Args:
            starts: `[*]` int64 first bytes.
            lengths: `[*]` int64 numbers of bytes; nothing is read of those of none.

        Returns:
            uint8, what was read, and `[*]` where each range begins in it.

        Raises:
            ValueError: As `read`.
        """
        self.check_unchanged()
        begin, order = starts.reshape(-1).sort()
        end = begin + lengths.reshape(-1)[order]
        offsets = torch.zeros_like(begin)
        is_wanted = end > begin
        begin, end, order = begin[is_wanted], end[is_wanted], order[is_wanted]
        if not len(begin):
            return torch.empty(0, dtype=torch.uint8), offsets.view(starts.shape)
        reached = end.cummax(0).values
        is_first = torch.ones(len(begin), dtype=torch.bool)
        is_first[1:] = begin[1:] > reached[:-1] + _GAP
        firsts = is_first.nonzero().squeeze(1)
        span_begin = begin[firsts]
        span_length = reached[torch.cat([firsts[1:], firsts.new_tensor([len(begin)])]) - 1] - span_begin
        span_place = span_length.cumsum(0) - span_length
        content = torch.empty(int(span_length.sum()), dtype=torch.uint8)
        self._check_sums(span_begin, span_begin + span_length)
        memory, descriptor = _memory(content), self._descriptor
        # Nothing but the call: there may be thousands.
        for place, first, length in zip(span_place.tolist(), span_begin.tolist(), span_length.tolist(), strict=True):
            if _pread_into(descriptor, (memory[place : place + length],), first) != length:
                self._fill(memory[place : place + length], first)
        span = is_first.cumsum(0) - 1
        offsets[order] = span_place[span] + begin - span_begin[span]
        return content, offsets.view(starts.shape)

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened.

        Raises:
            ValueError: Naming it.
        """
        if self._now() != self._stamp:
            raise ValueError(
                f"{str(self.path)!r} was written to while it was open, and its rows are no longer known: load the "
                "model again, and replace files under another name that is then given theirs (os.replace)"
            )

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def _check_sums(self, starts: Tensor, stops: Tensor) -> None:
        """Compare the chunks of `[n]` ranges with their sums, those that were not compared yet."""
        if self.sums is None:
            return
        for chunk, first, stop in self.sums.unread(starts, stops):
            content = bytearray(stop - first)
            self._fill(memoryview(content), first)
            if not self.sums.holds(chunk, content):
                raise self._damaged(f"bytes {first} to {stop} are not those that were written")

    def _fill(self, place: memoryview, start: int) -> None:
        done = 0
        while done < len(place):
            count = _pread_into(self._descriptor, (place[done:],), start + done)
            if not count:
                raise self._damaged(f"it was cut short, and ends at byte {start + done}")
            done += count

    def _damaged(self, how: str) -> ValueError:
        return ValueError(f"{str(self.path)!r} is damaged: {how}; copy it again, or make it again")

    def _read_header(self) -> Iterator[tuple[str, Entry]]:
        if self.path.suffix == ".npy":
            yield "", self._numpy_entry()
            return
        if self.size < 8:
            raise self._damaged("it has no header")
        (length,) = struct.unpack("<Q", bytes(self.read(0, 8).numpy()))
        if length > min(_LONGEST_HEADER, self.size - 8):
            raise self._damaged("it has no whole header, or is no file of safetensors")
        try:
            header = json.loads(bytes(self.read(8, 8 + length).numpy()))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    found = Entry(_DTYPES[entry["dtype"]], torch.Size(entry["shape"]), 8 + length + begin)
                    if min((*found.shape, begin), default=0) < 0 or end - begin != found.nbytes:
                        raise self._damaged(f"{name!r} has {end - begin} bytes in its header")
                    yield name, found
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self._damaged(f"its header cannot be read ({error!r:.100})") from error

    def _numpy_entry(self) -> Entry:
        start = bytes(self.read(0, min(self.size, 12)).numpy())
        if start[:6] != b"\x93NUMPY":
            raise self._damaged("it is no array of NumPy")
        is_first = start[6] == 1
        (length,) = struct.unpack("<H", start[8:10]) if is_first else struct.unpack("<I", start[8:12])
        begin = 10 if is_first else 12
        try:
            header = ast.literal_eval(bytes(self.read(begin, begin + length).numpy()).decode("latin1"))
            dtype, shape = _OF_NUMPY.get(header["descr"]), header["shape"]
        except (ValueError, SyntaxError, KeyError, TypeError) as error:
            raise self._damaged(f"its header cannot be read ({error!r:.100})") from error
        if dtype is None or header["fortran_order"]:
            order = " column by column" if header["fortran_order"] else ""
            raise ValueError(
                f"{str(self.path)!r} holds {header['descr']!r}{order}: an array must hold one of "
                f"{', '.join(_OF_NUMPY)}, row by row"
            )
        return Entry(dtype, torch.Size(shape), begin + length)


class TensorOnDisk:
    """A tensor in a file. As a table it is read like a tensor on the CPU: `table[10:20]`, `table[ids]`.

    Args:
        file: Which.
        entry: Where it is there.
    """

    device = torch.device("cpu")

    def __init__(self, file: TensorFile, entry: Entry) -> None:
        """Keep where it is."""
        self.file, self.entry = file, entry

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.entry.dtype

    def element_size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self) -> Tensor:
        """All of it, in memory."""
        return self.file.read(self.entry.start, self.entry.start + self.entry.nbytes).view(self.dtype).view(self.shape)

    def __getitem__(self, rows: Any, /) -> Tensor:
        """Some rows: a slice of neighbours, or `[n]` int64 of them."""
        length, begin = self.row_bytes, self.entry.start
        if isinstance(rows, slice):
            first, last, _ = rows.indices(self.shape[0])
            last = max(first, last)
            found = self.file.read(begin + first * length, begin + last * length)
            return found.view(self.dtype).view(last - first, *self.shape[1:])
        ids = rows.reshape(-1)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.shape[0]:
            raise IndexError(f"rows {int(ids.min())} to {int(ids.max())} are not all of {self.shape[0]}")
        if not length:
            # Of bytes without a stride no other numbers can be seen.
            return torch.empty(*rows.shape, *self.shape[1:], dtype=self.dtype)
        out = torch.empty(len(ids), length, dtype=torch.uint8)
        # A few at a time: what lies between them is read too.
        for some in torch.split(torch.arange(len(ids)), max(1, _AT_ONCE // (length + _GAP))):
            content, offsets = self.file.ranges(begin + ids[some] * length, torch.full_like(some, length))
            if len(content):
                windows = content.as_strided((len(content) - length + 1, length), (1, 1))
                torch.index_select(windows, 0, offsets, out=out[some[0] : some[-1] + 1])
        return out.view(self.dtype).view(*rows.shape, *self.shape[1:])


def _memory(tensor: Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array)
