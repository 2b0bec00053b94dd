"""A parameter in few bits: fake-quantized while it trains, packed once it is trained.

`FakeQuantizer` and `Unpacker` say how its numbers are read in these two states. For weights whose layers are foreign
they are parametrizations (`torch.nn.utils.parametrize`); the factors of a table are replaced by `FakeQuantizedFactor`
and `PackedFactor`, which hold the numbers, or the bytes, themselves. A factorization reads its factors by `read_rows`,
`multiply`, `pieces` and `materialize`, whatever they are; only rows that are asked for are rounded, or unpacked.

Where a lookup asks for sparse gradients, that of a factor read by rows has those rows alone, and that of a factor that
is read as a whole has all of its rows: small as these are, all factors of a table then suit one optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.quantizers.gradients import rounded_to, with_sparse_gradient
from lightning_embcompress.methods.quantizers.integer_quantizer import (
    fake_quantize,
    group_scales,
    group_shape,
    scales_shape,
    to_codes,
)
from lightning_embcompress.methods.quantizers.onnx_blocks import OnnxBlocks, is_for_onnx, numbers_of_bytes
from lightning_embcompress.methods.quantizers.packed_rows import multiply_packed, pack_rows, read_packed_rows
from lightning_embcompress.methods.quantizers.packing import packed_bytes
from lightning_embcompress.methods.quantizers.quantization import HALVES, Quantization, Storage, matrix_shape
from lightning_embcompress.methods.quantizers.rounded_factor import RoundedFactor


@torch.no_grad()
def check_storable(what: str, weight: Tensor, storage: Storage) -> None:
    """Check that a parameter can be stored in fewer bits.

    Args:
        what: How messages call it.
        weight: The parameter.
        storage: How it will be stored.

    Raises:
        ValueError: If a number is not finite, or too large for 16 bits.
    """
    if weight.is_meta:
        return
    if not bool(weight.isfinite().all()):
        raise ValueError(
            f"{what} has NaN or infinite values, and cannot be quantized: look for what made training diverge"
        )
    matrix = weight.reshape(matrix_shape(weight.shape))
    if isinstance(storage, Quantization):
        found, remedy = _ranges(matrix, storage), f"scales in {storage.scale_dtype}: use scale_dtype='bfloat16'"
    else:
        found, remedy = matrix.to(HALVES[storage]), f"{storage}: use bfloat16"
    if not bool(found.isfinite().all()):
        raise ValueError(f"{what} has values that are too large for {remedy}")


class StoredParameter(nn.Module):
    """How a parameter is read that is, or will be, stored in fewer bits.

    Args:
        shape: Of the parameter.
        storage: How it is stored.
    """

    def __init__(self, shape: Sequence[int], storage: Storage) -> None:
        """Keep both."""
        super().__init__()
        self.shape, self.matrix, self.storage = torch.Size(shape), matrix_shape(shape), storage

    def extra_repr(self) -> str:
        """Arguments for `print(module)`."""
        return f"shape={tuple(self.shape)}, {self.storage}"


class FakeQuantizer(StoredParameter):
    """Reads the numbers of a parameter as they will be stored, while they train.

    The gradient goes straight through the rounding (Bengio et al. 2013). With `ranges="minmax"` a group's scale is that
    of its values whenever it is read, until `freeze`; with `"learned"` it is a parameter. As a parametrization of
    `torch.nn.utils.parametrize` it is given the numbers; `FakeQuantizedFactor` holds them.

    Args:
        weight: The parameter.
        storage: How it will be stored.
        frozen: Whether scales are kept as they are.
    """

    scales: Tensor | None

    def __init__(self, weight: Tensor, storage: Storage, frozen: bool = False) -> None:
        """Begin with the ranges of the values."""
        super().__init__(weight.shape, storage)
        self.frozen = False
        self._hold(weight)
        self.register_buffer("scales", None)
        if isinstance(storage, Quantization) and storage.ranges == "learned":
            del self._buffers["scales"]
            values = _ranges(weight.detach().reshape(self.matrix), storage).to(weight.dtype)
            self.scales = nn.Parameter(values, requires_grad=weight.requires_grad)
        if frozen:
            self.freeze(weight)

    def _hold(self, weight: Tensor) -> None:
        """Keep the parameter, where nobody else does."""

    def freeze(self, weight: Tensor) -> None:
        """Keep the scales of a weight as they are from now on; learned ones stop training."""
        if not isinstance(self.storage, Quantization):
            return
        self.frozen = True
        if isinstance(self.scales, nn.Parameter):
            self.scales.requires_grad_(False)
        elif self.scales is None:
            self.scales = _ranges(weight.detach().reshape(self.matrix), self.storage).to(weight.dtype)

    def forward(self, weight: Tensor, sparse: bool = False) -> Tensor:
        """All of the numbers as they will be stored."""
        if not isinstance(self.storage, Quantization):
            return rounded_to(weight, HALVES[self.storage])
        if not weight.numel() and self.scales is None:
            return weight
        numbers, kept = weight.reshape(self.matrix), self.scales is not None
        scales = self._scales_of(numbers) if self.scales is None else self._rounded(materialize(self.scales, sparse))
        of = self.storage
        return fake_quantize(numbers, scales, of.bits, of.group_size, clips=kept).view(self.shape)

    def _scales_of(self, numbers: Tensor) -> Tensor:
        of = cast(Quantization, self.storage)
        return group_scales(numbers.detach(), of.bits, of.group_size, of.scales)

    def _rounded(self, scales: Tensor) -> Tensor:
        return rounded_to(scales, cast(Quantization, self.storage).scales)


class FakeQuantizedFactor(FakeQuantizer):
    """A parameter of a factorization that is trained, and read as it will be once it is packed.

    Args:
        weight: The parameter; it stays the same object, so that optimizers go on with it.
        quantization: How it is quantized.
        frozen: Whether scales are kept as they are.
    """

    weight: nn.Parameter
    storage: Quantization

    def _hold(self, weight: Tensor) -> None:
        self.weight = cast(nn.Parameter, weight)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what is read."""
        return self.weight.dtype

    def rows(self, place: Tensor, sparse: bool = False) -> Tensor:
        """`[*, columns]` rows as they will be stored; no others are looked at, but those they share a scale with."""
        rows, columns = self.matrix
        # Not a view where there need be none: sparse gradients have no views.
        weight = self.weight if self.weight.ndim == 2 else self.weight.view(rows, columns)
        of = self.storage
        flat = place.reshape(-1)
        found = F.embedding(flat, weight, sparse=sparse)
        # Scales that are trained get a gradient from no rows too, if of zeros, as DDP insists.
        if not found.numel() and self.scales is None:
            return found.view(*place.shape, columns)
        group_rows, _ = group_shape(columns, of.group_size)
        group = torch.div(flat, group_rows, rounding_mode="floor")
        if self.scales is not None:
            scales = self._rounded(F.embedding(group, self.scales, sparse=sparse))
        elif group_rows == 1:
            scales = self._scales_of(found)
        else:
            # The last group may be short: its last row once more changes no range.
            mates = group.unsqueeze(1) * group_rows + torch.arange(group_rows, device=flat.device)
            scales = self._scales_of(F.embedding(mates.clamp(max=rows - 1), weight.detach()).view(-1, columns))
        found = fake_quantize(found, scales, of.bits, of.group_size, clips=self.scales is not None)
        return found.view(*place.shape, columns)

    def materialize(self, sparse: bool = False) -> Tensor:
        """All of it, as it will be stored."""
        return self.forward(materialize(self.weight, sparse), sparse)

    def multiply(self, hidden: Tensor) -> Tensor:
        """`[*, rows]`, the product of `[*, columns]` with all rows."""
        return F.linear(hidden, self.materialize().view(self.matrix))

    @torch.no_grad()
    def packed(self) -> PackedFactor:
        """What it is once it is not trained any more."""
        packed = PackedFactor(self.shape, self.storage, self.weight.dtype, self.weight.device)
        packed.keep(*packed.encode(self.weight, self.scales))
        return packed


