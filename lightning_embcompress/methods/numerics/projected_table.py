"""A table seen through its metric and a basis: sums over its blocks, and which block suits a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import compute_dtype, gram_matrix, row_chunks, row_units, run_of
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.numerics.rate_allocation import Rates, Widths
from lightning_embcompress.methods.numerics.sampling import draw
from lightning_embcompress.utils.division import deal
from lightning_embcompress.utils.tensor_files import Rows

# Rows, and coefficients, that are looked at to see what quantizers lose.
_SAMPLED_ROWS, _SAMPLED = 2**14, 2**21
# Weight of a row that has none, relative to the mean.
_LEAST_WEIGHT = 1e-12


@dataclass(frozen=True)
class BlockSums:
    """Weighted sums over the rows of every block.

    Attributes:
        sizes: `[blocks]` number of rows.
        mass: `[blocks]` sum of their weights.
        rows: `[blocks, dim]` sum of the rows.
        first: `[blocks, dim]` sum of the coefficients around the mean of the table.
        second: `[blocks, rank]` sum of their squares, of the components that are looked at.
        total: What dropping all components of all rows costs, with one mean for the table.
        stored: `[blocks, dim]` means of the rows, as they are stored.
        means: `[blocks, dim]` the coefficients of those.
        rounding: Relative error of the sums of squares.
    """

    sizes: Tensor
    mass: Tensor
    rows: Tensor
    first: Tensor
    second: Tensor
    total: float
    stored: Tensor
    means: Tensor
    rounding: float

    @property
    def energies(self) -> Tensor:
        """`[blocks, rank]`: half the weighted squares of a component around the mean, what dropping it costs."""
        rank = self.second.shape[1]
        around = self.second - self._less()[:, :rank]
        # What is below the rounding of the sums is not known, and no scale.
        return 0.5 * torch.maximum(around, self.rounding * self.second)

    @property
    def scales(self) -> Tensor:
        """`[blocks, rank]` root mean squares of the coefficients around the means of the blocks."""
        return (2 * self.energies / self.mass.clamp(min=1e-300).unsqueeze(1)).sqrt()

    @property
    def rest(self) -> float:
        """What dropping the components that are not looked at costs: what blocks' means and the others leave of all."""
        return max(0.0, self.total - 0.5 * float(self._less().sum()) - float(self.energies.sum()))

    def _less(self) -> Tensor:
        """By how much squares around the means of blocks are less than those around the mean of the table."""
        return (2 * self.first - self.mass.unsqueeze(1) * self.means) * self.means


