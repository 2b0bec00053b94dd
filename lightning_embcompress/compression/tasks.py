"""What is to become of which table: decided in one place, and refused before anything is solved or changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_embcompress.calibration.loss_metric import metric_of
from lightning_embcompress.calibration.special_tokens import KeepRows
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.weighing import check_counts, check_unseen_weight, kept_rows, protected
from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.methods.config import WIDTHS, MethodConfig, MetricConfig
from lightning_embcompress.methods.numerics.gram import row_weights
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.numerics.rate_allocation import RateCurve, allocate
from lightning_embcompress.methods.registry import Factorization, get_method
from lightning_embcompress.methods.shared_basis.config import SharedBasisConfig
from lightning_embcompress.methods.shared_basis.layout import bit_budget
from lightning_embcompress.methods.shared_basis.solver import rate_curve
from lightning_embcompress.methods.specs import padding_bytes
from lightning_embcompress.tables.finding import Table, check_finite, find_tables
from lightning_embcompress.utils.progress import progress_bar

# Equal groups by which the shares of tables are found; which number hardly changes them.
_GROUPS = 16

Tie: TypeAlias = Literal["keep", "untie", "auto"]
"""What becomes of a table that embedding and softmax share, see `compress`."""


@dataclass(frozen=True)
class Task:
    """A table to be solved.

    Attributes:
        table: With the weight that is to be approximated.
        config: Of the method.
        max_bytes: Most bytes that the factors may take.
        untied: Name of the table that it was a part of, if that is to become two.
        metric: What an error costs, where that is known.
        token_counts: `[vocab_size]` how often every token occurs.
        start: A factorization to refine instead of starting afresh.
    """

    table: Table
    config: MethodConfig
    max_bytes: int
    untied: str | None = None
    metric: Metric | None = None
    token_counts: Tensor | None = None
    start: Factorization[Any] | None = None

    @property
    def factorization(self) -> type[Factorization[Any]]:
        """The class that solves the table."""
        return get_method(self.config.method).factorization

    @property
    def padding_bytes(self) -> int:
        """Bytes that the rows of padding tokens take, which stay what they are."""
        return padding_bytes(self.table.padding, self.table.padding_rows)

    @property
    def smallest_bytes(self) -> int:
        """Fewest bytes that the table can be stored in."""
        itemsize = self.table.weight.element_size()
        smallest = self.factorization.smallest_bytes(*self.table.shape, itemsize, self.config.candidates[0])
        return smallest + self.padding_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of the table as it is; half of them where it becomes two."""
        return self.table.weight.nbytes // (1 if self.untied is None else 2)

    @property
    def weights(self) -> int:
        """Numbers of the table as it is; half of them where it becomes two."""
        return self.dense_bytes // self.table.weight.element_size()

    @property
    def trains(self) -> bool:
        """Whether the factors are to be trained."""
        return (self.table.weight if self.start is None else next(self.start.parameters())).requires_grad

    def weighed(self, model: nn.Module, statistics: Statistics) -> Task:
        """The task with the metric of the loss.

        Raises:
            ValueError: If the statistics are of another model or vocabulary.
        """
        unseen_weight = self.config.unseen_weight if isinstance(self.config, MetricConfig) else None
        metric = metric_of(model, self.table, statistics, self.token_counts, unseen_weight)
        return replace(self, metric=metric)

    def solve(self) -> Factorization[Any]:
        """Find the factors, with a progress bar: of several candidates those of the least predicted loss."""
        weight, start, configs = self.table.weight.detach(), self.start, self.config.candidates
        if start is not None and len(configs) > 1:
            configs = tuple(config for config in configs if config.method == start.provenance["method"])
        verb = "Compressing" if start is None else "Refining"
        best: Factorization[Any] | None = None
        with (
            torch.no_grad(),
            torch.autocast(weight.device.type, enabled=False),
            progress_bar(f"{verb} {self.table.name} {tuple(weight.shape)}", total=float(len(configs))) as advance,
        ):
            for config in configs:
                found = self._solve_by(config, weight, advance)
                if len(configs) > 1 and self.metric is not None:
                    found.predicted_loss = found.loss_in(self.metric, weight)
                if best is None or (found.predicted_loss or 0.0) < (best.predicted_loss or 0.0):
                    best = found
        assert best is not None
        return best.requires_grad_(self.trains)

    def _solve_by(self, config: MethodConfig, weight: Tensor, advance: Callable[[float], None]) -> Factorization[Any]:
        metric = self.metric if config.uses_metric else None
        if self.start is not None:
            found = self.start.refined(weight, self.max_bytes, self.token_counts, config, advance, metric)
        else:
            decompose, most = get_method(config.method).factorization.decompose, self.max_bytes - self.padding_bytes
            found = decompose(weight, most, self.token_counts, config, advance, metric)
            found.keep_padding(self.table.padding, self.table.padding_rows)
        found.provenance = {"method": config.method}
        return found

    def record(self, factorization: Factorization[Any]) -> None:
        """Note on a factorization how it was found and how far it is from the table."""
        weight = self.table.weight.detach()
        weights = row_weights(self.token_counts if self.config.needs_counts else None, weight.shape[0])
        factorization.provenance = {
            "method": factorization.provenance.get("method", self.config.method),
            "options": self.config.options,
            "weighted_error": factorization.weighted_error(weight, weights),
            # Of what is stored, rounding and all.
            "predicted_loss": None if self.metric is None else factorization.loss_in(self.metric, weight),
            "untied": self.untied,
        }


