"""The folded table as a sum of outer products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_embcompress.methods.specs import integers, positive_integers, stored_bytes
from lightning_embcompress.methods.tensorly.config import CPConfig
from lightning_embcompress.methods.tensorly.cp_solver import cp, cp_coefficients, cp_logits, khatri_rao, largest_cp_rank
from lightning_embcompress.methods.tensorly.folding import FoldedTable


class CP(FoldedTable[CPConfig]):
    """CP (CANDECOMP/PARAFAC) of the folded table: `w_(i,j) = Σ_r A[i, r] B[j, r] C[:, r]` for id `i · I_2 + j`.

    A baseline for high ratios. A component costs only `I_1 + I_2 + dim` numbers, so that soon there are more of them
    than any mode has entries (in a table of 33,278 x 256 from 53x down). Then they are close to dependent, and solving
    is slow: a round takes `6 · vocab_size · dim · rank` operations and the memory of `rank / I_1` tables.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        vocab_shape: Sizes of the modes of the vocabulary, with a product of at least `vocab_size`.
        dim_shape: Sizes of the modes of the columns, with a product of at least `dim`.
        rank: Number of components.
        dtype: Dtype of the factors.
        device: Device of the factors.

    Raises:
        ValueError: If a shape or the rank is not possible.

    Example:
        >>> table = torch.randn(1009, 64)
        >>> factors = CP.decompose(table, table.nbytes // 16)
        >>> factors.vocab_shape, factors.dim_shape, factors.rank
        ([29, 35], [64], 30)
        >>> factors.rows(torch.tensor([3, 1008])).shape, factors.logits(torch.randn(2, 64)).shape
        (torch.Size([2, 64]), torch.Size([2, 1009]))
    """

    kind = "cp"
    config_class = CPConfig

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        vocab_shape: Sequence[int],
        dim_shape: Sequence[int],
        rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Build it empty."""
        super().__init__(vocab_size, dim, vocab_shape, dim_shape)
        shape = [*vocab_shape, *dim_shape]
        if not 1 <= rank <= largest_cp_rank(shape):
            raise ValueError(f"rank must be from 1 to {largest_cp_rank(shape)} for the shape {shape}, it is {rank}")
        self.rank = rank
        self.factors = nn.ParameterList(
            nn.Parameter(torch.zeros(size, rank, dtype=dtype, device=device)) for size in shape
        )

    def _rows_of(self, ids: Tensor, distinct: bool, *factors: Tensor) -> Tensor:
        modes = len(self.vocab_shape)
        return cp_coefficients(factors[:modes], self._digits(ids)) @ khatri_rao(factors[modes:]).T

    def _contracted(self, hidden: Tensor, *factors: Tensor) -> Tensor:
        modes = len(self.vocab_shape)
        return cp_logits(factors[:modes], hidden.flatten(1) @ khatri_rao(factors[modes:]))

    def _costs(self) -> tuple[int, int, int]:
        rows, columns, heads = (math.prod(s) for s in (self.vocab_shape, self.dim_shape, self.vocab_shape[:-1]))
        return self.vocab_size * columns * self.rank, (columns + heads + rows) * self.rank, heads * self.rank + rows

    def structure(self) -> dict[str, Any]:
        """Shape, modes and rank."""
        return {**self._shapes(), "rank": self.rank}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim, rank = positive_integers(spec, "vocab_size", "dim", "rank")
        return cls(vocab_size, dim, integers(spec, "vocab_shape"), integers(spec, "dim_shape"), rank, dtype, device)

    @classmethod
    def smallest_bytes(cls, vocab_size: int, dim: int, itemsize: int, options: CPConfig | None = None) -> int:
        """Bytes at the rank asked for, or at rank 1.

        Raises:
            ValueError: If a shape is too small for the table, or the rank larger than the shapes allow.
        """
        options = options or CPConfig()
        shapes = options.shapes_for(vocab_size, dim)
        largest = largest_cp_rank([*shapes[0], *shapes[1]])
        if options.rank is not None and options.rank > largest:
            raise ValueError(
                f"rank must be at most {largest} for the shapes {shapes[0]} and {shapes[1]}, it is {options.rank}"
            )
        return cls._bytes(vocab_size, dim, itemsize, *shapes, options.rank or 1)

    @classmethod
    def _bytes(
        cls, vocab_size: int, dim: int, itemsize: int, vocab_shape: list[int], dim_shape: list[int], rank: int
    ) -> int:
        shapes = {"vocab_shape": vocab_shape, "dim_shape": dim_shape, "rank": rank}
        spec = {"kind": cls.kind, "vocab_size": vocab_size, "dim": dim, **shapes}
        sizes = [*vocab_shape, *dim_shape]
        return stored_bytes(sum(sizes) * rank * itemsize, len(sizes), spec)

    @classmethod
    def decompose(
        cls,
        weight: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: CPConfig | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """CP at the largest rank that fits, see `Factorization.decompose` and `solvers.cp`.

        Raises:
            ValueError: If not even rank 1 fits.
        """
        options = options or CPConfig()
        vocab_size, dim = weight.shape
        itemsize = weight.element_size()
        shapes = options.shapes_for(vocab_size, dim)
        rank = options.rank or 1
        if cls.smallest_bytes(vocab_size, dim, itemsize, options) > max_bytes:
            raise ValueError(f"{max_bytes} bytes do not hold rank {rank} of a table of {vocab_size} x {dim}")
        if options.rank is None:
            most = largest_cp_rank([*shapes[0], *shapes[1]])
            while rank < most:
                middle = (rank + most + 1) // 2
                if cls._bytes(vocab_size, dim, itemsize, *shapes, middle) <= max_bytes:
                    rank = middle
                else:
                    most = middle - 1
        factorization = cls(vocab_size, dim, *shapes, rank, weight.dtype, weight.device)
        factorization._solve(weight, None, options, advance)
        return factorization

    def refined(
        self,
        target: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: CPConfig | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """Go on with alternating least squares from the factors as they are, in place, see `Factorization.refined`."""
        self._solve(target, list(self.factors), options or CPConfig(), advance)
        return self

    @torch.no_grad()
    def _solve(
        self,
        weight: Tensor,
        start: list[Tensor] | None,
        options: CPConfig,
        advance: Callable[[float], None],
    ) -> None:
        solved = cp(self._folded(weight), self.rank, start, options.max_iterations, advance)
        for factor, new in zip(self.factors, solved, strict=True):
            factor.copy_(new)
