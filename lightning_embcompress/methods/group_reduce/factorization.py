"""A table cut into blocks of rows, each with a rank of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_embcompress.methods.base import Problem
from lightning_embcompress.methods.block_products import BlockProducts
from lightning_embcompress.methods.blocks import MOST_BLOCKS, RowBlocks
from lightning_embcompress.methods.group_reduce.config import GroupReduceConfig
from lightning_embcompress.methods.group_reduce.solver import BlockSolution, group_reduce
from lightning_embcompress.methods.numerics.alignment import aligned_bases
from lightning_embcompress.methods.numerics.gram import compute_dtype, project, row_weights, row_windows
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.numerics.rank_allocation import is_dense, smallest_elements
from lightning_embcompress.methods.products import balance_product, store_product
from lightning_embcompress.methods.quantizers.factors import PackedFactor, materialize, multiply, read_rows
from lightning_embcompress.methods.quantizers.integer_quantizer import group_shape
from lightning_embcompress.methods.quantizers.packing import bit_width, packed_bytes
from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.methods.specs import integers, positive_integers, stored_bytes
from lightning_embcompress.methods.tiles import Tiles
from lightning_embcompress.utils.division import deal
from lightning_embcompress.utils.tensor_files import Rows


class BlockLowRank(RowBlocks[GroupReduceConfig]):
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
        >>> blocks = BlockLowRank.decompose(table, table.nbytes // 4, counts, GroupReduceConfig(groups=5))
        >>> blocks.rows(torch.tensor([3, 999])).shape, blocks.logits(torch.randn(2, 64)).shape
        (torch.Size([2, 64]), torch.Size([2, 1000]))
    """

    kind = "block_low_rank"
    config_class = GroupReduceConfig
    entries = ("sizes", "ranks")
    divides = True
    streams = True
    shared_factors = ("basis",)
    row_factors = ("coefficients",)

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
        super().__init__(vocab_size, dim, sizes, device)
        if len(sizes) != len(ranks):
            raise ValueError(f"there must be a rank for each of the {len(sizes)} blocks, there are {len(ranks)}")
        for size, rank in zip(sizes, ranks, strict=True):
            if not 0 <= rank <= min(size, dim):
                raise ValueError(f"the rank of a block of {size} rows must be from 0 to {min(size, dim)}, it is {rank}")
        self.ranks = list(ranks)
        self.dense_blocks = [is_dense(size, rank, dim) for size, rank in zip(sizes, ranks, strict=True)]
        self.coefficients = nn.ParameterList(
            nn.Parameter(torch.zeros(size, dim if dense else rank, dtype=dtype, device=device))
            for size, rank, dense in zip(sizes, ranks, self.dense_blocks, strict=True)
        )
        self.basis_ranks = [0 if dense else rank for rank, dense in zip(ranks, self.dense_blocks, strict=True)]
        self.basis = nn.Parameter(torch.zeros(sum(self.basis_ranks), dim, dtype=dtype, device=device))

    def rows_of_blocks(self, places: Sequence[Tensor | None], sparse: bool = False) -> list[Tensor]:
        """Rows of a block share one product with its basis, see `RowBlocks.rows_of_blocks`."""
        rows = []
        for place, coefficients, basis, dense in zip(
            places, self.coefficients, self.bases(sparse), self.dense_blocks, strict=True
        ):
            if place is not None:
                block = read_rows(coefficients, place, sparse)
                rows.append(block if dense else block @ basis)
        return rows

    def logits_in_storage_order(self, hidden: Tensor) -> Tensor:
        """See `Factorization.logits_in_storage_order`: one product with all bases side by side, then one a block."""
        return self._products(hidden).logits()

    def _tiles(self, hidden: Tensor, tile_rows: int) -> Tiles:
        return self.tiles_in_block_order(self._products(hidden).tiles(tile_rows))

    def _products(self, hidden: Tensor) -> BlockProducts:
        reduced = multiply(hidden, self.basis)
        parts = [
            hidden if dense else part
            for part, dense in zip(torch.split(reduced, self.basis_ranks, dim=-1), self.dense_blocks, strict=True)
        ]
        firsts = accumulate(self.basis_ranks, initial=0)
        return BlockProducts(
            hidden,
            list(self.coefficients),
            reduced,
            [None if dense else first for first, dense in zip(firsts, self.dense_blocks, strict=False)],
            parts,
        )

    def bases(self, sparse: bool = False) -> tuple[Tensor, ...]:
        """`[rank, dim]` basis of every block; of no rows for a block that is kept as its rows."""
        return torch.split(materialize(self.basis, sparse), self.basis_ranks)

    def balance(self) -> None:
        """See `Factorization.balance`."""
        for coefficients, basis, dense in zip(self.coefficients, self.bases(), self.dense_blocks, strict=True):
            if not dense:
                balance_product([coefficients], basis)

    @torch.no_grad()
    def quantized(self, quantization: Quantization, metric: Metric | None = None) -> Self:
        """Every block balanced, and rounded with error feedback in the metric, see `Factorization.quantized`.

        Where rows of the basis are so short that those of two blocks share a scale, every factor is rounded by itself.
        """
        group_rows, _ = group_shape(self.dim, quantization.group_size)
        if any(sum(self.basis_ranks[:block]) % group_rows for block, rank in enumerate(self.basis_ranks) if rank):
            copied: Any = copy.deepcopy(self).prepared(quantization).converted()
            return cast(Self, copied)
        packed = self._copied()
        packed.hold(quantization, "packed")
        parts: list[Any] = list(packed.coefficients)
        shared: Any = packed.basis
        stored = []
        for part, own, numbers, rows in zip(
            parts, self.coefficients, self.bases(), torch.split(self.order, self.sizes), strict=True
        ):
            if not len(numbers):
                part.fill(own)
                continue
            alone = PackedFactor(numbers.shape, shared.storage, numbers.dtype, numbers.device)
            store_product([part], alone, [own], numbers, metric, [rows])
            stored.append(alone)
        if stored:
            shared.codes.copy_(torch.cat([alone.codes for alone in stored]))
            shared.scales.copy_(torch.cat([alone.scales for alone in stored]))
        return packed

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build it empty, see `Factorization.from_spec`."""
        vocab_size, dim = positive_integers(spec, "vocab_size", "dim")
        return cls(vocab_size, dim, cls.checked_sizes(spec), integers(spec, "ranks", MOST_BLOCKS), dtype, device)

    @classmethod
    def smallest_bytes(
        cls,
        vocab_size: int,
        dim: int,
        itemsize: int,
        config: GroupReduceConfig | None = None,
    ) -> int:
        """Bytes with rank 1 in every block, see `Factorization.smallest_bytes`."""
        config = config or GroupReduceConfig()
        groups = config.groups_for(vocab_size)
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
    def _decompose(cls, problem: Problem[GroupReduceConfig]) -> Self:
        """GroupReduce within a budget, see `group_reduce.solver`."""
        weight, config = problem.weight, problem.config
        weights = row_weights(problem.token_counts, weight.shape[0], weight.device)
        groups = config.groups_for(weight.shape[0])
        return cls._from_solution(weight, cls._solve(problem, weights, config.start(weights), groups, problem.advance))

    def _refine(self, problem: Problem[GroupReduceConfig]) -> Self:
        """Refine from the blocks as they are; there stay as many.

        Blocks that words have moved between may suit a table that has changed much no longer: frequency groups are
        tried beside them, and taken where they leave a weighted error that is clearly lower.
        """
        target, advance = problem.weight, problem.advance
        groups = len(self.sizes)
        weights = row_weights(problem.token_counts, self.vocab_size, target.device)
        now = self.block_of_row.to(target.device)
        afresh = replace(problem.config, groups=groups).start(weights)
        starts = [now] if torch.equal(now, afresh) else [now, afresh]
        solutions = [
            self._solve(problem, weights, start, groups, lambda part: advance(part / len(starts))) for start in starts
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
        problem: Problem[GroupReduceConfig],
        weights: Tensor,
        start: Tensor,
        groups: int,
        advance: Callable[[float], None],
    ) -> BlockSolution:
        weight, config = problem.weight, problem.config
        vocab_size, dim = weight.shape
        max_elements = (problem.max_bytes - cls._fixed_bytes(vocab_size, dim, groups)) // weight.element_size()
        return group_reduce(
            weight, weights, max_elements, groups, config.refine_rounds, config.move_fraction, start, advance
        )

    @classmethod
    def _from_solution(cls, weight: Tensor, solution: BlockSolution, reference: BlockLowRank | None = None) -> Self:
        """Coefficients of all rows in the bases of a solution, turned towards those of a reference of equal ranks."""
        factorization = cls._outlined(weight, solution, reference)
        bases = factorization._computing_bases(weight.dtype)
        windows = row_windows(*weight.shape)
        parts = [part for window in windows for part in factorization.runs_of(window)]
        results = [[factorization.coefficients[block].detach()[place]] for block, place, _ in parts]

        def compute(unit: int) -> None:
            block, _, ids = parts[unit]
            basis = bases[block]
            results[unit][0].copy_(weight[ids] if basis is None else project(weight, basis, ids))

        # Processes share the rows of all blocks.
        deal(results, [len(ids) * (1.0 + factorization.ranks[block]) for block, _, ids in parts], compute)
        return factorization

    @classmethod
    def _outlined(
        cls,
        weight: Rows,
        solution: BlockSolution,
        reference: BlockLowRank | None = None,
        device: torch.device | None = None,
    ) -> Self:
        vocab_size, dim = weight.shape
        sizes = torch.bincount(solution.block_of_row, minlength=len(solution.ranks)).tolist()
        factorization = cls(vocab_size, dim, sizes, solution.ranks, weight.dtype, device or weight.device)
        factorization._index(solution.block_of_row, weight.device)
        if factorization.basis.is_meta:
            factorization.basis = nn.Parameter(torch.zeros_like(factorization.basis, device=weight.device))
        bases = solution.bases
        if reference is not None and reference.basis_ranks == factorization.basis_ranks:
            bases = aligned_bases(bases, reference.bases())
        for basis, solved in zip(factorization.bases(), bases, strict=True):
            if solved is not None:
                basis.detach().copy_(solved)
        return factorization

    def _computing_bases(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Bases of all blocks as they are stored; None for those that are kept as their rows.

        Copies: products round by where in memory numbers are, and a file may have them anywhere.
        """
        wide = compute_dtype(dtype)
        return [
            None if dense else basis.detach().to(wide, copy=True)
            for basis, dense in zip(self.bases(), self.dense_blocks, strict=True)
        ]

    @classmethod
    @torch.no_grad()
    def outline(cls, problem: Problem[GroupReduceConfig]) -> Self:
        """See `Factorization.outline`."""
        weight, config = problem.weight, problem.config
        weights = row_weights(problem.token_counts, weight.shape[0], weight.device)
        groups = config.groups_for(weight.shape[0])
        solution = cls._solve(problem, weights, config.start(weights), groups, problem.advance)
        return cls._outlined(weight, solution, device=torch.device("meta"))

    @torch.no_grad()
    def filling(self, problem: Problem[GroupReduceConfig]) -> Callable[[slice], None]:
        """See `Factorization.filling`."""
        self.find_places()
        weight, bases = problem.weight, self._computing_bases(problem.weight.dtype)

        def fill(window: slice) -> None:
            rows = weight[window]
            for block, place, ids in self.runs_of(window):
                inside, basis = ids - window.start, bases[block]
                # Of copies, as in `_from_solution`.
                values = rows[inside] if basis is None else project(rows, basis, inside)
                self.coefficients[block].data[place] = values

        return fill
