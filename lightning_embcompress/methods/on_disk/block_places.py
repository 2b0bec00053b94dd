"""Where rows are in their blocks, by the packed block index alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcompress.methods.quantizers.packing import bit_width, packed_bytes, unpack_bits

# Fewest rows of which the blocks are counted: as many are looked at to find one.
_STEP = 64
# Steps that are looked at at a time.
_STEPS = 2**12


class BlockPlaces:
    """Finds where a row is in its block: as many before it as there are earlier rows of that block.

    A permutation takes 8 bytes a row and has to be sorted; counts before every 64th row take two, or less, and are
    there at once.

    Args:
        packed: The packed block index.
        sizes: Rows of every block.

    Raises:
        ValueError: If the index is not of these blocks.

    Example:
        >>> from lightning_embcompress.methods.quantizers.packing import pack_bits
        >>> places = BlockPlaces(pack_bits(torch.tensor([1, 0, 1, 1, 0]), 1), [2, 3])
        >>> places.of(torch.tensor([0, 1, 3, 4]))
        tensor([2, 0, 4, 1])
    """

    def __init__(self, packed: Tensor, sizes: Sequence[int]) -> None:
        """Count."""
        self.packed, self.bits, self.rows = packed, bit_width(len(sizes)), sum(sizes)
        self.starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
        blocks = len(sizes)
        # Of many blocks more rows, so that counts take no more than 2 bytes a row; whole bytes of the index.
        self.step = max(_STEP, 8 * -(-blocks // 4))
        steps = -(-self.rows // self.step)
        counts = torch.zeros(steps + 1, blocks, dtype=torch.int32)
        for first in range(0, steps, _STEPS):
            own = self._blocks(first * self.step, min(self.rows, (first + _STEPS) * self.step)).long()
            if own.numel() and int(own.max()) >= blocks:
                raise ValueError("the block index is damaged: it has blocks that do not exist")
            number = torch.arange(len(own)) // self.step * blocks
            found = torch.bincount(number + own, minlength=-(-len(own) // self.step) * blocks).view(-1, blocks)
            counts[first + 1 : first + 1 + len(found)] = found
        self.counts = counts.cumsum(0, dtype=torch.int32)
        if self.counts[-1].tolist() != list(sizes):
            raise ValueError("the block index is damaged: block sizes differ from the plan")

    def of(self, ids: Tensor) -> Tensor:
        """`[n]` positions of `[n]` ids in the order of blocks."""
        step = ids // self.step
        around = (step * self.step).unsqueeze(1) + torch.arange(self.step)
        blocks = self._looked_up(around)
        place = ids - step * self.step
        own = blocks.gather(1, place.unsqueeze(1))
        before = ((blocks == own) & (torch.arange(self.step) < place.unsqueeze(1))).sum(dim=1)
        block = own.squeeze(1).long()
        return self.starts[block] + self.counts[step, block] + before

    def _blocks(self, start: int, stop: int) -> Tensor:
        if not self.bits:
            return torch.zeros(stop - start, dtype=torch.uint8)
        dtype = torch.uint8 if self.bits <= 8 else torch.int32
        # Steps begin with a byte.
        part = self.packed[start * self.bits // 8 : packed_bytes(stop, self.bits)]
        return unpack_bits(part, self.bits, stop - start, dtype)

    def _looked_up(self, ids: Tensor) -> Tensor:
        """`[n, m]` int32 blocks of ids; those behind the last row are of any."""
        if not self.bits:
            return torch.zeros(ids.shape, dtype=torch.int32)
        bit = ids * self.bits
        byte, last = bit >> 3, len(self.packed) - 1
        # Three bytes hold the bits of a block, at most 16, wherever they begin.
        parts = [self.packed[(byte + more).clamp(max=last)].int() << (8 * more) for more in range(3)]
        return ((parts[0] | parts[1] | parts[2]) >> (bit & 7).int()) & ((1 << self.bits) - 1)
