"""A table as it is, to be quantized: the baseline that every decomposition has to beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lightning_embcompress.methods.base import Factorization, Problem
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.quantizers.factors import PackedFactor, multiply, read_rows
from lightning_embcompress.methods.quantizers.integer_quantizer import group_shape
from lightning_embcompress.methods.specs import dense_bytes, positive_integers, stored_bytes
from lightning_embcompress.methods.tiles import TileMaker, Tiles
from lightning_embcompress.utils.graphs import is_exporting


class FullTable(Factorization[MethodConfig]):
    """A table with all its numbers, which can be quantized like the factors of any other method.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        dtype: Dtype of the numbers.
        device: Device of the numbers.

    Example:
        >>> from lightning_embcompress.methods.registry import Quantization
        >>> table = nn.Parameter(torch.randn(1000, 64))
        >>> packed = FullTable.of(table).quantized(Quantization(bits=4, group_size=32))
        >>> packed.rows(torch.tensor([3, 999])).shape, round(table.nbytes / packed.stored_bytes(), 2)
        (torch.Size([2, 64]), 7.04)
    """

    kind = "full_table"
    config_class = MethodConfig
    streams = True
    row_factors = ("weight",)

    def __init__(
        self, vocab_size: int, dim: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        """Build it empty."""
        super().__init__(vocab_size, dim)
        self.weight = nn.Parameter(torch.zeros(vocab_size, dim, dtype=dtype, device=device))

    @classmethod
    def of(cls, weight: nn.Parameter) -> Self:
        """A table that is there, without a copy."""
        table = cls(weight.shape[0], weight.shape[1], weight.dtype, torch.device("meta"))
        table.weight = weight
        return table

    def filling(self, problem: Problem[MethodConfig]) -> Callable[[slice], None]:
        """See `Factorization.filling`; of one that is packed."""
        factor, weight = cast(PackedFactor, self.weight), problem.weight
        return lambda window: factor.fill_rows(window.start, weight[window])

    @property
    def window_multiple(self) -> int:
        """Rows that share a scale."""
        return group_shape(self.dim, self.quantization.group_size)[0] if self.quantization else 1

    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows of the table, see `Factorization.rows`; every distinct id is read once."""
        if is_exporting():
            return read_rows(self.weight, ids)
        distinct, inverse = torch.unique(ids, return_inverse=True)
        return F.embedding(inverse, read_rows(self.weight, distinct, sparse))

    def logits(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ`, see `Factorization.logits`."""
        return multiply(hidden, self.weight)

    def _tiles(self, hidden: Tensor, tile_rows: int) -> Tiles:
        maker = TileMaker(tile_rows)
        maker.add_product(self.weight, maker.share(hidden))
        return maker.made()

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        return cls(vocab_size, dim, dtype, device)

    @classmethod
    def smallest_bytes(cls, vocab_size: int, dim: int, itemsize: int, config: MethodConfig | None = None) -> int:
        """Bytes of all its numbers, see `Factorization.smallest_bytes`."""
        empty = cls(vocab_size, dim, device=torch.device("meta"))
        return stored_bytes(dense_bytes(vocab_size, dim, itemsize), 1, empty.structure())

    @classmethod
    def _decompose(cls, problem: Problem[MethodConfig]) -> Self:
        """A copy of the table."""
        problem.advance(1.0)
        return cls.of(nn.Parameter(problem.weight.detach().clone()))

    def _refine(self, problem: Problem[MethodConfig]) -> Self:
        """The numbers of another table, in place."""
        self.weight.copy_(problem.weight)
        problem.advance(1.0)
        return self
