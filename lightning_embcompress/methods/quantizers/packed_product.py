"""Products of few states with packed integers, in integers: nothing is unpacked.

The product of int8 matrices in int32 reads a byte an element, where one of floats reads four. So the bytes of packed
rows are multiplied as they are. A byte is made of pieces of one or more integers. The bits below the end of piece `k`,
`A_k = byte & (2^{end_k} - 1)`, are an int8 number, as is `B = byte - 128` with the bits of all of them, in which form
bytes are stored. Pieces are differences of those, `(A_k - A_{k-1}) / 2^{begin_k}`, hence a sum over integers `v` is one
over bytes,

    Σ_columns h v = Σ_bytes (Σ_k α_k A_k + β B) + constant,

for factors `α` and `β` that follow from the state `h` alone. They are split into three digits to the base 256, with
which the products are exact: what is rounded are `α` and `β`, to 24 bits of the largest in a group of columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from lightning_embcompress.methods.quantizers.integer_quantizer import group_shape

DIGITS = 3
# As bytes from 0 to 255 that stand for digits from -128 to 127, all digits 0.
_MIDDLE = 0x808080
# The largest number that is three such bytes.
_LARGEST = 2**24 - 1 - _MIDDLE
# A product is about as fast with the digits of some groups of columns as with those of one, as long as their bytes are
# few; of whole rows, which are not copied for it, there may be more.
_GROUPS, _SHORT, _SHORT_ROW = 4, 96, 160
# Rows that a mask is there for, where it is not the same for all bytes: one row is too short to begin anew each time.
_MASK_ROWS = 32
# Rows of a tile at most, and bytes of what is made for it: small enough for the cache, large enough for few calls. With
# a power of two the sums of a row would be in one another's way in the cache.
_TILE_ROWS, _TILE_BYTES = 16_800, 2**21


@dataclass(frozen=True)
class _Layout:
    """What the bytes of a row are made of.

    Attributes:
        columns: `[planes, bytes]` column of every piece.
        factors: `[parts, 1, planes, bytes]` float64, what a piece counts. Where groups end within bytes there is a part
            for those of even number and one for those of odd number.
        constant: `[columns, groups]` float64, what a state counts beside: bytes are 128 more than the numbers they are
            multiplied as, and codes are more than integers.
        masks: The bits below the end of every piece but the last: a number, or uint8 of 32 rows where bytes differ.
        slabs: Bytes that are multiplied at once, and as `[parts, 1, groups, 1, 1, bytes]` int8 whether they are of a
            group.
    """

    columns: Tensor
    factors: Tensor
    constant: Tensor
    masks: tuple[int | Tensor, ...]
    slabs: tuple[tuple[slice, Tensor], ...]


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def _layout(bits: int, columns: int, group_columns: int) -> _Layout:
    """How rows are laid out."""
    groups = -(-columns // group_columns)
    # The first byte of every group, and the end of its last one.
    ends_within = group_columns * bits % 8 > 0 and groups > 1
    spans = [
        (group * group_columns * bits // 8, (min((group + 1) * group_columns, columns) * bits + 7) // 8)
        for group in range(groups)
    ]
    is_short = columns * bits <= 8 * _SHORT_ROW and groups <= _GROUPS
    count = groups if is_short else max(1, min(_GROUPS, 8 * _SHORT // (group_columns * bits)))
    slabs = []
    with torch.device("cpu"):
        begin = torch.arange(0, columns * bits, 8)
        ends = torch.div(begin + 7, bits, rounding_mode="floor")
        planes = int((ends - torch.div(begin, bits, rounding_mode="floor")).max()) + 1
        # The last piece of every byte is in the last plane; bytes of fewer pieces have none in the first planes.
        column = ends - torch.arange(planes - 1, -1, -1).unsqueeze(1)
        offset = column * bits - begin
        # A piece that begins its integer begins within the byte, one that goes on within the integer.
        factors = torch.where((offset > -bits) & (column < columns), torch.exp2(-offset.double()), 0)
        masks = [mask.to(torch.uint8) for mask in 2 ** (offset[:-1] + bits).clamp(0, 8) - 1]
        column = column.clamp(0, columns - 1)
        group = torch.arange(columns) // group_columns
        constant = torch.full((columns,), -(2.0 ** (bits - 1)), dtype=torch.float64)
        constant.index_add_(0, column[-1], 128 * factors[-1])
        constant = torch.zeros(columns, groups, dtype=torch.float64).scatter_(1, group[:, None], constant[:, None])
        parts = torch.stack([group[column] % 2 == part for part in range(2)]) if ends_within else torch.ones(1, 1, 1)
        for first in range(0, groups, count):
            mine = spans[first : first + count]
            data = slice(mine[0][0], mine[-1][1])
            member = torch.zeros(len(parts), 1, len(mine), 1, 1, data.stop - data.start, dtype=torch.int8)
            for place, (start, stop) in enumerate(mine):
                member[(first + place) % len(parts), 0, place, 0, 0, start - data.start : stop - data.start] = 1
            slabs.append((data, member))
    return _Layout(
        column,
        (factors * parts).unsqueeze(1),
        constant,
        tuple(int(mask[0]) if bool((mask == mask[0]).all()) else mask.repeat(_MASK_ROWS) for mask in masks),
        tuple(slabs),
    )


@cache
def products_are_exact() -> bool:
    """Whether this processor has exact and fast products of int8 matrices; those of older ones saturate."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ends = torch.tensor([-128, 127], dtype=torch.int8)
    # Constant and alternating, both at their ends.
    left = torch.stack([*ends.repeat_interleave(64).view(2, 64), ends.repeat(32)])
    right = left.repeat(8, 1).T
    try:
        found = torch._int_mm(left, right)
    except RuntimeError:
        return False
    return torch.equal(found.long(), left.long() @ right.long())


