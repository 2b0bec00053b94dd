"""The basis that suits all blocks, which keep different amounts of it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.common_basis import Valued, common_basis
from lightning_embcompress.methods.numerics.projected_table import BlockSums, ProjectedTable
from lightning_embcompress.methods.numerics.rate_allocation import RateCurve, Rates, Widths, allocate, falling_rows
from lightning_embcompress.methods.shared_basis.budget import BitBudget
from lightning_embcompress.utils.division import agree

# Rows per column for every group of blocks, so that turning takes about as long as some passes over the table: fewer
# where what comes after it takes longer.
_ROWS_A_COLUMN, _ROWS_A_COLUMN_OF_CODES = 16, 6


def turned(
    table: ProjectedTable,
    blocks: Tensor,
    sums: BlockSums,
    rates: Rates,
    widths: Widths,
    budget: BitBudget,
    keeps: bool,
) -> BlockSums:
    """Turn the basis to what suits all blocks, which keep different amounts of it.

    Args:
        table: Whose basis.
        blocks: `[vocab_size]` block of every row.
        sums: Of them, of all components.
        rates: What they keep.
        widths: Ways to store a coefficient.
        budget: What may be stored.
        keeps: Whether they go on keeping that.

    Returns:
        The sums in the new basis.
    """
    present = (sums.sizes > 0).nonzero().squeeze(1)
    if len(present) < 2:
        return sums
    vocab_size, dim = table.weight.shape
    rows = (_ROWS_A_COLUMN if budget.is_exact else _ROWS_A_COLUMN_OF_CODES) * dim
    groups = min(len(present), max(8, vocab_size // rows))
    order = (sums.energies.sum(dim=1) / sums.sizes.clamp(min=1))[present].argsort(stable=True)
    group_of_block = torch.zeros(len(sums.sizes), dtype=torch.long)
    group_of_block[present[order]] = torch.arange(len(present)) * groups // len(present)
    # All processes must mean the same groups, and rounding may differ between processors.
    agree(group_of_block)
    moments = table.moments(blocks, sums, group_of_block, groups)

    def grouped(values: Tensor) -> Tensor:
        return torch.zeros(groups, *values.shape[1:], dtype=values.dtype).index_add_(0, group_of_block, values)

    distortions = torch.tensor(widths.distortions, dtype=torch.float64)
    lost = torch.ones_like(sums.energies)
    lost[:, : rates.widths.shape[1]] = distortions[rates.widths]
    sizes, energies, left = grouped(sums.sizes), grouped(sums.energies), grouped(sums.energies * lost)
    lost = left / energies.clamp(min=1e-300)
    # What a component loses that is kept: of reverse water-filling the same of all in a block.
    kept = lost < 1
    level = ((left * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)).clamp(min=1e-300).unsqueeze(1)

    # Where widths are what they are, so is the part that is lost; else it follows the energy.
    is_fixed = keeps or len(widths.bits) == 2

    def value(energies: Tensor) -> Valued:
        if is_fixed:
            order = energies.sum(dim=0).argsort(descending=True, stable=True)
        else:
            rate = sizes.double() @ (energies / level).clamp(min=1).log()
            order = rate.argsort(descending=True, stable=True)
        offered, part = energies[:, order], lost
        if not keeps:
            [found] = allocate(
                [RateCurve(offered, sizes.tolist(), widths, budget.overheads)], budget.left(len(present))
            )
            part = torch.ones_like(offered)
            part[:, : found.widths.shape[1]] = distortions[found.widths]
        parts = torch.empty_like(energies)
        parts[:, order] = part if is_fixed else (level / falling_rows(offered).clamp(min=1e-300)).clamp(max=1)
        return Valued(float((offered * part).sum()), parts, order)

    table.turn(lambda: common_basis(moments, value))
    return table.sum_blocks(blocks, len(sums.sizes))
