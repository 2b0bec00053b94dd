"""Logits a tile of the vocabulary at a time, in the order in which a table is kept, for who needs no others at once.

A loss or the best tokens need every logit once, and all of them never. What all tiles share, such as the product of the
hidden states with a basis, is computed once; a tile reads some of that and rows that are its own. So the gradient of
its own rows is complete when the tile is done, and only that of what is shared is added up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_embcompress.methods.quantizers.factors import Factor, PackedFactor, multiply

# Rows that tiles are whole multiples of, unless they are fewer than some.
_UNIT, _LEAST_OF_UNITS = 16, 128


class Tile(NamedTuple):
    """A run of rows, and how its logits are computed.

    Attributes:
        start: First row, in the order in which the table is kept.
        stop: Row behind the last one.
        reads: Which of the shared tensors it reads, as places in `Tiles.shared`.
        owns: Runs of rows that no other tile reads, each a place in `Tiles.owned`, the first row, and that behind the
            last one.
        logits: Gives `[N, stop - start]` when called with what it reads and what it owns, in this order. It computes
            from nothing else that requires a gradient.
        is_product: Whether that is the product of the first tensor read with the first rows owned, and what is added.
    """

    start: int
    stop: int
    reads: tuple[int, ...]
    owns: tuple[tuple[int, int, int], ...]
    logits: Callable[..., Tensor]
    is_product: bool = False


class Tiles(NamedTuple):
    """All logits of some hidden states, none of them computed yet.

    Attributes:
        shared: What more than one tile reads, with a graph to the hidden states and the parameters.
        owned: Parameters of which every row belongs to one tile.
        tiles: One after the other, all rows in sum.
        order: `[vocab_size]` ids of the rows as they are kept; None where that is their own order.
        position: `[vocab_size]` where the row of every id is; None as for `order`.
    """

    shared: Sequence[Tensor]
    owned: Sequence[Tensor]
    tiles: Sequence[Tile]
    order: Tensor | None = None
    position: Tensor | None = None

    def logits(self, tile: Tile) -> Tensor:
        """Those of one tile, `[N, stop - start]`."""
        own = [self.owned[place][start:stop] for place, start, stop in tile.owns]
        return tile.logits(*(self.shared[place] for place in tile.reads), *own)

    def plus(self, bias: Tensor) -> Tiles:
        """The same with a bias, `[vocab_size]`, in the order of ids."""
        place = len(self.owned)
        own = bias if self.order is None else bias.index_select(0, self.order)
        tiles = [
            tile._replace(owns=(*tile.owns, (place, tile.start, tile.stop)), logits=_plus(tile.logits))
            for tile in self.tiles
        ]
        return self._replace(owned=[*self.owned, own], tiles=tiles)

    def with_logits(self, token: int, logits: Tensor) -> Tiles:
        """The same with other logits, `[N]`, of one token."""
        row = token if self.position is None else int(self.position[token])
        tiles = [
            tile._replace(
                reads=(len(self.shared), *tile.reads),
                logits=_with_column(tile.logits, row - tile.start),
                is_product=False,
            )
            if tile.start <= row < tile.stop
            else tile
            for tile in self.tiles
        ]
        return self._replace(shared=[*self.shared, logits], tiles=tiles)


class Places(NamedTuple):
    """Where some ids are among tiles.

    Attributes:
        queries: Places of the ids in the tensor that was given, by where their rows are, int64.
        rows: Those rows, in the order in which the table is kept.
        ends: For every tile, how many of them lie before its end.
    """

    queries: Tensor
    rows: Tensor
    ends: Sequence[int]

    @classmethod
    def of(cls, ids: Tensor, tiles: Tiles) -> Places:
        """Find `[N]` ids."""
        rows, queries = (ids if tiles.position is None else tiles.position[ids]).sort()
        stops = torch.tensor([tile.stop for tile in tiles.tiles], device=rows.device)
        return cls(queries, rows, torch.searchsorted(rows, stops).tolist())

    def inside(self, index: int, tile: Tile) -> tuple[Tensor, Tensor]:
        """Those in a tile: their places, and the columns of the tile's logits that they are."""
        part = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return self.queries[part], self.rows[part] - tile.start