@dataclass(frozen=True)
class Tasks(Sequence[Task]):
    """All tables of a model that are to be solved.

    Attributes:
        tables: One task a table.
        statistics: Of the model, where errors are weighed by what the loss grows by.
        curves: What each table loses at which price, where all share a budget; empty otherwise.
        fixed: Bits of each that are there whatever is kept.
    """

    tables: tuple[Task, ...]
    statistics: Statistics | None = None
    curves: tuple[RateCurve, ...] = ()
    fixed: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Number of tables."""
        return len(self.tables)

    def __getitem__(self, index: Any) -> Any:
        """Tasks by their place."""
        return self.tables[index]

    @property
    def token_counts(self) -> Tensor | dict[str, Tensor] | None:
        """Counts of all tables, or by their names where they are not the same."""
        counts = {task.table.name: one for task in self if (one := task.token_counts) is not None}
        known = list(counts.values())
        same = all(one.shape == known[0].shape and torch.equal(one, known[0]) for one in known)
        return counts if not same else known[0] if known else None

    @property
    def max_bytes(self) -> int:
        """Most bytes of all tables together."""
        return sum(task.max_bytes for task in self)

    @property
    def bits_per_weight(self) -> float:
        """Most bits of all tables together, over their numbers."""
        return 8 * self.max_bytes / sum(task.weights for task in self)

    def counted(self, tables: Sequence[Table], counts: Sequence[Tensor | None]) -> Tasks:
        """The tasks with the counts of their tables; parts of one table have the same."""
        of = {id(table.weight): one for table, one in zip(tables, counts, strict=True)}
        known = tuple(replace(task, token_counts=of[id(task.table.weight)]) for task in self)
        return replace(self, tables=known)

    def within(self, max_bytes: int) -> Tasks:
        """The tasks with the bytes of all tables shared so that the next byte is worth the same everywhere."""
        if len(self) == 1:
            return replace(self, tables=(replace(self.tables[0], max_bytes=max_bytes),))
        found = allocate(self.curves, 8 * max_bytes - sum(self.fixed))
        taken = [rates.bits + fixed for rates, fixed in zip(found, self.fixed, strict=True)]
        smallest = [task.smallest_bytes for task in self]
        spare = max(0, max_bytes - sum(smallest))
        wanted = [max(0, bits // 8 - least) for bits, least in zip(taken, smallest, strict=True)]
        # What is left over goes to all in proportion: no table is below the smallest that it can be.
        part = spare / sum(wanted) if sum(wanted) else 0.0
        dense = [task.table.weight.nbytes for task in self]
        sizes = [min(least + int(part * more), full) for least, more, full in zip(smallest, wanted, dense, strict=True)]
        sized = tuple(replace(task, max_bytes=size) for task, size in zip(self, sizes, strict=True))
        return replace(self, tables=sized)

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


def plan(
    model: nn.Module,
    config: MethodConfig,
    budget: Budget | None,
    tables: str | Sequence[str] = "auto",
    tie: Tie = "keep",
    *,
    statistics: Statistics | None = None,
    token_counts: Any = None,
    keep_rows: KeepRows = None,
    is_preview: bool = False,
) -> Tasks:
    """Decide what becomes of which table, and refuse what cannot be reached, before anything is solved or changed.

    With statistics and a method that uses them errors are weighed by what the loss grows by, and all tables share one
    budget; then `divided` lets processes share the work of planning.

    Args:
        model: The model.
        config: Of the method.
        budget: How small the tables are to become; None where the config says it. If it is searched for, the tasks are
            to be solved by `search`.
        tables: See `find_tables`.
        tie: What becomes of a table that embedding and softmax share, see `compress`.
        statistics: Of the model.
        token_counts: `[vocab_size]` how often every token occurs, where there are no statistics that say it; of several
            vocabularies, by the paths of the tables.
        keep_rows: Ids that are counted at least as often as a common word, in all tables or by the paths of some;
            special tokens of models of transformers are anyway.
        is_preview: Whether statistics and counts are still to come, so that only sizes are decided.

    Raises:
        ValueError: If the tables, the budget, the counts or the statistics cannot be used; the table, the value and the
            nearest that can be reached are named.
    """
    if tie not in get_args(Tie):
        raise ValueError(f"tie must be one of {', '.join(map(repr, get_args(Tie)))}, it is {tie!r}")
    takes_statistics = statistics is not None and (token_counts is None or config.uses_metric)
    counted = statistics if takes_statistics else None
    if not config.uses_metric:
        statistics = None
    if config.needs_metric and statistics is None and not is_preview:
        raise ValueError(
            f"method={config.method!r} minimises what the loss grows by, and has to know what errors cost: give "
            "statistics=collect_statistics(model, batches), or name one method"
        )
    if statistics is None and not is_preview:
        check_unseen_weight(config)
    found = find_tables(model, tables)
    ways: tuple[Tie, ...] = ("keep", "untie") if tie == "auto" and statistics is not None else (tie,)
    tasks = Tasks(_sized(model, found, config, budget, ways[0]), statistics)
    kept = kept_rows(found, config, keep_rows)
    counts: list[Tensor | None] = [None] * len(found)
    if not is_preview:
        if counted is not None:
            token_counts = {table.name: counted.counts_of(table.modules) for table in found}
        checked = check_counts(found, config, token_counts)
        for table in found:
            check_finite(table)
        counts = [protected(model, *one) for one in zip(found, checked, kept, strict=True)]
        tasks = tasks.counted(found, counts)
    if statistics is None:
        return tasks
    is_searched = budget is not None and budget.is_searched
    # Nothing is shared where the config says how large each is, or one table has it all.
    if not is_searched and (config.fixes_size or (len(tasks) == 1 and len(ways) == 1)):
        return replace(tasks, tables=tuple(task.weighed(model, statistics) for task in tasks))
    best = share(model, tasks, statistics)
    if len(ways) > 1:
        untied = _sized(model, found, config, budget, "untie")
        if len(untied) > len(tasks):
            other = share(model, Tasks(untied, statistics).counted(found, counts), statistics)
            best = min(best, other, key=lambda one: one.loss_at(one.max_bytes))
    return best if is_searched else best.within(best.max_bytes)


def share(model: nn.Module, tasks: Tasks, statistics: Statistics) -> Tasks:
    """Give tasks the metric of the loss, and see what each table is worth.

    Raises:
        ValueError: If the statistics are of another model or vocabulary.
    """
    known, curves, fixed = [], [], []
    with progress_bar("Sharing the budget", total=float(len(tasks))) as advance:
        for task in (one.weighed(model, statistics) for one in tasks):
            vocab_size, dim = task.table.shape
            blocks = min(_GROUPS, vocab_size)
            # Of floats only ranks are to be decided, not bits.
            widths = () if task.config.keeps_floats else WIDTHS
            window = task.config.window if isinstance(task.config, SharedBasisConfig) else 0
            bits, always = bit_budget(vocab_size, dim, task.table.weight.element_size(), 0, widths, window)
            assert task.metric is not None
            known.append(task)
            curves.append(rate_curve(task.table.weight.detach(), task.metric, bits, blocks))
            fixed.append(8 * (always + task.padding_bytes) + blocks * bits.block + bits.index(blocks))
            advance(1.0)
    return Tasks(tuple(known), statistics, tuple(curves), tuple(fixed))


def _sized(
    model: nn.Module, tables: Sequence[Table], config: MethodConfig, budget: Budget | None, tie: Tie
) -> tuple[Task, ...]:
    """Tasks with their bytes."""
    total = sum(table.weight.nbytes for table in tables)
    tasks = []
    for table in tables:
        parts = _untied(model, table) if tie == "untie" else [table]
        for part in parts:
            # The bytes of a table that becomes two are shared between them.
            task = Task(part, config, 0, table.name if len(parts) > 1 else None)
            smallest, dense = task.smallest_bytes, task.dense_bytes
            weights = table.weight.numel() // len(parts)
            most = smallest if budget is None else budget.bytes_of(dense, weights, total)
            if budget is not None and most >= dense:
                name, value = next(iter(budget.given.items()))
                raise ValueError(
                    f"{name} {value!r} is not below the {total / 1e6:.3f} MB that the tables "
                    f"{', '.join(repr(one.name) for one in tables)} have now: nothing to compress"
                )
            if smallest > most:
                ratio = (budget and budget.ratio) or dense / max(1, most)
                # Rounded down, so that it can be asked for.
                least = f"{math.floor(100 * dense / smallest) / 100}x, {8 * smallest / weights:.3g} bits per weight"
                raise ValueError(
                    f"table {table.name!r} {table.shape} cannot be stored in {most} bytes ({ratio:.4g}x) by "
                    f"{config.method!r} with these options: the smallest it can be is {smallest} bytes "
                    f"({least}); ask for less, or use other options or another method"
                )
            if smallest >= dense:
                raise ValueError(
                    f"table {table.name!r} {table.shape} would take {smallest} bytes by {config.method!r} with these "
                    f"options, not less than the {dense} bytes it has now: nothing to compress; ask for smaller factors"
                )
            tasks.append(replace(task, max_bytes=most))
    return tuple(tasks)


def _untied(model: nn.Module, table: Table) -> list[Table]:
    """A table by the two ways in which it is read, or as it is where there is only one."""
    embeddings = tuple(path for path in table.modules if isinstance(model.get_submodule(path), AnyEmbedding))
    others = tuple(path for path in table.modules if path not in embeddings)
    parts = Table(embeddings, table.weight, table.padding), Table(others, table.weight)
    return [part for part in parts if part.modules]
