"""The callback that compresses tables while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_embcompress.calibration.loss_metric import add_to_biases, corrections_of
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.callbacks.arguments import doc_of, init_of
from lightning_embcompress.callbacks.checks import (
    Turn,
    check_copies,
    check_gradients,
    check_optimizers,
    check_order,
    check_references,
    is_fast_dev_run,
    settings_of,
    warn_of_other_settings,
)
from lightning_embcompress.callbacks.monitors import restart_comparisons, warn_of_early_end
from lightning_embcompress.callbacks.replacing import make_dense, replace_in_training, uninterrupted
from lightning_embcompress.callbacks.reporting import (
    merged_perplexity,
    residual_folder,
    show_and_log,
    show_loss,
    show_perplexities,
)
from lightning_embcompress.callbacks.scheduled import ScheduledCallback, scheduled
from lightning_embcompress.callbacks.solving import (
    Done,
    Files,
    check_residuals,
    keep_tables,
    put_refined,
    search_in_training,
    solve_again,
)
from lightning_embcompress.callbacks.spawning import check_ties
from lightning_embcompress.callbacks.weighing import Weighing
from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.compression.report import show_tasks
from lightning_embcompress.compression.solution import solve
from lightning_embcompress.compression.tasks import Tie, plan
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.registry import DEFAULT_METHOD, get_config
from lightning_embcompress.tables.finding import Table, find_tables, large_and_dense
from lightning_embcompress.tables.replacement import put_back
from lightning_embcompress.utils.division import divided, failing_together
from lightning_embcompress.utils.progress import say_line


class EmbeddingCompression(ScheduledCallback):
    """Compress the embedding and softmax tables of a model at the start of an epoch, and refine them at later ones.

    Tables are replaced in place, the optimizer goes on with the factors, and checkpoints record the structure, so
    that `ckpt_path` works from before and after the compression. Perplexity on the validation data is measured before
    and after every step, shown, logged to every logger, and written to `report.json` in the run's folder.

    Methods that can (those whose config says `uses_metric`) weigh errors by what the loss grows by: statistics of the
    model are collected from some batches of the training data right before the tables are solved, all tables share one
    budget, and biases of heads make up for the mean error of their logits. Where that cannot be done rows are weighted
    by the frequency of their tokens alone; the log says so.

    A compressed model is compared with itself only: the best scores of `ModelCheckpoint`, the patience of
    `EarlyStopping` and `ReduceLROnPlateau` begin anew when the tables are compressed, and checkpoints that were the
    best ones before stay on disk. Before the first step the steps of the module are called once with compressed layers
    that store the tables as they are: what they cannot do is refused then.

    Under DDP the processes share the work of solving, and hold the same factors afterwards. Several callbacks may
    compress different tables, or the same ones one after the other, each time from the table as it is then; one of
    method, `at_epoch` and `tables` has to differ, by which checkpoints tell them apart.

    Checkpoints keep the random state of all processes, so that a resumed run goes on as the uninterrupted one would
    have: from anywhere with the data modules of this package and other loaders with a `state_dict`, with plain loaders
    from the end of an epoch.

    Epochs count from 0; what is due at an epoch happens before its first step. With `fast_dev_run`, whose only epoch
    is the first, everything happens there.

    Args:
        method: Config of a method or its name, such as `group_reduce`; `auto` for the one of the least predicted loss,
            for every table.
        ratio: Dense bytes over stored bytes, `6` or `6x`, for every table; of all tables together where errors are
            weighed by what the loss grows by. Some methods have an option instead, as `max_rank` of `tensor_train`.
        size: Instead of a ratio, bytes of all tables together: `80MB` (MB = 10⁶ bytes).
        bits_per_weight: Instead of a ratio, stored bits over the numbers of the dense tables: 4 is 8x of float32.
        max_perplexity_increase: Instead of a size, the most that the perplexity on the validation data may grow by when
            the tables are compressed, `1%` or `0.01`: the smallest tables within it are searched for.
        at_epoch: Epoch at whose start the tables are compressed; 0 is before the first step.
        refine_at_epochs: Later epochs at whose start they are solved again, for the table as training has moved it
            plus what the last solution left out of it. That residual is kept in the run's folder, as large as the
            dense tables, and may be deleted when the run will not be resumed any more.
        tables: `auto`, or the names of the modules, see `lightning_embcompress.tables.finding.find_tables`.
        keep_reference: Folder in which the dense tables are kept when they are compressed, for
            `lightning_embcompress.compression.reference.open_reference`; residuals are then kept after the last
            refinement too, so that a resumed run may refine at further epochs.
        tie: What becomes of a table that embedding and softmax share: `keep` one set of factors for both, `untie` into
            two of half the bytes each, or `auto`, see `lightning_embcompress.compress`.
        monitor: Name of a loss that validation logs, in nats per token, to measure the perplexity by. By default the
            only one with "loss" in its name.
        token_counts: `[vocab_size]` how often every token occurs in the training data. By default they are the data
            module's `token_counts`, or counted by one pass over the training data, without padding; needed where that
            never ends. Of tables with vocabularies of their own, such counts by the paths of the tables.
        keep_rows: Ids of tokens that are to be kept finely however seldom they occur, see
            `lightning_embcompress.compress`; special tokens of models of transformers are anyway.
        statistics: Of the model, or the file that `Statistics.save` has written; with token counts of their own. By
            default they are collected.
        statistics_batches: Batches of training data, in each process, from which they are collected; 0 for none: then
            rows are weighted by frequency alone.
        refresh_statistics: Whether they are collected anew before every refinement.
        **options: Fields of the config, where the method is given by its name (in YAML under `dict_kwargs`; the
            callbacks `GroupReduce`, `SharedBasis`, `TransformCoding` and `TensorTrain` have them as arguments).

    Raises:
        ValueError: If an argument is out of its range; when training starts, if the tables, the ratio or the epochs
            cannot be used. Nothing is changed then.

    Example:
        >>> callback = EmbeddingCompression("low_rank", ratio=4, at_epoch=2, refine_at_epochs=[3])
    """

    def __init__(
        self,
        method: MethodConfig | str = DEFAULT_METHOD,
        *,
        ratio: float | str | None = None,
        size: str | int | None = None,
        bits_per_weight: float | None = None,
        max_perplexity_increase: str | float | None = None,
        at_epoch: int = 0,
        refine_at_epochs: Sequence[int] = (),
        tables: str | list[str] = "auto",
        tie: Tie = "keep",
        monitor: str | None = None,
        token_counts: list[int] | dict[str, list[int]] | Tensor | None = None,
        keep_rows: list[int] | dict[str, list[int]] | None = None,
        statistics: Statistics | str | Path | None = None,
        statistics_batches: int = 200,
        refresh_statistics: bool = False,
        keep_reference: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Check what can be checked without a model."""
        super().__init__(at_epoch, monitor)
        self.config = get_config(method, **options)
        self.budget = Budget.of(
            self.config,
            ratio=ratio,
            size=size,
            bits_per_weight=bits_per_weight,
            max_perplexity_increase=max_perplexity_increase,
        )
        self._weighing = Weighing(
            self.config, self.budget, token_counts, statistics, statistics_batches, refresh_statistics
        )
        if isinstance(refine_at_epochs, int):
            raise ValueError(f"refine_at_epochs must be a list of epochs such as [3, 4], it is {refine_at_epochs}")
        if early := [epoch for epoch in refine_at_epochs if epoch <= at_epoch]:
            raise ValueError(
                f"refine_at_epochs {list(refine_at_epochs)} must all come after at_epoch={at_epoch}; {early[0]} does "
                "not: there is nothing to refine before the tables are compressed"
            )
        self.refine_at_epochs = sorted(set(refine_at_epochs))
        self.tables, self.tie, self.keep_rows = tables, tie, keep_rows
        self.keep_reference = None if keep_reference is None else Path(keep_reference)
        self._done = Done()

    def __init_subclass__(cls, config: type[MethodConfig] | None = None, **arguments: Any) -> None:
        """Give the callback of a method the fields of its config as arguments, in place of `method` and `options`."""
        super().__init_subclass__(**arguments)
        if config is not None:
            cls.__init__ = init_of(EmbeddingCompression, config)  # type: ignore[method-assign]
            cls.__doc__ = doc_of(cls, EmbeddingCompression, config)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(method=self.config.method, at_epoch=self.at_epoch, tables=self.tables)

    @override
    def former_keys(self) -> list[str]:
        if not self.config.formerly:
            return []
        former = self._generate_state_key(method=self.config.formerly, at_epoch=self.at_epoch, tables=self.tables)
        arguments = former.removeprefix(type(self).__qualname__)
        classes: list[type] = [EmbeddingCompression, *EmbeddingCompression.__subclasses__()]
        return [f"{cls.__qualname__}{arguments}" for cls in classes]

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._done.to_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = Done.from_dict(state_dict)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check tables and budget before the first step, show what will be done, and go on with the random state."""
        check_optimizers(trainer, type(self).__name__)
        self._folder = residual_folder(trainer, bool(self.refine_at_epochs))
        there = plan_of(pl_module).tables
        if self._done.compressed and not there:
            # The callback was used for another model before.
            self._done = Done()
        by_others = any(callback._done.compressed for callback in compressing(trainer) if callback is not self)
        if self._done.compressed:
            if not set(self.refine_at_epochs) <= set(self._done.refined):
                check_residuals(pl_module, self._done.compressed, self.config, self._resumed_from)
            paths = [path for entry in self._done.compressed for path in entry["modules"]]
            check_copies(trainer, type(self).__name__, {path: pl_module.get_submodule(path) for path in paths})
            warn_of_other_settings(self._done.settings, self.config, self.budget)
        elif not (there and by_others):
            with failing_together():
                self._check_request(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    def _check_request(self, trainer: Trainer, module: LightningModule) -> None:
        there = plan_of(module).tables
        if there and self.tables == "auto":
            raise ValueError(
                f"the tables {', '.join(repr(table.name) for table in there)} are compressed already, and not by this "
                f"{type(self).__name__}: resume with the method, at_epoch and tables of the run that did it, remove "
                "the callback, restore them with densify(model), or name other modules as tables"
            )
        known: dict[str, Any] = {"keep_rows": self.keep_rows, "is_preview": True}
        tasks = plan(module, self.config, self.budget, self.tables, self.tie, **known)
        tables = [task.table for task in tasks]
        check_gradients(trainer, type(self).__name__, tables)
        layers = {path: module.get_submodule(path) for table in tables for path in table.modules}
        check_copies(trainer, type(self).__name__, layers)
        check_ties(trainer, type(self).__name__, self.tie, find_tables(module, self.tables))
        self._weighing.check(trainer, module, tasks)
        if len(compressing(trainer)) > 1:
            check_order([callback._turn(module) for callback in compressing(trainer) if not callback._done.compressed])
        if self.keep_reference is not None and not trainer.ckpt_path:
            check_references(self.keep_reference, tables)
        show_tasks(tasks, self.budget, self._weighing.by_loss(module))
        if self.tables == "auto":
            say_line(large_and_dense(module, tables))

    @override
    def tables_to_come(self, module: LightningModule) -> list[Table]:
        return [] if self._done.compressed or plan_of(module).tables else find_tables(module, self.tables)

    def _turn(self, module: LightningModule) -> Turn:
        paths = frozenset(path for table in find_tables(module, self.tables) for path in table.modules)
        return Turn(self.at_epoch, self.refine_at_epochs, paths, self.keep_reference)

    def _is_due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch
        if self._done.unmeasured is not None:
            return True
        if is_fast_dev_run(trainer):
            return not self._done.compressed or len(self._done.refined) < len(self.refine_at_epochs)
        if not self._done.compressed:
            return epoch >= self.at_epoch
        return any(due <= epoch and due not in self._done.refined for due in self.refine_at_epochs)

    def _do_due(self, trainer: Trainer, module: LightningModule) -> None:
        epoch = trainer.current_epoch
        # A trial run leaves nothing behind.
        reference = None if is_fast_dev_run(trainer) else self.keep_reference

        def files(at: int) -> Files:
            needed = any(later > at for later in self.refine_at_epochs) or reference is not None
            return Files(folder, writes, needed, self._resumed_from, reference)

        with ExitStack() as stack:
            # Drawn numbers would change what follows, and a resumed run does not draw them again.
            stack.enter_context(isolate_rng())
            if is_fast_dev_run(trainer):
                folder, writes = Path(stack.enter_context(TemporaryDirectory(prefix="embcompress-"))), True
            else:
                # One process of every machine writes: some share a file system, some do not.
                folder, writes = self._folder, trainer.local_rank == 0
            if self._done.unmeasured is not None:
                self._measure_change(trainer, module)
            if not self._done.compressed:
                self._compress(trainer, module, files(self.at_epoch))
            for due in self.refine_at_epochs:
                if due in self._done.refined:
                    continue
                if due == epoch or is_fast_dev_run(trainer):
                    self._refine(trainer, module, due, files(due))
                elif due < epoch:
                    rank_zero_warn(f"the refinement at epoch {due} is left out: training is at epoch {epoch} already")
                    self._done.refined.append(due)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final model and write the report."""
        if not self._done.compressed:
            warn_of_early_end(trainer, f"at_epoch={self.at_epoch}: nothing was compressed")
            return
        if missed := [due for due in self.refine_at_epochs if due not in self._done.refined]:
            warn_of_early_end(trainer, f"refine_at_epochs {missed}: the tables were not refined then")
        last = [callback for callback in compressing(trainer) if callback._done.compressed][-1]
        if last is not self:
            # It measures for all.
            return
        self._done.perplexity["final"] = self._measure(trainer, pl_module, "final")
        values = self._merged(trainer)
        self._write_report(trainer, pl_module, values)
        show_perplexities(values)

    def _compress(self, trainer: Trainer, module: LightningModule, files: Files) -> None:
        # Layers that another callback has compressed before.
        before = make_dense(module, self.tables)
        try:
            tables = find_tables(module, self.tables)
            paths = [path for table in tables for path in table.modules]
            counts = self._weighing.find_counts(trainer, module, tables)
            self._done.perplexity["dense"] = dense = self._measure(trainer, module, "dense")
            statistics = self._weighing.find_statistics(trainer, module, paths, counts)
            with divided():
                known = {"statistics": statistics, "token_counts": counts, "keep_rows": self.keep_rows}
                tasks = plan(module, self.config, self.budget, self.tables, self.tie, **known)
            if self.budget is not None and self.budget.is_searched:
                solution = search_in_training(trainer, module, tasks, self.budget, dense, self.monitor)
            else:
                solution = solve(tasks, together=True)
            entries = keep_tables(solution, trainer.current_epoch, files)
            corrections = corrections_of(module, solution.tables, statistics)
        except BaseException:
            put_back(module, before)
            raise
        chosen = {path for paths, _ in solution.tables for path in paths}
        with uninterrupted():
            put_back(module, {path: layer for path, layer in before.items() if path not in chosen})
            replaced = {path: layer for path, layer in before.items() if path in chosen}
            replace_in_training(trainer, module, solution.tables, replaced)
            add_to_biases(module, corrections)
            self._done.compressed = entries
            if files.keeps_residual:
                # Only a refinement reads them again.
                self._done.token_counts, self._done.statistics = tasks.token_counts, statistics
            self._done.unmeasured = "compressed"
            self._done.settings = settings_of(self.config, self.budget)
            restart_comparisons(trainer, "Compressed")
        self._measure_change(trainer, module)

    def _refine(self, trainer: Trainer, module: LightningModule, epoch: int, files: Files) -> None:
        statistics, counts = self._done.statistics, self._done.token_counts
        if statistics is not None and self._weighing.refresh_statistics:
            paths = [path for entry in self._done.compressed for path in entry["modules"]]
            statistics = self._weighing.collect(trainer, module, paths, counts)
        solved = solve_again(module, self._done.compressed, self.config, counts, epoch, files, statistics)
        tables = [(table.entry["modules"], table.factors) for table in solved]
        corrections = corrections_of(module, tables, statistics)
        with uninterrupted():
            put_refined(trainer, module, solved)
            add_to_biases(module, corrections)
            self._done.statistics = statistics if files.keeps_residual else None
            self._done.compressed = [table.entry for table in solved]
            self._done.refined.append(epoch)
            self._done.unmeasured = "refined"
        self._measure_change(trainer, module)

    def _measure_change(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure and show what was changed last."""
        name = str(self._done.unmeasured)
        value = self._measure(trainer, module, name)
        if name == "compressed":
            self._done.perplexity["compressed"] = value
            names = [entry["modules"][0] for entry in self._done.compressed]
            show_loss(trainer, module, names, self._done.perplexity["dense"], value)
        else:
            self._done.perplexity["refined"].append({"epoch": trainer.current_epoch, "value": value})
        self._done.unmeasured = None
        show_and_log(trainer, module, f"{name.capitalize()} at epoch {trainer.current_epoch}")
        self._write_report(trainer, module, self._merged(trainer))

    def _merged(self, trainer: Trainer) -> dict[str, Any]:
        return merged_perplexity(
            [callback._done.perplexity for callback in compressing(trainer) if callback._done.compressed]
        )


def compressing(trainer: Trainer) -> list[EmbeddingCompression]:
    """All callbacks that compress tables, in the order in which they do."""
    return [callback for callback in scheduled(trainer) if isinstance(callback, EmbeddingCompression)]
