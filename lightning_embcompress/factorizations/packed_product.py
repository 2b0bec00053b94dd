"""Products of few states with packed integers, in integers: nothing is unpacked.

The product of int8 matrices in int32 reads a byte an element, where one of floats reads four. So the bytes of packed
rows are multiplied as they are. A byte is made of pieces of one or more integers. The bits below the end of piece `k`,
`A_k = byte & (2^{end_k} - 1)`, are an int8 number, as is `B = byte - 128` with the bits of all of them. Pieces are
differences of those, `(A_k - A_{k-1}) / 2^{begin_k}`, hence a sum over integers `v` is one over bytes,

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

from lightning_embcompress.solvers.integer_quantizer import group_shape

_DIGITS = 3
# The largest number of three digits from -128 to 127 whose first stays below 128 however the others are rounded.
_LARGEST = 2 ** (8 * _DIGITS - 1) - 2 ** (8 * (_DIGITS - 1))
# Groups of a product: its rows are all of them times the digits, of which a group's own columns use only theirs.
_GROUPS = 4
# Bytes of a tile, which is copied as signed numbers: small enough for the cache, large enough for few calls.
_TILE_BYTES = 2**20


@dataclass(frozen=True)
class _Slab:
    """Neighbouring groups of columns, and the bytes of a row that they are in.

    Attributes:
        groups: Which groups.
        data: Which bytes.
        columns: `[planes, bytes]` column of every piece, counted from the first of the slab.
        factors: `[planes, bytes]` what a piece counts, 0 where there is none.
        group_of: `[planes, bytes]` group of every piece, counted from the first of the slab.
        masks: `[planes - 1, bytes]` uint8, the bits below the end of every piece but the last.
    """

    groups: slice
    data: slice
    columns: Tensor
    factors: Tensor
    group_of: Tensor
    masks: Tensor


@lru_cache(maxsize=64)
def _slabs(bits: int, columns: int, group_size: int) -> tuple[_Slab, ...]:
    """How rows of a width are laid out."""
    group_columns = group_shape(columns, group_size)[1]
    slabs = []
    with torch.device("cpu"):
        for first in range(0, columns, _GROUPS * group_columns):
            last = min(first + _GROUPS * group_columns, columns)
            data = slice(first * bits // 8, (last * bits + 7) // 8)
            begin = torch.arange(8 * data.start, 8 * data.stop, 8)
            ends = torch.div(begin + 7, bits, rounding_mode="floor")
            planes = int((ends - torch.div(begin, bits, rounding_mode="floor")).max()) + 1
            # The last piece of every byte is in the last plane; bytes of fewer pieces have none in the first planes.
            column = ends - torch.arange(planes - 1, -1, -1).unsqueeze(1)
            offset = column * bits - begin
            there = (offset > -bits) & (column >= first) & (column < last)
            # A piece that begins its integer begins within the byte, one that goes on within the integer.
            factors = torch.where(there, torch.exp2(-offset.double()), 0)
            masks = 2 ** (offset[:-1] + bits).clamp(0, 8) - 1
            column = (column - first).clamp(0, last - first - 1)
            groups = slice(first // group_columns, -(-last // group_columns))
            slabs.append(_Slab(groups, data, column, factors, column // group_columns, masks.to(torch.uint8)))
    return tuple(slabs)


@cache
def products_are_exact() -> bool:
    """Whether this processor has exact and fast products of int8 matrices; those of older ones saturate."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ends = torch.tensor([-128, 127], dtype=torch.int8)
    left, right = ends.repeat_interleave(64).view(2, 64), ends.repeat(64, 32).view(64, 64).T
    try:
        found = torch._int_mm(left, right)
    except RuntimeError:
        return False
    return torch.equal(found.long(), left.long() @ right.long())


