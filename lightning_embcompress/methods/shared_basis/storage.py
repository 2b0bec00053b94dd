"""How blocks of rows that share one basis are stored, read, and quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from lightning_embcompress.methods.base import ConfigT, is_exporting
from lightning_embcompress.methods.block_products import BlockProducts
from lightning_embcompress.methods.blocks import RowBlocks
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.products import balance_product, store_product
from lightning_embcompress.methods.quantizers.factors import Factor, materialize, read_rows
from lightning_embcompress.methods.quantizers.packing import pack_bits, packed_bytes, unpack_bits
from lightning_embcompress.methods.quantizers.quantization import Quantization, State
from lightning_embcompress.methods.shared_basis.layout import (
    SCALE_STEPS,
    byte_codes,
    checked_segments,
)
from lightning_embcompress.methods.specs import integer, integers, positive_integers
from lightning_embcompress.methods.tiles import TileMaker, Tiles

# Coefficients that are looked up at a time on the way to the logits: 1 MiB of float32.
_PIECE = 2**18


class SharedBasisStorage(RowBlocks[ConfigT]):
    """What `SharedBasisBlocks` stores, and how it is read: all of it but how blocks, basis and widths are found.

    Coefficients are floats, parameters of their own for every block, or codes. Codes are stored packed, one segment
    after the other, and are unpacked to a byte each when they are loaded.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        rank: Rows of the basis.
        sizes: Rows of every block; they add up to `vocab_size`.
        segments: For every block, runs `[bits, components]` of the components that it keeps; bits 0 for floats.
        is_coded: Whether coefficients are codes.
        dtype: Dtype of the factors.
        device: Device of the factors.

    Raises:
        ValueError: If the structure is not possible.
    """

    entries: ClassVar[tuple[str, ...]] = ("rank", "sizes", "segments", "is_coded")
    shared_factors = ("basis", "means")
    packed_codes: Tensor
    codes: Tensor
    scale_codes: Tensor
    basis_codes: Tensor
    mean_codes: Tensor
    scale_unit: Tensor
    basis_scales: Tensor
    mean_scales: Tensor

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        rank: int,
        sizes: Sequence[int],
        segments: Sequence[Sequence[Sequence[int]]],
        is_coded: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Build it empty."""
        super().__init__(vocab_size, dim, sizes, device)
        self.rank = rank
        self.segments, self.ranks, self.widths = checked_segments(dim, rank, len(self.sizes), segments, is_coded)
        self.is_coded = is_coded
        blocks = len(self.sizes)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        def buffer(name: str, *shape: int, persistent: bool = True) -> None:
            values = torch.zeros(*shape, dtype=torch.uint8, device=device)
            self.register_buffer(name, values, persistent=persistent)

        if not self.is_coded:
            self.coefficients = nn.ParameterList(
                parameter(size, count) for size, count in zip(self.sizes, self.ranks, strict=True)
            )
            self.basis = parameter(rank, dim)
            self.means = parameter(blocks, dim)
            return
        self.levels = parameter(sum(2**bits for bits in self.widths))
        # Not trained: a step that suits levels, which are about 1, would be many times the size of these.
        for name, count in (("scale_unit", 1 if rank else 0), ("basis_scales", rank), ("mean_scales", blocks)):
            self.register_buffer(name, torch.zeros(count, dtype=dtype, device=device))
        buffer("packed_codes", sum(packed_bytes(size * n, bits) for size, bits, n in self._runs()))
        buffer("scale_codes", sum(self.ranks))
        buffer("basis_codes", rank, dim)
        buffer("mean_codes", blocks, dim)
        buffer("codes", sum(size * n for size, n in zip(self.sizes, self.ranks, strict=True)), persistent=False)

    def _runs(self) -> Iterator[tuple[int, int, int]]:
        """Rows, bits and components of every segment, in the order in which they are packed."""
        for size, runs in zip(self.sizes, self.segments, strict=True):
            for bits, count in runs:
                yield size, bits, count

    def _block_codes(self) -> list[Tensor]:
        """`[size, rank]` codes of every block."""
        codes, start = [], 0
        for size, rank in zip(self.sizes, self.ranks, strict=True):
            # Not `torch.split`, of which runtimes have none for bytes.
            codes.append(self.codes[start : start + size * rank].view(size, rank))
            start += size * rank
        return codes

    def _pack(self) -> None:
        """Pack the codes of all blocks."""
        packed = []
        for block, runs in zip(self._block_codes(), self.segments, strict=True):
            start = 0
            for bits, count in runs:
                packed.append(pack_bits(block[:, start : start + count].flatten(), bits))
                start += count
        self.packed_codes = torch.cat([self.packed_codes.new_empty(0), *packed])

    def _unpack(self) -> None:
        """Read the codes of all blocks from what is packed."""
        # The packed codes may have come to another device than that which is left.
        self.codes = torch.empty_like(self.codes, device=self.packed_codes.device)
        begin = 0
        for block, runs in zip(self._block_codes(), self.segments, strict=True):
            start = 0
            for bits, count in runs:
                number = block.shape[0] * count
                length = packed_bytes(number, bits)
                codes = unpack_bits(self.packed_codes[begin : begin + length], bits, number, torch.uint8)
                block[:, start : start + count] = codes.view(-1, count)
                start, begin = start + count, begin + length

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.is_coded and prefix + "packed_codes" in state_dict and not self.packed_codes.is_meta:
            self._unpack()

    def _read(self, sparse: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Basis, means, and scales of every block, of codes."""
        if not self.is_coded:
            return (
                materialize(self.basis, sparse),
                materialize(self.means, sparse),
                [self.position.new_empty(0)] * len(self.sizes),
            )
        basis = (self.basis_codes.to(self.dtype) - 128) * self.basis_scales.unsqueeze(1)
        means = (self.mean_codes.to(self.dtype) - 128) * self.mean_scales.unsqueeze(1)
        scales = torch.exp2(self.scale_codes.float() / -SCALE_STEPS).to(self.dtype) * self.scale_unit
        return basis, means, list(torch.split(scales, self.ranks))

    def _factors(self, sparse: bool = False) -> Sequence[Factor]:
        """Coefficients of every block, of floats."""
        return list(self.coefficients)

    def _offsets(self) -> list[Tensor]:
        """Where the levels of every component of a block begin, int32."""
        starts = dict(zip(self.widths, accumulate((2**bits for bits in self.widths), initial=0), strict=False))
        device = self.codes.device
        return [
            torch.tensor([starts[bits] for bits, count in runs for _ in range(count)], dtype=torch.int32, device=device)
            for runs in self.segments
        ]

    def rows_of_blocks(self, places: Sequence[Tensor | None], sparse: bool = False) -> list[Tensor]:
        """Rows of the table by their places in every block, see `RowBlocks.rows_of_blocks`."""
        basis, means, scales = self._read(sparse)
        codes = self._block_codes() if self.is_coded else []
        offsets = self._offsets() if self.is_coded else []
        factors = [] if self.is_coded else self._factors(sparse)
        levels = materialize(self.levels, sparse) if self.is_coded else None
        rows = []
        for block, place in enumerate(places):
            if place is None:
                continue
            if levels is not None:
                index = F.embedding(place, codes[block]).int() + offsets[block]
                values = _looked_up(levels, index) * scales[block]
            else:
                values = read_rows(factors[block], place, sparse)
            rows.append(values @ basis[: self.ranks[block]] + means[block])
        return rows

    def logits_in_storage_order(self, hidden: Tensor) -> Tensor:
        """See `Factorization.logits_in_storage_order`: one product with the basis, then one a block."""
        if not self.is_coded:
            return self._products(hidden).logits()
        pieces: list[Tensor] = []
        for states, codes, offsets, shift in self._coded_products(hidden):
            pieces += [part + shift for part in self._code_products(states, codes, offsets)]
        return torch.cat(pieces, dim=-1)

    def _tiles(self, hidden: Tensor, tile_rows: int) -> Tiles:
        if not self.is_coded:
            return self.tiles_in_block_order(self._products(hidden).tiles(tile_rows))
        maker = TileMaker(tile_rows)
        levels = maker.share(self.levels)
        for states, codes, offsets, shift in self._coded_products(hidden):
            maker.add(len(codes), (*maker.share(states, shift), *levels), _code_tile(codes, offsets))
        return self.tiles_in_block_order(maker)

    def _products(self, hidden: Tensor) -> BlockProducts:
        """Of coefficients that are floats."""
        basis, means, _ = self._read()
        reduced = F.linear(hidden, basis)
        parts = [reduced[..., :rank] for rank in self.ranks]
        return BlockProducts(hidden, self._factors(), reduced, [0] * len(parts), parts, F.linear(hidden, means))

    def _coded_products(self, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """States, codes, offsets of their levels, and the constant of every block whose coefficients are codes."""
        basis, means, scales = self._read()
        reduced, constant = F.linear(hidden, basis), F.linear(hidden, means)
        blocks = zip(self.ranks, scales, self._block_codes(), self._offsets(), strict=True)
        for block, (rank, scale, codes, offsets) in enumerate(blocks):
            yield reduced[..., :rank] * scale, codes, offsets, constant[..., block : block + 1]

    def _code_products(self, states: Tensor, codes: Tensor, offsets: Tensor) -> list[Tensor]:
        """Products with the coefficients of a block, a piece at a time; their values are never there as a whole."""

        def product(states: Tensor, piece: Tensor, levels: Tensor) -> Tensor:
            return F.linear(states, _looked_up(levels, piece.int() + offsets))

        keeps = torch.is_grad_enabled() and not is_exporting()
        step = max(1, _PIECE // max(1, codes.shape[1]))
        # Not `torch.split`, of which runtimes have none for bytes.
        pieces = [codes[start : start + step] for start in range(0, codes.shape[0], step)]
        return [
            checkpoint(product, states, piece, self.levels, use_reentrant=False)
            if keeps
            else product(states, piece, self.levels)
            for piece in pieces
        ]

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        if not isinstance(spec.get("is_coded"), bool):
            raise ValueError("the structure's 'is_coded' must be true or false")
        blocks = cls.checked_blocks(spec, dim)
        return cls(vocab_size, dim, integer(spec, "rank"), *blocks, spec["is_coded"], dtype, device)

    @classmethod
    def checked_blocks(cls, spec: dict[str, Any], dim: int) -> tuple[list[int], list[Any]]:
        """Sizes and segments of a structure that came from a file.

        Raises:
            ValueError: If they are no lists of integers, or too many.
        """
        sizes = cls.checked_sizes(spec)
        segments = spec.get("segments")
        if not isinstance(segments, list) or len(segments) > len(sizes):
            raise ValueError("the structure's 'segments' must be a list with an entry for every block")
        for runs in segments:
            if not isinstance(runs, list) or len(runs) > dim:
                raise ValueError("the structure's 'segments' must be lists of [bits, components]")
            for run in runs:
                if len(integers({"segments": run}, "segments")) != 2:
                    raise ValueError("the structure's 'segments' must be lists of [bits, components]")
        return sizes, segments

    @property
    def num_values(self) -> int:
        """Coefficients, codes or not, and what they stand on, see `Factorization.num_values`."""
        frame = (self.rank + len(self.sizes)) * self.dim
        coefficients = sum(size * rank for size, rank in zip(self.sizes, self.ranks, strict=True))
        return frame + coefficients + (self.levels.numel() if self.is_coded else 0)

    def _store_frame(self, basis: Tensor, means: Tensor, scales: Tensor) -> None:
        """Round what codes stand on: basis and means to 8 bits, and `[Σ rank]` scales to steps of their logarithms."""
        self.scale_unit.fill_(max([0.0, *scales.tolist()]))
        steps = torch.log2(scales.double().cpu().clamp(min=1e-300) / self.scale_unit.double().cpu().clamp(min=1e-300))
        self.scale_codes.copy_((-SCALE_STEPS * steps).round().clamp(0, 255).to(torch.uint8))
        for name, values in (("basis", basis), ("mean", means)):
            rounded, units = byte_codes(values)
            getattr(self, f"{name}_codes").copy_(rounded)
            getattr(self, f"{name}_scales").copy_(units)

    @torch.no_grad()
    def store(self, codes: Sequence[Tensor], basis: Tensor, means: Tensor, scales: Tensor) -> None:
        """Keep other codes, and what they stand on.

        Args:
            codes: `[size, rank]` of every block.
            basis: `[rank, dim]`.
            means: `[blocks, dim]`.
            scales: `[Σ rank]`, those of the components of every block.
        """
        self._store_frame(basis, means, scales)
        for place, values in zip(self._block_codes(), codes, strict=True):
            place.copy_(values)
        self._pack()

    @property
    def is_packed(self) -> bool:
        """Whether its coefficients are codes, or were packed, see `Factorization.is_packed`."""
        return self.is_coded or super().is_packed

    def balance(self) -> None:
        """See `Factorization.balance`."""
        if not self.is_coded:
            balance_product(list(self.coefficients), self.basis)

    @torch.no_grad()
    def quantized(self, quantization: Quantization, metric: Metric | None = None) -> Self:
        """Balanced, and rounded with error feedback in the metric, see `Factorization.quantized`."""
        packed = self._copied()
        packed.hold(quantization, "packed")
        means: Any = packed.means
        means.fill(self.means)
        rows = torch.split(self.order, self.sizes)
        store_product(list(packed.coefficients), packed.basis, list(self.coefficients), self.basis, metric, rows)
        return packed

    def hold(self, quantization: Quantization, state: State) -> None:
        """See `Factorization.hold`.

        Raises:
            ValueError: If the coefficients are codes.
        """
        if self.is_coded:
            raise ValueError("codes have widths of their own, and no other quantization")
        super().hold(quantization, state)


def _code_tile(codes: Tensor, offsets: Tensor) -> Callable[[int, int], Callable[..., Tensor]]:
    def logits_of(start: int, stop: int) -> Callable[..., Tensor]:
        def logits(states: Tensor, shift: Tensor, levels: Tensor) -> Tensor:
            return F.linear(states, _looked_up(levels, codes[start:stop].int() + offsets)) + shift

        return logits

    return logits_of


def _looked_up(levels: Tensor, index: Tensor) -> Tensor:
    """Single numbers by their places; of rows of one number `F.embedding` takes four times as long."""
    return levels.index_select(0, index.reshape(-1)).view(index.shape)
