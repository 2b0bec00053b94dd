"""Codes of a shared basis: how they are stored, and how rows and logits are read from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from lightning_embcompress.methods.base import ConfigT
from lightning_embcompress.methods.blocks import RowBlocks
from lightning_embcompress.methods.kernels.choice import uncompiled
from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.quantizers.byte_tiles import ByteTiles
from lightning_embcompress.methods.quantizers.factors import materialize
from lightning_embcompress.methods.quantizers.onnx_blocks import is_for_onnx
from lightning_embcompress.methods.quantizers.packing import pack_bits, packed_bytes, unpack_bits
from lightning_embcompress.methods.shared_basis import onnx_codes
from lightning_embcompress.methods.shared_basis.code_views import (
    Frame,
    LaidOut,
    Places,
    byte_tile,
    code_tile,
    looked_up,
)
from lightning_embcompress.methods.shared_basis.layout import (
    SCALE_STEPS,
    from_integers,
    from_windows,
    integer_codes,
    level_tables,
    level_values,
    table_size,
)
from lightning_embcompress.methods.shared_basis.level_bytes import ByteLevels
from lightning_embcompress.methods.shared_basis.level_fitting import num_levels
from lightning_embcompress.methods.shared_basis.packed_layout import PackedLayout
from lightning_embcompress.methods.tiles import TileMaker
from lightning_embcompress.utils.graphs import is_exporting
from lightning_embcompress.utils.kept import Kept

# Coefficients that are looked up at a time on the way to the logits: 1 MiB of float32.
_PIECE = 2**18
# States up to which codes are multiplied as bytes where they are not laid out for that, and codes of which that is
# worth a copy.
_FEW_STATES, _MANY_CODES = 32, 2**18


_frames: Kept[Frame] = Kept()
_places: Kept[Places] = Kept()
_laid: Kept[LaidOut] = Kept()


class StoredCodes(RowBlocks[ConfigT]):
    """Codes, packed one segment after the other, the basis in 6 bits, means and scales in 8.

    In memory there are codes of a byte each beside those that are packed; once they are laid out for inference, bytes
    that are proportional to the levels take the place of both: 8 to 9 bits a weight, see `ByteTiles`.
    """

    rank: int
    segments: list[list[tuple[int, int]]]
    ranks: list[int]
    widths: list[int]
    window: int
    basis_bits: int
    by_rows: bool
    levels: Tensor
    packed_codes: Tensor
    codes: Tensor
    level_bytes: Tensor
    scale_codes: Tensor
    basis_codes: Tensor
    mean_codes: Tensor
    scale_unit: Tensor
    basis_scales: Tensor
    mean_scales: Tensor
    _byte_levels: ByteLevels | None = None

    def _make_codes(self, dtype: torch.dtype, device: torch.device | None) -> None:
        """Build all of it empty."""
        blocks = len(self.sizes)

        def buffer(name: str, *shape: int, persistent: bool = True, dtype: torch.dtype = torch.uint8) -> None:
            self.register_buffer(name, torch.zeros(*shape, dtype=dtype, device=device), persistent=persistent)

        self.levels = nn.Parameter(
            torch.zeros(sum(num_levels(bits) for bits in self.widths), dtype=dtype, device=device)
        )
        # Not trained: a step that suits levels, which are about 1, would be many times the size of these.
        buffer("scale_unit", 1 if self.rank else 0, dtype=dtype)
        buffer("basis_scales", self.rank, dtype=dtype)
        buffer("mean_scales", blocks, dtype=dtype)
        buffer("packed_codes", self.layout.nbytes)
        buffer("scale_codes", sum(self.ranks))
        shape = (self.rank, self.dim)
        buffer(
            "basis_codes", *(shape if self.basis_bits == 8 else [packed_bytes(self.rank * self.dim, self.basis_bits)])
        )
        buffer("mean_codes", blocks, self.dim)
        buffer("codes", self._num_codes(), persistent=False)
        buffer("level_bytes", 0, persistent=False)

    @property
    def layout(self) -> PackedLayout:
        """Where the packed codes are."""
        return PackedLayout(self.sizes, self.segments, self.by_rows)

    def _num_codes(self) -> int:
        """Codes of all blocks."""
        return sum(size * rank for size, rank in zip(self.sizes, self.ranks, strict=True))

    def _level_values(self, sparse: bool = False) -> Tensor:
        """All levels, one width after the other."""
        return level_values(materialize(self.levels, sparse), self.widths)

    def _level_tables(self) -> dict[int, Tensor]:
        """Levels of every width."""
        return level_tables(self._level_values(), self.widths)

    def _block_codes(self) -> list[Tensor]:
        """`[size, rank]` codes of every block."""
        if self._byte_levels is not None:
            self._take_back()
        found, start = [], 0
        for size, rank in zip(self.sizes, self.ranks, strict=True):
            # Not `torch.split`, of which runtimes have none for bytes.
            found.append(self.codes[start : start + size * rank].view(size, rank))
            start += size * rank
        return found

    def _packed(self, codes: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The codes of all blocks as they are stored, packed, in new memory if there is no other."""
        layout = self.layout
        return layout.pack(codes, self.packed_codes.new_empty(layout.nbytes) if out is None else out)

    def allocate_frame(self, device: torch.device) -> None:
        """Give all that is on the meta device memory, but for what there is for every row."""
        for tensors in (self._parameters, self._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta and name not in ("packed_codes", "codes"):
                    empty = torch.zeros_like(tensor, device=device)
                    tensors[name] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty  # type: ignore[assignment]

    def _unpack(self) -> None:
        """Read the codes of all blocks from what is packed."""
        # The packed codes may have come to another device than that which is left.
        device = self.packed_codes.device
        self.codes = torch.empty_like(self.codes, device=device)
        self.level_bytes = torch.empty_like(self.level_bytes, device=device)
        codes = self._block_codes()
        self.layout.unpack(self.packed_codes, codes)
        for block, runs in zip(codes, self.segments, strict=True) if self.window else ():
            # A few rows at a time: windows take four bytes each.
            for chunk in row_chunks(*block.shape):
                block[chunk] = from_windows(block[chunk], runs, self.window)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loads = prefix + "packed_codes" in state_dict
        if loads and self._byte_levels is not None:
            self._take_back()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if loads and not self.packed_codes.is_meta:
            self._unpack()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._byte_levels is not None and not self.window:
            destination[prefix + "packed_codes"] = self._packed(self._decoded(self._byte_levels))

    def _frame(self) -> Frame:
        """What the codes stand on, computed once."""
        read = (self.basis_codes, self.basis_scales, self.mean_codes, self.mean_scales)
        return _frames.of([*read, self.scale_codes, self.scale_unit], self._read_frame)

    def _read_frame(self) -> Frame:
        if is_for_onnx():
            basis, scales = onnx_codes.basis_values(self), onnx_codes.scale_values(self)
        else:
            codes, rank, dim = self.basis_codes, self.rank, self.dim
            if self.basis_bits < 8:
                codes = unpack_bits(codes, self.basis_bits, rank * dim, torch.uint8).view(rank, dim)
            basis = from_integers(codes, self.basis_scales, self.basis_bits)
            scales = torch.exp2(self.scale_codes.float() / -SCALE_STEPS).to(self.dtype) * self.scale_unit
        means = from_integers(self.mean_codes, self.mean_scales)
        starts = dict(zip(self.widths, accumulate(map(table_size, self.widths), initial=0), strict=False))
        offsets = [[starts[bits] for bits, count in runs for _ in range(count)] for runs in self.segments]
        places = [torch.tensor(one, dtype=torch.int32, device=self.scale_codes.device) for one in offsets]
        return Frame(basis, means, list(torch.split(scales, self.ranks)), places)

    def _place_codes(self) -> Places:
        device, frame = self.scale_codes.device, self._frame()
        rows, ranks = torch.tensor(self.sizes), torch.tensor(self.ranks)
        codes = rows * ranks
        numbers = torch.stack([rows.cumsum(0) - rows, codes.cumsum(0) - codes, ranks], dim=1)
        scales, offsets = (pad_sequence(list(one), batch_first=True) for one in (frame.scales, frame.offsets))
        return Places(rows.cumsum(0).to(device), numbers.to(device), scales, offsets)

    def _rows_of_codes(self, ids: Tensor, sparse: bool) -> Tensor:
        """`[n, dim]` rows of `[n]` ids, all blocks at once."""
        frame = self._frame()
        places = _places.of([self.codes, self.scale_codes, self.scale_unit], self._place_codes)
        position = self.position.index_select(0, ids)
        block = torch.searchsorted(places.ends, position, right=True)
        first_row, first_code, rank = torch.split(places.numbers[block], 1, dim=1)
        begin = first_code + (position.unsqueeze(1) - first_row) * rank
        component = torch.arange(self.rank, device=ids.device)
        codes = looked_up(self.codes, torch.where(component < rank, begin + component, 0))
        return self._rows_by_codes(codes, block, places, frame, sparse)

    def _rows_by_codes(self, codes: Tensor, block: Tensor, places: Places, frame: Frame, sparse: bool) -> Tensor:
        values = looked_up(self._level_values(sparse), codes.int() + places.offsets[block])
        return (values * places.scales[block]) @ frame.basis + frame.means[block]

    def rows_of_places(self, positions: Tensor) -> Tensor:
        """`[n, dim]` rows by their positions in the order of blocks, of codes that are read from a file."""
        stored: Any = self._modules["packed_codes"]
        frame, places = self._frame(), _places.of([self.codes, self.scale_codes, self.scale_unit], self._place_codes)
        positions = positions.to(places.ends.device)
        block = torch.searchsorted(places.ends, positions, right=True)
        within = positions - places.numbers[block, 0]
        codes = stored.read(block.cpu(), within.cpu()).to(block.device)
        for one in torch.unique(block).tolist() if self.window else ():
            own, rank = (block == one).nonzero().squeeze(1), self.ranks[one]
            codes[own, :rank] = from_windows(codes[own, :rank], self.segments[one], self.window)
        return self._rows_by_codes(codes, block, places, frame, sparse=False)

    @uncompiled
    def _rows_of_bytes(self, ids: Tensor, laid: LaidOut) -> Tensor:
        """`[*, dim]` rows of `[*]` ids; every distinct one is computed once."""
        frame = self._frame()
        positions, inverse = self.position.index_select(0, ids.reshape(-1)), None
        if len(positions) > 1:
            positions, inverse = torch.unique(positions, return_inverse=True)
        coefficients, blocks = laid.coefficients(positions, self.rank)
        rows = frame.means.index_select(0, blocks).addmm_(coefficients.to(frame.basis.dtype), frame.basis)
        return (rows if inverse is None else F.embedding(inverse, rows)).view(*ids.shape, self.dim)

    def _coded_products(self, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """States, codes, offsets of their levels, and the constant of every block."""
        frame = self._frame()
        reduced, constant = F.linear(hidden, frame.basis), F.linear(hidden, frame.means)
        blocks = zip(self.ranks, frame.scales, self._block_codes(), frame.offsets, strict=True)
        for block, (rank, scale, codes, offsets) in enumerate(blocks):
            yield reduced[..., :rank] * scale, codes, offsets, constant[..., block : block + 1]

    def _code_logits(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ` in block order."""
        laid = self._for_bytes(hidden)
        if laid is not None:
            return self._byte_logits(hidden, laid)
        pieces: list[Tensor] = []
        for states, codes, offsets, shift in self._coded_products(hidden):
            pieces += [part + shift for part in self._code_products(states, codes, offsets)]
        return torch.cat(pieces, dim=-1)

    def _code_products(self, states: Tensor, codes: Tensor, offsets: Tensor) -> list[Tensor]:
        """Products with the coefficients of a block, a piece at a time; their values are never there as a whole."""

        def product(states: Tensor, piece: Tensor, levels: Tensor) -> Tensor:
            return F.linear(states, looked_up(levels, piece.int() + offsets))

        keeps, levels = torch.is_grad_enabled() and not is_exporting(), self._level_values()
        step = max(1, _PIECE // max(1, codes.shape[1]))
        # Not `torch.split`, of which runtimes have none for bytes.
        pieces = [codes[start : start + step] for start in range(0, codes.shape[0], step)]
        return [
            checkpoint(product, states, piece, levels, use_reentrant=False) if keeps else product(states, piece, levels)
            for piece in pieces
        ]

    def _code_tiles(self, hidden: Tensor, tile_rows: int) -> TileMaker:
        maker = TileMaker(tile_rows)
        laid = self._for_bytes(hidden)
        if laid is not None:
            frame = self._frame()
            (reduced,), constant = maker.share(F.linear(hidden, frame.basis)), F.linear(hidden, frame.means)
            for block, (tiles, units) in enumerate(zip(laid.blocks, laid.units, strict=True)):
                reads = (reduced, *maker.share(constant[..., block : block + 1]))
                maker.add(tiles.shape.rows, reads, byte_tile(tiles, units, constant.dtype))
            return maker
        levels = maker.share(self._level_values())
        for states, codes, offsets, shift in self._coded_products(hidden):
            maker.add(len(codes), (*maker.share(states, shift), *levels), code_tile(codes, offsets))
        return maker

    def _rows_as_bytes(self) -> LaidOut | None:
        """Bytes to look rows up in, where codes are laid out as such, still on the CPU, and no gradient is wanted."""
        if self._byte_levels is None:
            return None
        if self.level_bytes.device.type != "cpu" or (torch.is_grad_enabled() and self.levels.requires_grad):
            self._take_back()
            return None
        return self._laid_out(self._byte_levels)

    def _for_bytes(self, hidden: Tensor) -> LaidOut | None:
        """Bytes to multiply states with, where no gradient is wanted and that is faster; otherwise None."""
        wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or self.levels.requires_grad)
        if wants_gradient or hidden.device.type != "cpu" or hidden.dtype == torch.float64 or not hidden.numel():
            return None
        if torch.compiler.is_compiling():
            return None
        if self._byte_levels is not None:
            return self._laid_out(self._byte_levels)
        # A change of tensors that were made for inference cannot be seen, and would leave a copy of what they were.
        is_worth_a_copy = self.codes.numel() >= _MANY_CODES and not self.packed_codes.is_inference()
        if not is_worth_a_copy or hidden.numel() > _FEW_STATES * self.dim:
            return None
        read = [self.packed_codes, self.levels, self.scale_codes, self.scale_unit]
        return _laid.of(read, lambda: self._lay(ByteLevels.of(self._level_tables(), exact=True)))

    def _byte_logits(self, hidden: Tensor, laid: LaidOut) -> Tensor:
        frame, states = self._frame(), hidden.reshape(-1, self.dim)
        reduced, constant = F.linear(states, frame.basis), F.linear(states, frame.means)
        return laid.logits(reduced, constant).view(*hidden.shape[:-1], self.vocab_size)

    def _lay(self, levels: ByteLevels, flat: Tensor | None = None) -> LaidOut:
        """Bytes of all blocks: those there are, or made of the codes."""
        shapes = [levels.shape(size, runs) for size, runs in zip(self.sizes, self.segments, strict=True)]
        lengths = [shape.nbytes for shape in shapes]
        data = torch.empty(sum(lengths), dtype=torch.uint8) if flat is None else flat
        pieces = list(zip(shapes, torch.split(data, lengths), strict=True))
        if flat is None:
            blocks = [ByteTiles.empty(shape, own) for shape, own in pieces]
            for tiles, codes, runs in zip(blocks, self._block_codes(), self.segments, strict=True):
                levels.encode(codes, runs, tiles)
        else:
            blocks = [ByteTiles(shape, own) for shape, own in pieces]
        scales = zip(self.segments, self._frame().scales, strict=True)
        return LaidOut.of(data, blocks, [levels.units_of(runs, own) for runs, own in scales])

    def _laid_out(self, levels: ByteLevels) -> LaidOut:
        read = [self.level_bytes, self.scale_codes, self.scale_unit]
        return _laid.of(read, lambda: self._lay(levels, self.level_bytes))

    def _decoded(self, levels: ByteLevels) -> list[Tensor]:
        blocks = self._laid_out(levels).blocks
        return [levels.decode(own, runs) for own, runs in zip(blocks, self.segments, strict=True)]

    @torch.no_grad()
    def lay_out(self) -> bool:
        """See `Factorization.lay_out`: bytes take the place of all codes, until a gradient is wanted."""
        fits = self.is_coded and self.rank and self.codes.device.type == "cpu" and self.dtype != torch.float64
        if self._byte_levels is None and fits:
            levels = ByteLevels.of(self._level_tables(), exact=False)
            with torch.inference_mode(mode=False):
                self.level_bytes = self._lay(levels).data
                self.codes = self.codes.new_empty(0)
                # Which windows the bytes of a trellis were read in can no longer be seen.
                self.packed_codes = self.packed_codes if self.window else self.packed_codes.new_empty(0)
            self._byte_levels = levels
        return self._byte_levels is not None

    def materialize(self) -> Tensor:
        """The whole table as the codes say, see `Factorization.materialize`."""
        if self._byte_levels is not None:
            self._take_back()
        return super().materialize()

    @torch.no_grad()
    def _take_back(self) -> None:
        """Let the codes take the place of the bytes that they were laid out as."""
        assert self._byte_levels is not None
        with torch.inference_mode(mode=False):
            if self.window:
                self.codes = self.packed_codes.new_empty(self._num_codes())
                self.level_bytes, self._byte_levels = self.level_bytes.new_empty(0), None
                self._unpack()
                return
            codes = self._decoded(self._byte_levels)
            self.packed_codes = self._packed(codes)
            self.codes = torch.cat([block.flatten() for block in codes])
            self.level_bytes, self._byte_levels = self.level_bytes.new_empty(0), None

    def _store_frame(self, basis: Tensor, means: Tensor, scales: Tensor) -> None:
        """Round basis and means to integers, and `[Σ rank]` scales to steps of their logarithms."""
        self.scale_unit.fill_(max([0.0, *scales.tolist()]))
        steps = torch.log2(scales.double().cpu().clamp(min=1e-300) / self.scale_unit.double().cpu().clamp(min=1e-300))
        self.scale_codes.copy_((-SCALE_STEPS * steps).round().clamp(0, 255).to(torch.uint8))
        for name, values, bits in (("basis", basis, self.basis_bits), ("mean", means, 8)):
            codes, units = integer_codes(values, bits)
            getattr(self, f"{name}_codes").copy_(codes if bits == 8 else pack_bits(codes.flatten(), bits))
            getattr(self, f"{name}_scales").copy_(units)

    @torch.no_grad()
    def store(self, codes: Sequence[Tensor], basis: Tensor, means: Tensor, scales: Tensor) -> None:
        """Keep other codes, and what they stand on.

        Args:
            codes: `[size, rank]` of every block, as they are stored.
            basis: `[rank, dim]`.
            means: `[blocks, dim]`.
            scales: `[Σ rank]`, those of the components of every block.
        """
        self._store_frame(basis, means, scales)
        for place, values in zip(self._block_codes(), codes, strict=True):
            place.copy_(values)
        self.packed_codes = self._packed(self._block_codes())
        if self.window:
            self._unpack()
