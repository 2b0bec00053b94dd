"""Blocks of rows in one basis, in the metric of the loss: GroupReduce where it is known what an error costs.

Minimises the predicted growth of the loss `½ Σ_i q_i ‖(w_i − ŵ_i) C‖²`, `C = M^½` (see `numerics.metric`), in a budget
of bits. All blocks share one basis: to begin with the eigenvectors `P` of `C S C`, `S` the weighted second moment of
the rows around the means of their blocks, and then what suits blocks that keep different amounts of it
(`numerics.common_basis`). In it errors of components add up, and a block is no more than a choice of what every
component is worth there. Widths follow from marginal gains (`numerics.rate_allocation`); words move to the block whose
widths suit them, at the price of the bits that they take there. All three lower the same number.

Compared with a basis for every block, as published, this stores one basis instead of many, and a round of refinement is
one product of the table with the basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.numerics.projected_table import BlockSums, ProjectedTable
from lightning_embcompress.methods.numerics.rate_allocation import RateCurve, Rates, Widths, allocate
from lightning_embcompress.methods.shared_basis.budget import BitBudget
from lightning_embcompress.methods.shared_basis.level_fitting import (
    coded_by_trellis,
    fit_widths,
    levels_in_use,
    widened,
)
from lightning_embcompress.methods.shared_basis.turning import turned
from lightning_embcompress.utils.division import agree
from lightning_embcompress.utils.tensor_files import Rows

# Numbers of blocks to choose from where none is given: each is made of neighbours of the next.
_AUTOMATIC_GROUPS = (1, 2, 4, 8, 16, 32)
# Refinement has converged when a round lowers the loss by less than this part.
_TOLERANCE = 2e-3


@dataclass(frozen=True)
class SharedBasis:
    """Which row is in which block, what is kept of it there, and in which basis.

    Attributes:
        block_of_row: `[vocab_size]` int64; no block is empty.
        bits: `[blocks, rank]` int64 bits of a coefficient, 0 where the component is dropped, below 0 where it is coded
            by a trellis; their amounts do not rise within a row.
        means: `[blocks, dim]` float64 weighted means of the rows, as they are stored.
        projector: `[dim, rank]` float64: coefficients are `(w − mean) projector`.
        basis: `[rank, dim]` float64: rows are `mean + coefficients basis`.
        scales: `[blocks, rank]` float64 weighted root mean squares of the coefficients around these means.
        levels: For every width that is used, `[2^bits]` float64 levels of coefficients over their scale, or of a
            trellis `[1]`, what a number of it stands for; none where coefficients are kept as floats.
        losses: Predicted growth of the loss in nats: in the basis to begin with, in the one that suits the blocks, and
            after each round of refinement; of codes, with what quantizers lose in the blocks to begin with.
        loss: Predicted growth of the loss in nats; of codes, with what the levels lose.
    """

    block_of_row: Tensor
    bits: Tensor
    means: Tensor
    projector: Tensor
    basis: Tensor
    scales: Tensor
    levels: dict[int, Tensor]
    losses: list[float]
    loss: float


def shared_basis(
    weight: Rows,
    metric: Metric,
    budget: BitBudget,
    groups: int | None = None,
    refine_rounds: int = 5,
    start: Tensor | None = None,
    keep: Tensor | None = None,
    basis: Tensor | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> SharedBasis:
    """Find blocks, basis and widths within a budget, see the top of the module.

    Processes share the rows in every pass, see `utils.division`. The result does not depend on their order.

    Args:
        weight: `[vocab_size, dim]` table.
        metric: What an error costs.
        budget: What may be stored.
        groups: Number of blocks to begin with, equal groups of words by weight; None for the best of some.
        refine_rounds: Most rounds of moving rows between blocks.
        start: `[vocab_size]` block of every row to begin with.
        keep: `[blocks, rank]` bits of the blocks of `start`, which then stay what they are, and rows where they are.
        basis: `[rank, dim]` the basis that goes with these, to begin with.
        advance: Called with shares of the work that add up to 1.

    Returns:
        The solution of least predicted loss of all rounds.

    Raises:
        ValueError: If there are more groups than rows, the metric is of another table, or the budget does not cover the
            index and the means of the blocks.
    """
    table = ProjectedTable(weight, metric, budget.stored_means)
    step = 1.0 / (refine_rounds + 5)
    if start is not None:
        candidates: Sequence[int] = [int(start.max()) + 1]
    else:
        candidates = [groups] if groups else [count for count in _AUTOMATIC_GROUPS if count <= weight.shape[0]]
    fitting = [count for count in candidates if keep is not None or budget.left(count) >= 0]
    if not fitting:
        least = candidates[0]
        raise ValueError(
            f"the index and the means of {least} blocks of a table of {weight.shape[0]} x {weight.shape[1]} take "
            f"{(budget.max_bits - budget.left(least)) / 8:.0f} bytes, and {max(0, budget.max_bits) // 8} are left for "
            "them; allow more bytes or use fewer groups"
        )
    finest = fitting[-1]
    blocks = table.equal_groups(finest) if start is None else start.clone()
    table.choose_basis(blocks, finest, basis)
    advance(2 * step)
    sums = table.sum_blocks(blocks, finest)
    widths = fit_widths(table, blocks, sums, budget)
    advance(step)
    if keep is not None:
        bits = keep
        kept = _kept(bits, sums, widths)
        sums, kept = _turned(table, blocks, sums, kept, widths, budget, lambda some: _kept(bits, some, widths), True)
        advance(step * (refine_rounds + 2))
        return _solution(table, kept, sums, blocks, widths, [kept.loss], budget)
    options = [(count, table.merged(sums, finest // count)) for count in fitting]
    allocated = [(_allocated(some, widths, budget), some, count) for count, some in options]
    rates, sums, count = min(allocated, key=lambda option: option[0].loss)
    losses = [rates.loss]
    blocks = start_blocks = blocks // (finest // count)
    sums, rates = _turned(
        table, blocks, sums, rates, widths, budget, lambda some: _allocated(some, widths, budget), False
    )
    losses.append(rates.loss)
    advance(step)
    best = (rates, sums, blocks)
    looked_at = 0
    for done in range(refine_rounds):
        # Components that no block keeps, nor is going to, need not be computed.
        looked_at = max(looked_at, rates.widths.shape[1] + rates.widths.shape[1] // 4 + 16)
        blocks, sums = table.move(sums, rates, widths, min(looked_at, weight.shape[1]))
        rates = _allocated(sums, widths, budget)
        losses.append(rates.loss)
        advance(step)
        if rates.loss < best[0].loss:
            gain = 1 - rates.loss / best[0].loss
            best = (rates, sums, blocks)
            if gain >= _TOLERANCE:
                continue
        advance(step * (refine_rounds - done - 1))
        break
    rates, sums, blocks = best
    has_moved = blocks is not start_blocks
    del start_blocks, best
    if not budget.is_exact and has_moved:
        # Rows of a block are more alike than they were, and lose less.
        widths = fit_widths(table, blocks, sums, budget)
        rates = _allocated(sums, widths, budget)
    solution = _solution(table, rates, sums, blocks, widths, losses, budget)
    advance(step)
    return solution


def _turned(
    table: ProjectedTable,
    blocks: Tensor,
    sums: BlockSums,
    rates: Rates,
    widths: Widths,
    budget: BitBudget,
    rated: Callable[[BlockSums], Rates],
    keeps: bool,
) -> tuple[BlockSums, Rates]:
    """Sums and widths in the basis that suits the blocks, if they lose less in it; it is found for groups of blocks."""
    projector, inverse = table.projector.clone(), table.inverse.clone()
    found = turned(table, blocks, sums, rates, widths, budget, keeps)
    other = rated(found)
    if other.loss <= rates.loss:
        return found, other
    table.projector, table.inverse = projector, inverse
    return sums, rates


def _allocated(sums: BlockSums, widths: Widths, budget: BitBudget) -> Rates:
    """Widths of all components within the budget; none in empty blocks."""
    present = sums.sizes > 0
    curve = RateCurve(sums.energies[present], sums.sizes[present].tolist(), widths, budget.overheads, sums.rest)
    [found] = allocate([curve], budget.left(int(present.sum())))
    chosen = torch.zeros(sums.energies.shape, dtype=torch.long)
    chosen[present, : found.widths.shape[1]] = found.widths
    numbers = torch.tensor([found.widths.shape[1], found.price, found.loss, found.bits], dtype=torch.float64)
    # What follows from it must be the same in all processes, and rounding may differ between processors.
    agree(chosen, numbers)
    rank, price, loss, bits = numbers.tolist()
    return Rates(chosen[:, : int(rank)], price, loss, int(bits))


def _kept(keep: Tensor, sums: BlockSums, widths: Widths) -> Rates:
    """Bits that are what they are."""
    found = [widths.bits.index(bits) for bits in keep.flatten().tolist()]
    index = torch.tensor(found, dtype=torch.long).view(keep.shape)
    lost = torch.tensor(widths.distortions, dtype=torch.float64)[index]
    loss = float(sums.energies.sum() - (sums.energies[:, : keep.shape[1]] * (1 - lost)).sum())
    return Rates(index, 0.0, max(loss, 0.0), 0)


def rate_curve(weight: Tensor, metric: Metric, budget: BitBudget, groups: int) -> RateCurve:
    """What a table loses at which price, before refinement: to share a budget between tables.

    Args:
        weight: `[vocab_size, dim]` table.
        metric: What an error costs.
        budget: As for `shared_basis`; how much it is has no say.
        groups: Number of equal groups of words by weight.
    """
    table = ProjectedTable(weight, metric, budget.stored_means)
    blocks = table.equal_groups(groups)
    table.choose_basis(blocks, groups)
    sums = table.sum_blocks(blocks, groups)
    return RateCurve(sums.energies, sums.sizes.tolist(), fit_widths(table, blocks, sums, budget), budget.overheads)


def _solution(
    table: ProjectedTable,
    rates: Rates,
    sums: BlockSums,
    blocks: Tensor,
    widths: Widths,
    losses: list[float],
    budget: BitBudget,
) -> SharedBasis:
    """What was found, without empty blocks."""
    present = (sums.sizes > 0).nonzero().squeeze(1)
    if len(present) < len(sums.sizes):
        number = torch.full((len(sums.sizes),), -1, dtype=torch.long)
        number[present] = torch.arange(len(present))
        blocks = number.to(blocks.device)[blocks]
    rank = rates.widths.shape[1]
    bits = coded_by_trellis(torch.tensor(widths.bits)[rates.widths[present]], budget.window)
    scales = sums.scales[present, :rank]
    # Rows of the basis of length 1: coefficients are then as large as the table's values, whatever the metric's
    # unit, and have a place in every dtype.
    lengths = table.inverse[:rank].norm(dim=1)
    solution = SharedBasis(
        blocks,
        bits,
        sums.stored[present],
        table.projector[:, :rank] * lengths,
        table.inverse[:rank] / lengths.unsqueeze(1),
        scales * lengths,
        {},
        losses,
        rates.loss,
    )
    agree(solution.means, solution.projector, solution.basis, solution.scales)
    if budget.is_exact:
        return solution
    means, energies, blocks = sums.means[present, :rank], sums.energies[present], solution.block_of_row
    levels, lost = levels_in_use(table, blocks, bits, means, scales, budget.window)
    scales = widened(table, blocks, bits, energies[:, :rank], means, scales, levels, lost)
    left = torch.ones_like(scales)
    for width, part in lost.items():
        left[bits == width] = part
    loss = sums.rest + float(energies[:, rank:].sum()) + float((energies[:, :rank] * left).sum())
    return replace(solution, scales=scales * lengths, levels=levels, loss=loss)
