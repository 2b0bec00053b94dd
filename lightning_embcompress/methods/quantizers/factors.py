"""Factors in few bits: how a factorization reads a matrix that is quantized while training, or packed.

A factorization reads its factors by `read_rows`, `multiply`, `pieces` and `whole`. They take a parameter as it is, or
what stands in its place: a `FakeQuantizedFactor`, which trains numbers and reads them as they will be stored, or a
`PackedFactor`, which has the integers alone. Only what is asked for is quantized, or unpacked.

Where a lookup asks for sparse gradients, that of a factor read by rows has those rows alone, and that of a factor that
is read as a whole has all of its rows: small as these are, all factors of a table then suit one optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.quantizers.integer_quantizer import (
    fake_quantize,
    group_scales,
    group_shape,
    narrowed,
    scales_shape,
    to_codes,
)
from lightning_embcompress.methods.quantizers.packed_rows import multiply_packed, pack_rows, read_packed_rows
from lightning_embcompress.methods.quantizers.packing import packed_bytes

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
        >>> Quantization(bits=3, group_size=32).bytes_of((1000, 64))
        28000
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

    def bytes_of(self, shape: Sequence[int]) -> int:
        """Bytes of a packed factor of a shape."""
        rows, columns = matrix_shape(shape)
        return rows * packed_bytes(columns, self.bits) + 2 * math.prod(scales_shape(rows, columns, self.group_size))

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


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a factor as it is quantized: of more than two modes the last two are the columns.

    Example:
        >>> matrix_shape([1000, 64]), matrix_shape([4, 10, 8, 4])
        ((1000, 64), (40, 32))
    """
    kept = max(1, len(shape) - 2)
    return math.prod(shape[:kept]), math.prod(shape[kept:])


