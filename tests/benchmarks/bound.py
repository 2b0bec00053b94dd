"""The least that any code could lose: reverse water-filling over the components of a solution.

Components of a block are taken as Gaussian values, so that `R` bits each lose `4^-R` of their energy at best, whatever
the number of them that are coded together (Cover and Thomas, Elements of Information Theory, Theorem 10.3.3). Blocks
and basis are those of the solution, and what it stores beside its codes is paid for as the solution pays for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lightning_embcompress.methods.config import WIDTHS
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.numerics.projected_table import BlockSums, ProjectedTable
from lightning_embcompress.methods.numerics.rate_allocation import RateCurve, Widths, allocate
from lightning_embcompress.methods.registry import SharedBasisBlocks
from lightning_embcompress.methods.shared_basis.layout import bit_budget

# Steps of a rate, as fine as nobody's code is.
_STEP, _MOST = 0.02, 10.0


def gaussian_bound(
    weight: Tensor, metric: Metric, solved: SharedBasisBlocks, bits_per_weight: Sequence[float]
) -> list[float]:
    """Nats that the loss would grow by at the bound, for each of some sizes.

    Args:
        weight: `[vocab_size, dim]` table.
        metric: What an error costs.
        solved: Codes of the table, with the blocks and the basis to be taken.
        bits_per_weight: Sizes, of everything that is stored.
    """
    sums, expected = (
        _sums(weight, replace(metric, weights=weights), solved) for weights in (metric.weights, metric.predicting)
    )
    rates = torch.arange(0, _MOST, _STEP, dtype=torch.float64)
    lost = 4**-rates
    widths = Widths(cast(Any, tuple(rates.tolist())), tuple(lost.tolist()))
    found = []
    for size in bits_per_weight:
        max_bytes = int(size * weight.numel() / 8)
        budget, _ = bit_budget(*weight.shape, weight.element_size(), max_bytes, WIDTHS)
        curve = RateCurve(sums.energies, sums.sizes.tolist(), widths, budget.overheads, sums.rest)
        chosen = allocate([curve], budget.left(len(sums.sizes)))[0].widths
        dropped = expected.energies[:, chosen.shape[1] :].sum() + expected.rest
        found.append(float((expected.energies[:, : chosen.shape[1]] * lost[chosen]).sum() + dropped))
    return found


def _sums(weight: Tensor, metric: Metric, solved: SharedBasisBlocks) -> BlockSums:
    """What components of blocks are worth, in the basis as it is stored."""
    table = ProjectedTable(weight, metric, lambda means: means)
    blocks, groups = solved.block_of_row, len(solved.sizes)
    table.choose_basis(blocks, groups, solved._read()[0].detach())
    return table.sum_blocks(blocks, groups)
