"""Where the packed codes of a shared basis are: run by run, or row by row for tables that are read from disk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.quantizers.packing import pack_into, packed_bytes, unpack_bits


class PackedLayout:
    """How the codes of all blocks are packed, one block after the other, without gaps within a part.

    Run by run a part has the components of one width of all rows of a block. Row by row a part is a block: the codes of
    a row are next to each other, of whatever widths, so that one read gets all of them.

    Args:
        sizes: Rows of every block.
        segments: Runs `[bits, components]` of every block; bits below 0 are those of a trellis.
        by_rows: Whether it is row by row.
    """

    def __init__(self, sizes: Sequence[int], segments: Sequence[Sequence[tuple[int, int]]], by_rows: bool) -> None:
        """Keep what is where."""
        self.sizes, self.by_rows = sizes, by_rows
        self.segments = [[(abs(bits), count) for bits, count in runs] for runs in segments]
        self.parts = [
            [sum(bits * count for bits, count in runs)] if by_rows else [bits * count for bits, count in runs]
            for runs in self.segments
        ]
        """Bits of a row in every part of a block."""
        lengths = [sum(packed_bytes(size, row) for row in rows) for size, rows in zip(sizes, self.parts, strict=True)]
        self.begins = list(accumulate(lengths, initial=0))
        """First byte of every block, and behind the last."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.begins[-1]

    def put(self, packed: Tensor, block: int, start: int, codes: Tensor) -> None:
        """Pack `[n, rank]` codes of a block behind those of its first rows, which are there already.

        Args:
            packed: uint8, of all blocks; written in place.
            block: Which.
            start: How many of its rows are there.
            codes: Of the next ones.
        """
        size, runs, begin, first = self.sizes[block], self.segments[block], self.begins[block], 0
        if self.by_rows:
            row = self.parts[block][0]
            part = packed[begin : begin + packed_bytes(size, row)]
            for chunk in row_chunks(len(codes), max(1, row)):
                pack_into(part, (start + chunk.start) * row, _digits(codes[chunk], runs).flatten(), 1)
            return
        for bits, count in runs:
            length = packed_bytes(size * count, bits)
            own = codes[:, first : first + count].flatten()
            pack_into(packed[begin : begin + length], start * count, own, bits)
            begin, first = begin + length, first + count

    def pack(self, codes: Sequence[Tensor], packed: Tensor) -> Tensor:
        """Pack the codes of all blocks, `[size, rank]` each, into `[nbytes]` uint8."""
        for block, own in enumerate(codes):
            self.put(packed, block, 0, own)
        return packed

    def unpack(self, packed: Tensor, codes: Sequence[Tensor]) -> None:
        """Write what is packed to the codes of all blocks, `[size, rank]` uint8 each."""
        for block, own in enumerate(codes):
            size, runs, begin, first = self.sizes[block], self.segments[block], self.begins[block], 0
            if self.by_rows:
                row = self.parts[block][0]
                part = packed[begin : begin + packed_bytes(size, row)]
                # Eight rows begin with a byte.
                for chunk in row_chunks(-(-size // 8), 8 * max(1, row)):
                    start, stop = 8 * chunk.start, min(size, 8 * chunk.stop)
                    digits = unpack_bits(part[start * row // 8 :], 1, (stop - start) * row, torch.uint8)
                    own[start:stop] = _of_digits(digits.view(stop - start, row), runs)
                continue
            for bits, count in runs:
                length = packed_bytes(size * count, bits)
                found = unpack_bits(packed[begin : begin + length], bits, size * count, torch.uint8)
                own[:, first : first + count] = found.view(-1, count)
                begin, first = begin + length, first + count


def _digits(codes: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """`[n, bits]` uint8 binary digits of `[n, rank]` codes, the lowest first."""
    parts, first = [codes.new_empty(len(codes), 0, dtype=torch.uint8)], 0
    for bits, count in runs:
        own = codes[:, first : first + count].to(torch.uint8).unsqueeze(2)
        parts.append(((own >> torch.arange(bits, device=own.device, dtype=torch.uint8)) & 1).flatten(1))
        first += count
    return torch.cat(parts, dim=1)


def _of_digits(digits: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """`[n, rank]` uint8 codes of their digits."""
    parts, first = [digits[:, :0]], 0
    for bits, count in runs:
        own = digits[:, first : first + bits * count].view(len(digits), count, bits)
        parts.append((own << torch.arange(bits, device=own.device, dtype=torch.uint8)).sum(dim=2, dtype=torch.uint8))
        first += bits * count
    return torch.cat(parts, dim=1)
