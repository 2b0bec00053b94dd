"""What tables that are cut into blocks of rows have in common: which row is where, and the way there and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from reprlib import repr as shortened
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_embcompress.methods.base import ConfigT, Factorization
from lightning_embcompress.methods.kernels.choice import uncompiled
from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.quantizers.packing import bit_width, pack_bits, packed_bytes, unpack_bits
from lightning_embcompress.methods.specs import integers
from lightning_embcompress.methods.tiles import TileMaker, Tiles
from lightning_embcompress.utils.graphs import is_exporting

# Every block has factors of its own.
MOST_BLOCKS = 2**16


class RowBlocks(Factorization[ConfigT]):
    """A table in blocks of rows, kept in block order.

    On disk a row has a block index of `⌈log₂ blocks⌉` bits, from which the permutation is rebuilt when it is loaded.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        sizes: Rows of every block; they add up to `vocab_size`.
        device: Device of the index.

    Raises:
        ValueError: If the sizes are not possible.
    """

    packed_block_index: Tensor
    position: Tensor
    order: Tensor

    def __init__(self, vocab_size: int, dim: int, sizes: Sequence[int], device: torch.device | None = None) -> None:
        """Rows in vocabulary order."""
        super().__init__(vocab_size, dim)
        if not sizes or min(sizes) < 0 or sum(sizes) != vocab_size:
            raise ValueError(f"sizes {shortened(list(sizes))} must add up to {vocab_size} rows")
        self.sizes = list(sizes)
        self.register_buffer("packed_block_index", torch.empty(0, dtype=torch.uint8, device=device))
        self.register_buffer("position", torch.empty(0, dtype=torch.long, device=device), persistent=False)
        self.register_buffer("order", torch.empty(0, dtype=torch.long, device=device), persistent=False)
        if self.packed_block_index.is_meta:
            # Only shapes are wanted: nothing is computed for as many rows as a file may say there are.
            self.packed_block_index = self.packed_block_index.new_empty(packed_bytes(vocab_size, bit_width(len(sizes))))
            self.position, self.order = self.position.new_empty(vocab_size), self.order.new_empty(vocab_size)
            self.in_order = True
            return
        with torch.device("cpu"):
            self._index(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))

    @property
    def block_of_row(self) -> Tensor:
        """`[vocab_size]` int64 block of every row."""
        return unpack_bits(self.packed_block_index, bit_width(len(self.sizes)), self.vocab_size)

    def _index(self, block_of_row: Tensor, device: torch.device | None = None) -> None:
        """Set which row is in which block, and the permutations that follow; None for the device of the index."""
        device = device or self.packed_block_index.device
        # Stable: within a block rows are in vocabulary order, so that the block index alone is enough. Narrow, as
        # sorting takes a copy.
        order = torch.argsort(block_of_row.to(torch.int32), stable=True)
        position = torch.empty_like(order)
        for chunk in row_chunks(self.vocab_size, 1):
            position[order[chunk]] = torch.arange(chunk.start, chunk.stop, device=order.device)
        self.in_order = bool((order[1:] > order[:-1]).all())
        self.packed_block_index = pack_bits(block_of_row, bit_width(len(self.sizes))).to(device)
        self.order, self.position = order.to(device), position.to(device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "packed_block_index" not in state_dict or self.packed_block_index.is_meta:
            return
        error_msgs: list[str] = args[-1]
        block_of_row = self.block_of_row
        if torch.bincount(block_of_row, minlength=len(self.sizes)).tolist() != self.sizes:
            error_msgs.append(
                f"the block index {prefix}packed_block_index is damaged: block sizes differ from the plan"
            )
            return
        # The factors may not be loaded yet, and still be on the meta device.
        self._index(block_of_row, block_of_row.device)

    def find_places(self) -> None:
        """Find where every row is, if that is not known yet: by the block index alone."""
        if self.position.is_meta:
            self._index(self.block_of_row)

    def runs_of(self, window: slice) -> Iterator[tuple[int, slice, Tensor]]:
        """Neighbouring rows of the table by blocks: the block, where they are in it one after the other, and their ids.

        Rows of a block are in the order of the table, so that those of a window are neighbours there too.
        """
        positions, order = self.position[window].sort()
        ends = torch.tensor(self.sizes, device=positions.device).cumsum(0)
        stops = torch.searchsorted(positions, ends).tolist()
        start = first = 0
        for block, (stop, size) in enumerate(zip(stops, self.sizes, strict=True)):
            if stop > start:
                place = int(positions[start]) - first
                yield block, slice(place, place + stop - start), order[start:stop] + window.start
            start, first = stop, first + size

    @classmethod
    def checked_sizes(cls, spec: dict[str, Any]) -> list[int]:
        """Sizes of a structure that came from a file.

        Raises:
            ValueError: If they are no list of integers, or too many.
        """
        return integers(spec, "sizes", MOST_BLOCKS)

    @abstractmethod
    def rows_of_blocks(self, places: Sequence[Tensor | None], sparse: bool = False) -> list[Tensor]:
        """Rows of the table by where they are in their blocks.

        Args:
            places: For every block `[*]` places from 0 to its size; None for a block that is not asked for.
            sparse: Whether gradients are sparse, see `Factorization.rows`.

        Returns:
            `[*, dim]` for every block that is asked for.
        """

    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows of the table, see `Factorization.rows`; every distinct id is computed once."""
        if is_exporting():
            return self._exported_rows(ids)
        return self._distinct_rows(ids, sparse)

    # Which blocks are asked for, and of how many rows, changes with every batch: compiled it would be over and over.
    @uncompiled
    def _distinct_rows(self, ids: Tensor, sparse: bool) -> Tensor:
        distinct, inverse = torch.unique(ids, return_inverse=True)
        return F.embedding(inverse, self.rows_at(self.position.index_select(0, distinct), sparse))

    def rows_at(self, position: Tensor, sparse: bool = False) -> Tensor:
        """`[n, dim]` rows by `[n]` positions in the order of blocks."""
        positions, by_position = position.sort()
        ends = torch.tensor(self.sizes, device=positions.device).cumsum(0)
        counts = torch.diff(torch.searchsorted(positions, ends), prepend=ends.new_zeros(1)).tolist()
        # In training blocks without an id too: all factors get a gradient, if of zeros, as DDP insists.
        every_block = torch.is_grad_enabled() or not position.numel()
        places: list[Tensor | None] = []
        start = 0
        for piece, size in zip(torch.split(positions, counts), self.sizes, strict=True):
            places.append(piece - start if piece.numel() or every_block else None)
            start += size
        place = torch.empty_like(by_position)
        place[by_position] = torch.arange(by_position.numel(), device=place.device)
        return F.embedding(place, torch.cat(self.rows_of_blocks(places, sparse)))

    def _exported_rows(self, ids: Tensor) -> Tensor:
        """Rows in a graph whose shapes do not depend on the ids: every id is looked up in every block."""
        positions = F.embedding(ids, self.position.unsqueeze(1)).squeeze(-1)
        starts = [sum(self.sizes[:block]) for block in range(len(self.sizes))]
        places = [
            (positions - start).clamp(0, size - 1) if size else None
            for start, size in zip(starts, self.sizes, strict=True)
        ]
        blocks = iter(self.rows_of_blocks(places))
        rows: Tensor | None = None
        for start, size in zip(starts, self.sizes, strict=True):
            if size:
                block, here = next(blocks), (positions >= start) & (positions < start + size)
                rows = block if rows is None else torch.where(here.unsqueeze(-1), block, rows)
        assert rows is not None
        return rows

    def tiles_in_block_order(self, maker: TileMaker) -> Tiles:
        """What a maker of tiles has collected of all blocks, one after the other."""
        return maker.made() if self.in_order else maker.made(self.order, self.position)

    @property
    def storage_order(self) -> Tensor | None:
        """See `Factorization.storage_order`."""
        return None if self.in_order else self.position

    @abstractmethod
    def logits_in_storage_order(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ` in block order, see `Factorization.logits_in_storage_order`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ`, see `Factorization.logits`."""
        blocks = self.logits_in_storage_order(hidden)
        if self.in_order:
            return blocks
        if is_exporting():
            return blocks.index_select(-1, self.position)
        return cast(Tensor, _VocabularyOrder.apply(blocks, self.position, self.order))  # type: ignore[no-untyped-call]


class _VocabularyOrder(torch.autograd.Function):
    """Bring logits from block order to vocabulary order.

    Backward of a permutation is the inverse permutation: a gather, where autograd would scatter and add.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, position: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return blocks.gather(-1, position.expand_as(blocks))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return gradients[0].gather(-1, order.expand_as(gradients[0])), None, None


def check_blocks(groups: Any, refine_rounds: int) -> None:
    """Check options that all methods with blocks have.

    Raises:
        ValueError: If one is out of its range.
    """
    if groups not in (None, "auto") and (not isinstance(groups, int) or groups < 1):
        raise ValueError(f"groups must be 1 or more, or 'auto', it is {groups!r}")
    if refine_rounds < 0:
        raise ValueError(f"refine_rounds must be 0 or more, it is {refine_rounds}")
