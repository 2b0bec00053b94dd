"""One tensor train for the whole table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_embcompress.methods.folding import FoldedTable, Labels, Shape
from lightning_embcompress.methods.sized import Sizes
from lightning_embcompress.methods.tensor_train_matrix.config import TensorTrainMatrixConfig
from lightning_embcompress.methods.tensor_train_matrix.solver import (
    aligned_cores,
    matrix_ranks,
    scattered_rows,
    tt_matrix,
)

T = TypeVar("T")


class TensorTrainMatrix(FoldedTable[TensorTrainMatrixConfig]):
    """A table as a TT-matrix: row `(i_1 … i_N)` is `G_1[i_1] · … · G_N[i_N]` (arXiv 1901.10787).

    A token's id is read as a number with `N` digits. Tokens that share digits share cores, and TT-SVD profits where
    neighbours are alike: the vocabulary should be in the order of frequency, as most are. Reading costs more than the
    product with a dense table does for one state; for many states the difference vanishes.

    Args and errors are those of `FoldedTable`; the two shapes have one length, and `ranks` are `R_0 … R_N`, the first
    and the last 1.

    Example:
        >>> table = torch.randn(1009, 64)
        >>> cores = TensorTrainMatrix.decompose(table, table.nbytes // 4)
        >>> cores.vocab_shape, cores.dim_shape
        ([8, 8, 16], [4, 4, 4])
        >>> cores.rows(torch.tensor([3, 1008])).shape, cores.logits(torch.randn(2, 64)).shape
        (torch.Size([2, 64]), torch.Size([2, 1009]))
    """

    kind = "tensor_train_matrix"
    config_class = TensorTrainMatrixConfig
    cores: nn.ParameterList

    def _shapes(self) -> dict[str, Shape | list[Shape]]:
        if len(self.vocab_shape) != len(self.dim_shape):
            raise ValueError(f"vocab_shape {self.vocab_shape} and dim_shape {self.dim_shape} must be of one length")
        largest = matrix_ranks(self.vocab_shape, self.dim_shape, self.vocab_size * self.dim)
        if len(self.ranks) != len(largest) or any(
            not 1 <= rank <= most for rank, most in zip(self.ranks, largest, strict=True)
        ):
            raise ValueError(f"ranks {self.ranks} must be from 1 to {largest} for these shapes")
        return {"cores": list(zip(self.ranks, self.vocab_shape, self.dim_shape, self.ranks[1:], strict=False))}

    def _network(self, factors: Sequence[T]) -> list[tuple[T, Labels]]:
        count = len(factors)
        bonds = range(2 * count, 3 * count)
        return [
            (core, (bond, mode, count + mode, bond + 1))
            for mode, (core, bond) in enumerate(zip(factors, bonds, strict=True))
        ]

    def _scattered_rows(self, ids: Tensor, *factors: Tensor) -> Tensor:
        return scattered_rows(factors, ids)[:, : self.dim]

    @classmethod
    def sizes(cls, vocab_size: int, dim: int, config: TensorTrainMatrixConfig) -> Sizes:
        """The largest rank asked for, or any."""
        shapes = config.shapes_for(vocab_size, dim)
        most, rank = max(matrix_ranks(*shapes, vocab_size * dim)), config.max_rank
        if rank is None:
            return Sizes(most, lambda size: (*shapes, matrix_ranks(*shapes, size)))
        if rank > most:
            raise ValueError(
                f"max_rank must be at most {most} for the shapes {shapes[0]} and {shapes[1]}, it is {rank}"
            )
        return Sizes(1, lambda _: (*shapes, matrix_ranks(*shapes, rank)))

    def _find(
        self, folded: Tensor, config: TensorTrainMatrixConfig, advance: Callable[[float], None], refine: bool
    ) -> None:
        if config.init == "random" and not refine:
            table = folded.reshape(math.prod(self.vocab_shape), -1)[: self.vocab_size, : self.dim]
            self.initialize(float(table.std()))
        else:
            cores = tt_matrix(folded, self.ranks)
            self._copy(*(aligned_cores(cores, list(self.cores)) if refine else cores))
        advance(1.0)

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """Draw the cores so that the table's entries have a standard deviation, for training from scratch.

        Every entry of the table is a sum of `∏ R_k` products of `N` core entries, so these have the variance
        `(σ² / ∏ R_k)^{1/N}` (Hrinchuk et al. 2020, section 4.2).

        Args:
            std: Standard deviation `σ` of the table's entries.
        """
        variance = (std**2 / math.prod(self.ranks)) ** (1 / len(self.cores))
        for core in self.cores:
            nn.init.normal_(core, std=math.sqrt(variance))
