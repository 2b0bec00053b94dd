"""Structures as JSON: what plans and checkpoints record, how it is read back, and the bytes that it stands for."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

# Name, dtype, shape and offsets of one tensor in the header of a safetensors file.
TENSOR_HEADER_BYTES = 96
# Torch counts elements in 64 bits.
_MOST = 2**62


def plain(value: Any) -> Any:
    """A value as JSON has it: of NumPy's scalars and arrays, and tensors, their numbers; of sequences, a list.

    Plans and checkpoints record the options that were given, and nothing is read from them but plain values.

    Example:
        >>> import numpy
        >>> plain({"ranks": (numpy.int64(3), 4)})
        {'ranks': [3, 4]}
    """
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return value


def stored_bytes(tensor_bytes: int, num_tensors: int, spec: dict[str, Any]) -> int:
    """Bytes that tensors and their structure take in a file."""
    return tensor_bytes + num_tensors * TENSOR_HEADER_BYTES + len(json.dumps(spec, separators=(",", ":")))


def padding_record(ids: Sequence[int], stored: bool) -> dict[str, Any]:
    """Rows of a table that are constant, as JSON: of which tokens, and whether they are stored or zero.

    Example:
        >>> padding_record((0,), stored=False)
        {'ids': [0], 'stored': False}
    """
    return {"ids": list(ids), "stored": stored}


def padding_bytes(ids: Sequence[int], rows: Tensor | None) -> int:
    """Bytes that constant rows take in a file, beside a factorization that has none."""
    if not ids:
        return 0
    entry = len(json.dumps({"padding": padding_record(ids, rows is not None)}, separators=(",", ":")))
    return entry + (0 if rows is None else rows.nbytes + TENSOR_HEADER_BYTES)


def checked_padding(record: Any, vocab_size: int) -> tuple[list[int], bool]:
    """Read what `padding_record` wrote, from a structure that came from a file.

    Raises:
        ValueError: If it is something else, or a token is out of range or named twice.
    """
    if not isinstance(record, dict) or set(record) != {"ids", "stored"} or type(record["stored"]) is not bool:
        raise ValueError(f"the structure's 'padding' must have 'ids' and 'stored', it is {reprlib.repr(record)}")
    ids = integers(record, "ids")
    if not ids or len(set(ids)) < len(ids) or max(ids) >= vocab_size:
        raise ValueError(
            f"the structure's 'padding' must name rows of the table's {vocab_size}, each once: {reprlib.repr(ids)}"
        )
    return ids, record["stored"]


def dense_bytes(vocab_size: int, dim: int, itemsize: int) -> int:
    """Bytes of a table as it is."""
    return vocab_size * dim * itemsize


def integer(spec: dict[str, Any], name: str, least: int = 0) -> int:
    """Read an integer from a structure that came from a file.

    Raises:
        ValueError: If it is missing, something else, or out of its range.
    """
    value = spec.get(name)
    # A bool is an int to Python.
    if type(value) is not int or not least <= value <= _MOST:
        wanted = "a positive integer" if least == 1 else f"an integer from {least} up"
        raise ValueError(f"the structure's {name!r} must be {wanted}, it is {reprlib.repr(value)}")
    return value


def positive_integers(spec: dict[str, Any], *names: str) -> list[int]:
    """Read positive integers from a structure that came from a file.

    Raises:
        ValueError: If one is missing or is not a positive integer.
    """
    return [integer(spec, name, least=1) for name in names]


def integers(spec: dict[str, Any], name: str, most_entries: int = 65) -> list[int]:
    """Read a list of integers that are not negative from a structure that came from a file.

    Args:
        spec: The structure.
        name: Which of its entries.
        most_entries: How many there can be: 64 modes of two have more elements than can be counted, and one more rank.

    Raises:
        ValueError: If it is missing, something else, or has values that are out of their range.
    """
    value = spec.get(name)
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number <= _MOST for number in value):
        raise ValueError(
            f"the structure's {name!r} must be a list of integers that are not negative, it is {reprlib.repr(value)}"
        )
    if len(value) > most_entries:
        raise ValueError(f"the structure's {name!r} must have at most {most_entries} entries, it has {len(value)}")
    return value
