"""Codes in graphs of ONNX, read from the bytes that are stored: no index tables, and nothing unfolded.

One look-up reads all codes of a field, a run of bits that is at most a byte or two: its table has the levels of each.
Where fields cross bytes, their integers are sums of bytes and of parts of bytes, which are two small products. Integers
stay below 2^24, which float32 holds: `torch.div` of larger ones would be computed in float32 too, and be wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_embcompress.methods.quantizers.onnx_blocks import chosen
from lightning_embcompress.methods.quantizers.packing import packed_bytes
from lightning_embcompress.methods.shared_basis.layout import SCALE_STEPS
from lightning_embcompress.methods.shared_basis.level_fitting import num_levels

if TYPE_CHECKING:
    from lightning_embcompress.methods.shared_basis.stored_codes import StoredCodes

# Of every width: codes of a field, fields of a group that ends with a byte, and its bytes.
_FIELDS = {
    1: (8, 1, 1),
    2: (4, 1, 1),
    3: (4, 2, 3),
    4: (2, 1, 1),
    5: (2, 4, 5),
    6: (2, 2, 3),
    7: (2, 4, 7),
    8: (1, 1, 1),
}
# Codes whose levels are there at a time.
_PIECE = 2**21


def basis_values(table: StoredCodes[Any]) -> Tensor:
    """`[rank, dim]` basis from its packed integers."""
    bits = table.basis_bits
    integers = torch.arange(2.0**bits) - 2 ** (bits - 1)
    values = _levels_of(table.basis_codes.reshape(-1), bits, table.rank * table.dim, _fields(integers, bits))
    return values.view(table.rank, table.dim) * table.basis_scales.unsqueeze(1)


def scale_values(table: StoredCodes[Any]) -> Tensor:
    """`[Σ rank]` scales from the steps of their logarithms."""
    steps = np.exp2(np.arange(256) / -SCALE_STEPS).astype(np.float32)
    return chosen(steps, table.scale_codes.int()) * table.scale_unit


def logits(table: StoredCodes[Any], hidden: Tensor) -> Tensor:
    """`h Wᵀ` in block order, `[*, vocab_size]`; the codes of some rows are read at a time.

    Args:
        table: Single codes.
        hidden: `[*, dim]`.
    """
    basis, means, scales = table._frame().basis, table._frame().means, table._frame().scales
    tables = {bits: _fields(own, bits) for bits, (_, own) in _levels(table).items()}
    states = hidden.reshape(-1, table.dim)
    # Always 0, and known only with the states: so no runtime unfolds the codes when it loads the graph.
    zero = (states.sum() < -torch.inf).long().reshape(1)
    reduced, constant = basis @ states.T, means @ states.T
    found, begin = [], 0
    for block, (size, runs) in enumerate(zip(table.sizes, table.segments, strict=True)):
        total, start = constant[block : block + 1].expand(size, -1), 0
        for bits, count in runs:
            own = reduced[start : start + count] * scales[block][start : start + count].unsqueeze(1)
            # A multiple of 8 rows ends with a byte.
            step = max(8, _PIECE // count // 8 * 8)
            pieces = []
            for row in range(0, size, step):
                number = min(step, size - row) * count
                first, length = begin + row * count * bits // 8, packed_bytes(number, bits)
                data = _sliced(table.packed_codes, zero, first, length)
                pieces.append(_levels_of(data, bits, number, tables[bits]).view(-1, count) @ own)
            total = total + torch.cat(pieces)
            start, begin = start + count, begin + packed_bytes(size * count, bits)
        found.append(total)
    return torch.cat(found).T.reshape(*hidden.shape[:-1], table.vocab_size)


def rows(table: StoredCodes[Any], ids: Tensor) -> Tensor:
    """`[*, dim]` rows; no other codes are read.

    Args:
        table: Single codes.
        ids: `[*]`.
    """
    first, stride, width, offset = _bits_of_components(table)
    # Scales of the components that a block keeps, and 0 for others.
    ranks = np.array(table.ranks)[:, None]
    component = np.arange(table.rank)
    places = np.where(component < ranks, np.cumsum(ranks, axis=0) - ranks + component, ranks.sum())
    scales = F.pad(scale_values(table), (0, 1)).index_select(0, torch.tensor(places).reshape(-1)).view(places.shape)
    position = table.position.index_select(0, ids.reshape(-1))
    ends = np.cumsum(table.sizes)
    block = (position.unsqueeze(1) >= torch.tensor(ends)).int().sum(dim=1)
    row = (position - chosen(ends - np.array(table.sizes), block)).int().unsqueeze(1)
    bit = chosen(first, block) + row * chosen(stride, block)
    byte, inside = bit >> 3, bit & 7
    words = _bytes_at(table.packed_codes, byte) + 256 * _bytes_at(table.packed_codes, byte + 1)
    powers = (0.5 ** np.arange(16)).astype(np.float32)
    unit, part = chosen(powers, inside), chosen(powers, chosen(width, block))
    codes = (words * unit).floor() - (words * (unit * part)).floor() / part
    index = codes.int() + chosen(offset, block)
    values = table._level_values().index_select(0, index.reshape(-1)).view(index.shape)
    frame = table._frame()
    found = (values * scales.index_select(0, block)) @ frame.basis + frame.means.index_select(0, block)
    return found.view(*ids.shape, table.dim)


def _levels(table: StoredCodes[Any]) -> dict[int, tuple[int, Tensor]]:
    """Of every width, where its levels begin, and which they are."""
    found, start, values = {}, 0, table._level_values()
    for bits in table.widths:
        found[bits] = (start, values[start : start + num_levels(bits)])
        start += num_levels(bits)
    return found


def _bits_of_components(table: StoredCodes[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`[blocks, rank]` first bit of every component, bits from row to row, its width, and where its levels begin."""
    first, stride, width, offset = (np.zeros((len(table.sizes), table.rank), dtype=np.int32) for _ in range(4))
    starts, begin = {bits: start for bits, (start, _) in _levels(table).items()}, 0
    for block, (size, runs) in enumerate(zip(table.sizes, table.segments, strict=True)):
        start = 0
        for bits, count in runs:
            own = slice(start, start + count)
            first[block, own] = 8 * begin + bits * np.arange(count)
            stride[block, own], width[block, own], offset[block, own] = bits * count, bits, starts[bits]
            start, begin = start + count, begin + packed_bytes(size * count, bits)
    return first, stride, width, offset


