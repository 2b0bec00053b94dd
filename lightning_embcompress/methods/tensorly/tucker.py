"""The folded table as a core and a factor for every mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorly
import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_embcompress.methods.low_rank.factorization import alignment
from lightning_embcompress.methods.specs import integers, positive_integers, stored_bytes
from lightning_embcompress.methods.tensorly.config import TuckerConfig
from lightning_embcompress.methods.tensorly.folding import FoldedTable
from lightning_embcompress.methods.tensorly.tucker_solver import (
    possible_ranks,
    proportional_ranks,
    tucker,
    tucker_elements,
    tucker_logits,
    tucker_rows_of_distinct_ids,
    tucker_rows_of_ids,
)


class Tucker(FoldedTable[TuckerConfig]):
    """Tucker of the folded table: `w_(i,j) = G ×_1 A[i] ×_2 B[j] ×_3 C` for id `i · I_2 + j`.

    A baseline. With a budget, the ranks are to the sizes of their modes as one number. Ids that share all digits but
    the last share the contraction of the core in a lookup; logits contract the states with columns, core and vocabulary
    in turn, which takes fewer multiplications than the product with a dense table.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        vocab_shape: Sizes of the modes of the vocabulary, with a product of at least `vocab_size`.
        dim_shape: Sizes of the modes of the columns, with a product of at least `dim`.
        ranks: One for every mode, at most its size and at most the product of the others.
        dtype: Dtype of the factors.
        device: Device of the factors.

    Raises:
        ValueError: If shapes or ranks are not possible.

    Example:
        >>> table = torch.randn(1009, 64)
        >>> factors = Tucker.decompose(table, table.nbytes // 4)
        >>> factors.vocab_shape, factors.dim_shape, factors.ranks
        ([29, 35], [64], [17, 20, 36])
        >>> factors.rows(torch.tensor([3, 1008])).shape, factors.logits(torch.randn(2, 64)).shape
        (torch.Size([2, 64]), torch.Size([2, 1009]))
    """

    kind = "tucker"
    config_class = TuckerConfig

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
        super().__init__(vocab_size, dim, vocab_shape, dim_shape)
        shape = [*vocab_shape, *dim_shape]
        _check_ranks(shape, ranks)
        self.ranks = list(ranks)
        self.core = nn.Parameter(torch.zeros(*ranks, dtype=dtype, device=device))
        self.factors = nn.ParameterList(
            nn.Parameter(torch.zeros(size, rank, dtype=dtype, device=device))
            for size, rank in zip(shape, ranks, strict=True)
        )

    def _rows_of(self, ids: Tensor, distinct: bool, *factors: Tensor) -> Tensor:
        core, *others = factors
        if not distinct:
            return tucker_rows_of_ids(core, others, self._digits(ids))
        return tucker_rows_of_distinct_ids(core, others, self._digits(ids), ids // self.vocab_shape[-1])

    def _contracted(self, hidden: Tensor, *factors: Tensor) -> Tensor:
        core, *others = factors
        return tucker_logits(core, others, hidden)

    def _costs(self) -> tuple[int, int, int]:
        modes = len(self.vocab_shape)
        rows, heads = (math.prod(shape) for shape in (self.vocab_shape, self.vocab_shape[:-1]))
        vocab_ranks, reduced = math.prod(self.ranks[:modes]), math.prod(self.ranks[modes:])
        last = self.ranks[modes - 1]
        # The largest terms: of the core, of the last mode of the vocabulary, and of the columns.
        table = heads * vocab_ranks * reduced + rows * last * reduced + rows * reduced * self.dim
        state = self.dim * reduced + vocab_ranks * reduced + heads * vocab_ranks + rows * last
        return table, state, heads * last + rows

    def structure(self) -> dict[str, Any]:
        """Shape, modes and ranks."""
        return {**self._shapes(), "ranks": self.ranks}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        vocab_shape, dim_shape, ranks = (integers(spec, name) for name in ("vocab_shape", "dim_shape", "ranks"))
        return cls(vocab_size, dim, vocab_shape, dim_shape, ranks, dtype, device)

    @classmethod
    def smallest_bytes(cls, vocab_size: int, dim: int, itemsize: int, options: TuckerConfig | None = None) -> int:
        """Bytes at the ranks asked for, or at rank 1 in every mode.

        Raises:
            ValueError: If a shape is too small for the table, or the ranks do not fit the shapes.
        """
        options = options or TuckerConfig()
        shapes = options.shapes_for(vocab_size, dim)
        ranks = [1] * len([*shapes[0], *shapes[1]]) if options.ranks is None else list(options.ranks)
        _check_ranks([*shapes[0], *shapes[1]], ranks)
        return cls._bytes(vocab_size, dim, itemsize, *shapes, ranks)

    @classmethod
    def _bytes(
        cls,
        vocab_size: int,
        dim: int,
        itemsize: int,
        vocab_shape: list[int],
        dim_shape: list[int],
        ranks: list[int],
    ) -> int:
        shapes = {"vocab_shape": vocab_shape, "dim_shape": dim_shape, "ranks": ranks}
        spec = {"kind": cls.kind, "vocab_size": vocab_size, "dim": dim, **shapes}
        return stored_bytes(tucker_elements([*vocab_shape, *dim_shape], ranks) * itemsize, len(ranks) + 1, spec)

    @classmethod
    @torch.no_grad()
    def decompose(
        cls,
        weight: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: TuckerConfig | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """Tucker at the largest ranks that fit, see `Factorization.decompose` and `solvers.tucker`.

        Raises:
            ValueError: If not even rank 1 in every mode fits.
        """
        options = options or TuckerConfig()
        vocab_size, dim = weight.shape
        itemsize = weight.element_size()
        if cls.smallest_bytes(vocab_size, dim, itemsize, options) > max_bytes:
            raise ValueError(
                f"{max_bytes} bytes do not hold {'rank 1' if options.ranks is None else list(options.ranks)} in every "
                f"mode of a table of {vocab_size} x {dim}"
            )
        shapes = options.shapes_for(vocab_size, dim)
        if options.ranks is not None:
            ranks = list(options.ranks)
        else:
            ranks = proportional_ranks(
                [*shapes[0], *shapes[1]],
                lambda some: cls._bytes(vocab_size, dim, itemsize, *shapes, some) <= max_bytes,
            )
        factorization = cls(vocab_size, dim, *shapes, ranks, weight.dtype, weight.device)
        core, factors = tucker(factorization._folded(weight), ranks, None, options.max_iterations, advance)
        factorization._copy(core, factors)
        return factorization

    @torch.no_grad()
    def refined(
        self,
        target: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: TuckerConfig | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """Go on with the iteration from the factors as they are, in place, see `Factorization.refined`."""
        iterations = max(1, (options or TuckerConfig()).max_iterations)
        core, factors = tucker(self._folded(target), self.ranks, list(self.factors), iterations, advance)
        # Turned towards those of before, so that an optimizer's state goes on to fit; the core takes it back.
        rotations = [alignment(new.T, old.T) for new, old in zip(factors, self.factors, strict=True)]
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            core = tensorly.tenalg.multi_mode_dot(core, rotations)
        self._copy(core, [factor @ rotation.T for factor, rotation in zip(factors, rotations, strict=True)])
        return self

    @torch.no_grad()
    def _copy(self, core: Tensor, factors: Sequence[Tensor]) -> None:
        self.core.copy_(core)
        for factor, new in zip(self.factors, factors, strict=True):
            factor.copy_(new)


def _check_ranks(shape: Sequence[int], ranks: Sequence[int]) -> None:
    """Check that ranks have a meaning.

    Raises:
        ValueError: If there is not one for every mode, or one is out of its range.
    """
    if len(ranks) != len(shape):
        raise ValueError(f"ranks {list(ranks)} must be {len(shape)}, one for every mode of {list(shape)}")
    if min(ranks) < 1 or list(ranks) != possible_ranks(shape, ranks):
        raise ValueError(
            f"ranks {list(ranks)} must be from 1 to the sizes of the modes {list(shape)}, and none may be above the "
            "product of the others"
        )
