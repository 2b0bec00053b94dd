"""Small integers at their exact bit width."""

from __future__ import annotations

import torch
from torch import Tensor


def bit_width(num_values: int) -> int:
    """Bits that tell `num_values` values apart: `⌈log₂ num_values⌉`."""
    return max(0, num_values - 1).bit_length()


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack non-negative integers below `2^bits` without gaps, lowest bit first.

    Args:
        values: `[count]` integers.
        bits: Bits a value, from 0 to 31.

    Returns:
        `[⌈count · bits / 8⌉]` uint8.

    Example:
        >>> unpack_bits(pack_bits(torch.tensor([5, 0, 7]), 3), 3, 3)
        tensor([5, 0, 7])
    """
    shifts = torch.arange(bits, device=values.device)
    digits = ((values.unsqueeze(1) >> shifts) & 1).flatten().to(torch.uint8)
    digits = torch.nn.functional.pad(digits, (0, -digits.numel() % 8)).view(-1, 8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=values.device)
    return (digits * places).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Read back what `pack_bits` packed.

    Args:
        packed: `[⌈count · bits / 8⌉]` uint8.
        bits: Bits a value.
        count: How many values.

    Returns:
        `[count]` int64.
    """
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    digits = ((packed.unsqueeze(1) >> places) & 1).flatten()[: count * bits].view(count, bits)
    return (digits.long() << torch.arange(bits, device=packed.device)).sum(dim=1)
