"""Factors and codes that stay in a file; what is read of them are the rows that are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_embcompress.methods.quantizers.factors import PackedFactor, as_numbers
from lightning_embcompress.methods.quantizers.integer_quantizer import group_shape
from lightning_embcompress.methods.quantizers.packed_rows import read_packed_rows
from lightning_embcompress.methods.quantizers.packing import packed_bytes
from lightning_embcompress.methods.shared_basis.packed_layout import PackedLayout
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
        layout: How they are packed.
    """

    def __init__(self, tensor: TensorOnDisk, layout: PackedLayout) -> None:
        """Find where the codes of every block and component are."""
        super().__init__(tensor)
        parts = [torch.tensor(rows, dtype=torch.long) for rows in layout.parts]
        self.row_bits = pad_sequence(parts, batch_first=True)
        """`[blocks, parts]` bits of a row."""
        self.begins = torch.zeros_like(self.row_bits)
        """`[blocks, parts]` first byte."""
        rank = max(sum(count for _, count in runs) for runs in layout.segments)
        self.components = torch.zeros(3, len(parts), rank, dtype=torch.int32)
        """`[3, blocks, rank]`: of every component the first bit in a row of its part, the largest code, the part."""
        for block, (size, runs) in enumerate(zip(layout.sizes, layout.segments, strict=True)):
            begin = tensor.entry.start + layout.begins[block]
            for part, row in enumerate(layout.parts[block]):
                self.begins[block, part] = begin
                begin += packed_bytes(size, row)
            start = first = 0
            for run, (bits, count) in enumerate(runs):
                own = self.components[:, block, start : start + count]
                own[0], own[1], own[2] = first + torch.arange(count) * bits, 2**bits - 1, 0 if layout.by_rows else run
                start, first = start + count, first + bits * count if layout.by_rows else 0

    def read(self, blocks: Tensor, places: Tensor) -> Tensor:
        """`[n, rank]` uint8 codes of `[n]` rows by their blocks and places there; 0 where a block has no component."""
        row_bits = self.row_bits[blocks]
        first_bit = places.unsqueeze(1) * row_bits
        starts = self.begins[blocks] + (first_bit >> 3)
        lengths = ((first_bit & 7) + row_bits + 7) >> 3
        lengths[row_bits == 0] = 0
        content, offsets = self.tensor.file.ranges(starts, lengths)
        begin = offsets * 8 + (first_bit & 7)
        if begin.shape[1] > 1:
            begin = begin.gather(1, self.components[2, blocks].long())
        bit = begin + self.components[0, blocks]
        # The two bytes from every one on, in which a code ends wherever it begins.
        pairs = torch.cat([content, content.new_zeros(2)]).int()
        pairs = pairs[:-1] | (pairs[1:] << 8)
        values = pairs.take(bit >> 3).bitwise_right_shift_(bit.bitwise_and_(7).int())
        return values.bitwise_and_(self.components[1, blocks]).to(torch.uint8)
