"""A table cut into blocks of rows that share one basis, each with widths of its own for the components."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_embcompress.methods.base import Factorization, Problem
from lightning_embcompress.methods.numerics.gram import compute_dtype, row_chunks, row_windows
from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies
from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.methods.shared_basis.config import SharedBasisConfig
from lightning_embcompress.methods.shared_basis.layout import (
    KIND,
    bit_budget,
    nearest_codes,
    projectors,
    segments_of,
)
from lightning_embcompress.methods.shared_basis.solver import shared_basis
from lightning_embcompress.methods.shared_basis.storage import SharedBasisStorage
from lightning_embcompress.methods.transform_coding.config import TransformCodingConfig
from lightning_embcompress.utils.division import agree, deal
from lightning_embcompress.utils.tensor_files import Rows

# Refinement changes the structure if that leaves less than this part of the loss.
_CLEARLY = 0.85


class SharedBasisBlocks(SharedBasisStorage[SharedBasisConfig]):
    """`w_i ≈ μ_b + u_i B` for row `i` of block `b`, `u_i` of as many components and bits as they are worth in `b`.

    Components are the leading ones of one basis for all blocks, so a table needs one small product with it whatever the
    number of blocks. Coefficients are floats, or codes of `bits` bits of a level, times a scale for each block and
    component; then the basis is stored in 6 bits and means in 8. What is trained are the coefficients, the basis and
    the means, or, of codes, the levels. A block without components is its mean, not zero: a softmax word that never
    occurs has strongly negative logits, and zero would flood the distribution.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        rank: Rows of the basis.
        sizes: Rows of every block; they add up to `vocab_size`.
        segments: For every block, runs `[bits, components]` of the components that it keeps; bits 0 for floats.
        is_coded: Whether coefficients are codes.
        dtype: Dtype of the factors.
        device: Device of the factors.

    Raises:
        ValueError: If the structure is not possible.

    Example:
        >>> table, counts = torch.randn(2000, 64), torch.arange(2000, 0, -1)
        >>> blocks = SharedBasisBlocks.decompose(table, table.nbytes // 16, counts)
        >>> blocks.rows(torch.tensor([3, 999])).shape, blocks.logits(torch.randn(2, 64)).shape
        (torch.Size([2, 64]), torch.Size([2, 2000]))
    """

    kind = KIND
    config_class = TransformCodingConfig
    divides = True
    streams = True
    latent_codes: ClassVar[Callable[[Any], Factorization[Any]]]
    """Makes the numbers behind the codes of a table; registered by `LatentCodes`, which is built on this class."""

    def prepared(self, quantization: Quantization) -> Factorization[Any]:
        """See `Factorization.prepared`; codes keep the widths that they have, and are trained as `LatentCodes`."""
        return type(self).latent_codes(self) if self.is_coded else super().prepared(quantization)

    @classmethod
    def smallest_bytes(cls, vocab_size: int, dim: int, itemsize: int, config: SharedBasisConfig | None = None) -> int:
        """Bytes with only a mean in every block, see `Factorization.smallest_bytes`."""
        config = config or cls.config_class()
        return cls.least_bytes(vocab_size, dim, itemsize, config.groups, config.widths, config.window)

    @classmethod
    def least_bytes(
        cls, vocab_size: int, dim: int, itemsize: int, groups: Any, widths: tuple[int, ...], window: int = 0
    ) -> int:
        """Bytes with only a mean in every block; no widths where coefficients are floats.

        Raises:
            ValueError: If there are more groups than rows.
        """
        count = groups if isinstance(groups, int) else 1
        if count > vocab_size:
            raise ValueError(f"groups must be at most the {vocab_size} rows of the table, it is {count}")
        budget, fixed = bit_budget(vocab_size, dim, itemsize, 0, widths, window)
        return fixed - (-(count * budget.block + budget.index(count)) // 8)

    @classmethod
    def _decompose(cls, problem: Problem[SharedBasisConfig]) -> Self:
        """Blocks, basis and coefficients within a budget, see `shared_basis.solver`.

        Without a metric all directions count the same, and rows by their counts.
        """
        config = problem.config
        metric = _metric_of(problem)
        return cls.solve(
            problem.weight,
            problem.max_bytes,
            metric,
            config.groups,
            config.refine_rounds,
            config.widths,
            config.window,
            advance=problem.advance,
        )

    @classmethod
    def _check_bytes(cls, weight: Rows, max_bytes: int, groups: Any, widths: tuple[int, ...], window: int) -> None:
        vocab_size, dim = weight.shape
        least = cls.least_bytes(vocab_size, dim, weight.element_size(), groups, widths, window)
        if max_bytes < least:
            count = groups if isinstance(groups, int) else 1
            raise ValueError(
                f"{max_bytes} bytes do not hold a table of {vocab_size} x {dim} in {count} blocks of a mean each, "
                f"which takes {least}; allow more bytes or use fewer groups"
            )

    def _refine(self, problem: Problem[SharedBasisConfig]) -> Self:
        """Solve again from the blocks as they are, and afresh, and take the better."""
        target, max_bytes, config, advance = problem.weight, problem.max_bytes, problem.config, problem.advance
        metric = _metric_of(problem)
        widths, window = config.widths, config.window
        now = self.block_of_row.to(target.device)
        arguments = (target, max_bytes, metric, config.groups, config.refine_rounds, widths, window)
        starts: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = [(None, None, None)]
        if max_bytes >= self.least_bytes(
            self.vocab_size, self.dim, target.element_size(), len(self.sizes), widths, window
        ):
            starts.append((now, None, None))
        # What there is stays only if the config and the budget still allow it.
        bits = self._bits()
        offered = {0, *(widths or (8 * target.dtype.itemsize,))}
        stays = self.is_coded == bool(widths) and self.window == window and set(bits.flatten().tolist()) <= offered
        if stays:
            starts.append((now, bits, self._read()[0].detach()))
        solved = [self.solve(*arguments, *one, lambda part: advance(part / len(starts))) for one in starts]
        losses = torch.tensor([one.loss_in(metric, target) for one in (*solved, self)], dtype=torch.float64)
        # Which one is taken must be the same in all processes.
        agree(losses)
        losses[torch.tensor([one.stored_bytes() > max_bytes for one in (*solved, self)])] = torch.inf
        losses[-1] = losses[-1] if stays else torch.inf
        best, kept = int(losses[:-1].argmin()), solved[-1]
        # Training may have done better than solving afresh does.
        if losses[-1] <= losses[:-1].min() and bool(losses[-1].isfinite()):
            return self
        if kept.spec() != self.spec() or not losses[-2].isfinite() or losses[best] < _CLEARLY * losses[-2:].min():
            return solved[best]
        if losses[-1] < losses[-2]:
            return self
        if not self.is_coded:
            # The signs of components are free: with those there were, the optimizer's state keeps its meaning.
            signs = torch.where((kept.basis * self.basis.to(kept.basis)).sum(dim=1) < 0, -1.0, 1.0).to(kept.basis)
            kept.basis.mul_(signs.unsqueeze(1))
            for coefficients in kept.coefficients:
                coefficients.mul_(signs[: coefficients.shape[1]])
        # In place: the optimizer goes on with the parameters it knows.
        self.load_state_dict(kept.state_dict())
        self.predicted_loss = kept.predicted_loss
        return self

    def _bits(self) -> Tensor:
        """`[blocks, rank]` bits of all components, 0 where they are dropped, those of a number for floats."""
        floats = 8 * self.dtype.itemsize
        rows = [[abs(bits) or floats for bits, count in runs for _ in range(count)] for runs in self.segments]
        padded = [row + [0] * (self.rank - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long).reshape(len(rows), self.rank)

    @classmethod
    @torch.no_grad()
    def solve(
        cls,
        weight: Tensor,
        max_bytes: int,
        metric: Metric,
        groups: Any,
        refine_rounds: int,
        widths: tuple[int, ...],
        window: int = 0,
        start: Tensor | None = None,
        keep: Tensor | None = None,
        basis: Tensor | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """Find blocks, basis, widths and coefficients.

        Args:
            weight: `[vocab_size, dim]` table.
            max_bytes: Most bytes that may be stored.
            metric: What an error costs.
            groups: See `SharedBasisConfig`.
            refine_rounds: See `SharedBasisConfig`.
            widths: Bits of a coefficient to choose from; none for floats.
            window: Bits of the windows of a trellis; 0 for none.
            start: `[vocab_size]` block of every row to begin with.
            keep: `[blocks, rank]` bits that are to stay what they are.
            basis: `[rank, dim]` the basis to begin with that goes with them.
            advance: Called with shares of the work that add up to 1.

        Raises:
            ValueError: If the bytes do not cover the means of the blocks.
        """
        if keep is None:
            cls._check_bytes(weight, max_bytes, groups, widths, window)
        solved = cls.outlined(
            weight,
            max_bytes,
            metric,
            groups,
            refine_rounds,
            widths,
            window,
            start,
            keep,
            basis,
            advance=lambda part: advance(0.8 * part),
        )
        solved._fill_all(weight, metric, lambda part: advance(0.2 * part))
        return solved

    @classmethod
    @torch.no_grad()
    def outlined(
        cls,
        weight: Rows,
        max_bytes: int,
        metric: Metric,
        groups: Any,
        refine_rounds: int,
        widths: tuple[int, ...],
        window: int = 0,
        start: Tensor | None = None,
        keep: Tensor | None = None,
        basis: Tensor | None = None,
        advance: Callable[[float], None] = lambda _: None,
        device: torch.device | None = None,
    ) -> Self:
        """As `solve`, but for the coefficients: on the meta device, if that is given, they take no memory."""
        vocab_size, dim = weight.shape
        budget, _ = bit_budget(vocab_size, dim, weight.element_size(), max_bytes, widths, window)
        count = groups if isinstance(groups, int) else None
        solution = shared_basis(weight, metric, budget, count, refine_rounds, start, keep, basis, advance)
        is_coded = bool(widths)
        segments = [segments_of(row, is_coded) for row in solution.bits.tolist()]
        sizes = torch.bincount(solution.block_of_row, minlength=len(segments)).tolist()
        rank = solution.bits.shape[1]
        structure = (vocab_size, dim, rank, sizes, segments, is_coded, weight.dtype, device or weight.device, window)
        # Of a table that is filled in its file rows are read from there.
        solved = cls(*structure, by_rows=is_coded and device is not None)
        solved.predicted_loss = solution.loss
        solved._index(solution.block_of_row, weight.device)
        solved.allocate_frame(weight.device)
        if not is_coded:
            solved.basis.copy_(solution.basis)
            solved.means.copy_(solution.means)
            return solved
        scales = torch.cat([row[:own] for row, own in zip(solution.scales, solved.ranks, strict=True)])
        solved.levels.copy_(torch.cat([solved.levels[:0].cpu(), *(solution.levels[bits] for bits in solved.widths)]))
        solved._store_frame(solution.basis, solution.means, scales)
        # Rounded logarithms may differ between processors.
        agree(solved.scale_codes)
        return solved

    @classmethod
    def outline(cls, problem: Problem[SharedBasisConfig]) -> Self:
        """See `Factorization.outline`."""
        weight, config = problem.weight, problem.config
        cls._check_bytes(weight, problem.max_bytes, config.groups, config.widths, config.window)
        arguments = (config.groups, config.refine_rounds, config.widths, config.window)
        return cls.outlined(
            weight,
            problem.max_bytes,
            _metric_of(problem),
            *arguments,
            advance=problem.advance,
            device=torch.device("meta"),
        )

    @torch.no_grad()
    def filling(self, problem: Problem[SharedBasisConfig]) -> Callable[[slice], None]:
        """See `Factorization.filling`."""
        self.find_places()
        weight, metric = problem.weight, _metric_of(problem)
        # As many projectors as take 256 MB, in float32.
        encode = self._encoder(weight, metric, kept=max(1, 2**26 // max(1, self.dim**2)))
        layout = self.layout

        def fill(window: slice) -> None:
            rows = weight[window]
            for block, place, ids in self.runs_of(window):
                for chunk in row_chunks(len(ids), self.dim):
                    values, start = encode(rows[ids[chunk] - window.start], block), place.start + chunk.start
                    if self.is_coded:
                        layout.put(self.packed_codes, block, start, values)
                    else:
                        self.coefficients[block].data[start : start + len(values)] = values

        return fill

    def _encoder(self, weight: Rows, metric: Metric, kept: int) -> Callable[[Tensor, int], Tensor]:
        """Gives the coefficients of rows of a block, in the basis and around the means as they are stored."""
        device, dtype = weight.device, compute_dtype(weight.dtype)
        basis, means, stored = self._read()
        projector_of = projectors(basis, metric, kept, dtype, device)
        levels = {bits: own.to(dtype) for bits, own in self._level_tables().items()} if self.is_coded else {}
        costs = (basis.double().cpu() @ metric.root).square().sum(dim=1).to(device)

        def encode(rows: Tensor, block: int) -> Tensor:
            projector = projector_of(self.ranks[block])
            values = rows.to(dtype) @ projector - means[block].to(dtype) @ projector
            if not self.is_coded:
                return values
            values /= stored[block].to(dtype).clamp(min=1e-30)
            own = costs[: self.ranks[block]] * stored[block].double().square()
            return nearest_codes(values, self.segments[block], levels, own, self.window)

        return encode

    def _fill_all(self, weight: Tensor, metric: Metric, advance: Callable[[float], None]) -> None:
        """Coefficients of all rows; processes share them."""
        encode = self._encoder(weight, metric, kept=1)
        # In place: the coefficients of all rows are as large as the result.
        found = self._block_codes() if self.is_coded else [one.detach() for one in self.coefficients]
        windows = row_windows(self.vocab_size, self.dim)
        # Block by block, of which each has a projector.
        parts = sorted((part for window in windows for part in self.runs_of(window)), key=lambda part: part[0])

        def compute(unit: int) -> None:
            block, place, ids = parts[unit]
            for chunk in row_chunks(len(ids), self.dim):
                values = encode(weight[ids[chunk]], block)
                found[block][place.start + chunk.start : place.start + chunk.stop] = values.to(found[block].dtype)
            advance(len(ids) / self.vocab_size)

        results = [[found[block][place]] for block, place, _ in parts]
        deal(results, [len(ids) * (1.0 + self.ranks[block]) for block, _, ids in parts], compute)
        if self.is_coded:
            self._packed(found, out=self.packed_codes)
        if self.window:
            self._unpack()


def _metric_of(problem: Problem[SharedBasisConfig]) -> Metric:
    return problem.metric or plain_metric(problem.weight, problem.token_counts, problem.config.unseen_weight)


def plain_metric(weight: Tensor, token_counts: Tensor | None, unseen_weight: float | None = None) -> Metric:
    """The metric where nothing is known of the loss: all directions count the same, and rows by their counts.

    Args:
        weight: `[vocab_size, dim]` table.
        token_counts: `[vocab_size]` how often every token occurs; None for equally often.
        unseen_weight: What the tokens that were not counted weigh together; None for what is expected of them.
    """
    counts = torch.zeros(weight.shape[0]) if token_counts is None else token_counts
    return Metric(torch.eye(weight.shape[1], dtype=torch.float64), smoothed_frequencies(counts.cpu(), unseen_weight))
