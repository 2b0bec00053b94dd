"""A table cut into blocks of rows, each with a rank of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lightning_embcompress.factorizations.base import (
    Factorization,
    Options,
    integers,
    is_exporting,
    positive_integers,
    stored_bytes,
)
from lightning_embcompress.factorizations.low_rank import aligned_bases
from lightning_embcompress.factorizations.packing import bit_width, pack_bits, packed_bytes, unpack_bits
from lightning_embcompress.solvers.division import deal
from lightning_embcompress.solvers.gram import row_units, row_weights, run_of
from lightning_embcompress.solvers.group_reduce import BlockSolution, equal_frequency_groups, group_reduce
from lightning_embcompress.solvers.low_rank import project
from lightning_embcompress.solvers.rank_allocation import is_dense, smallest_elements

# Every block is a parameter of its own.
_MOST_BLOCKS = 2**16


@dataclass(frozen=True)
class GroupReduceOptions(Options):
    """Options of GroupReduce.

    Attributes:
        variant: `paper` is the published algorithm.
        groups: Number of blocks; None for 5 up to 30,000 words, else 20.
        refine_rounds: Most rounds of refinement; 0 for none.
        move_fraction: Part of the candidates that move in a round.

    Raises:
        ValueError: If one is out of its range.
    """

    variant: Literal["paper"] = "paper"
    groups: int | None = None
    refine_rounds: int = 5
    move_fraction: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.variant != "paper":
            raise ValueError(f"variant must be 'paper', it is {self.variant!r}")
        if self.groups is not None and self.groups < 1:
            raise ValueError(f"groups must be 1 or more, it is {self.groups}")
        if self.refine_rounds < 0:
            raise ValueError(f"refine_rounds must be 0 or more, it is {self.refine_rounds}")
        if not 0 < self.move_fraction <= 1:
            raise ValueError(f"move_fraction must be above 0 and at most 1, it is {self.move_fraction}")

    def groups_for(self, vocab_size: int) -> int:
        """Number of blocks of a table.

        Raises:
            ValueError: If there are too many, or the table has fewer rows.
        """
        groups = self.groups or min(5 if vocab_size <= 30_000 else 20, vocab_size)
        if groups > _MOST_BLOCKS:
            raise ValueError(f"groups must be at most {_MOST_BLOCKS}, it is {groups}")
        if groups > vocab_size:
            raise ValueError(f"groups must be at most the {vocab_size} rows of the table, it is {groups}")
        return groups


class BlockLowRank(Factorization[GroupReduceOptions]):
    """`w_i ≈ u_i B_b` for row `i` of block `b`: what GroupReduce stores.

    Rows are kept in block order. On disk a row has a block index of `⌈log₂ blocks⌉` bits, from which the permutation
    is rebuilt when the factors are loaded. A block whose factors would take more than its rows is kept as its rows.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        sizes: Rows of every block; they add up to `vocab_size`.
        ranks: Rank of every block, from 0 to `min(size, dim)`.
        dtype: Dtype of the factors.
        device: Device of the factors.

    Raises:
        ValueError: If sizes or ranks are not possible.

    Example:
        >>> table, counts = torch.randn(1000, 64), torch.arange(1000, 0, -1)
        >>> blocks = BlockLowRank.decompose(table, table.nbytes // 4, counts, GroupReduceOptions(groups=5))
        >>> blocks.rows(torch.tensor([3, 999])).shape, blocks.logits(torch.randn(2, 64)).shape
        (torch.Size([2, 64]), torch.Size([2, 1000]))
    """

    kind = "block_low_rank"
    options_class = GroupReduceOptions
    divides = True
    packed_block_index: Tensor
    position: Tensor
    order: Tensor

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        sizes: Sequence[int],
        ranks: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Build it empty."""
        super().__init__(vocab_size, dim)
        if len(sizes) != len(ranks) or not sizes or min(sizes) < 0 or sum(sizes) != vocab_size:
            raise ValueError(
                f"sizes {shortened(list(sizes))} must be one for each of the ranks and add up to {vocab_size} rows"
            )
        for size, rank in zip(sizes, ranks, strict=True):
            if not 0 <= rank <= min(size, dim):
                raise ValueError(f"the rank of a block of {size} rows must be from 0 to {min(size, dim)}, it is {rank}")
        self.sizes = list(sizes)
        self.ranks = list(ranks)
        self.dense_blocks = [is_dense(size, rank, dim) for size, rank in zip(sizes, ranks, strict=True)]
        self.coefficients = nn.ParameterList(
            nn.Parameter(torch.zeros(size, dim if dense else rank, dtype=dtype, device=device))
            for size, rank, dense in zip(sizes, ranks, self.dense_blocks, strict=True)
        )
        self.basis_ranks = [0 if dense else rank for rank, dense in zip(ranks, self.dense_blocks, strict=True)]
        self.basis = nn.Parameter(torch.zeros(sum(self.basis_ranks), dim, dtype=dtype, device=device))
        self.register_buffer("packed_block_index", torch.empty(0, dtype=torch.uint8, device=device))
        self.register_buffer("position", torch.empty(0, dtype=torch.long, device=device), persistent=False)
        self.register_buffer("order", torch.empty(0, dtype=torch.long, device=device), persistent=False)
        if self.device.type == "meta":
            # Only shapes are wanted: nothing is computed for as many rows as a file may say there are.
            self.packed_block_index = self.packed_block_index.new_empty(packed_bytes(vocab_size, bit_width(len(sizes))))
            self.position, self.order = self.position.new_empty(vocab_size), self.order.new_empty(vocab_size)
            self.in_order = True
            return
        with torch.device("cpu"):
            self._index(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))

    @property
    def block_of_row(self) -> Tensor:
        """`[vocab_size]` int64 block of every row."""
        return unpack_bits(self.packed_block_index, bit_width(len(self.sizes)), self.vocab_size)

    def _index(self, block_of_row: Tensor, device: torch.device | None = None) -> None:
        """Set which row is in which block, and the permutations that follow; None for the device of the factors."""
        device = device or self.device
        # Stable: within a block rows are in vocabulary order, so that the block index alone is enough.
        order = torch.argsort(block_of_row, stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(self.vocab_size, device=order.device)
        self.in_order = bool((order[1:] > order[:-1]).all())
        self.packed_block_index = pack_bits(block_of_row, bit_width(len(self.sizes))).to(device)
        self.order, self.position = order.to(device), position.to(device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "packed_block_index" not in state_dict or self.packed_block_index.is_meta:
            return
        error_msgs: list[str] = args[-1]
        block_of_row = self.block_of_row
        if torch.bincount(block_of_row, minlength=len(self.sizes)).tolist() != self.sizes:
            error_msgs.append(
                f"the block index {prefix}packed_block_index is damaged: block sizes differ from the plan"
            )
            return
        # The factors may not be loaded yet, and still be on the meta device.
        self._index(block_of_row, block_of_row.device)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the table, see `Factorization.rows`.

        Every distinct id is computed once; those of a block share one product with its basis.
        """
        if is_exporting():
            return self._exported_rows(ids)
        distinct, inverse = torch.unique(ids, return_inverse=True)
        positions, by_position = self.position.index_select(0, distinct).sort()
        ends = torch.tensor(self.sizes, device=positions.device).cumsum(0)
        counts = torch.diff(torch.searchsorted(positions, ends), prepend=ends.new_zeros(1)).tolist()
        # In training blocks without an id too: all factors get a gradient, if of zeros, as DDP insists.
        every_block = torch.is_grad_enabled() or not ids.numel()
        pieces = []
        start = 0
        for piece, size, coefficients, basis, dense in zip(
            torch.split(positions, counts), self.sizes, self.coefficients, self.bases(), self.dense_blocks, strict=True
        ):
            if piece.numel() or every_block:
                block = F.embedding(piece - start, coefficients)
                pieces.append(block if dense else block @ basis)
            start += size
        place = torch.empty_like(by_position)
        place[by_position] = torch.arange(by_position.numel(), device=place.device)
        return F.embedding(place[inverse], torch.cat(pieces))

    def _exported_rows(self, ids: Tensor) -> Tensor:
        """Rows in a graph whose shapes do not depend on the ids: every id is looked up in every block."""
        positions = F.embedding(ids, self.position.unsqueeze(1))
        rows = self.basis.new_zeros(*ids.shape, self.dim)
        start = 0
        for size, coefficients, basis, dense in zip(
            self.sizes, self.coefficients, self.bases(), self.dense_blocks, strict=True
        ):
            if size:
                block = F.embedding((positions.squeeze(-1) - start).clamp(0, size - 1), coefficients)
                here = (positions >= start) & (positions < start + size)
                rows = torch.where(here, block if dense else block @ basis, rows)
            start += size
        return rows

    def logits(self, hidden: Tensor) -> Tensor:
        """`h Wᵀ`, see `Factorization.logits`: one product with all bases side by side, then one a block."""
        blocks = self.block_logits(hidden)
        if self.in_order:
            return blocks
        if is_exporting():
            return blocks.index_select(-1, self.position)
        return cast(Tensor, _VocabularyOrder.apply(blocks, self.position, self.order))  # type: ignore[no-untyped-call]

    def block_logits(self, hidden: Tensor) -> Tensor:
        """Logits in block order: column `position[i]` is token `i`, column `k` is token `order[k]`."""
        reduced = torch.split(F.linear(hidden, self.basis), self.basis_ranks, dim=-1)
        return torch.cat(
            [
                F.linear(hidden if dense else part, coefficients)
                for part, coefficients, dense in zip(reduced, self.coefficients, self.dense_blocks, strict=True)
            ],
            dim=-1,
        )

    def bases(self) -> tuple[Tensor, ...]:
        """`[rank, dim]` basis of every block; of no rows for a block that is kept as its rows."""
        return torch.split(self.basis, self.basis_ranks)

    def spec(self) -> dict[str, Any]:
        """Shape, and size and rank of every block."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "dim": self.dim,
            "sizes": self.sizes,
            "ranks": self.ranks,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        return cls(vocab_size, dim, *_blocks(spec), dtype, device)

    @classmethod
    def smallest_bytes(
        cls,
        vocab_size: int,
        dim: int,
        itemsize: int,
        options: GroupReduceOptions | None = None,
    ) -> int:
        """Bytes with rank 1 in every block, see `Factorization.smallest_bytes`."""
        groups = (options or GroupReduceOptions()).groups_for(vocab_size)
        elements = smallest_elements([vocab_size // groups] * (groups - vocab_size % groups), dim)
        elements += smallest_elements([vocab_size // groups + 1] * (vocab_size % groups), dim)
        return elements * itemsize + cls._fixed_bytes(vocab_size, dim, groups)

    @classmethod
    def _fixed_bytes(cls, vocab_size: int, dim: int, groups: int) -> int:
        """Bytes beside the factors at most: block indices, headers, structure."""
        spec = {
            "kind": cls.kind,
            "vocab_size": vocab_size,
            "dim": dim,
            "sizes": [vocab_size] * groups,
            "ranks": [min(vocab_size, dim)] * groups,
        }
        return stored_bytes(packed_bytes(vocab_size, bit_width(groups)), groups + 2, spec)

    @classmethod
    @torch.no_grad()
    def decompose(
        cls,
        weight: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: GroupReduceOptions | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """GroupReduce within a budget, see `Factorization.decompose` and `solvers.group_reduce`.

        Raises:
            ValueError: If there are more groups than rows, or the bytes do not cover rank 1 in every block.
        """
        options = options or GroupReduceOptions()
        weights = row_weights(token_counts, weight.shape[0], weight.device)
        groups = options.groups_for(weight.shape[0])
        start = equal_frequency_groups(weights, groups)
        return cls._from_solution(weight, cls._solve(weight, weights, max_bytes, start, groups, options, advance))

    @torch.no_grad()
    def refined(
        self,
        target: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: GroupReduceOptions | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """Refine from the blocks as they are, see `Factorization.refined`; there stay as many.

        Blocks that words have moved between may suit a table that has changed much no longer: frequency groups are
        tried beside them, and taken where they leave a weighted error that is clearly lower.
        """
        options = options or GroupReduceOptions()
        groups = len(self.sizes)
        weights = row_weights(token_counts, self.vocab_size, target.device)
        now = self.block_of_row.to(target.device)
        afresh = equal_frequency_groups(weights, groups)
        starts = [now] if torch.equal(now, afresh) else [now, afresh]
        solutions = [
            self._solve(target, weights, max_bytes, start, groups, options, lambda part: advance(part / len(starts)))
            for start in starts
        ]
        solution = solutions[0]
        if min(solutions[-1].errors) < 0.98 * min(solution.errors):
            solution = solutions[-1]
        solved = self._from_solution(target, solution, reference=self)
        if solved.spec() != self.spec() or not torch.equal(solved.packed_block_index, self.packed_block_index):
            return solved
        # In place: the optimizer goes on with the parameters it knows.
        self.load_state_dict(solved.state_dict())
        return self

    @classmethod
    def _solve(
        cls,
        weight: Tensor,
        weights: Tensor,
        max_bytes: int,
        start: Tensor,
        groups: int,
        options: GroupReduceOptions,
        advance: Callable[[float], None],
    ) -> BlockSolution:
        vocab_size, dim = weight.shape
        max_elements = (max_bytes - cls._fixed_bytes(vocab_size, dim, groups)) // weight.element_size()
        return group_reduce(
            weight, weights, max_elements, groups, options.refine_rounds, options.move_fraction, start, advance
        )

    @classmethod
    @torch.no_grad()
    def _from_solution(cls, weight: Tensor, solution: BlockSolution, reference: BlockLowRank | None = None) -> Self:
        """Coefficients of all rows in the bases of a solution, turned towards those of a reference of equal ranks."""
        vocab_size, dim = weight.shape
        sizes = torch.bincount(solution.block_of_row, minlength=len(solution.ranks)).tolist()
        factorization = cls(vocab_size, dim, sizes, solution.ranks, weight.dtype, weight.device)
        factorization._index(solution.block_of_row)
        bases = solution.bases
        if reference is not None and reference.basis_ranks == factorization.basis_ranks:
            bases = aligned_bases(bases, reference.bases())
        units: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows, coefficients, basis, solved in zip(
            torch.split(factorization.order, sizes),
            factorization.coefficients,
            factorization.bases(),
            bases,
            strict=True,
        ):
            if solved is None:
                coefficients.copy_(weight[rows])
                continue
            basis.copy_(solved)
            runs = [run_of(chunks) for chunks in row_units(rows.numel(), dim)]
            units += [(coefficients[run], rows[run], solved) for run in runs]

        def compute(unit: int) -> None:
            coefficients, rows, solved = units[unit]
            coefficients.copy_(project(weight, solved, rows))

        # Processes share the rows of all blocks.
        deal([[unit[0]] for unit in units], [rows.numel() * solved.shape[0] for _, rows, solved in units], compute)
        return factorization


class _VocabularyOrder(torch.autograd.Function):
    """Bring logits from block order to vocabulary order.

    Backward of a permutation is the inverse permutation: a gather, where autograd would scatter and add.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, position: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return blocks.gather(-1, position.expand_as(blocks))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return gradients[0].gather(-1, order.expand_as(gradients[0])), None, None


def _blocks(spec: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Sizes and ranks of a structure that came from a file."""
    return integers(spec, "sizes", _MOST_BLOCKS), integers(spec, "ranks", _MOST_BLOCKS)
