"""Codes in training: the numbers behind the codes of `SharedBasisBlocks`, read as they will be stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_embcompress.methods.base import Factorization, Problem
from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.quantizers.factors import materialize
from lightning_embcompress.methods.quantizers.gradients import straight_through
from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.methods.quantizers.rounded_factor import RoundedFactor
from lightning_embcompress.methods.quantizers.scalar_quantizer import nearest_level
from lightning_embcompress.methods.shared_basis.factorization import SharedBasisBlocks
from lightning_embcompress.methods.shared_basis.layout import (
    BASIS_BITS,
    SCALE_STEPS,
    as_stored,
    checked_segments,
    nearest_codes,
)
from lightning_embcompress.methods.shared_basis.level_fitting import num_levels
from lightning_embcompress.methods.shared_basis.storage import SharedBasisStorage, window_of
from lightning_embcompress.methods.specs import integer, positive_integers
from lightning_embcompress.methods.transform_coding.config import TransformCodingConfig


class LatentCodes(SharedBasisStorage[TransformCodingConfig]):
    """`SharedBasisBlocks` with codes, while the codes are trained: as with floats, but read as they will be stored.

    Behind every code stands a number, and the nearest level is read in its place; behind basis and means, which are
    stored in few bits, and scales, in steps of `2^{1/16}`, too. All of these numbers are about as large as 1, so that
    one learning rate suits them. Gradients go straight through the rounding (Bengio et al. 2013), so that codes change
    when their numbers have come nearer to another level. Of an embedding only the rows that are asked for are rounded.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        rank: Rows of the basis.
        sizes: Rows of every block; they add up to `vocab_size`.
        segments: For every block, runs `[bits, components]` of the components that it keeps.
        dtype: Dtype of the numbers.
        device: Device of the numbers.
        window: Bits of the windows of a trellis; 0 for none.

    Raises:
        ValueError: If the structure is not possible.

    Example:
        >>> table, counts = torch.randn(2000, 64), torch.arange(2000, 0, -1)
        >>> coded = SharedBasisBlocks.decompose(table, table.nbytes // 16, counts)
        >>> latent = LatentCodes.of(coded)
        >>> bool(torch.allclose(latent.rows(torch.tensor([3])), coded.rows(torch.tensor([3])), atol=1e-5))
        True
    """

    kind = "latent_codes"
    config_class = TransformCodingConfig
    entries = ("rank", "sizes", "segments")
    divides = True
    units: Tensor

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        rank: int,
        sizes: Sequence[int],
        segments: Sequence[Sequence[Sequence[int]]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        window: int = 0,
    ) -> None:
        """Build it empty."""
        coded, ranks, widths = checked_segments(dim, rank, len(sizes), segments, is_coded=True, window=window)
        super().__init__(vocab_size, dim, rank, sizes, _floats(ranks), False, dtype, device)
        self.segments, self.widths, self.window = coded, widths, window
        self.log_scales = nn.Parameter(torch.zeros(sum(ranks), dtype=dtype, device=device))
        levels = torch.zeros(sum(num_levels(bits) for bits in widths), dtype=dtype, device=device)
        self.register_buffer("levels", levels)
        # Of basis and means.
        self.register_buffer("units", torch.ones(2, dtype=dtype, device=device))

    @classmethod
    @torch.no_grad()
    def of(cls, coded: SharedBasisBlocks) -> Self:
        """Numbers that stand for the codes of a table.

        Raises:
            ValueError: If it has no codes.
        """
        if not coded.is_coded:
            raise ValueError("its coefficients are no codes, but numbers")
        shape = (coded.vocab_size, coded.dim, coded.rank, coded.sizes, coded.segments)
        latent = cls(*shape, coded.dtype, coded.device, coded.window)
        latent._index(coded.block_of_row)
        latent.levels.copy_(coded.levels)
        basis, means, scales = coded._read()
        for unit, own, values in zip(latent.units, (latent.basis, latent.means), (basis, means), strict=True):
            mean = values.double().square().mean().sqrt() if values.numel() else values.new_zeros(())
            unit.fill_(float(mean) or 1.0)
            own.copy_(values / unit)
        smallest = torch.finfo(coded.dtype).tiny
        latent.log_scales.copy_(torch.cat([latent.log_scales[:0], *scales]).clamp(min=smallest).log2())
        for numbers, codes, offsets in zip(
            latent.coefficients, coded._block_codes(), coded._frame().offsets, strict=True
        ):
            numbers.copy_(latent._level_values()[(codes.int() + offsets).long()])
        latent.inherit(coded)
        return latent.requires_grad_(coded.may_train)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        blocks = SharedBasisBlocks.checked_blocks(spec, dim)
        return cls(vocab_size, dim, integer(spec, "rank"), *blocks, dtype, device, window_of(spec))

    @property
    def is_prepared(self) -> bool:
        """Always: it is what trains."""
        return True

    def prepared(self, quantization: Quantization) -> Factorization[Any]:
        """Refuse what is done already, see `Factorization.prepared`."""
        raise ValueError("its codes are prepared for training already")

    def hold(self, quantization: Quantization, state: Any) -> None:
        """Refuse a second quantization, see `Factorization.hold`."""
        raise ValueError("codes in training have widths of their own, and no other quantization")

    def freeze_ranges(self) -> None:
        """Keep the scales as they are from now on, see `Factorization.freeze_ranges`."""
        self.log_scales.requires_grad_(False)

    @torch.no_grad()
    def converted(self) -> SharedBasisBlocks:
        """The codes that stand for the numbers as they are, see `Factorization.converted`."""
        arguments = (self.vocab_size, self.dim, self.rank, self.sizes, self.segments)
        coded = SharedBasisBlocks(*arguments, True, self.dtype, self.device, self.window)
        coded._index(self.block_of_row)
        coded.levels.copy_(self.levels)
        tables, costs = self._level_tables(), torch.exp2(2 * self.log_scales.double())
        codes = []
        blocks = zip(self.coefficients, self.segments, torch.split(costs, self.ranks), strict=True)
        for numbers, runs, own in blocks:
            codes.append(torch.empty(numbers.shape, dtype=torch.uint8, device=numbers.device))
            # A few rows at a time: on the way codes take eight bytes each.
            for chunk in row_chunks(*numbers.shape):
                codes[-1][chunk] = nearest_codes(numbers[chunk], runs, tables, own, self.window).to(torch.uint8)
        basis, means = self.basis * self.units[0], self.means * self.units[1]
        coded.store(codes, basis, means, torch.exp2(self.log_scales.double()))
        coded.inherit(self)
        return coded.requires_grad_(any(parameter.requires_grad for parameter in self.parameters()))

    def _read(self, sparse: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        basis, means = (
            straight_through(materialize(own, sparse) * unit, partial(as_stored, bits=bits))
            for unit, own, bits in zip(self.units, (self.basis, self.means), (BASIS_BITS, 8), strict=True)
        )
        return basis, means, []

    def _factors(self, sparse: bool = False) -> list[RoundedFactor]:
        tables = self._level_tables()

        def nearest(runs: Sequence[tuple[int, int]]) -> Callable[[Tensor], Tensor]:
            def levels(numbers: Tensor) -> Tensor:
                parts = torch.split(numbers, [count for _, count in runs], dim=1)
                pairs = [(part.contiguous(), tables[bits]) for part, (bits, _) in zip(parts, runs, strict=True)]
                return torch.cat([table[nearest_level(part, table)] for part, table in pairs], dim=1)

            return levels

        scales = torch.exp2(straight_through(materialize(self.log_scales, sparse), _stored_logarithms))
        blocks = zip(self.coefficients, self.segments, torch.split(scales, self.ranks), strict=True)
        return [RoundedFactor(numbers, nearest(runs), scale) for numbers, runs, scale in blocks]

    def plain(self) -> tuple[SharedBasisBlocks, dict[str, Tensor]]:
        """See `Factorization.plain`: blocks whose coefficients are the levels times their scales."""
        arguments = (self.vocab_size, self.dim, self.rank, self.sizes, _floats(self.ranks), False, self.dtype)
        plain = SharedBasisBlocks(*arguments, torch.device("meta"))
        plain.packed_block_index, plain.position, plain.order = self.packed_block_index, self.position, self.order
        plain.in_order = self.in_order
        basis, means, _ = self._read()
        coefficients = {f"coefficients.{block}": own.materialize() for block, own in enumerate(self._factors())}
        return plain, {"basis": basis, "means": means, **coefficients}

    @classmethod
    def smallest_bytes(
        cls, vocab_size: int, dim: int, itemsize: int, config: TransformCodingConfig | None = None
    ) -> int:
        """Bytes once it is converted, see `Factorization.smallest_bytes`."""
        return SharedBasisBlocks.smallest_bytes(vocab_size, dim, itemsize, config)

    @classmethod
    def _decompose(cls, problem: Problem[TransformCodingConfig]) -> Self:
        """Codes of `SharedBasisBlocks`, ready to be trained; the bytes are those once it is converted."""
        return cls.of(SharedBasisBlocks._decompose(problem))

    def _refine(self, problem: Problem[TransformCodingConfig]) -> Self:
        """Solve again from the codes as they are."""
        return self.of(self.converted()._refine(problem))


def _floats(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Segments of blocks whose coefficients are floats."""
    return [[(0, rank)] if rank else [] for rank in ranks]


def _stored_logarithms(logarithms: Tensor) -> Tensor:
    """Binary logarithms of scales in steps, downwards from the largest."""
    if not logarithms.numel():
        return logarithms
    largest = logarithms.max()
    return largest - ((largest - logarithms) * SCALE_STEPS).round().clamp(max=255) / SCALE_STEPS


SharedBasisBlocks.latent_codes = LatentCodes.of
