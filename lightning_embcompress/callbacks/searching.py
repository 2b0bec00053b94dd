"""The smallest tables within a limit of the perplexity, measured on the validation data of a running fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.callbacks.replacing import uninterrupted
from lightning_embcompress.compression.budget import Request, parse_perplexity_increase
from lightning_embcompress.compression.distribution import Job, solve_together
from lightning_embcompress.compression.loss_budget import Shares, smallest_within
from lightning_embcompress.compression.solution import tried
from lightning_embcompress.methods.registry import Factorization


def search_smallest(
    module: LightningModule,
    shares: Shares,
    counts: Tensor | None,
    statistics: Statistics,
    max_perplexity_increase: str | float,
    dense: float | None,
    perplexity: Callable[[], float | None],
) -> tuple[list[Request], list[Factorization[Any]]]:
    """Solve tables in several sizes, and find the smallest within a limit; the module is afterwards as it was.

    Of several processes all have to call it, and all find the same.

    Args:
        module: The module that is training, with the tables in place.
        shares: What each table is worth.
        counts: `[vocab_size]` token counts.
        statistics: Of the module.
        max_perplexity_increase: Relative increase of the perplexity, `1%` or `0.01`.
        dense: Perplexity of the module as it is.
        perplexity: Measures the module.

    Returns:
        The requests with their sizes, and what was found for them.

    Raises:
        ValueError: If the perplexity is not known, or no size is within the limit.
    """
    if dense is None or not math.isfinite(dense):
        raise ValueError(
            f"max_perplexity_increase={max_perplexity_increase!r} needs the perplexity on the validation data, and "
            "that of the model as it is is "
            f"{'not known' if dense is None else dense}: name a logged loss in nats per token as monitor, or give a "
            "ratio or a size instead"
        )

    def measure(sized: list[Request]) -> tuple[float, tuple[list[Request], list[Factorization[Any]]]]:
        # The same numbers for the same request, whatever was tried before.
        with isolate_rng():
            factors = solve_together([Job(request, request.table.weight, counts) for request in sized])
        with uninterrupted(also_by_ctrl_c=False), tried(module, list(zip(sized, factors, strict=True)), statistics):
            value = perplexity()
        value = math.inf if value is None or math.isnan(value) else value
        size = sum(request.max_bytes for request in sized)
        rank_zero_info(f"Tables in {size / 1e6:.3f} MB: perplexity {value:.2f} ({value / dense - 1:+.2%}).")
        return math.log(value / dense), (sized, factors)

    return smallest_within(parse_perplexity_increase(max_perplexity_increase), shares, measure)[0]
