"""Products of states with a matrix of bytes that lies component by component, some rows of the matrix at a time.

One state is the weights of a bag whose items are components: FBGEMM's sum of rows of bytes (`embedding_bag` of
quantized tables) reads every byte once, converts it in a register and adds it up in float32, so that a product takes
what a quarter of a float32 matrix takes to be read. For more states, or where torch is built without FBGEMM, the bytes
of some tiles are converted to floats, which stay in the caches, and every core multiplies tiles of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# Rows of the matrix in a tile, at most: short enough for threads to share a block, long enough for the bytes that
# FBGEMM wants behind every component to be few. Of many rows a tile is a whole number of vectors wide.
_WIDTH, _VECTOR, _MANY_ROWS = 384, 16, 128
# Those bytes: scale and bias as float32.
_TAIL = 8
# What stands for 0, since FBGEMM reads bytes from 0 to 255; and what a lower byte counts.
_ZERO, _LOWER = 128, 1 / 256
# Tiles that a thread multiplies before it waits for the others; and the most tiles, times states, at once.
_TILES, _SUMS = 2, 2**13
# States up to which every one of them reads the bytes by itself.
_FEW_STATES = 6


@cache
def has_bags() -> bool:
    """Whether torch has fast sums of rows of bytes; without FBGEMM there are slow ones."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def is_few(states: int) -> bool:
    """Whether every one of so many states is better multiplied with the bytes by itself."""
    return states <= _FEW_STATES and has_bags()


def product_dtype(states: int, dtype: torch.dtype) -> torch.dtype:
    """What so many states of a dtype are multiplied in: bfloat16 as it is where that is fast, all others float32."""
    return dtype if dtype == torch.bfloat16 and not is_few(states) and _multiplies_bfloat16() else torch.float32


@cache
def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


@cache
def _items(bits: int) -> Tensor:
    """The first `2^bits` numbers: all tiles of all matrices are read from one."""
    return torch.arange(2**bits, dtype=torch.int32)


