"""Codes as bytes that are proportional to their levels: what products with states, and lookups, read without a table.

A level is `unit · (upper + lower / 256)` with two bytes from -128 to 127, as accurate as 15 bits are. Of few bits the
upper byte alone is enough: levels are farther apart than what is lost of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.quantizers.byte_tiles import ByteTiles, TileShape
from lightning_embcompress.methods.shared_basis.layout import unit_of

_LARGEST = 127


@dataclass(frozen=True)
class ByteLevels:
    """The levels of every width as integers.

    Attributes:
        numbers: For every width `[2^bits]` int16, `256 · upper + lower`.
        units: For every width, what 256 of a number stand for.
    """

    numbers: Mapping[int, Tensor]
    units: Mapping[int, float]

    @classmethod
    def of(cls, tables: Mapping[int, Tensor], exact: bool) -> ByteLevels:
        """Round levels.

        Args:
            tables: Levels of every width, ascending.
            exact: Whether all have a lower byte; otherwise those that are nearer to each other than two steps of the
                upper one.
        """
        numbers, units = {}, {}
        for bits, levels in tables.items():
            levels = levels.double().cpu()
            if bits < 0:
                # Those of a trellis are whole numbers of their unit.
                units[bits] = float(unit_of(levels))
                numbers[bits] = 256 * torch.arange(-128, 128).to(torch.int16)
                continue
            largest = max(float(levels.abs().max()), 1e-300)
            if exact or float(levels.sort().values.diff().min()) < 2 * largest / _LARGEST:
                units[bits] = largest / _LARGEST
                numbers[bits] = (256 * levels / units[bits]).round().to(torch.int16)
                continue
            # The largest need not be the largest byte: few levels can all be near to one.
            steps = largest / torch.linspace(0.75 * _LARGEST, _LARGEST, 128, dtype=torch.float64).unsqueeze(1)
            lost = ((levels / steps).round() * steps - levels).square().sum(dim=1)
            step = float(steps[lost.argmin()])
            numbers[bits], units[bits] = 256 * (levels / step).round().to(torch.int16), step
        return cls(numbers, units)

    def shape(self, size: int, runs: Sequence[tuple[int, int]]) -> TileShape:
        """How the bytes of a block are laid out: lower ones only of its first components, as far as needed."""
        needed = end = 0
        for bits, count in runs:
            end += count
            needed = end if bool((self.numbers[bits] % 256).any()) else needed
        return TileShape(size, end, needed)

    def encode(self, codes: Tensor, runs: Sequence[tuple[int, int]], into: ByteTiles) -> None:
        """Write `[size, rank]` uint8 codes of a block with these segments as bytes."""
        tables = {bits: numbers.to(codes.device) for bits, numbers in self.numbers.items()}
        # A few rows at a time: on the way codes take many bytes each.
        for chunk in row_chunks(*codes.shape):
            parts = torch.split(codes[chunk], [count for _, count in runs], dim=1)
            numbers = [tables[bits][part.int()] for part, (bits, _) in zip(parts, runs, strict=True)]
            into.write(chunk, torch.cat(numbers, dim=1))

    def decode(self, tiles: ByteTiles, runs: Sequence[tuple[int, int]]) -> Tensor:
        """The codes that `encode` was given."""
        codes = tiles.data.new_empty(tiles.shape.rows, tiles.shape.components)
        for chunk in row_chunks(*codes.shape):
            numbers = tiles.read(chunk)
            start = 0
            for bits, count in runs:
                ascending, order = self.numbers[bits].to(numbers.device).sort(stable=True)
                place = torch.searchsorted(ascending, numbers[:, start : start + count].contiguous())
                codes[chunk, start : start + count] = order[place].to(torch.uint8)
                start += count
        return codes

    def units_of(self, runs: Sequence[tuple[int, int]], scales: Tensor) -> Tensor:
        """What an upper byte of every component of a block stands for, `[rank]` float32; scales `[rank]`."""
        units = [self.units[bits] for bits, count in runs for _ in range(count)]
        return torch.tensor(units, dtype=torch.float32, device=scales.device) * scales.float()
