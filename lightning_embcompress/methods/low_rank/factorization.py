"""One low rank for the whole table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lightning_embcompress.methods.base import Factorization, is_exporting
from lightning_embcompress.methods.low_rank.config import LowRankConfig, WeightedLowRankConfig
from lightning_embcompress.methods.low_rank.solver import low_rank_in_metric, weighted_low_rank
from lightning_embcompress.methods.numerics.gram import row_weights
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.products import balance_product, store_product
from lightning_embcompress.methods.quantizers.factors import materialize, multiply, read_rows
from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.methods.specs import integer, positive_integers, stored_bytes
from lightning_embcompress.methods.tiles import TileMaker, Tiles
from lightning_embcompress.utils.division import agree, deal


class LowRank(Factorization[LowRankConfig]):
    """`W ≈ U B`: the truncated SVD of the table, or of the table weighted by frequency or in the metric of the loss.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        rank: Inner dimension, from 0 to `min(vocab_size, dim)`.
        dtype: Dtype of the factors.
        device: Device of the factors.

    Raises:
        ValueError: If the rank is out of its range.

    Example:
        >>> table = torch.randn(1000, 64)
        >>> factors = LowRank.decompose(table, max_bytes=table.nbytes // 4)
        >>> factors.rows(torch.tensor([3, 999])).shape, factors.logits(torch.randn(2, 64)).shape
        (torch.Size([2, 64]), torch.Size([2, 1000]))
    """

    kind = "low_rank"
    config_class = LowRankConfig
    divides = True
    shared_factors = ("basis",)

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Build it empty."""
        super().__init__(vocab_size, dim)
        if not 0 <= rank <= min(vocab_size, dim):
            raise ValueError(f"rank must be from 0 to min(vocab_size, dim) = {min(vocab_size, dim)}, it is {rank}")
        self.rank = rank
        self.coefficients = nn.Parameter(torch.zeros(vocab_size, rank, dtype=dtype, device=device))
        self.basis = nn.Parameter(torch.zeros(rank, dim, dtype=dtype, device=device))

    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows of the table, see `Factorization.rows`; every distinct id is computed once."""
        if is_exporting():
            return read_rows(self.coefficients, ids) @ materialize(self.basis)
        distinct, inverse = torch.unique(ids, return_inverse=True)
        return F.embedding(inverse, read_rows(self.coefficients, distinct, sparse) @ materialize(self.basis, sparse))

    def logits(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ = (h Bᵀ) Uᵀ`, see `Factorization.logits`."""
        return multiply(multiply(hidden, self.basis), self.coefficients)

    def _tiles(self, hidden: Tensor, tile_rows: int) -> Tiles:
        maker = TileMaker(tile_rows)
        maker.add_product(self.coefficients, maker.share(multiply(hidden, self.basis)))
        return maker.made()

    def balance(self) -> None:
        """See `Factorization.balance`."""
        balance_product([self.coefficients], self.basis)

    def quantized(self, quantization: Quantization, metric: Metric | None = None) -> Self:
        """Balanced, and rounded with error feedback in the metric, see `Factorization.quantized`."""
        packed = self._copied()
        packed.hold(quantization, "packed")
        rows = [torch.arange(self.vocab_size)]
        store_product([packed.coefficients], packed.basis, [self.coefficients], self.basis, metric, rows)
        return packed

    def structure(self) -> dict[str, Any]:
        """Shape and rank."""
        return self._spec(self.vocab_size, self.dim, self.rank)

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        return cls(vocab_size, dim, integer(spec, "rank"), dtype, device)

    @classmethod
    def smallest_bytes(cls, vocab_size: int, dim: int, itemsize: int, options: LowRankConfig | None = None) -> int:
        """Bytes at the rank asked for, or at rank 1.

        Raises:
            ValueError: If the rank asked for is above `min(vocab_size, dim)`.
        """
        rank = (options or WeightedLowRankConfig()).rank or 1
        if rank > min(vocab_size, dim):
            raise ValueError(
                f"rank must be at most {min(vocab_size, dim)} for a table of {vocab_size} x {dim}, it is {rank}"
            )
        return cls._bytes(vocab_size, dim, itemsize, rank)

    @classmethod
    def _bytes(cls, vocab_size: int, dim: int, itemsize: int, rank: int) -> int:
        return stored_bytes(rank * (vocab_size + dim) * itemsize, 2, cls._spec(vocab_size, dim, rank))

    @classmethod
    def _spec(cls, vocab_size: int, dim: int, rank: int) -> dict[str, Any]:
        return {"kind": cls.kind, "vocab_size": vocab_size, "dim": dim, "rank": rank}

    @classmethod
    def decompose(
        cls,
        weight: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: LowRankConfig | None = None,
        advance: Callable[[float], None] = lambda _: None,
        metric: Metric | None = None,
    ) -> Self:
        """Truncated SVD of the largest rank that fits, see `Factorization.decompose`.

        With a metric, `Σ_i q_i ‖(w_i − u_i B) C‖²` is minimised, with the metric's own row weights instead of those of
        the token counts; the plain SVD (`weighted=False`) is that of the table whatever the metric.

        Raises:
            ValueError: If not even rank 1 fits.
        """
        vocab_size, dim = weight.shape
        itemsize = weight.element_size()
        if max_bytes < cls.smallest_bytes(vocab_size, dim, itemsize, options):
            raise ValueError(
                f"{max_bytes} bytes do not hold rank {options.rank or 1 if options else 1} of a table of "
                f"{vocab_size} x {dim}"
            )
        if options is not None and options.rank is not None:
            rank = options.rank
        else:
            rank = min(max_bytes // ((vocab_size + dim) * itemsize), vocab_size, dim)
            while cls._bytes(vocab_size, dim, itemsize, rank) > max_bytes:
                rank -= 1
        factorization = cls(vocab_size, dim, rank, weight.dtype, weight.device)
        factorization._solve(weight, token_counts, options, metric)
        advance(1.0)
        return factorization

    def refined(
        self,
        target: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: LowRankConfig | None = None,
        advance: Callable[[float], None] = lambda _: None,
        metric: Metric | None = None,
    ) -> Self:
        """Solve again at the same rank, in place, see `Factorization.refined`; the metric is as for `decompose`."""
        self._solve(target, token_counts, options, metric, align=True)
        advance(1.0)
        return self

    @torch.no_grad()
    def _solve(
        self,
        weight: Tensor,
        token_counts: Tensor | None,
        options: LowRankConfig | None,
        metric: Metric | None,
        align: bool = False,
    ) -> None:
        weighted = (options or WeightedLowRankConfig()).uses_metric
        if weighted and metric is not None:
            coefficients, basis = low_rank_in_metric(weight, self.rank, metric)
        else:
            weights = row_weights(token_counts if weighted else None, self.vocab_size, weight.device)
            coefficients, basis = weighted_low_rank(weight, self.rank, weights)
        if align:
            rotation = alignment(basis, self.basis)
            # Rounding may differ between the processors of processes.
            agree(rotation)
            coefficients, basis = (coefficients.to(rotation) @ rotation.T), rotation @ basis.to(rotation)
        self.coefficients.copy_(coefficients)
        self.basis.copy_(basis)


def alignment(basis: Tensor, reference: Tensor) -> Tensor:
    """Rotation `Q` that brings an orthonormal basis closest to a reference, `min ‖Q B − B_ref‖` (Procrustes).

    The product of `U Qᵀ` and `Q B` stays what it is, while coefficients keep the meaning they had: an optimizer's
    state for them goes on to fit, and no sign or order of eigenvectors flips from one refinement to the next.

    Args:
        basis: `[rank, dim]` orthonormal rows.
        reference: `[rank, dim]`.

    Returns:
        `[rank, rank]` orthogonal, float32 or wider.
    """
    dtype = torch.promote_types(basis.dtype, torch.float32)
    left, _, right = torch.linalg.svd(reference.to(dtype) @ basis.to(dtype).T)
    rotation: Tensor = left @ right
    return rotation


def aligned_bases(bases: Sequence[Tensor | None], references: Sequence[Tensor]) -> list[Tensor | None]:
    """Bases of blocks, each turned towards a reference, see `alignment`; processes share the blocks.

    Args:
        bases: `[rank, dim]` orthonormal rows of every block, or None.
        references: As many, of the same shapes.

    Returns:
        `[rank, dim]` of every block, or None.
    """
    turned = [None if basis is None else torch.empty_like(basis) for basis in bases]
    units = [
        (out, basis, reference)
        for out, basis, reference in zip(turned, bases, references, strict=True)
        if out is not None and basis is not None
    ]

    def compute(unit: int) -> None:
        out, basis, reference = units[unit]
        out.copy_(alignment(basis, reference) @ basis)

    deal([[unit[0]] for unit in units], [basis.shape[0] ** 2 for _, basis, _ in units], compute)
    return turned
