"""Small integers at their exact bit width."""

from __future__ import annotations

import torch
from torch import Tensor

# Values at a time, a multiple of 8 so that pieces end with a byte: digits on the way take many times the memory.
_PIECE = 2**16


def bit_width(num_values: int) -> int:
    """Bits that tell `num_values` values apart: `⌈log₂ num_values⌉`."""
    return max(0, num_values - 1).bit_length()


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(values: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Pack non-negative integers below `2^bits` without gaps, lowest bit first.

    Args:
        values: `[count]` integers.
        bits: Bits a value, from 0 to 31.
        out: Where the result is written; None for new memory.

    Returns:
        `[⌈count · bits / 8⌉]` uint8.

    Example:
        >>> unpack_bits(pack_bits(torch.tensor([5, 0, 7]), 3), 3, 3)
        tensor([5, 0, 7])
    """
    count = values.numel()
    packed = torch.empty(packed_bytes(count, bits), dtype=torch.uint8, device=values.device) if out is None else out
    if bits == 8:
        return packed.copy_(values)
    shifts = torch.arange(bits, device=values.device)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=values.device)
    if bits == 1 and values.dtype == torch.uint8:
        # Digits are there already.
        digits = torch.nn.functional.pad(values, (0, -count % 8)).view(-1, 8)
        return torch.sum(digits * places, dim=1, dtype=torch.uint8, out=packed)
    for start in range(0, count, _PIECE):
        piece = values[start : start + _PIECE]
        digits = ((piece.long().unsqueeze(1) >> shifts) & 1).flatten().to(torch.uint8)
        digits = torch.nn.functional.pad(digits, (0, -digits.numel() % 8)).view(-1, 8)
        begin = start * bits // 8
        packed[begin : begin + len(digits)] = (digits * places).sum(dim=1, dtype=torch.uint8)
    return packed


def pack_into(packed: Tensor, start: int, values: Tensor, bits: int) -> None:
    """Put values behind the first ones of what is packed, those behind them being nothing yet.

    Args:
        packed: uint8, of all values; written in place.
        start: How many values there are already.
        values: `[count]` integers.
        bits: Bits a value.

    Example:
        >>> packed = torch.zeros(3, dtype=torch.uint8)
        >>> pack_into(packed, 0, torch.tensor([5, 0, 7]), 3)
        >>> pack_into(packed, 3, torch.tensor([1, 6]), 3)
        >>> unpack_bits(packed, 3, 5)
        tensor([5, 0, 7, 1, 6])
    """
    # Of eight values the last byte is full.
    first = start // 8 * 8
    before = unpack_bits(packed[first * bits // 8 : packed_bytes(start, bits)], bits, start - first)
    place = slice(first * bits // 8, packed_bytes(start + len(values), bits))
    pack_bits(torch.cat([before.to(values), values]) if len(before) else values, bits, packed[place])


def unpack_bits(packed: Tensor, bits: int, count: int, dtype: torch.dtype = torch.long) -> Tensor:
    """Read back what `pack_bits` packed.

    Args:
        packed: `[⌈count · bits / 8⌉]` uint8.
        bits: Bits a value.
        count: How many values.
        dtype: Of the values, wide enough for them.

    Returns:
        `[count]`.
    """
    if bits == 8:
        return packed[:count].to(dtype)
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    if bits == 1:
        digits = (packed[: packed_bytes(count, 1)].unsqueeze(1) >> places) & 1
        return digits.flatten()[:count].to(dtype)
    shifts = torch.arange(bits, device=packed.device)
    values = torch.empty(count, dtype=dtype, device=packed.device)
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        piece = packed[start * bits // 8 : packed_bytes(stop, bits)]
        digits = ((piece.unsqueeze(1) >> places) & 1).flatten()[: (stop - start) * bits].view(stop - start, bits)
        values[start:stop] = (digits.long() << shifts).sum(dim=1)
    return values