def integer_product(states: Tensor, packed: Tensor, scales: Tensor, bits: int, columns: int, group_size: int) -> Tensor:
    """`h Wᵀ` for few states, from packed integers on the CPU.

    The factors of bytes are rounded to 24 bits of the largest of a state. Against float64 the error is for 8 bits that
    of a product in float32, for 2 and 4 bits about 10 times as large, and for others, whose integers lie across bytes,
    about 50 times: 4e-6, 7e-5 and 3e-4 for logits of 20 to 30 from 192 columns.

    Args:
        states: `[m, columns]`, 1 or more each, of up to 24 bits.
        packed: `[n, ⌈columns · bits / 8⌉]` uint8 of 2 bytes or more a row, see `packed_rows.pack_rows`.
        scales: Of the groups of `[n, columns]`.
        bits: Bits of an integer.
        columns: Columns of the matrix.
        group_size: Values that share a scale.

    Returns:
        `[m, n]` float32.
    """
    group_rows, group_columns = group_shape(columns, group_size)
    layout = _layout(bits, columns, group_columns)
    states, packed = states.double(), packed.contiguous()
    digits, units = _digits(states, layout)
    # [groups · m, 1, 1] and [groups · m, 1, digits].
    constant = (states @ layout.constant).T.float().reshape(-1, 1, 1)
    units = units.unsqueeze(1).repeat(layout.constant.shape[1], 1, 1)
    out = torch.empty(len(states), len(packed))
    # The sums as integers and as floats, and a copy of the bytes.
    row_bytes = 8 * DIGITS * len(units) + (packed.shape[1] if layout.masks else 0)
    step = max(1, min(_TILE_ROWS, _TILE_BYTES // row_bytes) // group_rows) * group_rows
    for rows, sums in _tiles(packed, layout, digits, step):
        found = torch.baddbmm(constant, units, sums.float().view(len(units), DIGITS, -1))
        factors = scales[rows.start // group_rows : -(-rows.stop // group_rows)]
        factors = factors.T.to(torch.float32, memory_format=torch.contiguous_format)
        if group_rows > 1:
            factors = factors.repeat_interleave(group_rows, dim=1)[:, : rows.stop - rows.start]
        found = found.view(len(factors), len(states), -1)
        torch.sum(found.mul_(factors.unsqueeze(1)), dim=0, out=out[:, rows])
    return out


def to_digits(values: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Round numbers to three digits to the base 256 of a unit that they share.

    Args:
        values: Numbers, float64.
        dims: Dimensions whose numbers share a unit, so that the largest of them is that of three digits.

    Returns:
        `[*, 3]` uint8, the lowest first, which stand for digits from -128 to 127, and the units, of as many dimensions.
    """
    units = values.abs().amax(dim=dims, keepdim=True) / _LARGEST
    numbers = (values / units.clamp(min=1e-300)).round().to(torch.int32) + _MIDDLE
    return numbers.unsqueeze(-1).view(torch.uint8)[..., :DIGITS], units


def digit_units(units: Tensor) -> Tensor:
    """What every digit counts, `[units, 3]` float32."""
    return (units.reshape(-1, 1) * 256.0 ** torch.arange(DIGITS, dtype=torch.float64)).float()


def _digits(states: Tensor, layout: _Layout) -> tuple[list[Tensor], Tensor]:
    """Digits of what every byte counts, for every state and group.

    Returns:
        For every slab `[planes, groups · m · digits, bytes]` int8, and `[m, digits]` what a digit counts.
    """
    pieces = states[:, layout.columns] * layout.factors
    # What lies below the end of a piece counts for that piece, and against the next one.
    pieces[:, :, :-1] -= pieces[:, :, 1:].clone()
    numbers, unit = to_digits(pieces, dims=(0, 2, 3))
    digits = (numbers ^ 128).view(torch.int8)
    # [parts, planes, 1, m, digits, bytes]
    digits = digits.permute(0, 2, 1, 4, 3).unsqueeze(2)
    slabs = []
    for data, member in layout.slabs:
        slab = digits[..., data] * member
        slab = slab[0] if len(member) == 1 else slab.sum(dim=0, dtype=torch.int8)
        slabs.append(slab.flatten(1, 3))
    return slabs, digit_units(unit)


def _tiles(packed: Tensor, layout: _Layout, digits: list[Tensor], step: int) -> Iterator[tuple[slice, Tensor]]:
    """Sums over bytes for some rows at a time, `[groups · m · digits, rows]` int32, and which rows they are."""
    most = min(step, len(packed))
    numbers = torch.empty(most, packed.shape[1] if layout.masks else 0, dtype=torch.uint8)
    sums = torch.empty(sum(slab.shape[1] for slab in digits), most, dtype=torch.int32)
    signed = packed.view(torch.int8).T
    for start in range(0, len(packed), step):
        rows = slice(start, min(start + step, len(packed)))
        count = rows.stop - start
        if count < sums.shape[1]:
            numbers, sums = numbers[:count], sums[:, :count].contiguous()
        begin = 0
        for slab, (data, _) in zip(digits, layout.slabs, strict=True):
            # Parts of rows are copied for a product of matrices, and not for those of vectors.
            height = slab.shape[1] if slab.shape[1] > DIGITS or len(layout.slabs) == 1 else 1
            for few in torch.split(slab[-1], height):
                torch._int_mm(few, signed[data, rows], out=sums[begin : begin + height])
                begin += height
        for plane, mask in enumerate(layout.masks):
            _mask(packed[rows], mask, numbers)
            parts = torch.split(sums, [slab.shape[1] for slab in digits])
            for slab, part, (data, _) in zip(digits, parts, layout.slabs, strict=True):
                part += torch._int_mm(slab[plane], numbers.view(torch.int8)[:, data].T)
        yield rows, sums


def _mask(data: Tensor, mask: int | Tensor, out: Tensor) -> None:
    """The bits of contiguous rows that a mask has."""
    if isinstance(mask, int):
        torch.bitwise_and(data, mask, out=out)
        return
    whole = len(data) // _MASK_ROWS * _MASK_ROWS
    torch.bitwise_and(data[:whole].view(-1, len(mask)), mask, out=out[:whole].view(-1, len(mask)))
    torch.bitwise_and(data[whole:], mask.view(_MASK_ROWS, -1)[: len(data) - whole], out=out[whole:])
