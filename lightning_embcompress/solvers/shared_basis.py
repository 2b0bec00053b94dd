"""Blocks of rows in one basis, in the metric of the loss: GroupReduce where it is known what an error costs.

Minimises the predicted growth of the loss `½ Σ_i q_i ‖(w_i − ŵ_i) C‖²`, `C = M^½` (see `solvers.metric`), in a budget
of bits. All blocks share one basis, the eigenvectors `P` of `C S C`, `S` the weighted second moment of the rows around
the means of their blocks. In it errors of components add up, and a block is no more than a choice of what every
component is worth there. Widths follow from marginal gains (`solvers.rate_allocation`); words move to the block whose
widths suit them, at the price of the bits that they take there. Both lower the same number.

Compared with a basis for every block, as published, this stores one basis instead of many, needs one decomposition
instead of one a block and round, and a round of refinement is one product of the table with the basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_embcompress.solvers.division import deal
from lightning_embcompress.solvers.gram import compute_dtype, gram_matrix, row_units, run_of
from lightning_embcompress.solvers.metric import Metric
from lightning_embcompress.solvers.rate_allocation import Overheads, RateCurve, Rates, Widths, allocate
from lightning_embcompress.solvers.scalar_quantizer import distortion, fit_levels

# Numbers of blocks to choose from where none is given: each is made of neighbours of the next.
_AUTOMATIC_GROUPS = (1, 2, 4, 8, 16, 32)
# Refinement has converged when a round lowers the loss by less than this part.
_TOLERANCE = 2e-3
# Coefficients that are looked at to see what quantizers lose.
_SAMPLED = 2**18


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
    """

    max_bits: int
    widths: tuple[int, ...]
    is_exact: bool
    overheads: Overheads
    block: int
    index: Callable[[int], int]

    def left(self, blocks: int) -> float:
        """Bits that are left for coefficients and basis with so many blocks."""
        return self.max_bits - blocks * self.block - self.index(blocks)


@dataclass(frozen=True)
class SharedBasis:
    """Which row is in which block, what is kept of it there, and in which basis.

    Attributes:
        block_of_row: `[vocab_size]` int64; no block is empty.
        bits: `[blocks, rank]` int64 bits of a coefficient, 0 where the component is dropped; rows do not rise.
        means: `[blocks, dim]` float64 weighted means of the rows.
        projector: `[dim, rank]` float64: coefficients are `(w − mean) projector`.
        basis: `[rank, dim]` float64: rows are `mean + coefficients basis`.
        scales: `[blocks, rank]` float64 weighted root mean squares of the coefficients.
        levels: For every width that is used, `[2^bits]` float64 levels of coefficients over their scale; none where
            coefficients are kept as floats.
        losses: Predicted growth of the loss in nats, before refinement and after each round.
    """

    block_of_row: Tensor
    bits: Tensor
    means: Tensor
    projector: Tensor
    basis: Tensor
    scales: Tensor
    levels: dict[int, Tensor]
    losses: list[float]

    @property
    def loss(self) -> float:
        """Predicted growth of the loss, in nats."""
        return min(self.losses)


@dataclass(frozen=True)
class _Sums:
    """Weighted sums over the rows of every block, of coefficients around the mean of the table."""

    sizes: Tensor
    mass: Tensor
    first: Tensor
    second: Tensor

    @property
    def means(self) -> Tensor:
        return self.first / self.mass.clamp(min=1e-300).unsqueeze(1)

    @property
    def energies(self) -> Tensor:
        """`[blocks, dim]`: half the weighted variance of a component times the mass, what dropping it costs."""
        return 0.5 * (self.second - self.first * self.means).clamp(min=0)

    def merged(self, count: int) -> _Sums:
        """As if runs of `count` neighbouring blocks were one."""
        return _Sums(*(_merge(tensor, count) for tensor in (self.sizes, self.mass, self.first, self.second)))