def _bytes_at(data: Tensor, places: Tensor) -> Tensor:
    """Bytes as floats; what is asked for behind the last one is not used."""
    found: Tensor = data.index_select(0, places.clamp(max=len(data) - 1).reshape(-1)).view(places.shape).float()
    return found


def _sliced(data: Tensor, zero: Tensor, first: int, length: int) -> Tensor:
    """A run of bytes, which begins where the graph computes it."""
    ends = torch.tensor([first + length])
    found: Tensor = torch.onnx.ops.symbolic("Slice", [data, zero + first, ends], dtype=torch.uint8, shape=[length])
    return found


def _fields(levels: Tensor, bits: int) -> Tensor:
    """`[2^(bits · codes), codes]` levels of all codes of a field, the first code lowest."""
    count = _FIELDS[bits][0]
    shape = [2**bits] * count
    axes = [levels.view([-1 if axis == count - 1 - code else 1 for axis in range(count)]) for code in range(count)]
    return torch.stack([axis.expand(shape) for axis in axes], dim=-1).view(-1, count)


def _levels_of(data: Tensor, bits: int, count: int, fields: Tensor) -> Tensor:
    """`[count]` levels of packed codes that begin with a byte.

    Args:
        data: `[bytes]` uint8.
        bits: Of a code.
        count: Of codes.
        fields: Of `_fields`.
    """
    codes, number, length = _FIELDS[bits]
    missing = -(-count // (codes * number)) * length - len(data)
    groups = (F.pad(data, (0, missing)) if missing else data).view(-1, length)
    if number == 1:
        index = groups.int()
    else:
        whole, cut, back = (torch.tensor(one) for one in _cuts(bits * codes, number, length))
        wide = groups.float()
        index = (wide @ whole + (wide @ cut).floor() @ back).int()
    return fields.index_select(0, index.reshape(-1)).reshape(-1)[:count]


def _cuts(width: int, fields: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How fields of some bits are made of the bytes of a group: `bytes @ whole + floor(bytes @ cut) @ back`.

    A byte that two fields share counts for the first one as a whole; its upper part, what it is over a power of two, is
    taken back there and belongs to the second.
    """
    whole, cut, back = np.zeros((length, fields)), np.zeros((length, length)), np.zeros((length, fields))
    for byte in range(length):
        first, last = 8 * byte // width, (8 * byte + 7) // width
        unit = 2.0 ** (8 * byte - width * first)
        whole[byte, first] = unit
        if first != last:
            low = width * last - 8 * byte
            cut[byte, byte] = 2.0**-low
            back[byte, first], back[byte, last] = -unit * 2.0**low, 1.0
    return whole.astype(np.float32), cut.astype(np.float32), back.astype(np.float32)
