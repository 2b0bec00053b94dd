"""Products of some states with packed integers, from a copy of them that is laid out for oneDNN.

The product of bytes in int32 is exact, and reads a byte an element where one of floats reads four. What is rounded are
the states, to three digits to the base 256, 24 bits of the largest of them. The copy has a byte an integer, and is made
for the first product and kept by who multiplies, see `utils.kept`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor

from lightning_embcompress.methods.quantizers.integer_quantizer import group_shape

_DIGITS = 3


@dataclass(frozen=True)
class Repacked:
    """Integers and scales of every group of columns.

    Attributes:
        integers: For every group of columns `[n, group_columns]` int8, as oneDNN lays them out.
        scales: For every group of columns `[n]` float32.
    """

    integers: list[Tensor]
    scales: list[Tensor]


@cache
def can_repack() -> bool:
    """Whether this processor and this torch have exact products of bytes; those of older processors saturate."""
    states = torch.tensor([[0], [255], [64]], dtype=torch.uint8).repeat(1, 64)
    integers = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(1, 64)
    try:
        scales = torch.ones(2, dtype=torch.float32)
        found = _linear(states, torch.ops.onednn.qlinear_prepack(integers, None), scales, None)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, (states.float() - 128) @ integers.float().T)


def byte_digits(states: Tensor) -> tuple[Tensor, Tensor]:
    """Round every state to three digits from -128 to 127 to the base 256: 24 bits of its largest number.

    Args:
        states: `[m, *]` floats.

    Returns:
        `[m, 3, *]` int8 digits, the lowest of a state first; and `[m, 3]` float32 what they count.
    """
    # What makes all digits bytes from 0 to 255.
    middle = sum(128 << 8 * digit for digit in range(_DIGITS))
    states = states.double()
    units = states.abs().flatten(1).amax(dim=1) / (256**_DIGITS - 1 - middle)
    inverse = units.clamp(min=1e-300).reciprocal().view(-1, *[1] * (states.ndim - 1))
    numbers = (states * inverse).round_().to(torch.int32).add_(middle)
    # Bits beyond a byte are lost.
    digits = torch.stack([((numbers >> 8 * digit) - 128).to(torch.int8) for digit in range(_DIGITS)], dim=1)
    return digits, (units.unsqueeze(1) * 256.0 ** torch.arange(_DIGITS, dtype=torch.float64)).float()


def repack(codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Repacked:
    """Make the copy.

    Args:
        codes: `[n, columns]` uint8, what is packed.
        scales: Of its groups.
        bits: Bits of an integer.
        group_size: Values that share a scale.
    """
    group_rows, group_columns = group_shape(codes.shape[1], group_size)
    # Of unsigned numbers what is below 0 comes round as the int8 that is meant.
    integers = (codes - 2 ** (bits - 1)).view(torch.int8)
    groups = [torch.ops.onednn.qlinear_prepack(part.contiguous(), None) for part in integers.split(group_columns, 1)]
    factors = scales.float().repeat_interleave(group_rows, dim=0)[: len(codes)].T.contiguous()
    return Repacked(groups, list(factors))


def repacked_product(states: Tensor, matrix: Repacked) -> Tensor:
    """`h Wᵀ` for some states, as accurate as in float32.

    Args:
        states: `[m, columns]`, 1 or more each, of up to 24 bits.
        matrix: The copy of the packed matrix.

    Returns:
        `[m, n]` float32.
    """
    digits, counts = byte_digits(states)
    # As bytes from 0 to 255, which stand for 128 less.
    digits = digits.flatten(0, 1).view(torch.uint8) ^ 128
    sums: Tensor | None = None
    start = 0
    for integers, scales in zip(matrix.integers, matrix.scales, strict=True):
        stop = start + integers.shape[0]
        sums = _linear(digits[:, start:stop].contiguous(), integers, scales, sums)
        start = stop
    assert sums is not None
    return torch.bmm(counts.unsqueeze(1), sums.view(*counts.shape, -1)).squeeze(1)


def _linear(states: Tensor, integers: Tensor, scales: Tensor, into: Tensor | None) -> Tensor:
    """`(states - 128) integersᵀ · scales` in float32, added to what there is."""
    # Scale and zero of the states, the integers with theirs, then no bias and a result that is not quantized.
    inputs, result = (states, 1.0, 128, integers, scales, None), (None, 1.0, 0, torch.float32)
    if into is None:
        found = torch.ops.onednn.qlinear_pointwise(*inputs, *result, "none", [], "")
    else:
        found = torch.ops.onednn.qlinear_pointwise.binary(*inputs, into, *result, 1.0, 0, "sum", 1.0, "none", [], "")
    return cast(Tensor, found)
