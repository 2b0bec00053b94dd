"""Packed integers in graphs of ONNX: operators of ONNX Runtime read rows and multiply with the bytes that are stored.

`GatherBlockQuantized` unpacks the rows of a lookup, `MatMulNBits` multiplies states with all rows; their layout of 4
and 8 bits is that of packed rows but for the highest bit of every byte. Bytes of 8 bits are multiplied as two nibbles
each, for which ONNX Runtime has a product in float32; that of 8 bits rounds states to bytes, or unpacks everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_embcompress.methods.quantizers.integer_quantizer import group_shape
from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.utils.graphs import is_exporting

_DOMAIN = "com.microsoft"
# Columns that share a scale in the operators; of bytes that are two nibbles, half as many.
_BLOCKS = (128, 64, 32, 16)


def is_for_onnx() -> bool:
    """Whether a graph of ONNX is being made, into which operators of ONNX Runtime can be put (torch 2.8 and later)."""
    return is_exporting() and torch.onnx.is_in_onnx_export() and hasattr(torch.onnx, "ops")


def chosen(table: np.ndarray, index: Tensor) -> Tensor:
    """Entries of a constant, `[*, ...]` for `[*]` integers, by what runtimes compute once if they can."""
    constant = torch.tensor(table, device=index.device)
    return constant.index_select(0, index.reshape(-1)).view(*index.shape, *constant.shape[1:])


def numbers_of_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """`[n, k]` float32 of finite numbers of 16 bits, from their bytes `[n, 2 k]`.

    The high byte tells the sign, the exponent and some digits: what the number is at a low byte of 0, and by how much
    it grows with it.
    """
    pairs = data.view(data.shape[0], data.shape[1] // 2, 2).int()
    words = np.arange(256, dtype=np.uint32) << 8
    first, second = words, words + 1
    if dtype == torch.float16:
        base, next_ = (one.astype(np.uint16).view(np.float16).astype(np.float32) for one in (first, second))
    else:
        base, next_ = ((one << 16).view(np.float32) for one in (first, second))
    with np.errstate(invalid="ignore"):
        steps = np.nan_to_num(next_ - base, nan=0, posinf=0, neginf=0)
    base = np.nan_to_num(base, nan=0, posinf=0, neginf=0)
    return chosen(base, pairs[..., 1]) + chosen(steps, pairs[..., 1]) * pairs[..., 0].float()


@dataclass(frozen=True)
class OnnxBlocks:
    """A packed matrix as the operators read it.

    Attributes:
        data: `[n, blocks, bytes]` uint8.
        scales: `[n, blocks]` float32.
        size: Columns of a block.
        bits: 4 or 8.
        columns: Of the matrix.
    """

    data: Tensor
    scales: Tensor
    size: int
    bits: int
    columns: int

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, storage: Quantization, matrix: tuple[int, int]) -> OnnxBlocks | None:
        """What the operators read of packed rows; None where they have no place for them.

        Args:
            codes: `[n, bytes]` packed rows.
            scales: `[groups, 2 · groups of a row]` uint8.
            storage: How they are packed.
            matrix: `(n, columns)`.
        """
        n, columns = matrix
        bits, group = storage.bits, storage.group_size
        fits = [size for size in _BLOCKS if group % size == 0 or group >= columns]
        if bits not in (4, 8) or not fits or not codes.numel():
            return None
        # The least bytes, scales of four each with them.
        size = min(fits, key=lambda one: (-(-columns // one) * (one * bits // 8 + 4), -one))
        blocks = -(-columns // size)
        data = torch.bitwise_xor(codes, torch.tensor(128, dtype=torch.uint8, device=codes.device))
        missing = blocks * size * bits // 8 - data.shape[1]
        data = F.pad(data, (0, missing)) if missing else data
        numbers = numbers_of_bytes(scales, storage.scales)
        group_rows, group_columns = group_shape(columns, group)
        if group_rows > 1:
            numbers = numbers.repeat_interleave(group_rows, dim=0)[:n]
        if blocks != numbers.shape[1]:
            places = torch.tensor(np.arange(blocks) * size // group_columns, device=codes.device)
            numbers = numbers.index_select(1, places)
        return cls(data.view(n, blocks, size * bits // 8), numbers, size, bits, columns)

    def rows(self, place: Tensor) -> Tensor:
        """`[*, columns]` rows."""
        blocks = self.data.shape[1]
        found: Tensor = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::GatherBlockQuantized",
            [self.data, place, self.scales.unsqueeze(2)],
            {"bits": self.bits, "block_size": self.size, "gather_axis": 0, "quantize_axis": 2},
            dtype=torch.float32,
            shape=[*place.shape, blocks, self.size],
            version=1,
        )
        return found.flatten(-2)[..., : self.columns]

    def multiply(self, hidden: Tensor) -> Tensor:
        """`[*, n]`, the product of `[*, columns]` with all rows."""
        n, blocks, _ = self.data.shape
        states, shift, nibbles = F.pad(hidden, (0, blocks * self.size - self.columns)), None, self.bits // 4
        if nibbles == 2:
            # With nibbles h and l of 8 less: 16 h + l + 8, of a byte of 128 less.
            shift = 8 * states.view(*hidden.shape[:-1], blocks, self.size).sum(dim=-1) @ self.scales.T
            states = torch.stack([states, 16 * states], dim=-1).flatten(-2)
        found: Tensor = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::MatMulNBits",
            [states, self.data, self.scales],
            {"K": nibbles * blocks * self.size, "N": n, "bits": 4, "block_size": nibbles * self.size},
            dtype=torch.float32,
            shape=[*hidden.shape[:-1], n],
            version=1,
        )
        return found if shift is None else found + shift
