"""Plain quantization of a table: the baseline that every decomposition has to beat at equal bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import row_chunks


def round_to_nearest(weight: Tensor, bits: int, group_size: int = 32) -> Tensor:
    """Quantize a table to signed integers and back: `w ≈ s · round(w / s)`, one scale for each group of a row.

    A group's scale is its largest magnitude over `2^{bits−1} − 1`, kept in 16 bits.

    Args:
        weight: `[vocab_size, dim]` table of any floating dtype.
        bits: Bits of a value, 2 to 8.
        group_size: Neighbouring values of a row that share a scale; the last group of a row may be shorter.

    Returns:
        `[vocab_size, dim]`, the values that the integers stand for, in the table's dtype.

    Raises:
        ValueError: If `bits` or `group_size` is out of its range.

    Example:
        >>> round_to_nearest(torch.tensor([[0.0, 3.0, 0.6, -1.7]]), bits=3)
        tensor([[ 0.,  3.,  1., -2.]])
    """
    _check(bits, group_size)
    largest = 2 ** (bits - 1) - 1
    out = torch.empty_like(weight)
    for chunk in row_chunks(*weight.shape):
        rows = weight[chunk].float()
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group_size))
        groups = padded.reshape(len(rows), -1, group_size)
        scales = (groups.abs().amax(dim=2, keepdim=True) / largest).half().float()
        # A scale that vanishes in 16 bits has lost its group.
        levels = torch.where(scales > 0, (groups / scales).round().clamp(-largest, largest), 0.0)
        out[chunk] = (levels * scales).flatten(1)[:, : rows.shape[1]].to(out.dtype)
    return out


def rounded_bytes(vocab_size: int, dim: int, bits: int, group_size: int = 32) -> int:
    """Bytes of a table that `round_to_nearest` quantized: packed integers and 16-bit scales.

    Raises:
        ValueError: If `bits` or `group_size` is out of its range.

    Example:
        >>> rounded_bytes(1000, 64, bits=4)
        36000
    """
    _check(bits, group_size)
    return vocab_size * (-(-dim * bits // 8) + 2 * -(-dim // group_size))


def _check(bits: int, group_size: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, it is {bits}")
    if group_size < 1:
        raise ValueError(f"group_size must be 1 or more, it is {group_size}")
