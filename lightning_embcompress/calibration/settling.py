"""How far moments of a text are from those of endless text, by how much two halves of it differ.

A table that is coded with equal loss in all directions of a metric `A` has errors of covariance `A⁻¹`. Where the loss
is really that of `B` they cost `tr(A⁻¹ B) / dim · (det A / det B)^{1/dim} ≥ 1` times as much as they would if it had
been coded by `B`. For two halves of a text the geometric mean of both directions is
`J = (tr(A⁻¹ B) tr(B⁻¹ A))^½ / dim`; each half errs, and the whole by half as much as each: `(J − 1) / 4` more loss. It
falls as one over the number of tokens, and grows with the dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_embcompress.utils.division import count_processes

if TYPE_CHECKING:
    from lightning_embcompress.calibration.collector import Collector

# Directions that a text has not seen are not free: part of the mean eigenvalue that all of them have.
_FLOOR = 1e-6


def expected_excess(total: Tensor, part: Tensor) -> float:
    """How much more loss a table has that is compressed by moments of a text, than by those of endless text.

    Args:
        total: `[dim, dim]` sum of second moments over a text, symmetric.
        part: `[dim, dim]` of that the sum over half of the text, alternating with the other half.

    Returns:
        The excess as a part of the loss that compression costs; infinite where a half has seen nothing.

    Example:
        >>> states = torch.randn(2, 4000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> halves = states.mT @ states
        >>> expected_excess(halves.sum(0), halves[0]) < 0.01
        True
    """
    dim = len(total)
    floor = _FLOOR * torch.trace(total) / dim * torch.eye(dim, dtype=total.dtype, device=total.device)
    halves = (part, total - part)
    traces = []
    for one, other in (halves, halves[::-1]):
        factor, failed = torch.linalg.cholesky_ex(one + floor)
        if int(failed) or not float(torch.trace(one)) > 0:
            return math.inf
        traces.append(float(torch.trace(torch.cholesky_solve(other + floor, factor))))
    return max(0.0, (math.sqrt(traces[0] * traces[1]) / dim - 1) / 4)


class Settling:
    """Watches whether moments have settled while they are collected, seldom: a look takes `O(dim³)`.

    Args:
        collector: Of this process, with `in_halves`.
        tolerance: The excess of loss at which they have, see `expected_excess`. Several processes need not ask each
            other: what all have seen together errs less by their number.
    """

    def __init__(self, collector: Collector, tolerance: float) -> None:
        """Look first when each half can have seen every direction."""
        self._collector = collector
        self._tolerance = tolerance
        self._next = 4.0 * max(map(len, collector.halves.values()))
        self._has_settled = False

    def is_settled(self) -> bool:
        """Whether that is so now."""
        number = self._collector.num_targets
        if number >= self._next:
            excess = self._excess()
            self._has_settled = excess <= self._tolerance
            # It falls as one over their number; not at one stroke, as the estimate is rough.
            self._next = number * min(2.0, max(1.1, excess / self._tolerance))
        return self._has_settled

    def say(self) -> None:
        """Log how far the moments are, in the process of rank zero."""
        excess, number = self._excess(), self._collector.num_targets * count_processes()
        if self._has_settled:
            found = f"have settled after {number:,} targets"
        else:
            found = f"have not settled by {number:,} targets (tolerance {self._tolerance:.0%}), more text would help"
        lost = "an unknown part" if math.isinf(excess) else f"about {excess:.0%}"
        rank_zero_info(f"The moments {found}: tables lose {lost} more by them than by those of endless text.")

    def _excess(self) -> float:
        """That of the worst table."""
        return max(map(self._excess_of, self._collector.tables)) / count_processes()

    def _excess_of(self, modules: Sequence[str]) -> float:
        collector = self._collector
        total = part = torch.zeros(())
        for (kind, path), half in collector.halves.items():
            if path in modules:
                number = collector.num_targets if kind == "gradients" else collector.positions[path]
                total = total + collector.sums[kind, path].cpu() / max(1, number)
                part = part + half.cpu() / max(1, number)
        return expected_excess(total, part)
