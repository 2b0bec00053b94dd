"""Logits by blocks of rows, each a product with states of its own: all of them, or a tile at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcompress.methods.kernels.block_head import Block, block_products, multiplies_at_once
from lightning_embcompress.methods.quantizers.factors import Factor, multiply
from lightning_embcompress.methods.tiles import TileMaker


@dataclass
class BlockProducts:
    """What the logits of some hidden states are products of.

    Attributes:
        hidden: `[*, dim]`.
        factors: `[size, rank]` of every block.
        states: `[*, columns]` what all blocks read together, such as the products of the hidden states with bases.
        firsts: For every block the column of the states where its own begin; None for one that reads `hidden`.
        parts: Those of every block, `[*, rank]`; given where they can be cut so that gradients are not added up.
        shift: `[*, blocks]` what is added to all logits of a block; None for nothing.
    """

    hidden: Tensor
    factors: Sequence[Factor]
    states: Tensor
    firsts: Sequence[int | None]
    parts: Sequence[Tensor]
    shift: Tensor | None = None

    def logits(self) -> Tensor:
        """`[*, Σ size]`, one block after the other."""
        if multiplies_at_once(self.hidden, self.factors):
            return self._at_once()
        found = [multiply(part, factor) for part, factor in zip(self.parts, self.factors, strict=True)]
        if self.shift is not None:
            found = [one + self.shift[..., block : block + 1] for block, one in enumerate(found)]
        return torch.cat(found, dim=-1)

    def tiles(self, tile_rows: int) -> TileMaker:
        """Tiles of at most so many rows, of states `[N, *]`."""
        maker = TileMaker(tile_rows)
        if multiplies_at_once(self.hidden, self.factors):
            # They are so few that all of them are no more than a tile of other states.
            logits = self._at_once()
            maker.add(logits.shape[1], maker.share(logits), lambda start, stop: lambda own: own[:, start:stop])
            return maker
        shared: dict[int, tuple[int, ...]] = {}
        for block, (part, factor) in enumerate(zip(self.parts, self.factors, strict=True)):
            if id(part) not in shared:
                shared[id(part)] = maker.share(part)
            shift = () if self.shift is None else maker.share(self.shift[:, block : block + 1])
            maker.add_product(factor, shared[id(part)] + shift)
        return maker

    def _at_once(self) -> Tensor:
        states, width = self.states, self.states.shape[-1]
        if None in self.firsts:
            states = torch.cat([states, self.hidden], dim=-1)
        blocks = [
            Block(factor, width if first is None else first)
            for factor, first in zip(self.factors, self.firsts, strict=True)
            if isinstance(factor, Tensor)
        ]
        return block_products(states, blocks, self.shift)
