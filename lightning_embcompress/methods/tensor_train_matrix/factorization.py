"""One tensor train for the whole table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lightning_embcompress.methods.base import Factorization, is_exporting
from lightning_embcompress.methods.specs import integers, positive_integers, stored_bytes
from lightning_embcompress.methods.tensor_train_matrix.config import TensorTrainMatrixConfig
from lightning_embcompress.methods.tensor_train_matrix.solver import (
    contracted_logits,
    contraction_cost,
    decompose_table,
    matrix_ranks,
    rows_of_distinct_ids,
    rows_of_ids,
    rows_of_range,
    table_cost,
)


class TensorTrainMatrix(Factorization[TensorTrainMatrixConfig]):
    """A table as a TT-matrix: row `(i_1 … i_N)` is `G_1[i_1] · … · G_N[i_N]` (arXiv 1901.10787).

    A token's id is read as a number with `N` digits. Tokens that share digits share cores, and TT-SVD profits where
    neighbours are alike: the vocabulary should be in the order of frequency, as most are.

    A lookup computes every distinct id once, and beginnings that ids share once. Logits contract the states with the
    cores, or, from a few states on, compute a piece of the table at a time; the whole table is never built. Either
    costs more than the product with a dense table does for one state; for many states the difference vanishes.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        vocab_shape: `I_k`, with a product of at least `vocab_size`.
        dim_shape: `J_k`, with a product of at least `dim`.
        ranks: `R_0 … R_N`, the first and the last 1.
        dtype: Dtype of the cores.
        device: Device of the cores.

    Raises:
        ValueError: If shapes or ranks are not possible.

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

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        vocab_shape: Sequence[int],
        dim_shape: Sequence[int],
        ranks: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Build it empty."""
        super().__init__(vocab_size, dim)
        for name, shape, size in (("vocab_shape", vocab_shape, vocab_size), ("dim_shape", dim_shape, dim)):
            if not shape or min(shape) < 1 or math.prod(shape) < size:
                raise ValueError(f"{name} {list(shape)} must be sizes of 1 or more with a product of at least {size}")
        if len(vocab_shape) != len(dim_shape):
            raise ValueError(f"vocab_shape {list(vocab_shape)} and dim_shape {list(dim_shape)} must be of one length")
        largest = matrix_ranks(vocab_shape, dim_shape, vocab_size * dim)
        if len(ranks) != len(largest) or any(not 1 <= rank <= most for rank, most in zip(ranks, largest, strict=True)):
            raise ValueError(f"ranks {list(ranks)} must be from 1 to {largest} for these shapes")
        self.vocab_shape = list(vocab_shape)
        self.dim_shape = list(dim_shape)
        self.ranks = list(ranks)
        self.cores = nn.ParameterList(
            nn.Parameter(torch.zeros(left, rows, columns, right, dtype=dtype, device=device))
            for left, rows, columns, right in zip(ranks, vocab_shape, dim_shape, ranks[1:], strict=False)
        )

    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows of the table, see `Factorization.rows`.

        Raises:
            IndexError: If an id is out of range.
        """
        cores = self.whole_factors(sparse)
        if is_exporting():
            return rows_of_ids(cores, ids.flatten())[:, : self.dim].reshape(*ids.shape, self.dim)
        distinct, inverse = torch.unique(ids, return_inverse=True)
        # Sorted. The padding behind the last token would be read without a complaint.
        if distinct.numel() and (int(distinct[0]) < 0 or int(distinct[-1]) >= self.vocab_size):
            raise IndexError(
                f"ids must be from 0 to {self.vocab_size - 1}, they go from {distinct[0]} to {distinct[-1]}"
            )
        return F.embedding(inverse, rows_of_distinct_ids(cores, distinct.long())[:, : self.dim])

    def logits(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ`, see `Factorization.logits`."""
        cores = self.whole_factors()
        states = hidden.reshape(-1, self.dim)
        if not is_exporting() and states.shape[0] * contraction_cost(cores) > table_cost(cores):
            step = math.prod(self.vocab_shape[1:])
            return self.logits_of_rows(hidden, self._read, *cores, step=step)
        padded = F.pad(states, (0, math.prod(self.dim_shape) - self.dim))
        logits = contracted_logits(cores, padded)[:, : self.vocab_size]
        return logits.reshape(*hidden.shape[:-1], self.vocab_size)

    def _read(self, start: int, stop: int, *cores: Tensor) -> Tensor:
        step = math.prod(self.vocab_shape[1:])
        return rows_of_range(cores, start // step, -(-stop // step))[: stop - start, : self.dim]

    def structure(self) -> dict[str, Any]:
        """Shape, modes and ranks."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "dim": self.dim,
            "vocab_shape": self.vocab_shape,
            "dim_shape": self.dim_shape,
            "ranks": self.ranks,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        vocab_shape, dim_shape, ranks = (integers(spec, name) for name in ("vocab_shape", "dim_shape", "ranks"))
        return cls(vocab_size, dim, vocab_shape, dim_shape, ranks, dtype, device)

    @classmethod
    def smallest_bytes(
        cls, vocab_size: int, dim: int, itemsize: int, options: TensorTrainMatrixConfig | None = None
    ) -> int:
        """Bytes at the rank asked for, or at rank 1.

        Raises:
            ValueError: If a shape is too small for the table, or the rank larger than the shapes allow.
        """
        options = options or TensorTrainMatrixConfig()
        shapes = options.shapes_for(vocab_size, dim)
        largest = max(matrix_ranks(*shapes, vocab_size * dim))
        if options.max_rank is not None and options.max_rank > largest:
            raise ValueError(
                f"max_rank must be at most {largest} for the shapes {shapes[0]} and {shapes[1]}, it is "
                f"{options.max_rank}"
            )
        return cls._bytes(vocab_size, dim, itemsize, *shapes, options.max_rank or 1)

    @classmethod
    def _bytes(
        cls, vocab_size: int, dim: int, itemsize: int, vocab_shape: list[int], dim_shape: list[int], max_rank: int
    ) -> int:
        ranks = matrix_ranks(vocab_shape, dim_shape, max_rank)
        shapes = {"vocab_shape": vocab_shape, "dim_shape": dim_shape, "ranks": ranks}
        spec = {"kind": cls.kind, "vocab_size": vocab_size, "dim": dim, **shapes}
        entries = sum(
            left * rows * columns * right
            for left, rows, columns, right in zip(ranks, vocab_shape, dim_shape, ranks[1:], strict=False)
        )
        return stored_bytes(entries * itemsize, len(vocab_shape), spec)

    @classmethod
    def decompose(
        cls,
        weight: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: TensorTrainMatrixConfig | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """TT-SVD of the folded table at the largest rank that fits, see `Factorization.decompose`.

        Raises:
            ValueError: If not even rank 1 fits.
        """
        options = options or TensorTrainMatrixConfig()
        vocab_size, dim = weight.shape
        itemsize = weight.element_size()
        shapes = options.shapes_for(vocab_size, dim)
        rank = options.max_rank or 1
        if cls.smallest_bytes(vocab_size, dim, itemsize, options) > max_bytes:
            raise ValueError(f"{max_bytes} bytes do not hold rank {rank} of a table of {vocab_size} x {dim}")
        if options.max_rank is None:
            most = max(matrix_ranks(*shapes, vocab_size * dim))
            while rank < most:
                middle = (rank + most + 1) // 2
                if cls._bytes(vocab_size, dim, itemsize, *shapes, middle) <= max_bytes:
                    rank = middle
                else:
                    most = middle - 1
        factorization = cls(vocab_size, dim, *shapes, matrix_ranks(*shapes, rank), weight.dtype, weight.device)
        if options.init == "random":
            factorization.initialize(float(weight.detach().float().std()))
        else:
            factorization._solve(weight)
        advance(1.0)
        return factorization

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """Draw the cores so that the table's entries have a standard deviation, for training from scratch.

        Every entry of the table is a sum of `∏ R_k` products of `N` core entries, so these have the variance
        `(σ² / ∏ R_k)^{1/N}` (Hrinchuk et al. 2020, section 4.2).

        Args:
            std: Standard deviation `σ` of the table's entries.
        """
        variance = (std**2 / math.prod(self.ranks)) ** (1 / len(self.ranks[1:]))
        for core in self.cores:
            nn.init.normal_(core, std=math.sqrt(variance))

    def refined(
        self,
        target: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: TensorTrainMatrixConfig | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """Solve again at the same ranks, in place, see `Factorization.refined`."""
        self._solve(target, align=True)
        advance(1.0)
        return self

    @torch.no_grad()
    def _solve(self, weight: Tensor, align: bool = False) -> None:
        solved = decompose_table(weight, self.vocab_shape, self.dim_shape, self.ranks)
        rotation = torch.ones(1, 1).to(solved[0])
        for level, (core, new) in enumerate(zip(self.cores, solved, strict=True)):
            new = torch.einsum("qr,rijs->qijs", rotation, new)
            if align and level < len(solved) - 1:
                # Singular vectors are turned towards those of before, so that an optimizer's state goes on to fit; the
                # next core takes it back.
                left, _, right = torch.linalg.svd(new.flatten(0, 2).T @ core.to(new).flatten(0, 2))
                new = new @ (left @ right)
                rotation = (left @ right).T
            else:
                rotation = torch.eye(new.shape[3]).to(new)
            core.copy_(new)
