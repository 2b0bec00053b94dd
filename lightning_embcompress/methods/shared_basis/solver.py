"""Blocks of rows in one basis, in the metric of the loss: GroupReduce where it is known what an error costs.

Minimises the predicted growth of the loss `½ Σ_i q_i ‖(w_i − ŵ_i) C‖²`, `C = M^½` (see `numerics.metric`), in a budget
of bits. All blocks share one basis, the eigenvectors `P` of `C S C`, `S` the weighted second moment of the rows around
the means of their blocks. In it errors of components add up, and a block is no more than a choice of what every
component is worth there. Widths follow from marginal gains (`numerics.rate_allocation`); words move to the block whose
widths suit them, at the price of the bits that they take there. Both lower the same number.

Compared with a basis for every block, as published, this stores one basis instead of many, needs one decomposition
instead of one a block and round, and a round of refinement is one product of the table with the basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.numerics.projected_table import BlockSums, ProjectedTable
from lightning_embcompress.methods.numerics.rate_allocation import Overheads, RateCurve, Rates, Widths, allocate
from lightning_embcompress.methods.numerics.sampling import at_equal_steps, chances
from lightning_embcompress.methods.quantizers.scalar_quantizer import distortion, fit_levels
from lightning_embcompress.methods.quantizers.trellis import widest
from lightning_embcompress.methods.quantizers.trellis_levels import fit_unit
from lightning_embcompress.utils.division import agree, deal

# Numbers of blocks to choose from where none is given: each is made of neighbours of the next.
_AUTOMATIC_GROUPS = (1, 2, 4, 8, 16, 32)
# Refinement has converged when a round lowers the loss by less than this part.
_TOLERANCE = 2e-3
# Coefficients to which levels are fitted.
_POOLED = 2**18
# Windows that fit into a row, at least, where a trellis is worth it.
_LONG = 3


@dataclass(frozen=True)
class BitBudget:
    """What may be stored, and what it takes.

    Attributes:
        max_bits: Most bits of everything that depends on the solution.
        widths: Bits of a coefficient to choose from, ascending, without 0.
        is_exact: Whether they lose nothing: coefficients are kept as floats.
        overheads: Bits beside those of coefficients.
        block: Bits of a block: its mean.
        index: Called with the number of blocks, bits of the index that says which row is in which.
        stored_means: Called with means of blocks, `[blocks, dim]` float64, what they become when they are stored.
        window: Bits of the windows of a trellis, by which narrow coefficients are coded; 0 for none.
    """

    max_bits: int
    widths: tuple[int, ...]
    is_exact: bool
    overheads: Overheads
    block: int
    index: Callable[[int], int]
    stored_means: Callable[[Tensor], Tensor] = lambda means: means
    window: int = 0

    def left(self, blocks: int) -> float:
        """Bits that are left for coefficients and basis with so many blocks."""
        return self.max_bits - blocks * self.block - self.index(blocks)


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
        losses: Predicted growth of the loss in nats, before refinement and after each round; of codes, with what
            quantizers lose in the blocks to begin with.
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
    weight: Tensor,
    metric: Metric,
    budget: BitBudget,
    groups: int | None = None,
    refine_rounds: int = 5,
    start: Tensor | None = None,
    keep: Tensor | None = None,
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
        advance: Called with shares of the work that add up to 1.

    Returns:
        The solution of least predicted loss of all rounds.

    Raises:
        ValueError: If there are more groups than rows, the metric is of another table, or the budget does not cover the
            index and the means of the blocks.
    """
    table = ProjectedTable(weight, metric, budget.stored_means)
    step = 1.0 / (refine_rounds + 4)
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
    table.choose_basis(blocks, finest)
    advance(2 * step)
    sums = table.sum_blocks(blocks, finest)
    widths = _quantizers(table, blocks, sums, budget)
    advance(step)
    if keep is not None:
        kept = _kept(keep, sums, widths)
        advance(step * (refine_rounds + 1))
        return _solution(table, kept, sums, blocks, widths, [kept.loss], budget)
    options = [(count, table.merged(sums, finest // count)) for count in fitting]
    allocated = [(_allocated(some, widths, budget), some, count) for count, some in options]
    rates, sums, count = min(allocated, key=lambda option: option[0].loss)
    blocks = blocks // (finest // count)
    losses = [rates.loss]
    start_blocks = blocks
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
    if not budget.is_exact and blocks is not start_blocks:
        # Rows of a block are more alike than they were, and lose less.
        widths = _quantizers(table, blocks, sums, budget)
        rates = _allocated(sums, widths, budget)
    solution = _solution(table, rates, sums, blocks, widths, losses, budget)
    advance(step)
    return solution


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
    return RateCurve(sums.energies, sums.sizes.tolist(), _quantizers(table, blocks, sums, budget), budget.overheads)


def _quantizers(table: ProjectedTable, blocks: Tensor, sums: BlockSums, budget: BitBudget) -> Widths:
    """What is lost of a coefficient at each width, seen on a sample."""
    if budget.is_exact:
        return Widths((0, *budget.widths), (1.0, *(0.0 for _ in budget.widths)))
    values, weights, inside = table.sample(blocks, sums.means[:, : sums.second.shape[1]], sums.scales)
    values, weights = _pooled(values, weights, inside, sums.scales > 0)
    lost = torch.zeros(len(budget.widths), dtype=torch.float64)

    def compute(unit: int) -> None:
        bits = budget.widths[unit]
        if bits <= widest(budget.window):
            lost[unit] = fit_unit(values, weights, bits, budget.window)[1]
        else:
            lost[unit] = distortion(values, weights, fit_levels(values, weights, bits))

    deal([[one] for one in lost], [1.0] * len(lost), compute)
    return Widths((0, *budget.widths), (1.0, *lost.tolist()))


def _levels(
    table: ProjectedTable, solution: SharedBasis, means: Tensor, scales: Tensor, window: int
) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Levels of every width that is used, for the coefficients that have it, and what is lost at them."""
    used = sorted(set(solution.bits.flatten().tolist()) - {0})
    found = {bits: torch.zeros(num_levels(bits), dtype=torch.float64) for bits in used}
    lost = torch.zeros(len(used), dtype=torch.float64)
    values, weights, inside = table.sample(solution.block_of_row, means, scales)

    def compute(unit: int) -> None:
        bits = used[unit]
        pooled = _pooled(values, weights, inside, (solution.bits == bits) & (scales > 0))
        if bits < 0:
            found[bits][0], lost[unit] = fit_unit(*pooled, -bits, window)
            return
        found[bits].copy_(fit_levels(*pooled, bits))
        lost[unit] = distortion(*pooled, found[bits])

    deal([[found[bits], one] for bits, one in zip(used, lost, strict=True)], [1.0] * len(used), compute)
    return found, dict(zip(used, lost.tolist(), strict=True))


def num_levels(bits: int) -> int:
    """Levels of a width that are kept: all of them, or the unit of the numbers of a trellis."""
    return 2**bits if bits > 0 else 1


def _coded_by_trellis(bits: Tensor, window: int) -> Tensor:
    """`[blocks, rank]` bits, below 0 where a trellis gets them: the narrow ones of rows that are some windows long."""
    narrow = (bits > 0) & (bits <= widest(window))
    is_long = (bits * narrow).sum(dim=1, keepdim=True) >= _LONG * window
    return torch.where(narrow & is_long, -bits, bits)


def _pooled(values: Tensor, weights: Tensor, inside: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the chosen coefficients of all components together, and their weights.

    Args:
        values: `[rows, rank]`.
        weights: `[rows]`.
        inside: `[rows]` blocks.
        chosen: `[blocks, rank]` which.
    """
    copies = chosen.sum(dim=1)[inside]
    if not bool(copies.any()):
        # Of a width that no row of the sample has: those of a normal distribution.
        normal = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
        return normal, torch.ones_like(normal)
    # As with rows: a few values that weigh much would have levels of their own.
    chance = chances(weights, copies, _POOLED)
    row, place = at_equal_steps(chance, copies)
    component = chosen.logical_not().sort(dim=1, stable=True).indices[inside[row], place]
    return values[row, component], weights[row] / chance[row]


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
    number = torch.full((len(sums.sizes),), -1, dtype=torch.long)
    number[present] = torch.arange(len(present))
    rank = rates.widths.shape[1]
    bits = _coded_by_trellis(torch.tensor(widths.bits)[rates.widths[present]], budget.window)
    scales = sums.scales[present, :rank]
    # Rows of the basis of length 1: coefficients are then as large as the table's values, whatever the metric's
    # unit, and have a place in every dtype.
    lengths = table.inverse[:rank].norm(dim=1)
    solution = SharedBasis(
        number.to(blocks.device)[blocks],
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
    levels, lost = _levels(table, solution, sums.means[present, :rank], scales, budget.window)
    left = torch.ones_like(scales)
    for width, part in lost.items():
        left[bits == width] = part
    energies = sums.energies[present]
    loss = sums.rest + float(energies[:, rank:].sum()) + float((energies[:, :rank] * left).sum())
    return replace(solution, levels=levels, loss=loss)
