"""A GGUF file: its tensors as they are, and the same file with some of them replaced."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lightning_embcompress.utils.files import explaining_failure, replacing

# What the reader of gguf raises for files that are damaged, or none.
_DAMAGED = (ValueError, IndexError, KeyError, OverflowError, TypeError, UnicodeError, MemoryError)
# After name and dimensions of a tensor: its type and where its data begins.
_PLACE = struct.Struct("<IQ")
_COPIED_AT_ONCE = 2**26


@dataclass(frozen=True)
class GgufFile:
    """What the package gguf has read.

    Attributes:
        path: The file.
        reader: A `gguf.GGUFReader`.
        tensors: By name, as the reader has them.
    """

    path: Path
    reader: Any
    tensors: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GgufFile:
        """Read what a file says of its tensors.

        Raises:
            ValueError: If it is no GGUF file, or damaged.
            ImportError: If the package gguf is not there.
        """
        try:
            import gguf
        except ImportError as error:
            raise ImportError(
                "GGUF files are read by the package gguf: pip install 'lightning-embcompress[export]'"
            ) from error
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"there is no file {str(path)!r}")
        with file.open("rb") as start:
            magic = start.read(8)
        if magic[:4] != b"GGUF":
            raise ValueError(f"{str(path)!r} is no GGUF file: it does not begin with 'GGUF'")
        if len(magic) == 8 and struct.unpack("<I", magic[4:])[0] & 0xFFFF == 0:
            raise ValueError(f"{str(path)!r} is of a machine whose bytes are in the other order, and is not read")
        try:
            reader = gguf.GGUFReader(file, "r")
        except _DAMAGED as error:
            raise ValueError(f"{str(path)!r} was cut short or is damaged ({error})") from error
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if not tensors:
            raise ValueError(f"{str(path)!r} has no tensors: it holds a vocabulary alone, or a part of a model")
        return cls(file, reader, tensors)

    @property
    def architecture(self) -> str:
        """What `general.architecture` says."""
        return str(self.metadata("general.architecture") or "unknown")

    def metadata(self, key: str) -> Any:
        """A value of the metadata; None where there is none."""
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    def type_of(self, name: str) -> str:
        """Name of the type of a tensor, such as `Q8_0`."""
        return str(self.tensors[name].tensor_type.name)

    def shape_of(self, name: str) -> tuple[int, int]:
        """`(rows, columns)` of a table.

        Raises:
            ValueError: If the tensor is no matrix.
        """
        shape = self.tensors[name].shape.tolist()
        if len(shape) != 2:
            raise ValueError(f"{name!r} in {str(self.path)!r} is no table: it has {len(shape)} dimensions")
        return int(shape[1]), int(shape[0])

    def values(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Values of a table, `[rows, columns]`.

        Raises:
            ValueError: If gguf does not read its type.
        """
        from gguf import quants

        tensor = self.tensors[name]
        try:
            found = quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{name!r} is in {self.type_of(name)}, which the package gguf does not read: give its values from "
                "another source, such as the Hugging Face directory of the model"
            ) from error
        return np.array(found, dtype=np.float32).reshape(self.shape_of(name))

    def write(self, target: Path, replaced: Mapping[str, tuple[str, np.ndarray[Any, Any]]]) -> None:
        """Write the same file with other data for some tensors, whose shapes stay what they are.

        Args:
            target: The file, replaced when the new one is complete.
            replaced: By the name of a tensor, its type and its bytes.

        Raises:
            OSError: If it cannot be written.
        """
        raw, align = self.reader.data, int(self.reader.alignment)
        tensors = sorted(self.tensors.values(), key=lambda tensor: int(tensor.data_offset))
        sizes = [replaced[one.name][1].nbytes if one.name in replaced else int(one.n_bytes) for one in tensors]
        places, end = {}, 0
        for tensor, size in zip(tensors, sizes, strict=True):
            places[tensor.name] = end
            end = _aligned(end + size, align)
        with explaining_failure(target), replacing(target) as temporary, temporary.open("wb") as out:
            first = min(int(tensor.field.offset) for tensor in tensors)
            _copy(raw[:first], out)
            for tensor in self.tensors.values():
                out.write(self._described(tensor, replaced, places[tensor.name]))
            out.write(bytes(_aligned(out.tell(), align) - out.tell()))
            for tensor, size in zip(tensors, sizes, strict=True):
                if tensor.name in replaced:
                    _copy(replaced[tensor.name][1].reshape(-1).view(np.uint8), out)
                else:
                    _copy(raw[int(tensor.data_offset) : int(tensor.data_offset) + size], out)
                out.write(bytes(_aligned(size, align) - size))

    def _described(self, tensor: Any, replaced: Mapping[str, tuple[str, Any]], place: int) -> bytes:
        """What stands of a tensor before the data."""
        from gguf import GGMLQuantizationType

        length = sum(int(part.nbytes) for part in tensor.field.parts)
        start = int(tensor.field.offset)
        kind = GGMLQuantizationType[replaced[tensor.name][0]] if tensor.name in replaced else tensor.tensor_type
        return bytes(self.reader.data[start : start + length - _PLACE.size]) + _PLACE.pack(int(kind), place)


def _aligned(place: int, align: int) -> int:
    return -(-place // align) * align


def _copy(data: np.ndarray[Any, Any], out: BinaryIO) -> None:
    for start in range(0, len(data), _COPIED_AT_ONCE):
        out.write(data[start : start + _COPIED_AT_ONCE].tobytes())
