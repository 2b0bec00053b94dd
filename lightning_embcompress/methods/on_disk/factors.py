"""Factors and codes that stay in a file; what is read of them are the rows that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_embcompress.methods.quantizers.factors import PackedFactor, as_numbers
from lightning_embcompress.methods.quantizers.integer_quantizer import group_shape
from lightning_embcompress.methods.quantizers.packed_rows import read_packed_rows
from lightning_embcompress.methods.quantizers.packing import packed_bytes
from lightning_embcompress.utils.tensor_files import TensorOnDisk


class OnDisk(nn.Module):
    """Stands for a tensor of a state dict that is in a file: state dicts have it, read whole, under its name.

    Args:
        tensor: Where it is.
    """

    def __init__(self, tensor: TensorOnDisk) -> None:
        """Keep where it is."""
        super().__init__()
        self.tensor = tensor

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix.removesuffix(".")] = self.tensor.read()

    def extra_repr(self) -> str:
        """Where it is, for `print(module)`."""
        return f"{str(self.tensor.file.path)!r}, shape={tuple(self.tensor.shape)}, {self.tensor.dtype}"


class FactorOnDisk(OnDisk):
    """A factor of numbers with a row for every token.

    Args:
        tensor: Where it is.
        dtype: Of what is read.
    """

    unit: Tensor

    def __init__(self, tensor: TensorOnDisk, dtype: torch.dtype) -> None:
        """Keep where it is."""
        super().__init__(tensor)
        # Follows the model's casts and moves.
        self.register_buffer("unit", torch.empty(0, dtype=dtype), persistent=False)

    def rows(self, place: Tensor, sparse: bool = False) -> Tensor:
        """`[*, columns]` rows, read from the file."""
        return self.tensor[place.cpu()].to(self.unit.device, self.unit.dtype)


class PackedFactorOnDisk(PackedFactor):
    """A factor of packed integers with a row for every token.

    Args:
        factor: The factor, empty.
        codes: Where its codes are.
        scales: Where its scales are.
    """

    def __init__(self, factor: PackedFactor, codes: TensorOnDisk, scales: TensorOnDisk) -> None:
        """Keep where they are."""
        unit = torch.device("meta")
        super().__init__(factor.shape, factor.storage, factor.dtype, unit)
        self.unit = torch.empty(0, dtype=factor.dtype)
        del self._buffers["codes"], self._buffers["scales"]
        self.codes_on_disk, self.scales_on_disk = codes, scales

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}codes"] = self.codes_on_disk.read()
        destination[f"{prefix}scales"] = self.scales_on_disk.read()

    def rows(self, place: Tensor, sparse: bool = False) -> Tensor:
        """`[*, columns]` rows, read from the file."""
        of, columns, flat = self.storage, self.matrix[1], place.reshape(-1).cpu()
        group_rows, _ = group_shape(columns, of.group_size)
        scales = as_numbers(self.scales_on_disk[flat // group_rows], of.scales)
        # Each comes with its own scales, those that share them too.
        group_size = of.group_size if group_rows == 1 else max(1, columns)
        found = read_packed_rows(
            self.codes_on_disk[flat], scales, torch.arange(len(flat)), of.bits, columns, group_size, self.dtype
        )
        return found.to(self.unit.device).view(*place.shape, columns)


class CodesOnDisk(OnDisk):
    """Packed codes of `SharedBasisBlocks`, of which those of some rows are read.

    Args:
        tensor: Where they are.
        sizes: Rows of every block.
        segments: Runs `[bits, components]` of every block.
    """

    def __init__(
        self, tensor: TensorOnDisk, sizes: Sequence[int], segments: Sequence[Sequence[tuple[int, int]]]
    ) -> None:
        """Find where the codes of every block and component are."""
        super().__init__(tensor)
        blocks, most = len(sizes), max(1, *(len(runs) for runs in segments))
        rank = max(sum(count for _, count in runs) for runs in segments)
        # Of every run: the first byte, bits of a row. Of every component: its run, its first bit there, its bits.
        self.begins = torch.zeros(blocks, most, dtype=torch.long)
        self.row_bits = torch.zeros(blocks, most, dtype=torch.long)
        self.components = torch.zeros(3, blocks, rank, dtype=torch.long)
        begin = tensor.entry.start
        for block, (size, runs) in enumerate(zip(sizes, segments, strict=True)):
            start = 0
            for run, (bits, count) in enumerate((abs(bits), count) for bits, count in runs):
                self.begins[block, run], self.row_bits[block, run] = begin, count * bits
                own = self.components[:, block, start : start + count]
                own[0], own[1], own[2] = run, torch.arange(count) * bits, bits
                start, begin = start + count, begin + packed_bytes(size * count, bits)

    def read(self, blocks: Tensor, places: Tensor) -> Tensor:
        """`[n, rank]` uint8 codes of `[n]` rows by their blocks and places there; 0 where a block has no component."""
        row_bits = self.row_bits[blocks]
        first_bit = places.unsqueeze(1) * row_bits
        starts = self.begins[blocks] + (first_bit >> 3)
        lengths = torch.where(row_bits > 0, ((first_bit & 7) + row_bits + 7) >> 3, 0)
        content, offsets = self.tensor.file.ranges(starts, lengths)
        run, within, bits = self.components[:, blocks]
        # Bits in what was read, of every code.
        bit = (offsets * 8 + (first_bit & 7)).gather(1, run) + within
        byte, wide = bit >> 3, content.int()
        values = (wide[byte] | (wide[(byte + 1).clamp(max=len(wide) - 1)] << 8)) >> (bit & 7).int()
        codes: Tensor = (values & ((1 << bits.int()) - 1)).to(torch.uint8)
        return codes
