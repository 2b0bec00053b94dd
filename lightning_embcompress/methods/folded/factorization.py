"""The folded table as a sum of outer products (CP), or as a core and a factor for every mode (Tucker)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import tensorly
from torch import Tensor, nn

from lightning_embcompress.methods.folded.config import CPConfig, TuckerConfig
from lightning_embcompress.methods.folded.solver import cp, largest_cp_rank, possible_tucker_ranks, tucker
from lightning_embcompress.methods.folding import FoldedTable, Labels, Shape
from lightning_embcompress.methods.numerics.alignment import alignment
from lightning_embcompress.methods.sized import Sizes

T = TypeVar("T")

# Steps of the ranks of Tucker for each that the largest mode can have: where two modes round at once, one goes first.
_STEPS = 1000


class CP(FoldedTable[CPConfig]):
    """CP (CANDECOMP/PARAFAC) of the folded table: `w_(i,j) = Σ_r A[i, r] B[j, r] C[:, r]` for id `i · I_2 + j`.

    A baseline for high ratios. A component costs only `I_1 + I_2 + dim` numbers, so that soon there are more of them
    than any mode has entries (in a table of 33,278 x 256 from 53x down). Then they are close to dependent, and solving
    is slow: a round takes `6 · vocab_size · dim · rank` operations and the memory of `rank / I_1` tables.

    Args and errors are those of `FoldedTable`; `ranks` is the number of components.

    Example:
        >>> import torch
        >>> table = torch.randn(1009, 64)
        >>> factors = CP.decompose(table, table.nbytes // 16)
        >>> factors.vocab_shape, factors.dim_shape, factors.ranks
        ([29, 35], [64], 30)
        >>> factors.rows(torch.tensor([3, 1008])).shape, factors.logits(torch.randn(2, 64)).shape
        (torch.Size([2, 64]), torch.Size([2, 1009]))
    """

    kind = "cp"
    config_class = CPConfig
    size_name = "rank"
    factors: nn.ParameterList

    def _shapes(self) -> dict[str, Shape | list[Shape]]:
        shape = [*self.vocab_shape, *self.dim_shape]
        if not 1 <= self.ranks <= largest_cp_rank(shape):
            raise ValueError(f"rank must be from 1 to {largest_cp_rank(shape)} for {shape}, it is {self.ranks}")
        return {"factors": [(size, self.ranks) for size in shape]}

    def _network(self, factors: Sequence[T]) -> list[tuple[T, Labels]]:
        return [(factor, (mode, len(factors))) for mode, factor in enumerate(factors)]

    @classmethod
    def sizes(cls, vocab_size: int, dim: int, config: CPConfig) -> Sizes:
        """The rank asked for, or any."""
        shapes = config.shapes_for(vocab_size, dim)
        if config.rank is not None:
            return Sizes(1, lambda _: (*shapes, config.rank))
        return Sizes(largest_cp_rank([*shapes[0], *shapes[1]]), lambda rank: (*shapes, rank))

    def _find(self, folded: Tensor, config: CPConfig, advance: Callable[[float], None], refine: bool) -> None:
        start = list(self.factors) if refine else None
        self._copy(*cp(folded, self.ranks, start, config.max_iterations, advance))


class Tucker(FoldedTable[TuckerConfig]):
    """Tucker of the folded table: `w_(i,j) = G ×_1 A[i] ×_2 B[j] ×_3 C` for id `i · I_2 + j`.

    A baseline. With a budget, the ranks are to the sizes of their modes as one number. Logits contract the states with
    columns, core and vocabulary in turn, which takes fewer multiplications than the product with a dense table.

    Args and errors are those of `FoldedTable`; `ranks` has one for every mode, at most its size and at most the product
    of the others.

    Example:
        >>> import torch
        >>> table = torch.randn(1009, 64)
        >>> factors = Tucker.decompose(table, table.nbytes // 4)
        >>> factors.vocab_shape, factors.dim_shape, factors.ranks
        ([29, 35], [64], [17, 20, 36])
        >>> factors.rows(torch.tensor([3, 1008])).shape, factors.logits(torch.randn(2, 64)).shape
        (torch.Size([2, 64]), torch.Size([2, 1009]))
    """

    kind = "tucker"
    config_class = TuckerConfig
    core: nn.Parameter
    factors: nn.ParameterList

    def _shapes(self) -> dict[str, Shape | list[Shape]]:
        shape, ranks = [*self.vocab_shape, *self.dim_shape], self.ranks
        if len(ranks) != len(shape) or min(ranks) < 1 or list(ranks) != possible_tucker_ranks(shape, ranks):
            raise ValueError(
                f"ranks {list(ranks)} must be {len(shape)}, one for every mode of {shape}, from 1 to its size, and "
                "none above the product of the others"
            )
        return {"core": tuple(ranks), "factors": list(zip(shape, ranks, strict=True))}

    def _network(self, factors: Sequence[T]) -> list[tuple[T, Labels]]:
        core, *others = factors
        count, rows = len(others), len(self.vocab_shape)
        network = [(factor, (mode, count + mode)) for mode, factor in enumerate(others)]
        return [*network[:rows], (core, tuple(range(count, 2 * count))), *network[rows:]]

    @classmethod
    def sizes(cls, vocab_size: int, dim: int, config: TuckerConfig) -> Sizes:
        """The ranks asked for, or any that are to the sizes of their modes as one number."""
        shapes = config.shapes_for(vocab_size, dim)
        shape = [*shapes[0], *shapes[1]]
        if config.ranks is not None:
            return Sizes(1, lambda _: (*shapes, list(config.ranks or ())))
        count = _STEPS * max(shape)
        return Sizes(
            count,
            lambda step: (*shapes, possible_tucker_ranks(shape, [size * step / count for size in shape])),
        )

    def _find(self, folded: Tensor, config: TuckerConfig, advance: Callable[[float], None], refine: bool) -> None:
        old = list(self.factors)
        if not refine:
            core, factors = tucker(folded, self.ranks, None, config.max_iterations)
        else:
            core, factors = tucker(folded, self.ranks, old, max(1, config.max_iterations))
            # Turned towards those of before, so that an optimizer's state goes on to fit; the core takes it back.
            rotations = [alignment(new.T, before.T) for new, before in zip(factors, old, strict=True)]
            with tensorly.backend_context("pytorch", local_threadsafe=True):
                core = tensorly.tenalg.multi_mode_dot(core, rotations)
            factors = [factor @ rotation.T for factor, rotation in zip(factors, rotations, strict=True)]
        self._copy(core, *factors)
        advance(1.0)
