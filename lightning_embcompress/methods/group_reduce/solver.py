"""GroupReduce: block-wise, frequency-weighted low rank with refinement.

Chen, Si, Li, Chelba, Hsieh: GroupReduce: Block-Wise Low-Rank Approximation for Neural Language Model Shrinking,
NeurIPS 2018 (arXiv 1806.06950).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import (
    PackedSymmetric,
    add_gram,
    compute_dtype,
    gram_matrix,
    row_units,
    run_of,
    top_eigenvectors,
    warm_eigenvectors,
)
from lightning_embcompress.methods.numerics.rank_allocation import is_dense, proportional_ranks
from lightning_embcompress.utils.division import agree, deal
from lightning_embcompress.utils.tensor_files import Rows

# Refinement has converged when a round would move no more words than this (GroupReduce, algorithm 1).
_FEW_MOVES = 5


@dataclass(frozen=True)
class BlockSolution:
    """Which row belongs to which block, and the basis of every block.

    Attributes:
        block_of_row: `[vocab_size]` int64 block of every row.
        ranks: Rank of every block.
        bases: `[rank, dim]` orthonormal rows of every block; None for a block that is stored as its rows.
        errors: Relative weighted error `Σ q_i ‖w_i − ŵ_i‖² / Σ q_i ‖w_i‖²` before refinement and after each round.
    """

    block_of_row: Tensor
    ranks: list[int]
    bases: list[Tensor | None]
    errors: list[float]


def equal_frequency_groups(weights: Tensor, groups: int) -> Tensor:
    """Sort rows by weight and cut them into `groups` groups of equal size, the most frequent rows in group 0.

    Args:
        weights: `[vocab_size]` row weights; ties keep the order of the rows.
        groups: Number of groups, from 1 to `vocab_size`; the first ones get the rows left over.

    Returns:
        `[vocab_size]` int64 group of every row.
    """
    order = torch.argsort(weights, descending=True, stable=True)
    sizes = [len(part) for part in torch.arange(weights.numel()).tensor_split(groups)]
    groups_in_order = torch.arange(groups, device=weights.device).repeat_interleave(
        torch.tensor(sizes, device=weights.device)
    )
    block_of_row = torch.empty_like(groups_in_order)
    block_of_row[order] = groups_in_order
    return block_of_row


def group_reduce(
    weight: Rows,
    weights: Tensor,
    max_elements: int,
    groups: int = 5,
    refine_rounds: int = 5,
    move_fraction: float = 0.1,
    start: Tensor | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> BlockSolution:
    """Approximate a table by blocks of rows, each of a low rank of its own.

    Minimises `Σ_i q_i ‖w_i − (U Vᵀ)_i‖²` (eq. 3) for equal frequency groups with ranks proportional to the mean
    frequency of the group, then refines (algorithm 1): a word whose unweighted error is lower under the basis of
    another block is a candidate for it; the `move_fraction` of the candidates with the lowest errors there move, the
    changed blocks are solved again, until few move or `refine_rounds` is reached. What the paper leaves open: a block
    keeps at least as many rows as its rank; ranks are rescaled to the budget after every round; of all rounds the
    one of lowest weighted error is returned; of candidates of equal error the more frequent word goes first.

    Only `Wᵀ diag(q) W` of the blocks is ever decomposed. A round costs one product of the table with all bases; the
    second moments are updated by the rows that moved, and their eigenvectors are started from the last ones. Processes
    share the blocks in the latter and the rows in the former, see `utils.division`.

    Args:
        weight: `[vocab_size, dim]` table.
        weights: `[vocab_size]` positive float64 row weights `q`.
        max_elements: Elements that the factors of all blocks together may take.
        groups: Number of blocks, from 1 to `vocab_size`.
        refine_rounds: Most rounds of refinement; 0 for none.
        move_fraction: Part of the candidates that move in one round.
        start: `[vocab_size]` block of every row to begin with, instead of equal frequency groups.
        advance: Called with shares of the work that add up to 1.

    Returns:
        The blocks, their ranks and bases.

    Raises:
        ValueError: If the budget does not cover rank 1 in every block.
    """
    block_of_row = equal_frequency_groups(weights, groups) if start is None else start.clone()
    moments = _Moments(weight, weights, block_of_row, groups)
    step = 1.0 / (refine_rounds + 2)
    advance(step)

    ranks = moments.ranks(max_elements)
    bases, error = moments.solve(ranks)
    errors = [error]
    best = (error, block_of_row, ranks)
    for round_index in range(refine_rounds):
        moves = _choose_moves(weight, weights, block_of_row, ranks, bases, move_fraction)
        if moves is None:
            advance(step * (refine_rounds - round_index))
            break
        rows, destinations = moves
        block_of_row = block_of_row.index_put((rows,), destinations)
        moments.update(block_of_row)
        ranks = moments.ranks(max_elements)
        bases, error = moments.solve(ranks, bases)
        errors.append(error)
        if error < best[0]:
            best = (error, block_of_row, ranks)
        advance(step)
    if len(errors) > 1:
        # The rounds are compared by eigenvectors that were only updated; the best one gets exact ones.
        _, block_of_row, ranks = best
        moments.update(block_of_row)
        bases, _ = moments.solve(ranks)
    advance(step)
    return BlockSolution(block_of_row, ranks, bases, errors)


class _Moments:
    """Sizes, weights and second moments of all blocks, kept up to date while rows move."""

    def __init__(self, weight: Rows, weights: Tensor, block_of_row: Tensor, groups: int) -> None:
        self.weight = weight
        self.weights = weights
        self.block_of_row = block_of_row
        # Half of `groups` matrices in the compute dtype: whole ones in float64 would take most of the memory that
        # solving may use.
        dtype = compute_dtype(weight.dtype)
        self.grams = PackedSymmetric(groups, weight.shape[1], dtype, weight.device)

        def compute(block: int) -> None:
            self.grams[block] = gram_matrix(weight, weights, (block_of_row == block).nonzero().squeeze(1))

        deal([[self.grams.stored(block)] for block in range(groups)], self.sizes, compute)

    @property
    def sizes(self) -> list[int]:
        return [int(size) for size in torch.bincount(self.block_of_row, minlength=len(self.grams))]

    def ranks(self, max_elements: int) -> list[int]:
        """Ranks proportional to the mean frequency of the blocks as they are now, within the budget."""
        sizes = self.sizes
        mass = torch.bincount(self.block_of_row, weights=self.weights, minlength=len(sizes))
        # A GPU adds them up in any order.
        agree(mass)
        frequencies = [float(m) / size if size else 0.0 for m, size in zip(mass, sizes, strict=True)]
        return proportional_ranks(frequencies, sizes, self.weight.shape[1], max_elements)

    def solve(self, ranks: list[int], previous: list[Tensor | None] | None = None) -> tuple[list[Tensor | None], float]:
        """Leading eigenvectors of every block, None for those stored as their rows, and the error they leave.

        Args:
            ranks: Rank of every block.
            previous: Bases of similar blocks to start from.

        Returns:
            The bases, and the relative weighted error `Σ_b (tr S_b − tr B_b S_b B_bᵀ) / Σ_b tr S_b`.
        """
        dim, sizes = self.grams.dim, self.sizes
        dense = [is_dense(size, rank, dim) for size, rank in zip(sizes, ranks, strict=True)]
        widths = [0 if as_rows else rank for as_rows, rank in zip(dense, ranks, strict=True)]
        # What is kept is allocated before what is not: between the work space of one block and that of the next it
        # would keep the allocator from giving that back.
        stacked = torch.empty(sum(widths), dim, dtype=self.grams.dtype, device=self.weight.device)
        bases = torch.split(stacked, widths)
        # Of every block tr S_b and the part of it that is lost.
        traces = torch.zeros(len(sizes), 2, dtype=torch.float64, device=self.weight.device)
        before = previous if previous is not None else [None] * len(sizes)

        def compute(block: int) -> None:
            trace = self.grams.trace(block)
            traces[block, 0] = trace
            if dense[block]:
                return
            gram, basis, rank, old = self.grams[block], bases[block], ranks[block], before[block]
            basis.copy_(top_eigenvectors(gram, rank) if old is None else warm_eigenvectors(gram, rank, old))
            traces[block, 1] = trace - float(((basis @ gram) * basis).sum(dtype=torch.float64))

        # Against a full decomposition, of which some eigenvectors from a start are a part.
        costs = [
            min(1.0, 2 * width / dim) if old is not None or not width else 1.0
            for width, old in zip(widths, before, strict=True)
        ]
        deal([[*parts] for parts in zip(bases, traces, strict=True)], costs, compute)
        total = lost = 0.0
        for trace, part in traces.tolist():
            total, lost = total + trace, lost + part
        error = max(lost, 0.0) / total if total > 0 else 0.0
        return [None if as_rows else basis for as_rows, basis in zip(dense, bases, strict=True)], error

    def update(self, block_of_row: Tensor) -> None:
        """Move rows: subtract them from the blocks they left, add them to those they joined."""
        moved = (block_of_row != self.block_of_row).nonzero().squeeze(1)
        left, joined = self.block_of_row[moved], block_of_row[moved]
        self.block_of_row = block_of_row
        counts = torch.bincount(torch.cat([left, joined]), minlength=len(self.grams)).tolist()
        changed = [block for block, count in enumerate(counts) if count]

        def compute(unit: int) -> None:
            block = changed[unit]
            gone, come = moved[left == block], moved[joined == block]
            now = (block_of_row == block).nonzero().squeeze(1)
            if gone.numel() + come.numel() >= now.numel():
                self.grams[block] = gram_matrix(self.weight, self.weights, now)
                return
            updated = self.grams[block].double()
            add_gram(updated, self.weight, self.weights, come)
            add_gram(updated, self.weight, self.weights, gone, sign=-1)
            if float(updated.trace()) < 1e-3 * self.grams.trace(block):
                # Nearly all of its weight has left: what remains would be rounding.
                updated = gram_matrix(self.weight, self.weights, now)
            self.grams[block] = updated

        deal([[self.grams.stored(block)] for block in changed], [counts[block] for block in changed], compute)


def _choose_moves(
    weight: Rows,
    weights: Tensor,
    block_of_row: Tensor,
    ranks: list[int],
    bases: list[Tensor | None],
    move_fraction: float,
) -> tuple[Tensor, Tensor] | None:
    """Rows that move in one round and the blocks they move to; None when few are left that would."""
    best_error, best_block = _score(weight, block_of_row, bases)
    candidates = (best_block != block_of_row).nonzero().squeeze(1)
    # Lowest error at the destination first; of equal ones (a block of full rank has error 0 for all) the most frequent.
    candidates = candidates[torch.argsort(weights[candidates], descending=True, stable=True)]
    candidates = candidates[torch.argsort(best_error[candidates], stable=True)]
    candidates = candidates[: max(1, round(move_fraction * candidates.numel()))]

    # A donor keeps at least as many rows as its rank: of its candidates only the first ones may leave.
    donors = block_of_row[candidates]
    sizes = torch.bincount(block_of_row, minlength=len(ranks))
    may_leave = sizes - torch.tensor(ranks, device=sizes.device)
    by_donor = torch.argsort(donors, stable=True)
    first_of_donor = torch.searchsorted(donors[by_donor], donors[by_donor])
    place = torch.arange(by_donor.numel(), device=donors.device) - first_of_donor
    allowed = torch.empty_like(place, dtype=torch.bool)
    allowed[by_donor] = place < may_leave[donors[by_donor]]
    rows = candidates[allowed]
    return (rows, best_block[rows]) if rows.numel() > _FEW_MOVES else None


def _score(weight: Rows, block_of_row: Tensor, bases: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Lowest unweighted error of every row in any block, and that block (eq. 5).

    The error under an orthonormal basis is `‖w_i‖² − ‖w_i Bᵀ‖²`: one product of the table with all bases side by side.
    A row stays where it is unless another block is better by more than rounding.
    """
    dtype = compute_dtype(weight.dtype)
    num_rows, dim = weight.shape
    best = torch.empty(num_rows, dtype=dtype, device=weight.device)
    best_block = torch.empty_like(block_of_row)
    dense = [block for block, basis in enumerate(bases) if basis is None]
    factored = [block for block, basis in enumerate(bases) if basis is not None]
    stacked = torch.cat(
        [basis for basis in bases if basis is not None] or [torch.zeros(0, dim, dtype=dtype, device=weight.device)]
    ).T
    widths = [basis.shape[0] for basis in bases if basis is not None]
    units = row_units(num_rows, dim + stacked.shape[1])

    def compute(unit: int) -> None:
        for chunk in units[unit]:
            part = weight[chunk].to(dtype)
            norms = part.square().sum(dim=1)
            errors = torch.empty(part.shape[0], len(bases), dtype=dtype, device=weight.device)
            errors[:, dense] = 0.0
            for block, product in zip(factored, torch.split(part @ stacked, widths, dim=1), strict=True):
                errors[:, block] = norms - torch.linalg.vector_norm(product, dim=1).square_()
            errors.clamp_(min=0.0)
            own = errors.gather(1, block_of_row[chunk].unsqueeze(1)).squeeze(1)
            lowest, where = errors.min(dim=1)
            stays = lowest >= own - 1e-5 * norms
            best[chunk] = torch.where(stays, own, lowest)
            best_block[chunk] = torch.where(stays, block_of_row[chunk], where)

    runs = [run_of(chunks) for chunks in units]
    deal([[best[run], best_block[run]] for run in runs], [run.stop - run.start for run in runs], compute)
    return best, best_block