class QuantizedFactor(nn.Module):
    """What stands in the place of a parameter of a factorization.

    Args:
        shape: Of the parameter.
        quantization: How it is quantized.
    """

    def __init__(self, shape: Sequence[int], quantization: Quantization) -> None:
        """Keep the shape."""
        super().__init__()
        self.shape = torch.Size(shape)
        self.quantization = quantization

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns as they are quantized."""
        return matrix_shape(self.shape)

    def extra_repr(self) -> str:
        """Arguments for `print(module)`."""
        return f"shape={tuple(self.shape)}, bits={self.quantization.bits}, group_size={self.quantization.group_size}"


class FakeQuantizedFactor(QuantizedFactor):
    """A parameter that is trained, and read as it will be once it is packed.

    The gradient goes straight through the rounding (Bengio et al. 2013). With `ranges="minmax"` a group's scale is that
    of its values whenever it is read, until `freeze`; with `"learned"` it is a parameter.

    Args:
        weight: The parameter; it stays the same object, so that optimizers go on with it.
        quantization: How it is quantized.
        frozen: Whether scales are kept as they are.
    """

    scales: Tensor | None

    def __init__(self, weight: nn.Parameter, quantization: Quantization, frozen: bool = False) -> None:
        """Keep the parameter."""
        super().__init__(weight.shape, quantization)
        self.weight = weight
        self.register_buffer("scales", None)
        if quantization.ranges == "learned":
            del self._buffers["scales"]
            trains = weight.requires_grad and not frozen
            self.scales = nn.Parameter(self._ranges().to(weight.dtype), requires_grad=trains)
        elif frozen:
            self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what is read."""
        return self.weight.dtype

    @torch.no_grad()
    def _ranges(self) -> Tensor:
        """Scales of all groups as they are stored."""
        weight = self.weight.detach().reshape(self.matrix)
        shape = scales_shape(*self.matrix, self.quantization.group_size)
        if weight.is_meta or not weight.numel():
            return weight.new_zeros(shape, dtype=self.quantization.scales)
        found = weight.new_empty(shape, dtype=self.quantization.scales)
        group_rows, _ = group_shape(self.matrix[1], self.quantization.group_size)
        # Whole groups at a time.
        for chunk in row_chunks(shape[0], group_rows * self.matrix[1]):
            found[chunk] = self._scales_of(weight[chunk.start * group_rows : chunk.stop * group_rows])
        return found

    def _scales_of(self, weight: Tensor) -> Tensor:
        of = self.quantization
        return group_scales(weight.detach(), of.bits, of.group_size, of.scales)

    def freeze(self) -> None:
        """Keep the scales as they are from now on; learned ones stop training."""
        if self.quantization.ranges == "learned":
            assert isinstance(self.scales, nn.Parameter)
            self.scales.requires_grad_(False)
        elif self.scales is None:
            self.scales = self._ranges().to(self.weight.dtype)

    def rows(self, place: Tensor, sparse: bool = False) -> Tensor:
        """`[*, columns]` rows as they will be stored; no others are looked at, but those they share a scale with."""
        rows, columns = self.matrix
        # Not a view where there need be none: sparse gradients have no views.
        weight = self.weight if self.weight.ndim == 2 else self.weight.view(rows, columns)
        of = self.quantization
        flat = place.reshape(-1)
        found = F.embedding(flat, weight, sparse=sparse)
        if not found.numel():
            return found.view(*place.shape, columns)
        group_rows, _ = group_shape(columns, of.group_size)
        group = torch.div(flat, group_rows, rounding_mode="floor")
        if self.scales is not None:
            scales = rounded_to(F.embedding(group, self.scales, sparse=sparse), of.scales)
        elif group_rows == 1:
            scales = self._scales_of(found)
        else:
            # The last group may be short: its last row once more changes no range.
            mates = group.unsqueeze(1) * group_rows + torch.arange(group_rows, device=flat.device)
            scales = self._scales_of(F.embedding(mates.clamp(max=rows - 1), weight.detach()).view(-1, columns))
        return fake_quantize(found, scales, of.bits, of.group_size, clips=self.scales is not None).view(
            *place.shape, columns
        )

    def materialize(self, sparse: bool = False) -> Tensor:
        """All of it, as it will be stored."""
        of = self.quantization
        weight = materialize(self.weight, sparse).view(self.matrix)
        if not weight.numel():
            return weight.view(self.shape)
        scales = (
            self._scales_of(weight) if self.scales is None else rounded_to(materialize(self.scales, sparse), of.scales)
        )
        return fake_quantize(weight, scales, of.bits, of.group_size, clips=self.scales is not None).view(self.shape)

    def multiply(self, hidden: Tensor) -> Tensor:
        """`[*, rows]`, the product of `[*, columns]` with all rows."""
        return F.linear(hidden, self.materialize().view(self.matrix))

    @torch.no_grad()
    def packed(self) -> PackedFactor:
        """What it is once it is not trained any more."""
        packed = PackedFactor(self.shape, self.quantization, self.weight.dtype, self.weight.device)
        scales = self._ranges() if self.scales is None else self.scales.detach().to(self.quantization.scales)
        packed.fill(self.weight, scales)
        return packed


class PackedFactor(QuantizedFactor):
    """A factor as it is stored: packed integers, and the bytes of scales of 16 bits.

    Args:
        shape: Of the factor.
        quantization: How it is quantized.
        dtype: Dtype of what is read.
        device: Where it is.
    """

    codes: Tensor
    scales: Tensor
    unit: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        quantization: Quantization,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Build it empty."""
        super().__init__(shape, quantization)
        rows, columns = self.matrix
        groups = scales_shape(rows, columns, quantization.group_size)
        codes = torch.zeros(rows, packed_bytes(columns, quantization.bits), dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        # As bytes: casting the model casts no scales, and the file stays what it is.
        self.register_buffer("scales", torch.zeros(groups[0], 2 * groups[1], dtype=torch.uint8, device=device))
        # Follows the model's casts, for there is nothing else that does.
        self.register_buffer("unit", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what is read."""
        return self.unit.dtype

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # It is in no file: of a structure on the meta device the bytes were assigned alone.
        if self.unit.is_meta and not self.codes.is_meta:
            self.unit = torch.empty_like(self.unit, device=self.codes.device)

    def set_scales(self, scales: Tensor) -> None:
        """Keep scales of all groups, in their dtype of 16 bits."""
        self.scales.copy_(scales.contiguous().view(torch.uint8).reshape(self.scales.shape))

    def set_codes(self, codes: Tensor) -> None:
        """Keep `[rows, columns]` codes."""
        self.codes.copy_(pack_rows(codes, self.quantization.bits))

    def fill(self, numbers: Tensor, scales: Tensor | None = None) -> None:
        """Keep the nearest integers of numbers; None for the scales that lose least."""
        of = self.quantization
        matrix = numbers.detach().reshape(self.matrix)
        if scales is None:
            scales = group_scales(matrix, of.bits, of.group_size, of.scales, search=True)
        self.set_scales(scales)
        self.set_codes(to_codes(matrix, scales, of.bits, of.group_size))

    def group_scales(self) -> Tensor:
        """Scales of all groups, in their dtype of 16 bits."""
        if not self.scales.numel():
            # Of no columns: bytes of no strides cannot be seen as others.
            return self.scales.new_empty(
                self.scales.shape[0], self.scales.shape[1] // 2, dtype=self.quantization.scales
            )
        return self.scales.view(self.quantization.scales)

    def rows(self, place: Tensor) -> Tensor:
        """`[*, columns]` rows; no others are unpacked."""
        of = self.quantization
        return read_packed_rows(
            self.codes, self.group_scales(), place, of.bits, self.matrix[1], of.group_size, self.dtype
        )

    def materialize(self) -> Tensor:
        """All of it."""
        return self.rows(torch.arange(self.matrix[0], device=self.codes.device)).view(self.shape)

    def multiply(self, hidden: Tensor) -> Tensor:
        """`[*, rows]`, the product of `[*, columns]` with all rows, of which a few at a time are unpacked."""
        of = self.quantization
        return multiply_packed(hidden, self.codes, self.group_scales(), of.bits, self.matrix[1], of.group_size)


