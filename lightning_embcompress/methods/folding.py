"""Tables that are folded to a tensor of a few modes and stored as a network of small factors."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from lightning_embcompress.methods.base import Problem
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.numerics.shapes import balanced_shape, fold
from lightning_embcompress.methods.sized import SizedFactorization
from lightning_embcompress.methods.specs import integer, integers, positive_integers
from lightning_embcompress.utils.graphs import is_exporting

# Elements of what is computed on the way to the logits of some states at once: 16 MiB of float32.
_STATES_ELEMENTS = 2**22
# The label of ids, or of hidden states.
_ITEM = -1

Shape = tuple[int, ...]
Labels = tuple[int, ...]
"""A label for every mode of a tensor: products are summed over labels that the result does not have."""
T = TypeVar("T")


@dataclass(frozen=True)
class FoldingConfig(MethodConfig):
    """How a table is folded.

    Attributes:
        vocab_shape: Sizes of the modes of the vocabulary, whose product is at least the number of tokens; None for
            balanced ones.
        dim_shape: Sizes of the modes of the columns, whose product is at least their number; None for balanced ones.

    Raises:
        ValueError: If a size is not positive.
    """

    vocab_shape: Sequence[int] | None = None
    dim_shape: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("vocab_shape", "dim_shape"):
            shape = getattr(self, name)
            if shape is not None and (not shape or min(shape) < 1):
                raise ValueError(f"{name} must be sizes of 1 or more, it is {list(shape)}")

    @property
    def num_modes(self) -> tuple[int, int]:
        """How many modes rows and columns get where no shape is given."""
        return 2, 1

    def shapes_for(self, vocab_size: int, dim: int) -> tuple[list[int], list[int]]:
        """Sizes of the modes of the rows and of the columns of a table.

        Raises:
            ValueError: If a shape that was given is too small for it.
        """
        shapes = []
        for name, size, what, count in (
            ("vocab_shape", vocab_size, "rows", self.num_modes[0]),
            ("dim_shape", dim, "columns", self.num_modes[1]),
        ):
            shape = list(getattr(self, name) or balanced_shape(size, count))
            if math.prod(shape) < size:
                raise ValueError(
                    f"{name} {shape} has a product of {math.prod(shape)}: it must be at least the {size} {what} of the "
                    "table"
                )
            shapes.append(shape)
        return shapes[0], shapes[1]


FoldingConfigT = TypeVar("FoldingConfigT", bound=FoldingConfig)
"""The config of a method that folds the table."""


class FoldedTable(SizedFactorization[FoldingConfigT]):
    """A table as a tensor `[I_1, …, I_m, J_1, …, J_k]`, the product of a network of factors.

    An id is read as a number of `m` digits. Rows and columns beyond those of the table are padding, which is decomposed
    as zeros and never returned. A subclass says which factors there are, which of their modes belong together, and how
    they are found; reading them is the same for all. The table is never built: states are contracted with one factor
    after the other, or meet a piece of the table at a time where that takes fewer multiplications.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        vocab_shape: `I_1 … I_m`, with a product of at least `vocab_size`.
        dim_shape: `J_1 … J_k`, with a product of at least `dim`.
        ranks: What else there is to know of the shapes of the factors.
        dtype: Dtype of the factors.
        device: Device of the factors.

    Raises:
        ValueError: If shapes or ranks are not possible.
    """

    entries = ("vocab_shape", "dim_shape")
    size_name: ClassVar[str] = "ranks"
    """Name of the ranks in the structure."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        vocab_shape: Sequence[int],
        dim_shape: Sequence[int],
        ranks: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Build it empty."""
        super().__init__(vocab_size, dim)
        for name, shape, size in (("vocab_shape", vocab_shape, vocab_size), ("dim_shape", dim_shape, dim)):
            if not shape or min(shape) < 1 or math.prod(shape) < size:
                raise ValueError(f"{name} {list(shape)} must be sizes of 1 or more with a product of at least {size}")
        self.vocab_shape, self.dim_shape = list(vocab_shape), list(dim_shape)
        self.ranks = ranks
        for factor, shapes in self._shapes().items():
            made = [nn.Parameter(torch.zeros(one, dtype=dtype, device=device)) for one in _listed(shapes)]
            setattr(self, factor, nn.ParameterList(made) if isinstance(shapes, list) else made[0])

    @abstractmethod
    def _shapes(self) -> dict[str, Shape | list[Shape]]:
        """Shapes of the factors by their names, in the order of `parameters()`.

        Raises:
            ValueError: If the ranks are not possible.
        """

    @abstractmethod
    def _network(self, factors: Sequence[T]) -> list[tuple[T, Labels]]:
        """Factors with a label for each of their modes, in the order in which rows are computed.

        Labels are 0, 1, … for the modes of the folded table, and larger ones for ranks.

        Args:
            factors: In the order of `parameters()`, or something else for each.
        """

    @abstractmethod
    def _find(self, folded: Tensor, config: FoldingConfigT, advance: Callable[[float], None], refine: bool) -> None:
        """Find the factors of a folded table, in place; with `refine` from those there are."""

    def _solve(self, problem: Problem[FoldingConfigT], refine: bool) -> None:
        folded = fold(problem.weight, self.vocab_shape, self.dim_shape)
        self._find(folded, problem.config, problem.advance, refine)

    @property
    def _modes(self) -> tuple[Labels, Labels]:
        """Labels of the modes of rows and of columns."""
        rows, columns = len(self.vocab_shape), len(self.dim_shape)
        return tuple(range(rows)), tuple(range(rows, rows + columns))

    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows of the table, see `Factorization.rows`; every distinct id is computed once.

        Raises:
            IndexError: If an id is out of range.
        """
        factors = self.whole_factors(sparse)
        if is_exporting():
            return self._gathered_rows(ids.flatten().long(), *factors).reshape(*ids.shape, self.dim)
        distinct, inverse = torch.unique(ids, return_inverse=True)
        # Sorted. The padding behind the last token would be read without a complaint.
        if distinct.numel() and (int(distinct[0]) < 0 or int(distinct[-1]) >= self.vocab_size):
            raise IndexError(
                f"ids must be from 0 to {self.vocab_size - 1}, they go from {distinct[0]} to {distinct[-1]}"
            )
        return F.embedding(inverse, self._distinct_rows(distinct.long(), *factors))

    def _gathered_rows(self, ids: Tensor, *factors: Tensor) -> Tensor:
        """Rows by products of the parts of factors that each id reads: no shape depends on the ids' values."""
        _, columns = self._modes
        read = self._read(torch.unravel_index(ids, self.vocab_shape), factors)
        return contract(read, (_ITEM, *columns)).flatten(1)[:, : self.dim]

    def _distinct_rows(self, ids: Tensor, *factors: Tensor) -> Tensor:
        """Rows of ids that ascend, each once."""
        last = self.vocab_shape[-1]
        heads, inverse = torch.unique_consecutive(ids // last, return_inverse=True)
        if len(self.vocab_shape) == 1 or len(heads) * last > 2 * len(ids):
            return self._scattered_rows(ids, *factors)
        # Ids that share all digits but the last share what those have to do.
        modes, columns = self._modes
        read = self._read(torch.unravel_index(heads, self.vocab_shape[:-1]), factors)
        rows = contract(read, (_ITEM, modes[-1], *columns)).flatten(2).flatten(0, 1)
        return rows.index_select(0, inverse * last + ids % last)[:, : self.dim]

    def _scattered_rows(self, ids: Tensor, *factors: Tensor) -> Tensor:
        """Rows of distinct ids of which few have neighbours."""
        return self._gathered_rows(ids, *factors)

    def _read(self, digits: Sequence[Tensor], factors: Sequence[Tensor]) -> list[tuple[Tensor, Labels]]:
        """The network with the parts of factors that the first digits of ids name."""
        read = []
        for factor, labels in self._network(factors):
            for mode, digit in enumerate(digits):
                if mode in labels:
                    factor = factor.index_select(labels.index(mode), digit)
                    labels = tuple(_ITEM if label == mode else label for label in labels)
            read.append((factor, labels))
        return read

    def logits(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ`, see `Factorization.logits`: by contraction, or by rows where their cost is shared by many states."""
        factors = self.whole_factors()
        states = hidden.reshape(-1, self.dim)
        table_cost, state_cost, elements = self._costs
        if is_exporting():
            logits = self._contracted(states, *factors)
        elif len(states) * state_cost > table_cost + len(states) * self.vocab_size * self.dim:
            return self.logits_of_rows(hidden, self._rows_between, *factors)
        else:
            pieces = torch.split(states, max(1, _STATES_ELEMENTS // elements))
            if torch.is_grad_enabled():
                # What a contraction makes on its way may be many times the logits: it is made again for the gradient.
                outputs = [checkpoint(self._contracted, piece, *factors, use_reentrant=False) for piece in pieces]
            else:
                outputs = [self._contracted(piece, *factors) for piece in pieces]
            logits = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return logits.reshape(*hidden.shape[:-1], self.vocab_size)

    def _contracted(self, states: Tensor, *factors: Tensor) -> Tensor:
        device = states.device.type
        if torch.is_autocast_enabled(device) and states.dtype != torch.float64:
            # Products over ranks of 1 are no matrix products, and would keep their dtype.
            dtype = torch.get_autocast_dtype(device)
            states, factors = states.to(dtype), tuple(factor.to(dtype) for factor in factors)
        rows, columns = self._modes
        padded = F.pad(states, (0, math.prod(self.dim_shape) - self.dim)).reshape(-1, *self.dim_shape)
        network = [(padded, (_ITEM, *columns)), *reversed(self._network(factors))]
        return contract(network, (_ITEM, *rows)).flatten(1)[:, : self.vocab_size]

    def _rows_between(self, start: int, stop: int, *factors: Tensor) -> Tensor:
        return self._distinct_rows(torch.arange(start, stop, device=factors[0].device), *factors)

    @cached_property
    def _costs(self) -> tuple[int, int, int]:
        """Multiplications for all rows, and for one state; the most elements that the latter makes on its way."""
        rows, columns = self._modes
        shapes = [one for shape in self._shapes().values() for one in _listed(shape)]
        network = self._network(shapes)
        sizes = {label: size for shape, labels in network for label, size in zip(labels, shape, strict=True)}
        sizes[_ITEM] = 1
        labels = [own for _, own in network]

        def elements(some: Labels) -> int:
            return math.prod(sizes[label] for label in some)

        states = list(_steps([(_ITEM, *columns), *reversed(labels)], (_ITEM, *rows)))
        return (
            sum(elements(entering) for _, entering, _ in _steps(labels, (*rows, *columns))),
            sum(elements(entering) for _, entering, _ in states),
            max(elements(kept) for *_, kept in states),
        )

    def structure(self) -> dict[str, Any]:
        """See `Factorization.structure`."""
        return {**super().structure(), self.size_name: self.ranks}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        vocab_shape, dim_shape = integers(spec, "vocab_shape"), integers(spec, "dim_shape")
        ranks = integer(spec, "rank") if cls.size_name == "rank" else integers(spec, "ranks")
        return cls(vocab_size, dim, vocab_shape, dim_shape, ranks, dtype, device)

    def _copy(self, *found: Tensor) -> None:
        """Set the factors, in the order of `parameters()`."""
        for parameter, values in zip(self.parameters(), found, strict=True):
            parameter.copy_(values)


def _listed(shape: Shape | list[Shape]) -> list[Shape]:
    return shape if isinstance(shape, list) else [shape]


def _steps(labels: Sequence[Labels], output: Labels) -> Iterator[tuple[int, Labels, Labels]]:
    """Which factor each product takes in, the labels that enter it, and those that are kept for what follows."""
    kept, waiting = labels[0], list(range(1, len(labels)))
    while waiting:
        # One that shares nothing with what there is would only make it larger, and waits.
        index = next((one for one in waiting if not set(labels[one]).isdisjoint(kept)), waiting[0])
        waiting.remove(index)
        entering = tuple(dict.fromkeys((*kept, *labels[index])))
        needed = {*output}.union(*(labels[one] for one in waiting))
        kept = tuple(label for label in entering if label in needed)
        yield index, entering, kept


def contract(network: Sequence[tuple[Tensor, Labels]], output: Labels) -> Tensor:
    """Product of tensors, summed over all labels that the result does not have.

    From left to right, but for factors that have to wait for one that they share a label with. `torch.einsum` of more
    than two tensors chooses an order of its own, and the best one for many states builds the table.

    Args:
        network: Tensors with a label for each of their modes.
        output: Labels of the modes of the result.

    Example:
        >>> a, b, c = torch.rand(2, 3), torch.rand(3, 4), torch.rand(4, 5)
        >>> torch.allclose(contract([(a, (0, 1)), (b, (1, 2)), (c, (2, 3))], (3, 0)), (a @ b @ c).T)
        True
    """
    value, labels = network[0]
    for index, entering, kept in _steps([own for _, own in network], output):
        place = {label: position for position, label in enumerate(entering)}
        factor, own = network[index]
        sides = (value, [place[label] for label in labels], factor, [place[label] for label in own])
        value, labels = torch.einsum(*sides, [place[label] for label in kept]), kept
    place = {label: position for position, label in enumerate(labels)}
    return torch.einsum(value, list(place.values()), [place[label] for label in output])