class Unpacker(StoredParameter):
    """Reads the numbers of a parameter from its bytes: packed integers and their scales, or numbers of 16 bits.

    As a parametrization of `torch.nn.utils.parametrize` it is given the bytes; `PackedFactor` holds them.

    Args:
        shape: Of the parameter.
        storage: How it is stored.
        dtype: Dtype of what is read; it follows the model's casts.
        device: Where it is.
    """

    unit: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        storage: Storage,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Keep the shape."""
        super().__init__(shape, storage)
        # Follows the model's casts, for there is nothing else that does.
        self.register_buffer("unit", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what is read."""
        return self.unit.dtype

    def empty(self) -> tuple[Tensor, ...]:
        """Bytes without values, ready to be loaded into."""
        rows, columns = self.matrix
        if isinstance(self.storage, Quantization):
            groups = scales_shape(rows, columns, self.storage.group_size)
            # Scales as bytes: casting the model casts no scales, and the file stays what it is.
            scales = torch.zeros(groups[0], 2 * groups[1], dtype=torch.uint8, device=self.unit.device)
            codes = torch.zeros(rows, packed_bytes(columns, self.storage.bits), dtype=torch.uint8, device=scales.device)
            return codes, scales
        return (torch.zeros(rows, 2 * columns, dtype=torch.uint8, device=self.unit.device),)

    def encode(self, weight: Tensor, scales: Tensor | None = None) -> tuple[Tensor, ...]:
        """A weight as it is stored, with scales that were kept in training, or those of its values."""
        matrix = weight.detach().reshape(self.matrix)
        if not isinstance(self.storage, Quantization):
            return (matrix.to(HALVES[self.storage]).view(torch.uint8),)
        of = self.storage
        scales = _ranges(matrix, of) if scales is None else scales.detach().to(of.scales)
        return pack_rows(to_codes(matrix, scales, of.bits, of.group_size), of.bits), _as_bytes(scales)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Bytes of a weight, with the ranges of its values."""
        return self.empty() if weight.is_meta else self.encode(weight)

    def forward(self, *parts: Tensor) -> Tensor:
        """All of the numbers."""
        if not isinstance(self.storage, Quantization):
            return as_numbers(parts[0], HALVES[self.storage]).to(self.dtype).view(self.shape)
        places = torch.arange(self.matrix[0], device=parts[0].device)
        return self._rows(places, *parts).view(self.shape)

    def _rows(self, places: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        of = cast(Quantization, self.storage)
        numbers = as_numbers(scales, of.scales)
        return read_packed_rows(codes, numbers, places, of.bits, self.matrix[1], of.group_size, self.dtype)


class PackedFactor(Unpacker):
    """A factor as it is stored: packed integers, and the bytes of scales of 16 bits.

    Args:
        shape: Of the factor.
        quantization: How it is quantized.
        dtype: Dtype of what is read.
        device: Where it is.
    """

    storage: Quantization
    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        quantization: Quantization,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Build it empty."""
        super().__init__(shape, quantization, dtype, device)
        for name, part in zip(("codes", "scales"), self.empty(), strict=True):
            self.register_buffer(name, part)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # It is in no file: of a structure on the meta device the bytes were assigned alone.
        if self.unit.is_meta and not self.codes.is_meta:
            self.unit = torch.empty_like(self.unit, device=self.codes.device)

    def keep(self, packed: Tensor, scales: Tensor) -> None:
        """Take over bytes, as `encode` gives them."""
        self.codes.copy_(packed)
        self.scales.copy_(scales)

    def keep_codes(self, codes: Tensor, scales: Tensor) -> None:
        """Take over `[rows, columns]` codes, and scales of all groups in their dtype of 16 bits."""
        self.keep(pack_rows(codes, self.storage.bits), _as_bytes(scales))

    def fill(self, numbers: Tensor) -> None:
        """Keep the nearest integers of numbers, with the scales that lose least."""
        of, matrix = self.storage, numbers.detach().reshape(self.matrix)
        self.keep(*self.encode(matrix, group_scales(matrix, of.bits, of.group_size, of.scales, search=True)))

    def fill_rows(self, start: int, numbers: Tensor) -> None:
        """Keep the nearest integers of neighbouring rows, which begin and, but for the last ones, end with a group."""
        codes, scales = PackedFactor(numbers.shape, self.storage, numbers.dtype, numbers.device).encode(numbers)
        group = start // group_shape(self.matrix[1], self.storage.group_size)[0]
        self.codes[start : start + len(codes)] = codes
        self.scales[group : group + len(scales)] = scales

    def group_scales(self) -> Tensor:
        """Scales of all groups, in their dtype of 16 bits."""
        return as_numbers(self.scales, self.storage.scales)

    def rows(self, place: Tensor, sparse: bool = False) -> Tensor:
        """`[*, columns]` rows; no others are unpacked."""
        if is_for_onnx() and not self.codes.numel():
            # Graphs of ONNX get no arithmetic with nothing.
            return self.unit.new_zeros(*place.shape, self.matrix[1])
        blocks = self._for_onnx()
        return self._rows(place, self.codes, self.scales) if blocks is None else blocks.rows(place)

    def materialize(self, sparse: bool = False) -> Tensor:
        """All of it."""
        return self.forward(self.codes, self.scales)

    def multiply(self, hidden: Tensor) -> Tensor:
        """`[*, rows]`, the product of `[*, columns]` with all rows, of which a few at a time are unpacked."""
        if is_for_onnx() and not self.codes.numel():
            return hidden.new_zeros(*hidden.shape[:-1], self.matrix[0])
        blocks, of = self._for_onnx(), self.storage
        if blocks is not None:
            return blocks.multiply(hidden)
        return multiply_packed(hidden, self.codes, self.group_scales(), of.bits, self.matrix[1], of.group_size)

    def _for_onnx(self) -> OnnxBlocks | None:
        """What operators of ONNX Runtime read, where a graph for it is being made; float32 alone."""
        if not is_for_onnx() or self.dtype != torch.float32:
            return None
        return OnnxBlocks.of(self.codes, self.scales, self.storage, self.matrix)


