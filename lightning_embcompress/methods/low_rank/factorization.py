"""One low rank for the whole table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lightning_embcompress.methods.base import Problem
from lightning_embcompress.methods.low_rank.config import LowRankConfig, WeightedLowRankConfig
from lightning_embcompress.methods.low_rank.solver import low_rank_in_metric, weighted_low_rank
from lightning_embcompress.methods.numerics.alignment import alignment
from lightning_embcompress.methods.numerics.gram import row_weights
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.products import balance_product, store_product
from lightning_embcompress.methods.quantizers.factors import materialize, multiply, read_rows
from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.methods.sized import SizedFactorization, Sizes
from lightning_embcompress.methods.specs import integer, positive_integers
from lightning_embcompress.methods.tiles import TileMaker, Tiles
from lightning_embcompress.utils.division import agree
from lightning_embcompress.utils.graphs import is_exporting


class LowRank(SizedFactorization[LowRankConfig]):
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
    config_class = WeightedLowRankConfig
    entries = ("rank",)
    divides = True
    shared_factors = ("basis",)
    row_factors = ("coefficients",)

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

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        return cls(vocab_size, dim, integer(spec, "rank"), dtype, device)

    @classmethod
    def sizes(cls, vocab_size: int, dim: int, config: LowRankConfig) -> Sizes:
        """The rank asked for, or any."""
        most, rank = min(vocab_size, dim), config.rank
        if rank is None:
            return Sizes(most, lambda size: (size,))
        if rank > most:
            raise ValueError(f"rank must be at most {most} for a table of {vocab_size} x {dim}, it is {rank}")
        return Sizes(1, lambda _: (rank,))

    def _solve(self, problem: Problem[LowRankConfig], refine: bool) -> None:
        """Truncated SVD, in the metric if there is one: its row weights then take the place of the token counts."""
        weight, weighted = problem.weight, problem.config.uses_metric
        if weighted and problem.metric is not None:
            coefficients, basis = low_rank_in_metric(weight, self.rank, problem.metric)
        else:
            weights = row_weights(problem.token_counts if weighted else None, self.vocab_size, weight.device)
            coefficients, basis = weighted_low_rank(weight, self.rank, weights)
        if refine:
            rotation = alignment(basis, self.basis)
            # Rounding may differ between the processors of processes.
            agree(rotation)
            coefficients, basis = (coefficients.to(rotation) @ rotation.T), rotation @ basis.to(rotation)
        self.coefficients.copy_(coefficients)
        self.basis.copy_(basis)
        problem.advance(1.0)
