"""What codes are read by, computed once, and the tiles of their logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_embcompress.methods.shared_basis.level_bytes import Columns, byte_product


@dataclass(frozen=True)
class Frame:
    """What codes stand on.

    Attributes:
        basis: `[rank, dim]`.
        means: `[blocks, dim]`.
        scales: `[rank]` of every block.
        offsets: `[rank]` int32 of every block, where the levels of a component begin.
    """

    basis: Tensor
    means: Tensor
    scales: list[Tensor]
    offsets: list[Tensor]


@dataclass(frozen=True)
class Places:
    """Where the codes of a row are, and what they mean, by blocks; of components that a block drops, zeros.

    Attributes:
        ends: `[blocks]` the row behind the last one.
        numbers: `[blocks, 6]`: the first row, where its codes or bytes begin, how many a row has, how many of them are
            upper bytes and how many lower ones, and the rank.
        factors: `[blocks, rank]` scales, or units of bytes.
        offsets: `[blocks, rank]` where the levels of a component begin.
    """

    ends: Tensor
    numbers: Tensor
    factors: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class LaidOut:
    """Codes as bytes that are multiplied with states.

    Attributes:
        data: `[size, columns]` int8 of every block.
        columns: How they are laid out.
        units: `[blocks, rank]`, what a number stands for.
        digits: Of a state, to the base 256: no more than the levels are worth.
    """

    data: list[Tensor]
    columns: list[Columns]
    units: Tensor
    digits: int

    @property
    def lower_columns(self) -> int:
        """The most of a block."""
        return max(columns.lower for columns in self.columns)


def code_tile(codes: Tensor, offsets: Tensor) -> Callable[[int, int], Callable[..., Tensor]]:
    """Gives, for some rows of a block, how their logits are computed; see `Frame` for the offsets."""

    def logits_of(start: int, stop: int) -> Callable[..., Tensor]:
        def logits(states: Tensor, shift: Tensor, levels: Tensor) -> Tensor:
            return F.linear(states, looked_up(levels, codes[start:stop].int() + offsets)) + shift

        return logits

    return logits_of


def byte_tile(
    data: Tensor, columns: Columns, first_lower: int, dtype: torch.dtype
) -> Callable[[int, int], Callable[..., Tensor]]:
    """Gives, for some rows of a block, how their logits are computed in integers; arguments as of `byte_product`."""

    def logits_of(start: int, stop: int) -> Callable[..., Tensor]:
        def logits(states: Tensor, counts: Tensor, shift: Tensor) -> Tensor:
            return (byte_product(states, counts, data[start:stop], columns, first_lower) + shift).to(dtype)

        return logits

    return logits_of


def looked_up(levels: Tensor, index: Tensor) -> Tensor:
    """Single numbers by their places; of rows of one number `F.embedding` takes four times as long."""
    return levels.index_select(0, index.reshape(-1)).view(index.shape)
