"""Budgets in units of the loss: one for all tables of a model, and the smallest model within a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from lightning_embcompress.calibration.loss_metric import metric_of
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.compression.budget import Request, Tie, plan_requests
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.numerics.rate_allocation import RateCurve, allocate
from lightning_embcompress.methods.registry import METHODS, get_config
from lightning_embcompress.methods.shared_basis.layout import bit_budget
from lightning_embcompress.methods.shared_basis.solver import rate_curve
from lightning_embcompress.methods.transform_coding.config import TransformCodingConfig
from lightning_embcompress.utils.progress import progress_bar

# Equal groups by which the shares of tables are found; which number hardly changes them.
_GROUPS = 16
# The smallest part of the limit that a search is content with.
_CLOSE = 0.8
ANY_RATIO = 1.5
"""A ratio for tables whose size is searched for: none that is of use cannot be made smaller by so much."""
_TRIES = 10


@dataclass(frozen=True)
class Shares:
    """Tables whose errors are known in units of the loss, and what each is worth.

    Attributes:
        requests: What is to become of which table, with its metric.
        curves: What each loses at which price.
        fixed: Bits of each that are there whatever is kept.
    """

    requests: list[Request]
    curves: list[RateCurve]
    fixed: list[int]

    def within(self, max_bytes: int) -> list[Request]:
        """The requests with the bytes of all tables shared so that the next byte is worth the same everywhere."""
        if len(self.requests) == 1:
            return [replace(self.requests[0], max_bytes=max_bytes)]
        found = allocate(self.curves, 8 * max_bytes - sum(self.fixed))
        taken = [rates.bits + fixed for rates, fixed in zip(found, self.fixed, strict=True)]
        smallest = [request.smallest_bytes for request in self.requests]
        spare = max(0, max_bytes - sum(smallest))
        wanted = [max(0, bits // 8 - least) for bits, least in zip(taken, smallest, strict=True)]
        # What is left over goes to all in proportion: no table is below the smallest that it can be.
        part = spare / sum(wanted) if sum(wanted) else 0.0
        dense = [request.table.weight.nbytes for request in self.requests]
        sizes = [min(least + int(part * more), full) for least, more, full in zip(smallest, wanted, dense, strict=True)]
        return [replace(request, max_bytes=size) for request, size in zip(self.requests, sizes, strict=True)]

    def loss_at(self, max_bytes: float) -> float:
        """Predicted growth of the mean loss in nats, before refinement, if all tables take so many bytes."""
        return sum(rates.loss for rates in allocate(self.curves, 8 * max_bytes - sum(self.fixed)))

    def bytes_at(self, loss: float) -> int:
        """Bytes of all tables at a predicted growth of the loss."""
        low, high = min(curve.prices[0] for curve in self.curves), max(curve.prices[1] for curve in self.curves)
        low = max(low, 1e-300)
        while high > low * (1 + 1e-6):
            middle = math.sqrt(low) * math.sqrt(high)
            if sum(curve.at(middle).loss for curve in self.curves) > loss:
                high = middle
            else:
                low = middle
        return (sum(curve.at(low).bits for curve in self.curves) + sum(self.fixed)) // 8


def share(model: nn.Module, requests: Sequence[Request], statistics: Statistics) -> Shares:
    """Give requests the metric of the loss, and see what each table is worth.

    Args:
        model: The model.
        requests: What is to become of which table.
        statistics: Of the model.

    Raises:
        ValueError: If the statistics are of another model or vocabulary.
    """
    known = [replace(request, metric=metric_of(model, request.table, statistics)) for request in requests]
    curves, fixed = [], []
    with progress_bar("Sharing the budget", total=float(len(known))) as advance:
        for request in known:
            vocab_size, dim = request.table.shape
            blocks = min(_GROUPS, vocab_size)
            # Of floats only ranks are to be decided, not bits.
            floats = request.config.keeps_floats
            widths = () if floats else TransformCodingConfig().widths
            budget, always = bit_budget(vocab_size, dim, request.table.weight.element_size(), 0, widths)
            assert request.metric is not None
            curves.append(rate_curve(request.table.weight.detach(), request.metric, budget, blocks))
            fixed.append(8 * always + blocks * budget.block + budget.index(blocks))
            advance(1.0)
    return Shares(known, curves, fixed)


def check_known(config: MethodConfig, statistics: Statistics | None) -> None:
    """Refuse what needs statistics where there are none.

    Raises:
        ValueError: Naming the method and the remedy.
    """
    if config.needs_metric and statistics is None:
        raise ValueError(
            f"method={config.method!r} minimises what the loss grows by, and has to know what errors cost: give "
            "statistics=collect_statistics(model, batches), or name one method"
        )


def check_predictable(config: MethodConfig) -> None:
    """Refuse `max_perplexity_increase` for what does not predict what the loss grows by.

    Raises:
        ValueError: Naming methods that do.
    """
    if not config.uses_metric:
        known = ", ".join(repr(name) for name, method in METHODS.items() if method.config.uses_metric)
        raise ValueError(
            f"max_perplexity_increase cannot be predicted for method {config.method!r}: use one of {known}"
        )


def requests_in_loss(
    model: nn.Module,
    statistics: Statistics,
    method: MethodConfig | str,
    ratio: float | None = None,
    size: str | int | None = None,
    tables: str | Sequence[str] = "auto",
    tie: Tie = "keep",
    **options: Any,
) -> list[Request]:
    """Decide what becomes of which table where it is known what errors cost: one budget for all tables.

    Args:
        model: The model.
        statistics: Of the model.
        method: Config of a method, or its name.
        ratio: Dense bytes over stored bytes of all tables together.
        size: Bytes of all tables together, instead of a ratio.
        tables: See `plan_requests`.
        tie: `auto` unties what embedding and softmax share if that is predicted to lose less at equal bytes.
        **options: Options of the method.

    Raises:
        ValueError: If the request cannot be met, or the statistics are of another model.
    """
    config = get_config(method, **options)
    requests = plan_requests(model, config, ratio, size, tables, _ways(tie)[0])
    # Nothing is shared where options say how large each is, or one table has it all.
    if config.fixes_size or (len(requests) == 1 and tie != "auto"):
        return [replace(request, metric=metric_of(model, request.table, statistics)) for request in requests]
    shares, total = shares_in_loss(model, statistics, config, ratio, size, tables, tie)
    return shares.within(total)


def shares_in_loss(
    model: nn.Module,
    statistics: Statistics,
    method: MethodConfig | str,
    ratio: float | None = None,
    size: str | int | None = None,
    tables: str | Sequence[str] = "auto",
    tie: Tie = "keep",
    **options: Any,
) -> tuple[Shares, int]:
    """See what each table is worth; arguments as `requests_in_loss`.

    Returns:
        The tables, and the bytes that all of them together are asked to take.

    Raises:
        ValueError: If the request cannot be met, or the statistics are of another model.
    """
    best: tuple[float, Shares, int] | None = None
    for way in _ways(tie):
        requests = plan_requests(model, method, ratio, size, tables, way, **options)
        if best is not None and len(requests) == len(best[1].requests):
            # Nothing was tied.
            break
        total = sum(request.max_bytes for request in requests)
        shares = share(model, requests, statistics)
        found = (shares.loss_at(total), shares, total)
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    return best[1], best[2]


def _ways(tie: Tie) -> tuple[Tie, ...]:
    return ("keep", "untie") if tie == "auto" else (tie,)


Found = TypeVar("Found")
"""What a search has found for requests."""


def smallest_within(
    limit: float,
    shares: Shares,
    measure: Callable[[list[Request]], tuple[float, Found]],
) -> tuple[Found, float]:
    """The smallest size of all tables at which the measured loss grows by no more than a limit.

    The first size is the one that is predicted; what is measured there corrects the prediction, and brackets the next.

    Args:
        limit: Growth of the loss, in nats.
        shares: Of the tables.
        measure: Called with requests, solves them; gives the growth of the loss that is measured, and what it found.

    Returns:
        What was found for the smallest size, and the growth of the loss that was measured for it.

    Raises:
        ValueError: If even the largest size loses more; the least that was measured is named.
    """
    least = sum(request.smallest_bytes for request in shares.requests)
    most = sum(request.table.weight.nbytes for request in shares.requests) - 1
    goal = (1 + _CLOSE) / 2 * limit
    too_small = float(least)
    best: tuple[float, Found, float] | None = None
    size = float(shares.bytes_at(goal))
    lowest = math.inf
    for _ in range(_TRIES):
        size = min(max(size, least), most)
        measured, found = measure(shares.within(int(size)))
        lowest = min(lowest, measured)
        if measured <= limit:
            if best is None or size < best[0]:
                best = (size, found, measured)
            if measured >= _CLOSE * limit or size <= least:
                break
        else:
            if size >= most:
                break
            too_small = max(too_small, size)
        factor = max(measured, 0.02 * limit) / max(shares.loss_at(size), 1e-12)
        size = float(shares.bytes_at(goal / factor))
        high = float(most) if best is None else best[0]
        if size <= least and best is not None and too_small == least:
            # Even the smallest may do.
            size = float(least)
        elif not too_small < size < high:
            # Where the prediction says nothing new: halfway, of the logarithm.
            size = math.sqrt(too_small * high)
        if high / too_small < 1.002:
            break
    if best is None:
        raise ValueError(
            f"max_perplexity_increase: the perplexity grows by {math.expm1(lowest):.2%} at least with this method "
            f"and options, above the limit of {math.expm1(limit):.2%}: allow more, or use another method"
        )
    return best[1], best[2]
