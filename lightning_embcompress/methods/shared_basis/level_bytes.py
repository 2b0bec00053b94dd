"""Codes as bytes that are proportional to their levels: what products in integers, and lookups, read without a table.

A level is `unit · (256 · upper + lower)` with two bytes from -128 to 127, as accurate as 15 bits are. Of few bits the
upper byte alone is enough: levels are farther apart than what is lost of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.quantizers.integer_product import byte_digits

_LARGEST = 127
# Columns are filled up with zeros to multiples of it: products of rows that begin anywhere take twice the time.
_UNIT = 64


class Columns(NamedTuple):
    """How many bytes of a row are upper and lower ones, and how many there are with the zeros behind them."""

    upper: int
    lower: int
    total: int


@dataclass(frozen=True)
class ByteLevels:
    """The levels of every width in integers.

    Attributes:
        numbers: For every width `[2^bits]` int16, `256 · upper + lower`.
        units: For every width, what a number stands for.
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
            largest = max(float(levels.abs().max()), 1e-300)
            if exact or float(levels.sort().values.diff().min()) < 2 * largest / _LARGEST:
                units[bits] = largest / (256 * _LARGEST)
                numbers[bits] = (levels / units[bits]).round().to(torch.int16)
                continue
            # The largest need not be the largest byte: few levels can all be near to one.
            steps = largest / torch.linspace(0.75 * _LARGEST, _LARGEST, 128, dtype=torch.float64).unsqueeze(1)
            lost = ((levels / steps).round() * steps - levels).square().sum(dim=1)
            step = float(steps[lost.argmin()])
            numbers[bits], units[bits] = 256 * (levels / step).round().to(torch.int16), step / 256
        return cls(numbers, units)

    def columns(self, runs: Sequence[tuple[int, int]]) -> Columns:
        """How the bytes of a row of a block are laid out: lower ones only of its first components, as far as needed."""
        needed = end = 0
        for bits, count in runs:
            end += count
            needed = end if bool((self.numbers[bits] % 256).any()) else needed
        return Columns(end, needed, filled(end + needed))

    def encode(self, codes: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
        """Bytes of a block, `[size, columns]` int8: all upper ones, then the lower ones, then zeros.

        Args:
            codes: `[size, rank]` uint8.
            runs: The segments of the block.
        """
        columns = self.columns(runs)
        found = torch.zeros(len(codes), columns.total, dtype=torch.int8, device=codes.device)
        tables = {bits: numbers.to(codes.device) for bits, numbers in self.numbers.items()}
        # A few rows at a time: on the way codes take twelve bytes each.
        for chunk in row_chunks(*codes.shape):
            start = 0
            for bits, count in runs:
                numbers = tables[bits][codes[chunk, start : start + count].int()]
                upper = (numbers + 128) >> 8
                found[chunk, start : start + count] = upper.to(torch.int8)
                lower = (numbers - 256 * upper)[:, : max(0, columns.lower - start)]
                place = columns.upper + start
                found[chunk, place : place + lower.shape[1]] = lower.to(torch.int8)
                start += count
        return found

    def decode(self, data: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
        """The codes that `encode` was given, `[size, rank]` uint8."""
        columns = self.columns(runs)
        codes = torch.empty(len(data), columns.upper, dtype=torch.uint8, device=data.device)
        for chunk in row_chunks(*codes.shape):
            numbers = 256 * data[chunk, : columns.upper].int()
            numbers[:, : columns.lower] += data[chunk, columns.upper : columns.upper + columns.lower]
            start = 0
            for bits, count in runs:
                ascending, order = self.numbers[bits].int().to(data.device).sort(stable=True)
                place = torch.searchsorted(ascending, numbers[:, start : start + count].contiguous())
                codes[chunk, start : start + count] = order[place].to(torch.uint8)
                start += count
        return codes

    def units_of(self, runs: Sequence[tuple[int, int]], scales: Tensor) -> Tensor:
        """What the numbers of every component of a block stand for, `[rank]` float32; scales `[rank]`."""
        units = [self.units[bits] for bits, count in runs for _ in range(count)]
        return torch.tensor(units, dtype=torch.float32, device=scales.device) * scales.float()


def filled(columns: int) -> int:
    """Columns with those that are zeros."""
    return -(-columns // _UNIT) * _UNIT


def byte_states(reduced: Tensor, units: Tensor, lower_columns: int, digits: int) -> tuple[Tensor, Tensor]:
    """States as the bytes of all blocks are multiplied with them.

    Args:
        reduced: `[m, rank]` their products with the basis.
        units: `[blocks, rank]`, see `ByteLevels.units_of`.
        lower_columns: The most of a block.
        digits: Of a state, to the base 256.

    Returns:
        `[blocks, m · digits, filled(rank) + lower columns]` int8; and `[m, 1, digits]` what they count.
    """
    rank = reduced.shape[1]
    scaled = reduced.new_zeros(len(reduced), len(units), filled(rank) + lower_columns, dtype=torch.float32)
    torch.mul(reduced.float().unsqueeze(1), units, out=scaled[..., :rank])
    scaled[..., filled(rank) :] = scaled[..., :lower_columns]
    scaled[..., :rank] *= 256
    found, counts = byte_digits(scaled, digits)
    return found.permute(2, 0, 1, 3).flatten(1, 2).contiguous(), counts.unsqueeze(1)


def byte_product(states: Tensor, counts: Tensor, data: Tensor, columns: Columns, first_lower: int) -> Tensor:
    """Product of states with rows of a block, in integers.

    Args:
        states: `[m · digits, *]` int8 of the block, see `byte_states`.
        counts: `[m, 1, digits]`.
        data: `[n, columns]` int8, see `ByteLevels.encode`.
        columns: How they are laid out.
        first_lower: Where the states of lower bytes begin.

    Returns:
        `[m, n]` float32.
    """
    if not data.numel():
        return counts.new_zeros(len(counts), len(data))
    upper, lower, total = columns
    # Behind the components of a block states are zeros, as the bytes are.
    read = states[:, :total]
    if lower:
        parts = [states[:, :upper], states[:, first_lower : first_lower + lower]]
        read = F.pad(torch.cat(parts, dim=1), (0, total - upper - lower))
    sums = torch._int_mm(read, data.T).float()
    return torch.bmm(counts, sums.view(len(counts), -1, len(data))).squeeze(1)
