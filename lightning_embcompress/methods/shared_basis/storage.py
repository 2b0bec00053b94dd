"""How blocks of rows that share one basis are stored, read, and quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lightning_embcompress.methods.base import ConfigT
from lightning_embcompress.methods.block_products import BlockProducts
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.products import balance_product, store_product
from lightning_embcompress.methods.quantizers.factors import Factor, materialize, read_rows
from lightning_embcompress.methods.quantizers.onnx_blocks import is_for_onnx
from lightning_embcompress.methods.quantizers.quantization import Quantization, State
from lightning_embcompress.methods.shared_basis import onnx_codes
from lightning_embcompress.methods.shared_basis.code_views import looked_up
from lightning_embcompress.methods.shared_basis.layout import BASIS_BITS, checked_segments
from lightning_embcompress.methods.shared_basis.stored_codes import StoredCodes
from lightning_embcompress.methods.specs import integer, integers, positive_integers
from lightning_embcompress.methods.tiles import Tiles
from lightning_embcompress.utils.graphs import is_exporting


class SharedBasisStorage(StoredCodes[ConfigT]):
    """What `SharedBasisBlocks` stores, and how it is read: all of it but how blocks, basis and widths are found.

    Coefficients are floats, parameters of their own for every block, or codes, see `StoredCodes`.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        rank: Rows of the basis.
        sizes: Rows of every block; they add up to `vocab_size`.
        segments: For every block, runs `[bits, components]` of the components that it keeps; bits 0 for floats.
        is_coded: Whether coefficients are codes.
        dtype: Dtype of the factors.
        device: Device of the factors.
        window: Bits of the windows of a trellis, which has the segments of bits below 0; 0 for none.
        basis_bits: Bits of a number of the basis, of codes.
        by_rows: Whether codes are packed row by row, see `PackedLayout`.

    Raises:
        ValueError: If the structure is not possible.
    """

    entries: ClassVar[tuple[str, ...]] = ("rank", "sizes", "segments", "is_coded")
    shared_factors = ("basis", "means")
    row_factors = ("packed_codes", "coefficients")

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
        window: int = 0,
        basis_bits: int = BASIS_BITS,
        by_rows: bool = False,
    ) -> None:
        """Build it empty."""
        super().__init__(vocab_size, dim, sizes, device)
        self.rank, self.window, self.basis_bits, self.by_rows = rank, window, basis_bits, by_rows
        checked = checked_segments(dim, rank, len(self.sizes), segments, is_coded, window)
        self.segments, self.ranks, self.widths = checked
        self.is_coded = is_coded
        blocks = len(self.sizes)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        if not self.is_coded:
            self.coefficients = nn.ParameterList(
                parameter(size, count) for size, count in zip(self.sizes, self.ranks, strict=True)
            )
            self.basis = parameter(rank, dim)
            self.means = parameter(blocks, dim)
            return
        self._make_codes(dtype, device)

    def _read(self, sparse: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Basis, means, and scales of every block, of codes."""
        if not self.is_coded:
            return (
                materialize(self.basis, sparse),
                materialize(self.means, sparse),
                [self.position.new_empty(0)] * len(self.sizes),
            )
        frame = self._frame()
        return frame.basis, frame.means, frame.scales

    def _factors(self, sparse: bool = False) -> Sequence[Factor]:
        """Coefficients of every block, of floats."""
        return list(self.coefficients)

    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows of the table, see `Factorization.rows`; every distinct id is computed once."""
        if self._is_read_by_onnx():
            return onnx_codes.rows(self, ids)
        if not self.is_coded or is_exporting():
            return super().rows(ids, sparse)
        laid = self._rows_as_bytes()
        if laid is not None:
            return self._rows_of_bytes(ids, laid)
        # How many ids are distinct changes with every batch: compiled it would be over and over.
        if ids.numel() == 1 or torch.compiler.is_compiling():
            return self._rows_of_codes(ids.reshape(-1), sparse).view(*ids.shape, self.dim)
        distinct, inverse = torch.unique(ids, return_inverse=True)
        return F.embedding(inverse, self._rows_of_codes(distinct, sparse))

    def rows_of_blocks(self, places: Sequence[Tensor | None], sparse: bool = False) -> list[Tensor]:
        """Rows of the table by their places in every block, see `RowBlocks.rows_of_blocks`."""
        basis, means, scales = self._read(sparse)
        codes, offsets = (self._block_codes(), self._frame().offsets) if self.is_coded else ([], [])
        factors = [] if self.is_coded else self._factors(sparse)
        rows = []
        for block, place in enumerate(places):
            if place is None:
                continue
            if self.is_coded:
                index = F.embedding(place, codes[block]).int() + offsets[block]
                values = looked_up(self._level_values(sparse), index) * scales[block]
            else:
                values = read_rows(factors[block], place, sparse)
            rows.append(values @ basis[: self.ranks[block]] + means[block])
        return rows

    def logits_in_storage_order(self, hidden: Tensor) -> Tensor:
        """See `Factorization.logits_in_storage_order`: one product with the basis, then one a block."""
        if self._is_read_by_onnx():
            return onnx_codes.logits(self, hidden)
        return self._code_logits(hidden) if self.is_coded else self._products(hidden).logits()

    def _is_read_by_onnx(self) -> bool:
        """Whether a graph of ONNX reads codes from their bytes; it gets those of a trellis, or by rows, as they are."""
        return (
            self.is_coded
            and not (self.window or self.by_rows)
            and is_for_onnx()
            and self.dtype == torch.float32
            and self.rank > 0
        )

    def _tiles(self, hidden: Tensor, tile_rows: int) -> Tiles:
        maker = self._code_tiles(hidden, tile_rows) if self.is_coded else self._products(hidden).tiles(tile_rows)
        return self.tiles_in_block_order(maker)

    def _products(self, hidden: Tensor) -> BlockProducts:
        """Of coefficients that are floats."""
        basis, means, _ = self._read()
        reduced = F.linear(hidden, basis)
        parts = [reduced[..., :rank] for rank in self.ranks]
        return BlockProducts(hidden, self._factors(), reduced, [0] * len(parts), parts, F.linear(hidden, means))

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        if not isinstance(spec.get("is_coded"), bool):
            raise ValueError("the structure's 'is_coded' must be true or false")
        blocks = cls.checked_blocks(spec, dim)
        basis_bits = integer(spec, "basis_bits") if "basis_bits" in spec else 8
        if not 2 <= basis_bits <= 8:
            raise ValueError(f"the structure's 'basis_bits' must be from 2 to 8, not {basis_bits}")
        shape = (vocab_size, dim, integer(spec, "rank"), *blocks, spec["is_coded"])
        by_rows = spec.get("by_rows", False)
        if not isinstance(by_rows, bool):
            raise ValueError("the structure's 'by_rows' must be true or false")
        return cls(*shape, dtype, device, window_of(spec), basis_bits, by_rows)

    def structure(self) -> dict[str, Any]:
        """See `Factorization.structure`; with the windows of a trellis where there is one."""
        more = {"window": self.window} if self.window else {}
        if self.is_coded and self.basis_bits != 8:
            more["basis_bits"] = self.basis_bits
        if self.is_coded and self.by_rows:
            more["by_rows"] = True
        return super().structure() | more

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
                # Bits of a trellis are below 0.
                signless = [abs(one) if type(one) is int else one for one in run] if isinstance(run, list) else run
                if len(integers({"segments": signless}, "segments")) != 2:
                    raise ValueError("the structure's 'segments' must be lists of [bits, components]")
        return sizes, segments

    @property
    def num_values(self) -> int:
        """Coefficients, codes or not, and what they stand on, see `Factorization.num_values`."""
        frame = (self.rank + len(self.sizes)) * self.dim
        return frame + self._num_codes() + (self.levels.numel() if self.is_coded else 0)

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


def window_of(spec: dict[str, Any]) -> int:
    """Bits of the windows of a trellis, of a structure that came from a file; 0 where it has none."""
    return integer(spec, "window") if "window" in spec else 0