def _plus(logits: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def sums(*read: Tensor) -> Tensor:
        *others, bias = read
        found = logits(*others)
        # Under autocast logits are narrower than the bias: as in `nn.Linear`, their dtype is the result's.
        return found + bias.to(found.dtype)

    return sums


def _with_column(logits: Callable[..., Tensor], column: int) -> Callable[..., Tensor]:
    def replaced(own: Tensor, *read: Tensor) -> Tensor:
        found = logits(*read)
        is_own = torch.arange(found.shape[-1], device=found.device) == column
        return torch.where(is_own, own.to(found.dtype).unsqueeze(-1), found)

    return replaced


class TileMaker:
    """Collects tiles of products `h_b U_bᵀ`, block by block.

    Args:
        tile_rows: Most rows of a tile.
    """

    def __init__(self, tile_rows: int) -> None:
        """Start with none."""
        self.tile_rows = tile_rows
        self.shared: list[Tensor] = []
        self.owned: list[Tensor] = []
        self.tiles: list[Tile] = []
        self._rows = 0

    def share(self, *tensors: Tensor) -> tuple[int, ...]:
        """Places of tensors that several tiles read."""
        first = len(self.shared)
        self.shared += tensors
        return tuple(range(first, len(self.shared)))

    def add(self, size: int, reads: Sequence[int], logits_of: Callable[[int, int], Callable[..., Tensor]]) -> None:
        """Add tiles of `size` rows that own nothing; `logits_of` gives how those from one row to another are read."""
        for start, stop in self._runs(size):
            self._append(stop - start, reads, (), logits_of(start, stop))

    def add_product(self, factor: Factor, reads: Sequence[int], rows: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add tiles of the product of states with rows of a factor, or with what `rows` computes from these.

        Args:
            factor: `[size, *]`.
            reads: The place of the states, and of a constant that is added, if there is one.
            rows: Gives `[n, columns of the states]` for `n` rows of the factor; None for those rows.
        """
        if isinstance(factor, Tensor):
            self.owned.append(factor)
            for start, stop in self._runs(factor.shape[0]):
                owns = ((len(self.owned) - 1, start, stop),)
                self._append(stop - start, reads, owns, _product(rows), is_product=rows is None)
        else:
            assert isinstance(factor, PackedFactor)
            self.add(factor.matrix[0], reads, lambda start, stop: _unpacked_product(factor, rows, start, stop))

    def made(self, order: Tensor | None = None, position: Tensor | None = None) -> Tiles:
        """All of them."""
        return Tiles(self.shared, self.owned, self.tiles, order, position)

    def _runs(self, size: int) -> list[tuple[int, int]]:
        # Of equal size: a short rest costs more than its rows. Large ones in whole units: kernels for GPUs read a row
        # of logits in whole vectors where it begins and ends with one.
        unit = _UNIT if self.tile_rows >= _LEAST_OF_UNITS else 1
        number = -(-size // (self.tile_rows // unit * unit))
        step = -(-size // (max(1, number) * unit)) * unit
        return [(start, min(start + step, size)) for start in range(0, size, step)] if size else []

    def _append(
        self,
        rows: int,
        reads: Sequence[int],
        owns: tuple[tuple[int, int, int], ...],
        logits: Callable[..., Tensor],
        is_product: bool = False,
    ) -> None:
        self.tiles.append(Tile(self._rows, self._rows + rows, tuple(reads), owns, logits, is_product))
        self._rows += rows


def _product(rows: Callable[[Tensor], Tensor] | None) -> Callable[..., Tensor]:
    def product(states: Tensor, *others: Tensor) -> Tensor:
        *constant, own = others
        found = F.linear(states, own if rows is None else rows(own))
        return found + constant[0] if constant else found

    return product


def _unpacked_product(
    factor: PackedFactor, rows: Callable[[Tensor], Tensor] | None, start: int, stop: int
) -> Callable[..., Tensor]:
    def product(states: Tensor, *constant: Tensor) -> Tensor:
        if rows is None and (start, stop) == (0, factor.matrix[0]):
            # Of a few states products in integers are faster.
            found = multiply(states, factor)
            return found + constant[0] if constant else found
        return _product(rows)(states, *constant, factor.rows(torch.arange(start, stop, device=states.device)))

    return product


class _Rows(nn.Module):
    """Rows of a factorization as a call, so that other tensors can take the place of its parameters."""

    def __init__(self, factorization: Any) -> None:
        super().__init__()
        self.factorization = factorization

    def forward(self, start: int, stop: int) -> Tensor:
        rows: Tensor = self.factorization.rows(torch.arange(start, stop, device=self.factorization.device))
        return rows


def tiles_of_rows(factorization: Any, hidden: Tensor, tile_rows: int) -> Tiles:
    """Tiles of any factorization: its rows are computed, multiplied and forgotten.

    All parameters are shared by all tiles: those of which a token has rows of its own are better owned.

    Args:
        factorization: Any that is not prepared for quantization.
        hidden: `[N, dim]`.
        tile_rows: Most rows of a tile.
    """
    reader = _Rows(factorization)
    names = [name for name, _ in reader.named_parameters()]
    maker = TileMaker(tile_rows)
    reads = maker.share(hidden, *(parameter for _, parameter in reader.named_parameters()))

    def logits_of(start: int, stop: int) -> Callable[..., Tensor]:
        def logits(states: Tensor, *parameters: Tensor) -> Tensor:
            values = dict(zip(names, parameters, strict=True))
            rows: Tensor = functional_call(reader, values, (start, stop))
            return F.linear(states, rows)

        return logits

    maker.add(factorization.vocab_size, reads, logits_of)
    return maker.made()
