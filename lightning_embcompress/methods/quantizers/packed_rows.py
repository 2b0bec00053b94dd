"""Matrices of small integers, packed row by row: read, and multiplied with, without being unpacked as a whole.

Every row is packed by itself, lowest bit first, and ends with a whole byte. The integers begin at 0: a value is
`(code - 2^(bits-1)) · scale`, with a scale for each group of neighbouring values, see `quantizers.integer_quantizer`.
The highest bit of every byte is stored inverted, so that 8 bits are those of a signed integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.methods.quantizers.integer_quantizer import group_shape, repeated, scales_shape
from lightning_embcompress.methods.quantizers.packing import packed_bytes
from lightning_embcompress.methods.quantizers.repacked_product import Repacked, can_repack, repack, repacked_product
from lightning_embcompress.utils.kept import Kept

# Values that are unpacked at a time: what is on the way to them stays in the cache.
_TILE = 2**17
# In a graph every tile is nodes of its own, so that there are fewer of them.
_EXPORTED_TILE = 2**24
# States up to which integers are multiplied, from a copy that is kept; more are worth unpacking for.
_FEW_STATES = 32
# Values of a matrix up to which it is unpacked even for one of them.
_SMALL = 2**18

_repacked: Kept[Repacked] = Kept()


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack the rows of a matrix, each by itself.

    Args:
        codes: `[n, columns]` integers from 0 to `2^bits - 1`.
        bits: Bits of an integer, 2 to 8.

    Returns:
        `[n, ⌈columns · bits / 8⌉]` uint8.

    Example:
        >>> pack_rows(torch.tensor([[1, 2, 3], [15, 0, 1]]), 4)
        tensor([[161, 131],
                [143, 129]], dtype=torch.uint8)
    """
    n, columns = codes.shape
    values, data = _word(bits)
    packed = torch.empty(n, packed_bytes(columns, bits), dtype=torch.uint8, device=codes.device)
    shifts = bits * torch.arange(values, device=codes.device)
    places = 8 * torch.arange(data, device=codes.device)
    for rows in _tiles(n if columns else 0, columns, 1):
        padded = F.pad(codes[rows].long(), (0, -columns % values))
        words = (padded.view(-1, padded.shape[1] // values, values) << shifts).sum(dim=2)
        spread = ((words.unsqueeze(2) >> places) & 255).flatten(1)
        packed[rows] = spread[:, : packed.shape[1]].to(torch.uint8) ^ 128
    return packed


def unpack_rows(packed: Tensor, bits: int, columns: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Read back what `pack_rows` packed.

    Args:
        packed: `[*, ⌈columns · bits / 8⌉]` uint8, some rows.
        bits: Bits of an integer, 2 to 8.
        columns: Integers of a row.
        dtype: Of the integers.

    Returns:
        `[*, columns]`.

    Raises:
        ValueError: If rows of as many bytes hold other integers.

    Example:
        >>> unpack_rows(torch.tensor([[161, 131], [143, 129]], dtype=torch.uint8), 4, 3)
        tensor([[ 1,  2,  3],
                [15,  0,  1]], dtype=torch.uint8)
    """
    _check_width(packed, bits, columns)
    rows = packed.reshape(math.prod(packed.shape[:-1]), packed.shape[-1])
    if _plain(packed):
        return _unpacked_in_a_graph(rows, bits, columns).to(dtype).view(*packed.shape[:-1], columns)
    codes = rows.new_empty(len(rows), columns, dtype=dtype)
    for tile in _tiles(len(rows), columns, 1):
        codes[tile] = _unpacked(rows[tile], bits, columns)
    return codes.view(*packed.shape[:-1], columns)


def read_packed_rows(
    packed: Tensor,
    scales: Tensor,
    place: Tensor,
    bits: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of a packed matrix; no others are unpacked.

    Args:
        packed: `[n, ⌈columns · bits / 8⌉]` uint8, see `pack_rows`.
        scales: Of its groups, see `quantizers.integer_quantizer.scales_shape`.
        place: `[*]` int64 which rows, from 0 to `n - 1`.
        bits: Bits of an integer, 2 to 8.
        columns: Columns of the matrix.
        group_size: Values that share a scale.
        dtype: Of the rows; the product is exact in float32 before it is rounded to it.

    Returns:
        `[*, columns]`.

    Raises:
        ValueError: If bytes or scales are of another matrix.

    Example:
        >>> packed, scales = torch.tensor([[161, 131], [143, 129]], dtype=torch.uint8), torch.ones(1, 1)
        >>> read_packed_rows(packed, scales, torch.tensor([1, 0]), bits=4, columns=3, group_size=16)
        tensor([[ 7., -8., -7.],
                [-7., -6., -5.]])
    """
    _check(packed, scales, bits, columns, group_size)
    group_rows, _ = group_shape(columns, group_size)
    flat = place.reshape(-1)
    groups = torch.div(flat, group_rows, rounding_mode="floor") if group_rows > 1 else flat
    if _plain(packed):
        rows = _values(F.embedding(flat, packed), F.embedding(groups, scales), bits, columns, group_size, dtype)
        return rows.view(*place.shape, columns)
    found = torch.empty(len(flat), columns, dtype=dtype, device=packed.device)
    for tile in _tiles(len(flat), columns, 1):
        data, factors = packed.index_select(0, flat[tile]), scales.index_select(0, groups[tile])
        found[tile] = _values(data, factors, bits, columns, group_size, dtype)
    return found.view(*place.shape, columns)


def multiply_packed(hidden: Tensor, packed: Tensor, scales: Tensor, bits: int, columns: int, group_size: int) -> Tensor:
    """`h Wᵀ` from a packed matrix, some rows of it at a time.

    On the CPU up to 32 states are multiplied in integers, with a copy that is laid out for that, is made for the first
    of them and takes a byte an integer (`repacked_product`). For more, or for a small matrix, tiles of rows are
    unpacked in the dtype of the states. Errors of float32 logits of 20 against float64 are 1e-5.

    Args:
        hidden: `[*, columns]` floats. Under autocast they are cast as for `F.linear`.
        packed: `[n, ⌈columns · bits / 8⌉]` uint8, see `pack_rows`.
        scales: Of its groups, see `quantizers.integer_quantizer.scales_shape`.
        bits: Bits of an integer, 2 to 8.
        columns: Columns of the matrix.
        group_size: Values that share a scale.

    Returns:
        `[*, n]` in the dtype of the states, with a gradient to them alone.

    Raises:
        ValueError: If states, bytes or scales are of another matrix.

    Example:
        >>> packed, scales = torch.tensor([[161, 131], [143, 129]], dtype=torch.uint8), torch.ones(1, 1)
        >>> multiply_packed(torch.eye(3), packed, scales, bits=4, columns=3, group_size=16).round(decimals=3)
        tensor([[-7.,  7.],
                [-6., -8.],
                [-5., -7.]])
    """
    _check(packed, scales, bits, columns, group_size)
    if hidden.shape[-1] != columns:
        raise ValueError(f"states must have {columns} columns as the matrix has, they have {hidden.shape[-1]}")
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    arguments = (hidden, packed, scales, bits, columns, group_size)
    if torch.compiler.is_compiling() or not (hidden.requires_grad and torch.is_grad_enabled()):
        return _product(*arguments)
    return cast(Tensor, _Product.apply(*arguments))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """Keeps nothing but the packed matrix for the gradient, for which it is unpacked once more, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, packed: Tensor, scales: Tensor, bits: int, columns: int, group_size: int
    ) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.bits, ctx.columns, ctx.group_size = bits, columns, group_size
        return _product(hidden, packed, scales, bits, columns, group_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed, scales = ctx.saved_tensors
        # Of narrow dtypes the sum over all tiles would lose what single ones add.
        wide = compute_dtype(gradient.dtype)
        found = torch.zeros(*gradient.shape[:-1], ctx.columns, dtype=wide, device=gradient.device)
        tiles = _unpacked_tiles(packed, scales, ctx.bits, ctx.columns, ctx.group_size, gradient.dtype)
        for rows, tile in tiles:
            found += gradient[..., rows] @ tile
        return found.to(gradient.dtype), None, None, None, None, None


def _product(hidden: Tensor, packed: Tensor, scales: Tensor, bits: int, columns: int, group_size: int) -> Tensor:
    if _is_for_integers(hidden, packed, scales):
        matrix = _repacked.of(
            [packed, scales], lambda: repack(unpack_rows(packed, bits, columns), scales, bits, group_size)
        )
        found = repacked_product(hidden.detach().reshape(-1, columns), matrix)
        return found.to(hidden.dtype).view(*hidden.shape[:-1], len(packed))
    tiles = _unpacked_tiles(packed, scales, bits, columns, group_size, hidden.dtype)
    if _plain(packed):
        return torch.cat([F.linear(hidden, tile) for _, tile in tiles], dim=-1)
    out = hidden.new_empty(*hidden.shape[:-1], len(packed))
    for rows, tile in tiles:
        out[..., rows] = F.linear(hidden, tile)
    return out


def _is_for_integers(hidden: Tensor, packed: Tensor, scales: Tensor) -> bool:
    """Whether there are few states, and not of more than the 24 bits that they are rounded to, for a large matrix."""
    # A change of tensors that were made for inference cannot be seen, and would leave a copy of what they were.
    if _plain(packed) or packed.is_inference() or scales.is_inference() or hidden.dtype == torch.float64:
        return False
    columns = hidden.shape[-1]
    return 0 < hidden.numel() <= _FEW_STATES * columns and len(packed) * columns > _SMALL and can_repack()


def _unpacked_tiles(
    packed: Tensor, scales: Tensor, bits: int, columns: int, group_size: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the matrix, some at a time, and which they are."""
    group_rows, _ = group_shape(columns, group_size)
    for rows in _tiles(len(packed), columns, group_rows):
        factors = scales[rows.start // group_rows : -(-rows.stop // group_rows)]
        if group_rows > 1:
            factors = factors.repeat_interleave(group_rows, dim=0)[: rows.stop - rows.start]
        yield rows, _values(packed[rows], factors, bits, columns, group_size, dtype)


def _values(data: Tensor, scales: Tensor, bits: int, columns: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Unpack and scale rows, with a row of scales for each."""
    wide = compute_dtype(dtype)
    values: Tensor = unpack_rows(data, bits, columns, wide) - 2 ** (bits - 1)
    scales = scales.to(wide)
    if columns > group_size:
        scales = repeated(scales, columns, group_size)
    return (values * scales).to(dtype)


def _unpacked(rows: Tensor, bits: int, columns: int) -> Tensor:
    """`[n, columns]` uint8 of few rows: words that hold several integers are spread to words of a byte for each."""
    values, data = _word(bits)
    rows = rows ^ 128
    if values == 1:
        return rows
    dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values]
    if data == 1:
        words = rows.to(dtype)
    else:
        padded = rows.new_zeros(len(rows), -(-columns // values), values)
        whole = rows.shape[1] // data
        padded[:, :whole, :data] = rows[:, : whole * data].reshape(len(rows), whole, data)
        padded[:, whole:, : rows.shape[1] - whole * data] = rows[:, whole * data :].unsqueeze(1)
        words = padded.view(dtype).squeeze(2)
    half = values // 2
    while half:
        # Of every run of 2 · half integers the upper half moves to where its bytes begin.
        upper = sum((2 ** (half * bits) - 1) << (8 * run + half * bits) for run in range(0, values, 2 * half))
        words = torch.add(words, words & upper, alpha=2 ** (half * (8 - bits)) - 1)
        half //= 2
    codes: Tensor = words.view(torch.uint8)[:, :columns]
    return codes


def _unpacked_in_a_graph(rows: Tensor, bits: int, columns: int) -> Tensor:
    """`[n, columns]` int32, by operations that all runtimes and devices have."""
    rows = (rows.int() + 128) % 256
    if bits == 8:
        return rows
    begin = bits * torch.arange(columns, device=rows.device)
    first = torch.div(begin, 8, rounding_mode="floor")
    low, high = rows[:, first], rows[:, (first + 1).clamp(max=max(0, rows.shape[1] - 1))]
    words = low + 256 * high
    codes: Tensor = torch.div(words, (2 ** (begin - 8 * first)).int(), rounding_mode="floor") % 2**bits
    return codes


def _word(bits: int) -> tuple[int, int]:
    """Integers and bytes after which a row begins a byte again.

    Raises:
        ValueError: If `bits` is not from 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, it is {bits}")
    values = 8 // math.gcd(bits, 8)
    return values, values * bits // 8


def _tiles(n: int, columns: int, multiple: int) -> Iterator[slice]:
    """Cut rows into runs of a multiple of some number of rows."""
    most = _EXPORTED_TILE if torch.compiler.is_compiling() else _TILE
    step = max(1, most // max(1, columns) // multiple) * multiple
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _plain(tensor: Tensor) -> bool:
    """Whether only operations will do that all runtimes and devices have."""
    return torch.compiler.is_compiling() or tensor.device.type != "cpu"


def _check_width(packed: Tensor, bits: int, columns: int) -> None:
    _word(bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_bytes(columns, bits):
        raise ValueError(
            f"rows of {columns} integers of {bits} bits must be {packed_bytes(columns, bits)} uint8 each, they are "
            f"{packed.shape[-1]} {packed.dtype}"
        )


def _check(packed: Tensor, scales: Tensor, bits: int, columns: int, group_size: int) -> None:
    _check_width(packed, bits, columns)
    shape = scales_shape(len(packed), columns, group_size)
    if tuple(scales.shape) != shape:
        raise ValueError(
            f"the scales of {len(packed)} x {columns} in groups of {group_size} must be of the shape {list(shape)}, "
            f"they are {list(scales.shape)}"
        )