Factor: TypeAlias = Tensor | FakeQuantizedFactor | PackedFactor | RoundedFactor
"""A parameter, or what stands in its place."""


def read_rows(factor: Factor, place: Tensor, sparse: bool = False) -> Tensor:
    """Rows of a factor, `[*, columns]` for places `[*]`; with a sparse gradient that has no other rows, if asked."""
    return F.embedding(place, factor, sparse=sparse) if isinstance(factor, Tensor) else factor.rows(place, sparse)


def multiply(hidden: Tensor, factor: Factor) -> Tensor:
    """Product of `[*, columns]` with all rows of a factor, `[*, rows]`."""
    return F.linear(hidden, factor) if isinstance(factor, Tensor) else factor.multiply(hidden)


def materialize(factor: Factor, sparse: bool = False) -> Tensor:
    """All of a factor: for those that are small, or about to leave; with a sparse gradient of all rows, if asked."""
    if isinstance(factor, Tensor):
        return with_sparse_gradient(factor) if sparse else factor
    return factor.materialize(sparse)


def pieces(factor: Factor, step: int) -> Iterator[Tensor]:
    """All rows of a factor, `step` of them at a time; packed ones are unpacked one piece after the other."""
    if isinstance(factor, PackedFactor):
        places = torch.arange(factor.matrix[0], device=factor.codes.device)
        return (factor.rows(piece) for piece in torch.split(places, step))
    return iter(torch.split(materialize(factor), step))


def _ranges(matrix: Tensor, of: Quantization) -> Tensor:
    """Scales that cover the values of all groups, as they are stored."""
    shape = scales_shape(matrix.shape[0], matrix.shape[1], of.group_size)
    found = matrix.new_zeros(shape, dtype=of.scales)
    if not matrix.is_meta and matrix.numel():
        group_rows, _ = group_shape(matrix.shape[1], of.group_size)
        # Whole groups at a time.
        for chunk in row_chunks(shape[0], group_rows * matrix.shape[1]):
            part = matrix[chunk.start * group_rows : chunk.stop * group_rows]
            found[chunk] = group_scales(part, of.bits, of.group_size, of.scales)
    return found


def _as_bytes(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.uint8).reshape(scales.shape[0], 2 * scales.shape[1])


def as_numbers(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of 16 bits that `[rows, bytes]` uint8 are."""
    if not data.numel():
        # Of no columns: bytes of no strides cannot be seen as others.
        return data.new_empty(data.shape[0], data.shape[1] // 2, dtype=dtype)
    return numbers_of_bytes(data, dtype) if is_for_onnx() else data.view(dtype)
