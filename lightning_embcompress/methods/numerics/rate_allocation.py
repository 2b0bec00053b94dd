"""How many bits every component of every block gets: marginal gains per byte, in units of the loss.

In an orthonormal basis errors of components add up. A component whose energy in a block is `e` (what the loss would
grow by if it were dropped) costs `D(b) e` when its coefficients are stored in `b` bits, and takes `n b` bits for the
`n` rows of the block. Minimising `Σ D(b) e + price · bits` for a price that meets the budget is reverse water-filling
(Cover and Thomas, Elements of Information Theory, section 10.3.3; Goyal 2001, Theoretical Foundations of Transform
Coding). With the two choices "dropped" and "kept as floats" it is the allocation of ranks by marginal gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Widths:
    """Ways to store the coefficients of a component.

    Attributes:
        bits: Bits of a value, ascending; the first is 0: the component is dropped.
        distortions: Part of the energy that is lost at each, descending; the first is 1.
    """

    bits: tuple[int, ...]
    distortions: tuple[float, ...]


@dataclass(frozen=True)
class Overheads:
    """Bits beside those of the coefficients.

    Attributes:
        column: For every component that a block keeps.
        basis: For every component that any block keeps.
    """

    column: int
    basis: int


@dataclass(frozen=True)
class Rates:
    """An allocation.

    Attributes:
        widths: `[blocks, rank]` int64, index into `Widths.bits`, not rising within a block.
        price: Loss that one more bit would have spared, in nats.
        loss: What the loss grows by, in nats.
        bits: Bits that it takes, overheads included.
    """

    widths: Tensor
    price: float
    loss: float
    bits: int


def falling(values: Sequence[float]) -> list[float]:
    """The nearest sequence that does not rise (pool adjacent violators): means of neighbours that did.

    Example:
        >>> falling([5.0, 1.0, 3.0, 0.0])
        [5.0, 2.0, 2.0, 0.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = float(value), 1
        while pools and pools[-1][0] * count < total * pools[-1][1]:
            last = pools.pop()
            total, count = total + last[0], count + last[1]
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def falling_rows(values: Tensor) -> Tensor:
    """The same for every row, `[rows, columns]` float64."""
    rows = [falling(row) for row in values.tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(values.shape)


class RateCurve:
    """What can be kept of a table at which price, and what is lost then.

    Widths do not rise from one component of a block to the next, so that a few numbers describe them: the choice is
    that for the energies' nearest falling sequences, which is the best of those that do not rise.

    Args:
        energies: `[blocks, dim]` what the loss grows by if a component is dropped in a block, in nats.
        sizes: Rows of every block.
        widths: Ways to store a coefficient.
        overheads: What else takes bits.
        rest: What is lost whatever is kept: energy of components that are not offered, in nats.
    """

    def __init__(
        self, energies: Tensor, sizes: Sequence[int], widths: Widths, overheads: Overheads, rest: float = 0.0
    ) -> None:
        """Prepare what is the same at all prices."""
        self._energies = energies.double().cpu()
        self._falls = falling_rows(self._energies)
        self._lost = torch.tensor(widths.distortions, dtype=torch.float64)
        bits = torch.tensor(widths.bits, dtype=torch.float64)
        # [blocks, widths]
        self._costs = torch.tensor(list(sizes), dtype=torch.float64).unsqueeze(1) * bits
        self._costs += (bits > 0) * float(overheads.column)
        self._basis = overheads.basis
        self._total = float(self._energies.sum()) + rest
        largest = float(self._falls.max()) if self._falls.numel() else 0.0
        self.prices = (largest * 1e-24, max(largest, 1e-300) * max(2, len(sizes)))
        """A price at which everything that has any energy is kept, and one at which nothing is."""

    def at(self, price: float) -> Rates:
        """The allocation that minimises the loss plus the price of its bits, in nats a bit."""
        least = self._falls
        chosen = torch.zeros(least.shape, dtype=torch.long)
        for width in range(1, len(self._lost)):
            cost = self._falls * self._lost[width] + price * self._costs[:, width : width + 1]
            better = cost < least
            chosen.masked_fill_(better, width)
            least = torch.where(better, cost, least)
        # A component is kept if what all blocks gain by it pays for its row of the basis.
        gains = (self._falls - least).sum(dim=0)
        rank = int((gains > price * self._basis).int().cumprod(0).sum())
        rank = int((chosen[:, :rank] > 0).any(dim=0).int().cumprod(0).sum())
        return self._rates(chosen[:, :rank], price)

    def _rates(self, chosen: Tensor, price: float) -> Rates:
        rank = chosen.shape[1]
        loss = self._total - float((self._energies[:, :rank] * (1 - self._lost[chosen])).sum())
        taken = float(self._costs.gather(1, chosen).sum()) + rank * self._basis
        return Rates(chosen, price, max(loss, 0.0), math.ceil(taken))

    def between(self, low: Rates, high: Rates, max_bits: float) -> Rates:
        """As much of the step from one allocation to a larger one as fits.

        At the price where they meet, all parts of the step are worth it alike: components of equal or pooled energies
        come at one price, and a whole step of them may be much.

        Args:
            low: An allocation.
            high: The next larger one.
            max_bits: Most bits that the result may take.
        """
        chosen = torch.nn.functional.pad(low.widths, (0, high.widths.shape[1] - low.widths.shape[1]))
        rank, left = low.widths.shape[1], max_bits - low.bits
        stopped: set[int] = set()
        for component, block in (high.widths > chosen).T.nonzero().tolist():
            old, new = int(chosen[block, component]), int(high.widths[block, component])
            cost = float(self._costs[block, new] - self._costs[block, old])
            cost += self._basis * (component >= rank)
            if block in stopped or component > rank or cost > left:
                # Widths must not rise within a block: nothing behind a component that stays as it was.
                stopped.add(block)
                continue
            chosen[block, component] = new
            left -= cost
            rank = max(rank, component + 1)
        return self._rates(chosen[:, :rank], low.price)


def allocate(curves: Sequence[RateCurve], max_bits: float) -> list[Rates]:
    """Widths of all components of all blocks of tables that share one budget.

    Args:
        curves: Of the tables.
        max_bits: Most bits that all of them may take together.

    Returns:
        An allocation for each, all at one price, the last step in part; without any component where not even one fits.

    Example:
        >>> energies = torch.tensor([[8.0, 2.0, 0.1], [1.0, 0.5, 0.0]])
        >>> curve = RateCurve(energies, [10, 20], Widths((0, 32), (1.0, 0.0)), Overheads(0, 96))
        >>> [rates] = allocate([curve], max_bits=1600)
        >>> rates.widths.tolist(), rates.bits
        ([[1, 1], [1, 0]], 1472)
    """

    def at(price: float) -> list[Rates]:
        return [curve.at(price) for curve in curves]

    low, high = min(curve.prices[0] for curve in curves), max(curve.prices[1] for curve in curves)
    low = max(low, 1e-300)
    over = at(low)
    if sum(rates.bits for rates in over) <= max_bits:
        return over
    best = at(high)
    while high > low * (1 + 1e-6):
        middle = math.sqrt(low) * math.sqrt(high)
        found = at(middle)
        if sum(rates.bits for rates in found) <= max_bits:
            best, high = found, middle
        else:
            over, low = found, middle
    for index, (curve, larger) in enumerate(zip(curves, over, strict=True)):
        others = sum(rates.bits for rates in best) - best[index].bits
        best[index] = curve.between(best[index], larger, max_bits - others)
    return best