@dataclass(frozen=True)
class TileShape:
    """How a matrix is cut into tiles.

    Attributes:
        rows: Rows of the matrix.
        components: Its columns.
        lower: How many of the first components have a second, lower byte.
    """

    rows: int
    components: int
    lower: int = 0

    @property
    def count(self) -> int:
        """Tiles."""
        return -(-self.rows // _WIDTH)

    @property
    def width(self) -> int:
        """Rows of a tile; the last one may be filled up."""
        unit = _VECTOR if self.rows >= _MANY_ROWS else 1
        return -(-self.rows // (max(1, self.count) * unit)) * unit

    @property
    def stride(self) -> int:
        """Bytes from a component of a row to the next one."""
        return self.width + _TAIL

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile, in which upper bytes come before lower ones."""
        return (self.components + self.lower) * self.stride

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles."""
        return self.count * self.tile_bytes


class ByteTiles:
    """Numbers `u - 128 + (l - 128) / 256` of an upper byte `u` and, where there is one, a lower byte `l`.

    Args:
        shape: How the matrix is cut.
        data: `[shape.nbytes]` uint8, of which tiles are views.

    Example:
        >>> shape = TileShape(rows=3, components=2)
        >>> tiles = ByteTiles.empty(shape)
        >>> tiles.write(slice(0, 3), torch.tensor([[1, 2], [3, -4], [-128, 127]], dtype=torch.int16) * 256)
        >>> tiles.product(torch.tensor([[1.0, 10.0]]), torch.zeros(1, 1))
        tensor([[  21.,  -37., 1142.]])
    """

    def __init__(self, shape: TileShape, data: Tensor) -> None:
        """Keep both."""
        self.shape = shape
        self.data = data.view(shape.count, shape.components + shape.lower, shape.stride)
        items = self.data.shape[:2].numel()
        self._whole = (self.data.view(items, shape.stride), _items(items.bit_length())[:items])
        self._bags = torch.arange(shape.count, dtype=torch.int32) * self.data.shape[1]

    @classmethod
    def empty(cls, shape: TileShape, data: Tensor | None = None) -> ByteTiles:
        """All bytes 0, in new memory if there is none."""
        tiles = cls(shape, torch.empty(shape.nbytes, dtype=torch.uint8) if data is None else data)
        tiles.data.zero_()
        tail = (
            torch.tensor([[1.0, -_ZERO], [_LOWER, -_ZERO * _LOWER]], dtype=torch.float32)
            .view(torch.uint8)
            .to(tiles.data.device)
        )
        tiles.data[:, : shape.components, shape.width :] = tail[0]
        tiles.data[:, shape.components :, shape.width :] = tail[1]
        return tiles

    def pieces(self, rows: slice) -> Iterator[tuple[int, slice, slice]]:
        """Tiles of a run of rows: which, the columns of the tile, and the rows of the run."""
        width = self.shape.width
        for tile in range(rows.start // max(1, width), self.shape.count):
            first = max(rows.start, tile * width)
            last = min(rows.stop, (tile + 1) * width)
            if first >= last:
                return
            yield tile, slice(first - tile * width, last - tile * width), slice(first - rows.start, last - rows.start)

    def write(self, rows: slice, numbers: Tensor) -> None:
        """Keep `[n, components]` int16 numbers, `256 (u - 128) + l - 128`, of a run of rows."""
        upper = (numbers + _ZERO) >> 8
        lower = (numbers - 256 * upper)[:, : self.shape.lower]
        for tile, columns, own in self.pieces(rows):
            self.data[tile, : self.shape.components, columns] = (upper[own] + _ZERO).to(torch.uint8).T
            self.data[tile, self.shape.components :, columns] = (lower[own] + _ZERO).to(torch.uint8).T

    def read(self, rows: slice) -> Tensor:
        """The numbers of a run of rows, `[n, components]` int16."""
        numbers = self.data.new_empty(rows.stop - rows.start, self.shape.components, dtype=torch.int16)
        for tile, columns, own in self.pieces(rows):
            found = self.data[tile, :, columns].T.to(torch.int16) - _ZERO
            numbers[own] = 256 * found[:, : self.shape.components]
            numbers[own, : self.shape.lower] += found[:, self.shape.components :]
        return numbers

    def rows(self, places: Tensor) -> Tensor:
        """`[n, components]` float32 numbers of `[n]` rows."""
        tile, column = places // self.shape.width, places % self.shape.width
        found = self.data[tile, :, column].float().sub_(_ZERO)
        numbers = found[:, : self.shape.components]
        if self.shape.lower:
            numbers[:, : self.shape.lower].add_(found[:, self.shape.components :], alpha=_LOWER)
        return numbers

    def weights(self, states: Tensor) -> Tensor:
        """What `bag_sums` takes of `[m, components]` states: `[m, components + lower]`."""
        return torch.cat([states, states[:, : self.shape.lower]], dim=1) if self.shape.lower else states

    def bag_sums(self, weights: Tensor, tiles: slice | None = None) -> Tensor:
        """Products of one state, `[components + lower]`, with the rows of some tiles, one after the other."""
        (table, items), bags = self._whole, self._bags
        if tiles is not None:
            table, bags = self.data[tiles].flatten(0, 1), bags[: tiles.stop - tiles.start]
            items = items[: len(table)]
        weights = weights.expand(len(bags), -1).reshape(-1)
        arguments = (table, items, bags, False, 0, False, weights, None, False)
        sums: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default(*arguments)
        return sums.view(-1)

    def product(self, states: Tensor, shift: Tensor, start: int = 0, out: Tensor | None = None) -> Tensor:
        """Products of states with a run of rows.

        Args:
            states: `[m, components]` in their `product_dtype`.
            shift: `[m, 1]` in that dtype, what is added to them.
            start: The first row.
            out: `[m, n]` in that dtype, where they are written; None for the products with all rows from the first
                one on.

        Returns:
            `[m, n]`.
        """
        out = states.new_empty(len(states), self.shape.rows - start) if out is None else out
        rows = slice(start, start + out.shape[1])
        if not self.shape.components or not out.numel():
            return out.copy_(shift.expand_as(out))
        if is_few(len(states)):
            width = self.shape.width
            tiles = slice(rows.start // width, -(-rows.stop // width))
            own = slice(rows.start - tiles.start * width, rows.stop - tiles.start * width)
            for place, weights in enumerate(self.weights(states)):
                torch.add(self.bag_sums(weights, tiles)[own], shift[place], out=out[place])
            return out
        components, lower = self.shape.components, self.shape.lower
        # A number of two bytes is exact in float32, but not in bfloat16.
        adds_bytes = states.dtype == torch.float32
        if lower and not adds_bytes:
            states = torch.cat([states, states[:, :lower] * _LOWER], dim=1)
        pieces = list(self.pieces(rows))
        at_once = max(1, min(len(pieces), _TILES * torch.get_num_threads(), _SUMS // len(states)))
        numbers = states.new_empty(at_once, components + lower, self.shape.width)
        sums = states.new_empty(at_once, len(states), self.shape.width)
        for first in range(0, len(pieces), at_once):
            group = pieces[first : first + at_once]
            data = self.data[group[0][0] : group[-1][0] + 1, :, : self.shape.width]
            # Without their highest bit as it is, bytes from 0 to 255 are those from -128 to 127.
            found = numbers[: len(group)].copy_((data ^ _ZERO).view(torch.int8))
            if lower and adds_bytes:
                found[:, :lower].add_(found[:, components:], alpha=_LOWER)
                found = found[:, :components]
            torch.bmm(states.expand(len(group), -1, -1), found, out=sums[: len(group)])
            for of_tile, (_, columns, own) in zip(sums, group, strict=False):
                torch.add(of_tile[:, columns], shift, out=out[:, own])
        return out