def integer_product(states: Tensor, packed: Tensor, scales: Tensor, bits: int, columns: int, group_size: int) -> Tensor:
    """`h Wᵀ` for few states, from packed integers on the CPU.

    Against float64 the error is about that of a product in float32, and at most some times that for 3, 5, 6 and 7 bits,
    the integers of which lie across bytes: below 1e-3 for logits of 20.

    Args:
        states: `[m, columns]`, 1 or more each, of up to 24 bits.
        packed: `[n, ⌈columns · bits / 8⌉]` uint8, see `packed_rows.pack_rows`.
        scales: Of the groups of `[n, columns]`.
        bits: Bits of an integer.
        columns: Columns of the matrix.
        group_size: Values that share a scale.

    Returns:
        `[m, n]` float32.
    """
    group_rows, _ = group_shape(columns, group_size)
    out = torch.zeros(states.shape[0], packed.shape[0])
    for slab in _slabs(bits, columns, group_size):
        digits, units, constant = _digits(states, slab, bits, columns, group_size)
        step = max(1, _TILE_BYTES // max(1, slab.masks.shape[1]) // group_rows) * group_rows
        for tile, sums in _tiles(packed, slab, digits, step):
            # [m · groups, 1, n], of the digits by what they count.
            found = torch.baddbmm(constant, units, sums.float().view(constant.shape[0], _DIGITS, -1))
            of_groups = scales[tile.start // group_rows : -(-tile.stop // group_rows), slab.groups]
            factors = of_groups.T.to(torch.float32, memory_format=torch.contiguous_format)
            if group_rows > 1:
                factors = factors.repeat_interleave(group_rows, dim=1)[:, : tile.stop - tile.start]
            out[:, tile] += (found.view(states.shape[0], *factors.shape) * factors).sum(dim=1)
    return out


def _digits(states: Tensor, slab: _Slab, bits: int, columns: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Digits of what every byte counts, for every state and group.

    Returns:
        `[planes, m · groups · digits, bytes]` int8, `[m · groups, 1, digits]` what a digit counts, and
        `[m · groups, 1, 1]` what is added.
    """
    count = slab.groups.stop - slab.groups.start
    group_columns = group_shape(columns, group_size)[1]
    first = slab.groups.start * group_columns
    mine = states[:, first : first + count * group_columns].double()
    pieces = mine[:, slab.columns] * slab.factors
    pieces = pieces.unsqueeze(1) * (slab.group_of == torch.arange(count).view(-1, 1, 1))
    # [m, groups]: bytes are 128 more than the numbers they are multiplied as, integers 2^(bits-1) more than codes.
    sums = torch.zeros(len(mine), count, dtype=torch.float64)
    sums.index_add_(1, torch.arange(mine.shape[1]) // group_columns, mine)
    constant = 128 * pieces[:, :, -1].sum(dim=-1) - 2 ** (bits - 1) * sums
    # What lies below the end of a piece counts for that piece, and against the next one.
    pieces[:, :, :-1] -= pieces[:, :, 1:]
    unit = pieces.abs().amax(dim=(2, 3), keepdim=True) / _LARGEST
    rest = (pieces / unit.clamp(min=1e-300)).round().to(torch.int32)
    digits = torch.empty(*rest.shape, _DIGITS, dtype=torch.int8)
    for place in range(_DIGITS):
        digits[..., place] = rest
        rest = (rest - digits[..., place]) >> 8
    # [m, groups, planes, bytes, digits] before.
    digits = digits.permute(2, 0, 1, 4, 3).reshape(pieces.shape[2], -1, pieces.shape[3])
    units = unit.view(-1, 1, 1) * 256.0 ** torch.arange(_DIGITS, dtype=torch.float64)
    return digits, units.float(), constant.view(-1, 1, 1).float()


def _tiles(packed: Tensor, slab: _Slab, digits: Tensor, step: int) -> Iterator[tuple[slice, Tensor]]:
    """Sums over bytes for some rows at a time, `[m · groups · digits, rows]` int32, and which rows they are."""
    width = slab.masks.shape[1]
    # Masks that all bytes share are a number; others are there for as many rows as a tile has, as rows are short.
    masks = [
        int(mask[0]) if bool((mask == mask[0]).all()) else mask.repeat(min(step, len(packed)), 1) for mask in slab.masks
    ]
    copy = torch.empty(min(step, len(packed)), width, dtype=torch.uint8)
    for start in range(0, len(packed), step):
        tile = slice(start, min(start + step, len(packed)))
        data, numbers = packed[tile, slab.data], copy[: tile.stop - start]
        sums = torch._int_mm(digits[-1], torch.bitwise_xor(data, 128, out=numbers).view(torch.int8).T)
        for mask, plane in zip(masks, digits, strict=False):
            part = mask if isinstance(mask, int) else mask[: tile.stop - start]
            sums += torch._int_mm(plane, torch.bitwise_and(data, part, out=numbers).view(torch.int8).T)
        yield tile, sums
