"""What codes are read by, computed once, and the tiles of their logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_embcompress.methods.quantizers.byte_tiles import ByteTiles, is_few, product_dtype


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
        numbers: `[blocks, 3]`: the first row, where its codes begin, and the rank.
        scales: `[blocks, rank]`.
        offsets: `[blocks, rank]` where the levels of a component begin.
    """

    ends: Tensor
    numbers: Tensor
    scales: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class LaidOut:
    """Codes as bytes that are multiplied with states.

    Attributes:
        data: uint8, of all blocks.
        blocks: The same by blocks.
        units: `[rank]` of every block, what an upper byte stands for.
        components: `[*]`, of all blocks one after the other, the component that every upper and lower byte is of.
        factors: `[*]`, what an upper byte of it stands for.
        ends: `[blocks]` the row behind the last one.
    """

    data: Tensor
    blocks: list[ByteTiles]
    units: list[Tensor]
    components: Tensor
    factors: Tensor
    ends: Tensor

    @classmethod
    def of(cls, data: Tensor, blocks: list[ByteTiles], units: list[Tensor]) -> LaidOut:
        """Find out what follows."""
        kept = [
            one.weights(torch.arange(len(own)).unsqueeze(0)).squeeze(0) for one, own in zip(blocks, units, strict=True)
        ]
        factors = [own[components] for own, components in zip(units, kept, strict=True)]
        rows = torch.tensor([one.shape.rows for one in blocks])
        return cls(data, blocks, units, torch.cat(kept), torch.cat(factors), rows.cumsum(0))

    def logits(self, reduced: Tensor, constant: Tensor) -> Tensor:
        """`[m, vocab_size]` in block order, of `[m, rank]` states in the basis and `[m, blocks]` constants."""
        sizes, dtype = [one.shape.rows for one in self.blocks], reduced.dtype
        wide = product_dtype(len(reduced), dtype)
        logits, constant = reduced.new_empty(len(reduced), sum(sizes), dtype=wide), constant.to(wide)
        if not is_few(len(reduced)):
            parts = zip(torch.split(logits, sizes, 1), torch.split(constant, 1, 1), strict=True)
            for tiles, units, (part, shift) in zip(self.blocks, self.units, parts, strict=True):
                tiles.product((reduced[:, : len(units)] * units).to(wide), shift, out=part)
            return logits.to(dtype)
        # The same for all blocks at once as far as it can be: of one state, calls take as long as products.
        lengths = [one.data.shape[1] for one in self.blocks]
        weights = reduced.index_select(1, self.components) * self.factors
        shift = constant.repeat_interleave(self.ends.diff(prepend=self.ends.new_zeros(1)), dim=1)
        # All states block by block: the bytes of one stay in the cache of a core.
        sums = [
            [tiles.bag_sums(own)[:size] if length * size else own.new_zeros(size) for own in part]
            for tiles, part, size, length in zip(
                self.blocks, torch.split(weights, lengths, 1), sizes, lengths, strict=True
            )
        ]
        for found, of_blocks in zip(logits, zip(*sums, strict=True), strict=True):
            torch.cat(of_blocks, out=found)
        return logits.add_(shift).to(dtype)

    def coefficients(self, positions: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """`[n, rank]` coefficients of `[n]` ascending positions of rows, and the `[n]` blocks that they are in."""
        stops = torch.searchsorted(positions, self.ends).tolist()
        found = self.factors.new_empty(len(positions), rank)
        start = first = 0
        for tiles, units, stop in zip(self.blocks, self.units, stops, strict=True):
            if stop > start:
                numbers = tiles.rows(positions[start:stop] - first)
                torch.mul(numbers, units, out=found[start:stop, : len(units)])
                found[start:stop, len(units) :] = 0
            start, first = stop, first + tiles.shape.rows
        return found, torch.searchsorted(self.ends, positions, right=True)


def code_tile(codes: Tensor, offsets: Tensor) -> Callable[[int, int], Callable[..., Tensor]]:
    """Gives, for some rows of a block, how their logits are computed; see `Frame` for the offsets."""

    def logits_of(start: int, stop: int) -> Callable[..., Tensor]:
        def logits(states: Tensor, shift: Tensor, levels: Tensor) -> Tensor:
            return F.linear(states, looked_up(levels, codes[start:stop].int() + offsets)) + shift

        return logits

    return logits_of


def byte_tile(
    tiles: ByteTiles, units: Tensor, dtype: torch.dtype
) -> Callable[[int, int], Callable[[Tensor, Tensor], Tensor]]:
    """Gives, for some rows of a block, how their logits are computed from bytes."""

    def logits_of(start: int, stop: int) -> Callable[[Tensor, Tensor], Tensor]:
        def logits(reduced: Tensor, shift: Tensor) -> Tensor:
            wide = product_dtype(len(reduced), dtype)
            out = reduced.new_empty(len(reduced), stop - start, dtype=wide)
            states = (reduced[:, : len(units)] * units).to(wide)
            return tiles.product(states, shift.to(wide), start, out).to(dtype)

        return logits

    return logits_of


def looked_up(levels: Tensor, index: Tensor) -> Tensor:
    """Single numbers by their places; of rows of one number `F.embedding` takes four times as long."""
    return levels.index_select(0, index.reshape(-1)).view(index.shape)
