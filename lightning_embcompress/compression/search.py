"""The smallest tables within a growth of the loss: plan and solve in a loop, guided by what is predicted."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.solution import Solution, solve, tried
from lightning_embcompress.compression.tasks import Tasks

# The smallest part of the limit that a search is content with.
_CLOSE = 0.8
_TRIES = 10

Found = TypeVar("Found")
"""What a search has found for tasks."""


def search(
    model: nn.Module,
    tasks: Tasks,
    budget: Budget,
    dense: float,
    evaluate: Callable[[nn.Module], float],
    together: bool = False,
    guard: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Solution:
    """Solve tables in several sizes, and find the smallest within a limit; the model is afterwards as it was.

    Args:
        model: The model, with the tables in place.
        tasks: The tables, with what each is worth.
        budget: With the most that the perplexity may grow by.
        dense: Perplexity of the model as it is.
        evaluate: Measures the perplexity of the model.
        together: Whether all processes call it, and find the same.
        guard: Held while other tables are in the model.

    Raises:
        ValueError: If no size is within the limit; the least growth that was measured is named.
    """

    def measure(sized: Tasks) -> tuple[float, Solution]:
        # The same numbers for the same tasks, whatever was tried before.
        with isolate_rng() if together else nullcontext():
            solution = solve(sized, together)
        with guard(), tried(model, solution):
            value = evaluate(model)
        value = math.inf if math.isnan(value) else value
        rank_zero_info(
            f"Tables in {sized.max_bytes / 1e6:.3f} MB ({sized.bits_per_weight:.2f} bits per weight): perplexity "
            f"{value:.2f} ({value / dense - 1:+.2%})."
        )
        return math.log(value / dense), solution

    return smallest_within(budget.max_loss, tasks, measure)[0]


def smallest_within(limit: float, tasks: Tasks, measure: Callable[[Tasks], tuple[float, Found]]) -> tuple[Found, float]:
    """The smallest size of all tables at which the measured loss grows by no more than a limit.

    The first size is the one that is predicted; what is measured there corrects the prediction, and brackets the next.

    Args:
        limit: Growth of the loss, in nats.
        tasks: The tables, with what each is worth.
        measure: Solves tasks; gives the growth of the loss that is measured, and what it found.

    Returns:
        What was found for the smallest size, and the growth of the loss that was measured for it.

    Raises:
        ValueError: If even the largest size loses more; the least that was measured is named.
    """
    least = sum(task.smallest_bytes for task in tasks)
    most = sum(task.table.weight.nbytes for task in tasks) - 1
    goal = (1 + _CLOSE) / 2 * limit
    too_small = float(least)
    best: tuple[float, Found, float] | None = None
    size = float(tasks.bytes_at(goal))
    lowest = math.inf
    for _ in range(_TRIES):
        size = min(max(size, least), most)
        measured, found = measure(tasks.within(int(size)))
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
        factor = max(measured, 0.02 * limit) / max(tasks.loss_at(size), 1e-12)
        size = float(tasks.bytes_at(goal / factor))
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
            f"max_perplexity_increase: the perplexity grows by {math.expm1(lowest):.2%} at least with this method and "
            f"options, above the limit of {math.expm1(limit):.2%}: allow more, or use another method"
        )
    return best[1], best[2]