class ProjectedTable:
    """A table seen through its metric and, once that is chosen, its basis.

    Args:
        weight: `[vocab_size, dim]` table.
        metric: What an error costs.
        stored_means: What means of blocks become when they are stored.

    Raises:
        ValueError: If the metric is of another table.
    """

    def __init__(self, weight: Rows, metric: Metric, stored_means: Callable[[Tensor], Tensor]) -> None:
        """Without a basis."""
        vocab_size, dim = weight.shape
        if metric.matrix.shape != (dim, dim) or metric.weights.shape != (vocab_size,):
            raise ValueError(
                f"the metric is of a table of {metric.weights.numel()} x {metric.matrix.shape[0]}, the table has "
                f"{vocab_size} x {dim}: collect the statistics of this model"
            )
        self.weight = weight
        self.metric = metric
        self.stored_means = stored_means
        self.dtype = compute_dtype(weight.dtype)
        q = metric.weights.to(weight.device, torch.float64)
        # A row of no weight still has a say in where the mean of its block is.
        least = max(_LEAST_WEIGHT * float(q.mean()), 1e-30)
        self.q = q if float(q.min()) >= least else q.clamp(min=least)
        self.units = row_units(vocab_size, dim)
        self.center = torch.zeros(dim, dtype=torch.float64)
        self.projector = torch.zeros(dim, dim, dtype=torch.float64)
        """Coefficients are `(w − center) projector`."""
        self.inverse = torch.zeros(dim, dim, dtype=torch.float64)

    def equal_groups(self, groups: int) -> Tensor:
        """Groups of equal numbers of words, those of the highest weight first; of equal weight, the longest first."""
        order = torch.argsort(self._norms(), descending=True, stable=True)
        order = order[torch.argsort(self.q[order], descending=True, stable=True)]
        # In place of what is no longer needed: of all rows every number takes much memory.
        groups_in_order = torch.arange(order.numel(), device=order.device).mul_(groups)
        return torch.empty_like(order).scatter_(0, order, groups_in_order.div_(order.numel(), rounding_mode="floor"))

    def _norms(self) -> Tensor:
        """`[vocab_size]` squared lengths of rows."""
        norms = torch.empty(self.weight.shape[0], dtype=self.dtype, device=self.weight.device)

        def compute(unit: int) -> None:
            for chunk in self.units[unit]:
                norms[chunk] = self.weight[chunk].to(self.dtype).square().sum(dim=1)

        runs = [run_of(chunks) for chunks in self.units]
        deal([[norms[run]] for run in runs], [run.stop - run.start for run in runs], compute)
        return norms

    def choose_basis(self, blocks: Tensor, groups: int, begin: Tensor | None = None) -> None:
        """Eigenvectors of the weighted moment around the means of blocks, seen through the metric.

        Args:
            blocks: `[vocab_size]` block of every row.
            groups: How many.
            begin: `[rank, dim]` rows to begin with instead, nearly orthogonal in the metric.
        """
        gram = gram_matrix(self.weight, self.q)
        sums = [torch.zeros(groups, self.weight.shape[1] + 1, dtype=torch.float64) for _ in self.units]

        def compute(unit: int) -> None:
            for chunk in self.units[unit]:
                selected = self._selector(blocks[chunk], self.q[chunk], groups)
                rows = self.weight[chunk].to(self.dtype)
                sums[unit][:, 1:] += (selected @ rows).double().cpu()
                sums[unit][:, 0] += selected.sum(dim=1).double().cpu()

        deal([[part] for part in sums], [float(len(chunks)) for chunks in self.units], compute)
        total = torch.stack(sums).sum(dim=0)
        mass, first = total[:, 0].clamp(min=1e-300), total[:, 1:]

        def decompose(_: int) -> None:
            root = self.metric.root.to(gram)
            moment = gram - (first.T @ (first / mass.unsqueeze(1))).to(gram)
            seen = root @ moment @ root
            vectors = _eigenvectors(seen).cpu()
            if begin is not None:
                # What is missing to a basis is that of what is left.
                given = begin.double().cpu() @ self.metric.root
                rest = torch.eye(len(vectors), dtype=torch.float64) - torch.linalg.pinv(given) @ given
                left = _eigenvectors(rest @ seen.cpu() @ rest)[:, : len(vectors) - len(given)]
                vectors, signs = torch.linalg.qr(torch.cat([given.T, left], dim=1))
                vectors = vectors * torch.where(signs.diagonal() < 0, -1.0, 1.0)
            self.projector.copy_(self.metric.root @ vectors)
            self.inverse.copy_(vectors.T @ self.metric.inverse_root)
            self.center.copy_(first.sum(dim=0) / mass.sum())

        # One process decomposes it: rounding may differ between processors.
        deal([[self.projector, self.inverse, self.center]], [1.0], decompose)

    def moments(self, blocks: Tensor, sums: BlockSums, group_of_block: Tensor, groups: int) -> Tensor:
        """Second moments of the coefficients around the means of their blocks, added up over groups of blocks.

        Args:
            blocks: `[vocab_size]` block of every row.
            sums: Of them.
            group_of_block: `[blocks]` int64.
            groups: How many.

        Returns:
            `[groups, dim, dim]` in the dtype of computing.
        """
        dim, group_of_row = self.weight.shape[1], group_of_block.to(blocks.device)[blocks]
        found = torch.zeros(groups, dim, dim, dtype=self.dtype, device=self.weight.device)

        def compute(group: int) -> None:
            rows = (group_of_row == group).nonzero().squeeze(1)
            if rows.numel() == 0:
                return
            first = sums.rows[group_of_block == group]
            mass = sums.mass[group_of_block == group].clamp(min=1e-300).unsqueeze(1)
            moment = gram_matrix(self.weight, self.q, rows).cpu() - first.T @ (first / mass)
            found[group] = self.projector.T @ moment @ self.projector

        costs = torch.bincount(group_of_row, minlength=groups).tolist()
        deal([[one] for one in found], costs, compute)
        return found

    def turn(self, rotation: Callable[[], Tensor]) -> None:
        """Take other directions for the components.

        Args:
            rotation: Gives `[dim, dim]` orthonormal columns, the new directions in the old.
        """

        def turn(_: int) -> None:
            turned = rotation()
            self.projector.copy_(self.projector @ turned)
            self.inverse.copy_(turned.T @ self.inverse)

        # One process finds it: rounding may differ between processors.
        deal([[self.projector, self.inverse]], [1.0], turn)

    def _selector(self, blocks: Tensor, q: Tensor, groups: int) -> Tensor:
        """`[groups, rows]`: weights of the rows of each group, 0 elsewhere; sums over groups are products with it."""
        selected = torch.zeros(groups, blocks.numel(), dtype=self.dtype, device=self.weight.device)
        return selected.scatter_(0, blocks.unsqueeze(0), q.to(self.dtype).unsqueeze(0))

    def coefficients(self, rows: Tensor, rank: int) -> Tensor:
        """The first coefficients of some rows, around the mean of the table, `[rows, rank]` float64 on the CPU."""
        projector = self.projector[:, :rank].to(self.weight.device, self.dtype)
        parts = [self.weight[rows[chunk]].to(self.dtype) @ projector for chunk in row_chunks(*self._shape(rows))]
        return torch.cat(parts).to("cpu", torch.float64).sub_(self.center @ self.projector[:, :rank])

    def _shape(self, rows: Tensor) -> tuple[int, int]:
        return rows.numel(), self.weight.shape[1]

    def sum_blocks(self, blocks: Tensor, groups: int) -> BlockSums:
        """Sums over the rows of blocks as they are, of all components."""
        dim = self.weight.shape[1]
        return self._pass(groups, dim, self.projector, lambda _, chunk: blocks[chunk], None)[1]

    def move(self, sums: BlockSums, rates: Rates, widths: Widths, rank: int) -> tuple[Tensor, BlockSums]:
        """Every row to the block where its part of the loss plus the price of its bits is least, and the new sums.

        In a block whose scales follow its rows, a component loses the same part of each row's energy. Of components
        that no block keeps all lose the same but for the means, so that they need not be computed one by one.

        Args:
            sums: Of the blocks as they are.
            rates: What they keep.
            widths: Ways to store a coefficient.
            rank: How many components to look at, at least those that are kept.
        """
        lost = torch.ones(sums.first.shape, dtype=torch.float64)
        lost[:, : rates.widths.shape[1]] = torch.tensor(widths.distortions, dtype=torch.float64)[rates.widths]
        taken = torch.tensor(widths.bits, dtype=torch.float64)[rates.widths].sum(dim=1)
        means = sums.means
        # Of `Σ_k lost_k (c_k − m_k)²` the part that is linear in the row, the constant, and the squares.
        directions = self.projector @ (-2 * means * lost).T
        constant = (means.square() * lost).sum(dim=1) - self.center @ directions
        price = rates.price * taken
        price[sums.sizes == 0] = torch.inf
        device = self.weight.device
        square, constant, price = (part.to(device, self.dtype) for part in (lost[:, :rank].T, constant, price))

        def choose(products: tuple[Tensor, Tensor], chunk: slice) -> Tensor:
            linear, squares = products
            error = torch.addmm(linear, squares, square).add_(constant)
            return error.mul_(0.5 * self.q[chunk].to(self.dtype).unsqueeze(1)).add_(price).argmin(dim=1)

        seen = torch.cat([self.projector[:, :rank], directions], dim=1)
        return self._pass(len(sums.sizes), rank, seen, choose, sums.total)

    def beyond(self, blocks: Tensor, means: Tensor, largest: Tensor) -> Tensor:
        """`[*, blocks, rank]` half the weighted squares by which coefficients of the rows of blocks exceed some values.

        Args:
            blocks: `[vocab_size]` block of every row.
            means: `[blocks, rank]` mean coefficients.
            largest: `[*, blocks, rank]` the values.
        """
        count, groups, rank = largest.shape
        projector = self.projector[:, :rank].to(self.weight.device, self.dtype)
        shift = (self.center @ self.projector[:, :rank] + means).to(projector)
        values = largest.to(projector)
        parts = [torch.zeros(count, groups, rank, dtype=torch.float64) for _ in self.units]

        def compute(unit: int) -> None:
            for chunk in self.units[unit]:
                own = blocks[chunk]
                rows = (self.weight[chunk].to(self.dtype) @ projector - shift[own]).abs_()
                selected = self._selector(own, 0.5 * self.q[chunk], groups)
                for index in range(count):
                    over = (rows - values[index][own]).clamp_(min=0).square_()
                    parts[unit][index] += (selected @ over).double().cpu()

        deal([[part] for part in parts], [float(len(chunks)) for chunks in self.units], compute)
        return torch.stack(parts).sum(dim=0)

    def _pass(
        self,
        groups: int,
        rank: int,
        directions: Tensor,
        choose: Callable[[tuple[Tensor, Tensor], slice], Tensor],
        total: float | None,
    ) -> tuple[Tensor, BlockSums]:
        """Project all rows, choose their blocks, and sum over them.

        Args:
            groups: Number of blocks.
            rank: Components to look at.
            directions: `[dim, rank + *]`: those of the components, and others to project on.
            choose: Called with the products of some rows with the other directions and the squares of their
                coefficients, and which rows they are; gives their blocks.
            total: See `BlockSums`; None to compute it, which takes all components.
        """
        dim, device = self.weight.shape[1], self.weight.device
        blocks = torch.empty(self.weight.shape[0], dtype=torch.long, device=device)
        parts = [torch.zeros(groups, 1 + dim + rank, dtype=torch.float64) for _ in self.units]
        shift = (self.center @ directions[:, :rank]).to(device, self.dtype)
        seen = directions.to(device, self.dtype)

        def compute(unit: int) -> None:
            for chunk in self.units[unit]:
                rows = self.weight[chunk].to(self.dtype)
                products = rows @ seen
                squares = (products[:, :rank] - shift).square_()
                blocks[chunk] = choose((products[:, rank:], squares), chunk)
                selected = self._selector(blocks[chunk], self.q[chunk], groups)
                sums = [selected.sum(dim=1, keepdim=True), selected @ rows, selected @ squares]
                parts[unit] += torch.cat(sums, dim=1).double().cpu()

        runs = [run_of(chunks) for chunks in self.units]
        results = [[blocks[run], part] for run, part in zip(runs, parts, strict=True)]
        deal(results, [run.stop - run.start for run in runs], compute)
        mass, first, second = torch.split(torch.stack(parts).sum(dim=0), [1, dim, rank], dim=1)
        sizes = torch.bincount(blocks, minlength=groups).cpu()
        return blocks, self._summed(sizes, mass.squeeze(1), first, second, total)

    def _summed(self, sizes: Tensor, mass: Tensor, rows: Tensor, second: Tensor, total: float | None) -> BlockSums:
        weights = mass.unsqueeze(1)
        first = (rows - weights * self.center) @ self.projector
        stored = self.stored_means(rows / weights.clamp(min=1e-300))
        means = (stored - self.center) @ self.projector
        if total is None:
            total = 0.5 * float(second.sum())
        rounding = 8 * torch.finfo(self.dtype).eps
        return BlockSums(sizes, mass, rows, first, second, total, stored, means, rounding)

    def merged(self, sums: BlockSums, count: int) -> BlockSums:
        """Sums as if runs of `count` neighbouring blocks were one."""
        sizes, mass, rows, second = (
            torch.stack([part.sum(dim=0) for part in torch.split(tensor, count)])
            for tensor in (sums.sizes, sums.mass, sums.rows, sums.second)
        )
        return self._summed(sizes, mass, rows, second, sums.total)

    def sample(self, blocks: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients over their scales, of some rows.

        Rows are drawn by what they weigh within their blocks, those that weigh the most for certain: levels that are
        fitted to a few heavy rows alone would fit no others.

        Args:
            blocks: `[vocab_size]` block of every row.
            means: `[blocks, rank]` mean coefficients.
            scales: `[blocks, rank]`.

        Returns:
            `[rows, rank]` values, `[rows]` weights, of which every block has as much as it has rows, and `[rows]`
            blocks; on the CPU.
        """
        groups, rank = means.shape
        sizes = torch.bincount(blocks, minlength=groups)
        mass = torch.zeros(groups, dtype=torch.float64, device=blocks.device).index_add_(0, blocks, self.q)
        count = min(_SAMPLED_ROWS, max(256, _SAMPLED // max(1, rank)))
        rows, weights = draw((sizes / mass.clamp(min=1e-300))[blocks].mul_(self.q), count)
        inside = blocks[rows].cpu()
        values = self.coefficients(rows, rank)
        # In place: of many rows they are as large as the table that they are of.
        for chunk in row_chunks(*values.shape):
            values[chunk] -= means[inside[chunk]]
            values[chunk] /= scales[inside[chunk]].clamp(min=1e-300)
        return values, weights.cpu(), inside


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Those of a symmetric matrix, the largest first, in columns."""
    vectors: Tensor = torch.linalg.eigh((matrix + matrix.T) / 2).eigenvectors.flip(1)
    # The sign is free: a table that has changed a little gets a basis that has changed a little.
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