Factor: TypeAlias = Tensor | QuantizedFactor
"""A parameter, or what stands in its place."""
_Readable: TypeAlias = FakeQuantizedFactor | PackedFactor


def read_rows(factor: Factor, place: Tensor, sparse: bool = False) -> Tensor:
    """Rows of a factor, `[*, columns]` for places `[*]`; with a sparse gradient that has no other rows, if asked."""
    if isinstance(factor, Tensor):
        return F.embedding(place, factor, sparse=sparse)
    if isinstance(factor, FakeQuantizedFactor):
        return factor.rows(place, sparse)
    return cast(PackedFactor, factor).rows(place)


def multiply(hidden: Tensor, factor: Factor) -> Tensor:
    """Product of `[*, columns]` with all rows of a factor, `[*, rows]`."""
    if isinstance(factor, Tensor):
        return F.linear(hidden, factor)
    return cast(_Readable, factor).multiply(hidden)


def materialize(factor: Factor, sparse: bool = False) -> Tensor:
    """All of a factor: for those that are small, or about to leave; with a sparse gradient of all rows, if asked."""
    if isinstance(factor, Tensor):
        return cast(Tensor, _SparseGradient.apply(factor)) if sparse else factor  # type: ignore[no-untyped-call]
    if isinstance(factor, FakeQuantizedFactor):
        return factor.materialize(sparse)
    return cast(PackedFactor, factor).materialize()


def pieces(factor: Factor, step: int) -> Iterator[Tensor]:
    """All rows of a factor, `step` of them at a time; packed ones are unpacked one piece after the other."""
    if isinstance(factor, PackedFactor):
        places = torch.arange(factor.matrix[0], device=factor.codes.device)
        return (factor.rows(piece) for piece in torch.split(places, step))
    return iter(torch.split(materialize(factor), step))


def in_place_of(parameter: nn.Parameter, quantization: Quantization, state: State) -> QuantizedFactor:
    """What stands in the place of a parameter: with `"packed"` empty, ready to be loaded into."""
    if state == "packed":
        return PackedFactor(parameter.shape, quantization, parameter.dtype, parameter.device)
    return FakeQuantizedFactor(parameter, quantization, frozen=state == "frozen")


class _SparseGradient(torch.autograd.Function):
    """A tensor as it is; its gradient is a sparse one with all rows, which optimizers of sparse gradients take."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor) -> Tensor:
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        values = gradients[0].contiguous()
        rows = torch.arange(len(values), device=values.device).unsqueeze(0)
        return torch.sparse_coo_tensor(rows, values, values.shape, check_invariants=False, is_coalesced=True)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return rounded(values.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(values: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function of rounding makes of numbers; the gradient goes straight through (Bengio et al. 2013)."""
    return cast(Tensor, _Straight.apply(values, rounded))  # type: ignore[no-untyped-call]


def rounded_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as they are in a narrower dtype, with the gradient to those that are trained."""
    return straight_through(values, lambda wide: narrowed(wide, dtype).to(wide.dtype))