def _merge(tensor: Tensor, count: int) -> Tensor:
    return torch.stack([part.sum(dim=0) for part in torch.split(tensor, count)])


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

    Processes share the rows in every pass, see `solvers.division`. The result does not depend on their order.

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
        ValueError: If the budget does not cover the index and the means of the blocks.
    """
    table = _Coefficients(weight, metric)
    step = 1.0 / (refine_rounds + 4)
    candidates: Sequence[int] = [groups] if groups else [c for c in _AUTOMATIC_GROUPS if c <= weight.shape[0]]
    candidates = [count for count in candidates if budget.left(count) >= 0]
    if start is not None:
        candidates = [int(start.max()) + 1]
    if not candidates or budget.left(candidates[-1]) < 0:
        raise ValueError(
            f"{budget.max_bits // 8} bytes do not hold the block index and the means of {groups or 1} blocks of a "
            f"table of {weight.shape[0]} x {weight.shape[1]}; allow more bytes or use fewer groups"
        )
    finest = candidates[-1]
    blocks = table.equal_groups(finest) if start is None else start.clone()
    table.choose_basis(blocks, finest)
    advance(2 * step)
    sums = table.sum_blocks(blocks, finest)
    widths = table.quantizers(blocks, sums, budget)
    advance(step)

    def rates_of(sums: _Sums) -> Rates:
        present = sums.sizes > 0
        curve = RateCurve(sums.energies[present], sums.sizes[present].tolist(), widths, budget.overheads)
        [found] = allocate([curve], budget.left(int(present.sum())))
        chosen = torch.zeros(len(present), found.widths.shape[1], dtype=torch.long)
        chosen[present] = found.widths
        return replace(found, widths=chosen)

    if keep is not None:
        found = [widths.bits.index(bits) for bits in keep.flatten().tolist()]
        index = torch.tensor(found, dtype=torch.long).view(keep.shape)
        lost = torch.tensor(widths.distortions, dtype=torch.float64)[index]
        loss = float(sums.energies.sum() - (sums.energies[:, : keep.shape[1]] * (1 - lost)).sum())
        kept = Rates(index, 0.0, max(loss, 0.0), 0)
        advance(step * (refine_rounds + 1))
        return table.finish(kept, sums, blocks, widths, [kept.loss], budget)
    options = [(count, sums.merged(finest // count)) for count in candidates]
    allocated = [(rates_of(some), some, count) for count, some in options]
    rates, sums, count = min(allocated, key=lambda option: option[0].loss)
    blocks = blocks // (finest // count)
    losses = [rates.loss]
    best = (rates, sums, blocks)
    for done in range(refine_rounds):
        blocks, sums = table.move(sums, rates, widths)
        rates = rates_of(sums)
        losses.append(rates.loss)
        advance(step)
        if rates.loss < best[0].loss:
            gain = 1 - rates.loss / best[0].loss
            best = (rates, sums, blocks)
            if gain >= _TOLERANCE:
                continue
        advance(step * (refine_rounds - done - 1))
        break
    solution = table.finish(*best, widths, losses, budget)
    advance(step)
    return solution


def rate_curve(weight: Tensor, metric: Metric, budget: BitBudget, groups: int) -> RateCurve:
    """What a table loses at which price, before refinement: to share a budget between tables.

    Args:
        weight: `[vocab_size, dim]` table.
        metric: What an error costs.
        budget: As for `shared_basis`; how much it is has no say.
        groups: Number of equal groups of words by weight.
    """
    table = _Coefficients(weight, metric)
    blocks = table.equal_groups(groups)
    table.choose_basis(blocks, groups)
    sums = table.sum_blocks(blocks, groups)
    return RateCurve(sums.energies, sums.sizes.tolist(), table.quantizers(blocks, sums, budget), budget.overheads)


class _Coefficients:
    """A table seen through its metric and, once that is chosen, its basis."""

    def __init__(self, weight: Tensor, metric: Metric) -> None:
        self.weight = weight
        self.metric = metric
        self.dtype = compute_dtype(weight.dtype)
        self.q = metric.weights.to(weight.device, torch.float64)
        self.units = row_units(*weight.shape)
        self.center = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
        self.vectors = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
        self.projector = torch.zeros_like(self.vectors, dtype=self.dtype)

    def equal_groups(self, groups: int) -> Tensor:
        """Groups of equal numbers of words, those of the highest weight first; of equal weight, the longest first."""
        norms = torch.empty(self.weight.shape[0], dtype=self.dtype, device=self.weight.device)

        def compute(unit: int) -> None:
            for chunk in self.units[unit]:
                norms[chunk] = self.weight[chunk].to(self.dtype).square().sum(dim=1)

        runs = [run_of(chunks) for chunks in self.units]
        deal([[norms[run]] for run in runs], [run.stop - run.start for run in runs], compute)
        order = torch.argsort(norms, descending=True, stable=True)
        order = order[torch.argsort(self.q[order], descending=True, stable=True)]
        blocks = torch.empty_like(order)
        blocks[order] = torch.arange(order.numel(), device=order.device) * groups // order.numel()
        return blocks

    def choose_basis(self, blocks: Tensor, groups: int) -> None:
        """Eigenvectors of the weighted moment around the means of blocks, seen through the metric."""
        gram = gram_matrix(self.weight, self.q)
        sums = [torch.zeros(groups, self.weight.shape[1] + 1, dtype=torch.float64) for _ in self.units]

        def compute(unit: int) -> None:
            for chunk in self.units[unit]:
                selected = self._selector(blocks[chunk], self.q[chunk], groups)
                rows = self.weight[chunk].to(self.dtype)
                sums[unit][:, 1:] += (selected @ rows).double().cpu()
                sums[unit][:, 0] += selected.sum(dim=1).double().cpu()

        deal([[part] for part in sums], [float(len(chunks)) for chunks in self.units], compute)
        total = torch.stack(sums).sum(dim=0).to(self.weight.device)
        mass, first = total[:, 0].clamp(min=1e-300), total[:, 1:]
        gram -= first.T @ (first / mass.unsqueeze(1))
        root = self.metric.root.to(gram)

        def decompose(_: int) -> None:
            seen = root @ gram @ root
            vectors = torch.linalg.eigh((seen + seen.T) / 2).eigenvectors.flip(1)
            # The sign is free: a table that has changed a little gets a basis that has changed a little.
            largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
            self.vectors.copy_(vectors * largest.sign())

        # One process decomposes it: rounding may differ between processors.
        deal([[self.vectors]], [1.0], decompose)
        self.center = first.sum(dim=0) / mass.sum()
        self.projector = (root @ self.vectors).to(self.dtype)

    def _selector(self, blocks: Tensor, q: Tensor, groups: int) -> Tensor:
        """`[groups, rows]`: weights of the rows of each group, 0 elsewhere; sums over groups are products with it."""
        selected = torch.zeros(groups, blocks.numel(), dtype=self.dtype, device=self.weight.device)
        return selected.scatter_(0, blocks.unsqueeze(0), q.to(self.dtype).unsqueeze(0))

    def coefficients(self, rows: slice | Tensor) -> Tensor:
        """All coefficients of some rows, around the mean of the table."""
        return (self.weight[rows].to(self.dtype) - self.center.to(self.dtype)) @ self.projector

    def sum_blocks(self, blocks: Tensor, groups: int) -> _Sums:
        """Sums over the rows of blocks as they are."""
        return self._pass(groups, lambda _, __, chunk: blocks[chunk])[1]

    def move(self, sums: _Sums, rates: Rates, widths: Widths) -> tuple[Tensor, _Sums]:
        """Every row to the block where its part of the loss plus the price of its bits is least, and the new sums.

        In a block whose scales follow its rows, a component loses the same part of each row's energy.
        """
        groups, dim = sums.first.shape
        lost = torch.ones(groups, dim, dtype=torch.float64)
        lost[:, : rates.widths.shape[1]] = torch.tensor(widths.distortions, dtype=torch.float64)[rates.widths]
        taken = torch.tensor(widths.bits, dtype=torch.float64)[rates.widths].sum(dim=1)
        means = sums.means
        price = rates.price * taken
        price[sums.sizes == 0] = torch.inf
        square = lost.T.to(self.projector)
        linear = (-2 * means * lost).T.to(self.projector)
        constant = (means.square() * lost).sum(dim=1).to(self.projector)
        cost = price.to(self.projector)

        def choose(coefficients: Tensor, q: Tensor, _: slice) -> Tensor:
            error = (coefficients.square() @ square).add_(coefficients @ linear).add_(constant)
            return error.mul_(0.5 * q.to(self.dtype).unsqueeze(1)).add_(cost).argmin(dim=1)

        return self._pass(groups, choose)

    def _pass(self, groups: int, choose: Callable[[Tensor, Tensor, slice], Tensor]) -> tuple[Tensor, _Sums]:
        """Project all rows, choose their blocks, and sum over them."""
        dim = self.weight.shape[1]
        blocks = torch.empty(self.weight.shape[0], dtype=torch.long, device=self.weight.device)
        parts = [torch.zeros(groups, 2 * dim + 2, dtype=torch.float64) for _ in self.units]

        def compute(unit: int) -> None:
            for chunk in self.units[unit]:
                coefficients = self.coefficients(chunk)
                blocks[chunk] = choose(coefficients, self.q[chunk], chunk)
                selected = self._selector(blocks[chunk], self.q[chunk], groups)
                sums = [
                    (selected > 0).sum(dim=1, keepdim=True),
                    selected.sum(dim=1, keepdim=True),
                    selected @ coefficients,
                    selected @ coefficients.square(),
                ]
                parts[unit] += torch.cat([part.double() for part in sums], dim=1).cpu()

        runs = [run_of(chunks) for chunks in self.units]
        results = [[blocks[run], part] for run, part in zip(runs, parts, strict=True)]
        deal(results, [run.stop - run.start for run in runs], compute)
        sizes, mass, first, second = torch.split(torch.stack(parts).sum(dim=0), [1, 1, dim, dim], dim=1)
        return blocks, _Sums(sizes.squeeze(1).long(), mass.squeeze(1), first, second)

    def quantizers(self, blocks: Tensor, sums: _Sums, budget: BitBudget) -> Widths:
        """What is lost of a coefficient at each width, seen on a sample."""
        if budget.is_exact:
            return Widths((0, *budget.widths), (1.0, *(0.0 for _ in budget.widths)))
        values, weights = self._sample(blocks, sums.means, (2 * sums.energies / sums.mass.unsqueeze(1)).sqrt(), None)
        lost = [distortion(values, weights, fit_levels(values, weights, bits)) for bits in budget.widths]
        return Widths((0, *budget.widths), (1.0, *lost))

    def levels(self, solution: SharedBasis) -> dict[int, Tensor]:
        """Levels of every width that is used, for the coefficients that have it."""
        center = self.center.cpu()
        means = (solution.means - center) @ solution.projector
        found = {}
        for bits in sorted(set(solution.bits.flatten().tolist())):
            if bits:
                values, weights = self._sample(solution.block_of_row, means, solution.scales, solution.bits == bits)
                found[bits] = fit_levels(values, weights, bits)
        return found

    def _sample(self, blocks: Tensor, means: Tensor, scales: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Coefficients over their scales, of rows from all over the table, and their weights within a block."""
        rank = means.shape[1]
        order = torch.argsort(self.q, descending=True, stable=True)
        count = min(order.numel(), max(1, _SAMPLED // max(1, rank)))
        rows = order[torch.linspace(0, order.numel() - 1, count, device=order.device).round().long()]
        device = torch.device("cpu")
        inside = blocks[rows].to(device)
        values = self.coefficients(rows)[:, :rank].to(device, torch.float64) - means[inside]
        used = (scales > 0)[inside] if chosen is None else (chosen & (scales > 0))[inside]
        values = values / scales[inside].clamp(min=1e-300)
        q = self.q[rows].to(device)
        mass = torch.zeros(len(means), dtype=torch.float64).index_add_(0, inside, q)
        number = torch.bincount(inside, minlength=len(means))
        weights = (q * number[inside] / mass[inside]).unsqueeze(1).expand_as(values)
        if not bool(used.any()):
            # A width that no sampled row has: that of a normal distribution.
            normal = torch.special.ndtri((torch.arange(4096, dtype=torch.float64) + 0.5) / 4096)
            return normal, torch.ones_like(normal)
        return values[used], weights[used]

    def finish(
        self, rates: Rates, sums: _Sums, blocks: Tensor, widths: Widths, losses: list[float], budget: BitBudget
    ) -> SharedBasis:
        """What was found, without empty blocks."""
        present = (sums.sizes > 0).nonzero().squeeze(1)
        number = torch.full((len(sums.sizes),), -1, dtype=torch.long)
        number[present] = torch.arange(len(present))
        rank = rates.widths.shape[1]
        vectors = self.vectors.cpu()
        projector = (self.metric.root @ vectors)[:, :rank]
        inverse = vectors.T @ self.metric.inverse_root
        # The mean of a block, back from its coefficients.
        means = self.center.cpu() + sums.means[present] @ inverse
        scales = (2 * sums.energies[present, :rank] / sums.mass[present].clamp(min=1e-300).unsqueeze(1)).sqrt()
        bits = torch.tensor(widths.bits)[rates.widths[present]]
        index = number.to(blocks.device)[blocks]
        solution = SharedBasis(index, bits, means, projector, inverse[:rank], scales, {}, losses)
        return solution if budget.is_exact else replace(solution, levels=self.levels(solution))
