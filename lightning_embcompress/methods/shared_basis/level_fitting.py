"""Levels and scales of coefficients, and what is lost at them, seen on a sample of the table."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.projected_table import BlockSums, ProjectedTable
from lightning_embcompress.methods.numerics.rate_allocation import Widths
from lightning_embcompress.methods.numerics.sampling import at_equal_steps, chances
from lightning_embcompress.methods.quantizers.scalar_quantizer import distortion, fit_levels
from lightning_embcompress.methods.quantizers.trellis import widest
from lightning_embcompress.methods.quantizers.trellis_levels import fit_unit
from lightning_embcompress.methods.shared_basis.budget import BitBudget
from lightning_embcompress.utils.division import agree, deal

# Coefficients to which levels are fitted.
_POOLED = 2**18
# Times the root mean square that the scale of a component may be.
_WIDER = (1.0, 2**0.25, 2**0.5, 2.0, 4.0)
# Windows that fit into a row, at least, where a trellis is worth it.
_LONG = 3


def fit_widths(table: ProjectedTable, blocks: Tensor, sums: BlockSums, budget: BitBudget) -> Widths:
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


def levels_in_use(
    table: ProjectedTable, blocks: Tensor, bits: Tensor, means: Tensor, scales: Tensor, window: int
) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Levels of every width that is used, for the coefficients that have it, and what is lost at them.

    Args:
        table: Whose coefficients.
        blocks: `[vocab_size]` block of every row.
        bits: `[blocks, rank]` as of `SharedBasis`.
        means: `[blocks, rank]` mean coefficients.
        scales: `[blocks, rank]`.
        window: Bits of the windows of a trellis; 0 for none.
    """
    used = sorted(set(bits.flatten().tolist()) - {0})
    found = {bits: torch.zeros(num_levels(bits), dtype=torch.float64) for bits in used}
    lost = torch.zeros(len(used), dtype=torch.float64)
    values, weights, inside = table.sample(blocks, means, scales)

    def compute(unit: int) -> None:
        width = used[unit]
        pooled = _pooled(values, weights, inside, (bits == width) & (scales > 0))
        if width < 0:
            found[width][0], lost[unit] = fit_unit(*pooled, -width, window)
            return
        found[width].copy_(fit_levels(*pooled, width))
        lost[unit] = distortion(*pooled, found[width])

    deal([[found[width], one] for width, one in zip(used, lost, strict=True)], [1.0] * len(used), compute)
    return found, dict(zip(used, lost.tolist(), strict=True))


def widened(
    table: ProjectedTable,
    blocks: Tensor,
    bits: Tensor,
    energies: Tensor,
    means: Tensor,
    scales: Tensor,
    levels: dict[int, Tensor],
    lost: dict[int, float],
) -> Tensor:
    """Scales that are larger than root mean squares where values are far beyond the levels.

    A component in which most rows are small and one is many times as large would ruin that one.

    Args:
        table: Whose coefficients.
        blocks: `[vocab_size]` block of every row.
        bits: `[blocks, rank]` as of `SharedBasis`.
        energies: `[blocks, rank]` what dropping a component costs.
        means: `[blocks, rank]` mean coefficients.
        scales: `[blocks, rank]` root mean squares of the coefficients around them.
        levels: Of every width.
        lost: What part of the energy is lost at each.
    """
    largest, between = torch.zeros_like(scales), torch.zeros_like(scales)
    for width, values in levels.items():
        largest[bits == width] = float(values.abs().max()) * (1 if width > 0 else 127)
    factors = torch.tensor(_WIDER, dtype=torch.float64).view(-1, 1, 1)
    beyond = table.beyond(blocks, means, factors * largest * scales)
    for width, part in lost.items():
        own = bits == width
        # In most components that is what is lost beyond the levels; the rest is lost between them.
        typical = float((beyond[0][own] / energies[own].clamp(min=1e-300)).median())
        between[own] = max(0.0, part - typical) * energies[own]
    # Between the levels errors grow with the square of the scale.
    costs = factors.square() * between + beyond
    costs[1:, bits == 0] = torch.inf
    found = scales * factors.flatten()[costs.argmin(dim=0)]
    agree(found)
    return found


def num_levels(bits: int) -> int:
    """Levels of a width that are kept: all of them, or the unit of the numbers of a trellis."""
    return 2**bits if bits > 0 else 1


def coded_by_trellis(bits: Tensor, window: int) -> Tensor:
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
