"""How the numbers of a parameter are stored in few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, cast

import torch

State: TypeAlias = Literal["fake", "frozen", "packed"]
"""Of a factorization that is quantized: trained with ranges that follow it, with ranges that stay, or packed."""

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Dtypes of 16 bits by their names."""


@dataclass(frozen=True)
class Quantization:
    """How factors are quantized: signed integers, and a scale of 16 bits for every group of neighbouring values.

    Attributes:
        bits: Bits of a value, 2 to 8.
        group_size: Neighbouring values of a row that share a scale, 16 to 256; rows that are shorter share one.
        scale_dtype: `float16` or `bfloat16`.
        ranges: While training a group's range is that of its values (`minmax`), or its scale is a parameter that is
            trained too (`learned`; LSQ, Esser et al. 2020).
        shared_bits: Least bits of factors that all tokens share beside their own, such as a basis: those are few, and
            what they lose all rows lose.

    Raises:
        ValueError: If one is out of its range.

    Example:
        >>> Quantization(bits=3, group_size=32).shared.bits
        8
    """

    bits: int = 4
    group_size: int = 64
    scale_dtype: Literal["float16", "bfloat16"] = "float16"
    ranges: Literal["minmax", "learned"] = "minmax"
    shared_bits: int = 8

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, bits in (("bits", self.bits), ("shared_bits", self.shared_bits)):
            if type(bits) is not int or not 2 <= bits <= 8:
                raise ValueError(f"{name} must be an integer from 2 to 8, it is {bits!r}")
        if type(self.group_size) is not int or not 16 <= self.group_size <= 256:
            raise ValueError(f"group_size must be an integer from 16 to 256, it is {self.group_size!r}")
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in HALVES:
            raise ValueError(f"scale_dtype must be 'float16' or 'bfloat16', it is {self.scale_dtype!r}")
        if self.ranges not in ("minmax", "learned"):
            raise ValueError(f"ranges must be 'minmax' or 'learned', it is {self.ranges!r}")

    @property
    def scales(self) -> torch.dtype:
        """Dtype of the scales."""
        return HALVES[self.scale_dtype]

    @property
    def shared(self) -> Quantization:
        """That of factors that all tokens share beside their own."""
        return replace(self, bits=max(self.bits, self.shared_bits))

    def record(self, state: State) -> dict[str, Any]:
        """As JSON, with the state of the factors."""
        return {**asdict(self), "state": state}

    @classmethod
    def from_record(cls, record: Any) -> tuple[Quantization, State]:
        """Read what `record` wrote.

        Raises:
            ValueError: If it is something else.
        """
        names = [*cls.__dataclass_fields__, "state"]
        if not isinstance(record, Mapping) or set(record) != set(names):
            raise ValueError(f"the structure's 'quantization' must have the entries {', '.join(names)}")
        values = dict(record)
        state = values.pop("state")
        if state not in ("fake", "frozen", "packed"):
            raise ValueError("the structure's 'quantization' must have a 'state' that is 'fake', 'frozen' or 'packed'")
        return cls(**values), state


Storage: TypeAlias = Quantization | Literal["float16", "bfloat16"]
"""How a parameter is stored: integers in groups, or numbers of 16 bits."""


def storage_of(name: str, like: Quantization | None = None) -> Storage:
    """How a parameter is stored, by the name of a dtype: `int8`, `int6`, `int4`, ..., `float16` or `bfloat16`.

    Args:
        name: The dtype.
        like: Has the groups, scales and ranges of integers; None for the defaults.

    Raises:
        ValueError: If there is no such dtype.

    Example:
        >>> storage_of("int6", Quantization(group_size=128)).group_size, storage_of("float16")
        (128, 'float16')
    """
    if name in ("float16", "bfloat16"):
        return cast(Storage, name)
    widths = {f"int{bits}": bits for bits in range(2, 9)}
    if name not in widths:
        raise ValueError(f"{name!r} is no way to store weights: known are {', '.join(widths)}, float16 and bfloat16")
    return replace(like or Quantization(), bits=widths[name])


def name_of(storage: Storage) -> str:
    """The dtype of numbers as they are stored, `int4` or `float16`."""
    return f"int{storage.bits}" if isinstance(storage, Quantization) else storage


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter as it is quantized: of more than two modes the last two are the columns.

    Example:
        >>> matrix_shape([1000, 64]), matrix_shape([4, 10, 8, 4])
        ((1000, 64), (40, 32))
    """
    kept = max(1, len(shape) - 2)
    return math.prod(shape[:kept]), math.prod(shape[kept:])
