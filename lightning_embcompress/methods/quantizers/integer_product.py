"""Products of states with bytes, in integers: exact but for the states, which are rounded."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def can_multiply_bytes() -> bool:
    """Whether torch has exact products of bytes on this processor; those of older ones saturate."""
    left = torch.tensor([[-128], [127], [64]], dtype=torch.int8).repeat(1, 64)
    try:
        found = torch._int_mm(left, left[:2].T)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, left.int() @ left[:2].int().T)


def byte_digits(states: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Round every state to digits from -128 to 127 to the base 256: with three, 24 bits of its largest number.

    Args:
        states: `[m, *]` floats.
        count: Digits, 2 or 3.

    Returns:
        `[m, count, *]` int8 digits, the lowest of a state first; and `[m, count]` float32 what they count.
    """
    # What makes all digits bytes from 0 to 255.
    middle = sum(128 << 8 * digit for digit in range(count))
    states = states.double()
    units = states.abs().flatten(1).amax(dim=1) / (256**count - 1 - middle)
    inverse = units.clamp(min=1e-300).reciprocal().view(-1, *[1] * (states.ndim - 1))
    numbers = (states * inverse).round_().to(torch.int32).add_(middle)
    # Bits beyond a byte are lost.
    digits = torch.stack([((numbers >> 8 * digit) - 128).to(torch.int8) for digit in range(count)], dim=1)
    return digits, (units.unsqueeze(1) * 256.0 ** torch.arange(count, dtype=torch.float64)).float()
