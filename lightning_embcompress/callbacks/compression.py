"""The callback that compresses tables while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lightning_embcompress.budget import Request, Tie, check_budget, check_counts, plan_requests
from lightning_embcompress.callbacks.checks import check_optimizers, check_trainer, is_fast_dev_run
from lightning_embcompress.callbacks.continuation import Continuation, begin_epoch
from lightning_embcompress.callbacks.counting import counts_for, known_counts
from lightning_embcompress.callbacks.evaluation import validation_perplexity
from lightning_embcompress.callbacks.replacing import replace_in_training, uninterrupted
from lightning_embcompress.callbacks.reporting import check_folder, log, run_folder, show_and_log, write_run_report
from lightning_embcompress.callbacks.several import Turn, check_order, make_dense, merged_perplexity
from lightning_embcompress.callbacks.solving import Files, check_residuals, solve_again, solve_requests
from lightning_embcompress.checkpoint import keep_structure
from lightning_embcompress.checkpoint_io import use_atomic_checkpoints
from lightning_embcompress.distribution import failing_together
from lightning_embcompress.factorizations import get_method
from lightning_embcompress.factorizations.base import plain
from lightning_embcompress.files import remove_abandoned
from lightning_embcompress.plan import plan_of
from lightning_embcompress.reference import reference_file
from lightning_embcompress.report import show_requests
from lightning_embcompress.tables import put_back


class EmbeddingCompression(Callback):
    """Compress the embedding and softmax tables of a model at the start of an epoch, and refine them at later ones.

    Tables are replaced in place, the optimizer goes on with the factors, and checkpoints record the structure, so
    that `ckpt_path` works from before and after the compression. Perplexity on the validation data is measured before
    and after every step, shown, logged to every logger, and written to `report.json` in the run's folder.

    Under DDP the processes share the work of solving, and hold the same factors afterwards. Several callbacks may
    compress different tables, or the same ones one after the other, each time from the table as it is then. Checkpoints
    keep the random state of all processes, so that a resumed run goes on as the uninterrupted one would have: from
    anywhere with the data modules of this package and other loaders with a `state_dict`, with plain loaders from the
    end of an epoch.

    Epochs count from 0; what is due at an epoch happens before its first step. With `fast_dev_run`, whose only epoch
    is the first, everything happens there.

    Args:
        method: Name of a method, such as `group_reduce`.
        ratio: Dense bytes over stored bytes, for every table. Some methods have an option that takes its place, such as
            `max_rank` of `tensor_train`.
        size: Instead of a ratio, bytes of all tables together: `80MB` (MB = 10⁶ bytes).
        at_epoch: Epoch at whose start the tables are compressed; 0 is before the first step.
        refine_at_epochs: Later epochs at whose start they are solved again, for the table as training has moved it
            plus what the last solution left out of it. That residual is kept in the run's folder, as large as the
            dense tables, and may be deleted when the run will not be resumed any more.
        tables: `auto`, or the names of the modules, see `lightning_embcompress.tables.find_tables`.
        keep_reference: Folder in which the dense tables are kept when they are compressed, for
            `lightning_embcompress.open_reference`; residuals are then kept after the last refinement too, so that a
            resumed run may refine at further epochs.
        tie: What becomes of a table that embedding and softmax share: `keep` one set of factors for both, `untie` into
            two of half the bytes each, or `auto`, see `lightning_embcompress.compress`.
        monitor: Name of a loss that validation logs, in nats per token, to measure the perplexity by. By default the
            cross-entropy over the vocabulary that `validation_step` computes is used.
        token_counts: `[vocab_size]` how often every token occurs in the training data. By default they are the data
            module's `token_counts`, or counted by one pass over the training data; needed where that never ends.
        **options: Options of the method (in YAML under `dict_kwargs`).

    Raises:
        ValueError: If an argument is out of its range; when training starts, if the tables, the ratio or the epochs
            cannot be used. Nothing is changed then.

    Example:
        >>> callback = EmbeddingCompression("low_rank", ratio=4, at_epoch=2, refine_at_epochs=[3])
    """

    def __init__(
        self,
        method: str,
        *,
        ratio: float | None = None,
        size: str | int | None = None,
        at_epoch: int = 0,
        refine_at_epochs: Sequence[int] = (),
        tables: str | list[str] = "auto",
        tie: Tie = "keep",
        monitor: str | None = None,
        token_counts: list[int] | Tensor | None = None,
        keep_reference: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Check what can be checked without a model."""
        check_budget(ratio, size, get_method(method).options(**options))
        if at_epoch < 0:
            raise ValueError(f"at_epoch must be 0 or more, it is {at_epoch}")
        if early := [epoch for epoch in refine_at_epochs if epoch <= at_epoch]:
            raise ValueError(
                f"refine_at_epochs {list(refine_at_epochs)} must all come after at_epoch={at_epoch}; {early[0]} does "
                "not: there is nothing to refine before the tables are compressed"
            )
        self.method = method
        self.ratio = ratio
        self.size = size
        self.at_epoch = at_epoch
        self.refine_at_epochs = sorted(set(refine_at_epochs))
        self.tables = tables
        self.tie = tie
        self.monitor = monitor
        self.token_counts = token_counts
        self.keep_reference = None if keep_reference is None else Path(keep_reference)
        self.options = options
        self._continuation = Continuation()
        self._start_anew()

    def _start_anew(self) -> None:
        self._compressed: list[dict[str, Any]] = []
        self._refined: list[int] = []
        self._counts: Tensor | None = None
        self._resumed_from: str | None = None
        # What was changed last and not measured yet: an interruption may come in between.
        self._unmeasured: str | None = None
        self._settings: dict[str, Any] | None = None
        self._perplexity: dict[str, Any] = {
            "dense": None,
            "compressed": None,
            "refined": [],
            "final": None,
            "split": "validation",
        }

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(method=self.method, at_epoch=self.at_epoch, tables=self.tables)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = {
            "compressed": self._compressed,
            "refined": self._refined,
            "token_counts": self._counts,
            "perplexity": self._perplexity,
            "unmeasured": self._unmeasured,
            "settings": self._settings,
        }
        return deepcopy(state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = deepcopy(state_dict)
        self._compressed = state_dict["compressed"]
        self._refined = state_dict["refined"]
        self._counts = state_dict["token_counts"]
        self._perplexity = state_dict["perplexity"]
        # Of older checkpoints these are missing.
        self._unmeasured = state_dict.get("unmeasured")
        self._settings = state_dict.get("settings")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning leaves out: the random state of all processes, above all."""
        if self._leads(trainer):
            self._continuation.on_save_checkpoint(trainer, checkpoint)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where training goes on from."""
        if self._leads(trainer):
            self._continuation.on_load_checkpoint(checkpoint)
        self._resumed_from = None if trainer.ckpt_path is None else str(trainer.ckpt_path)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the structure in checkpoints, and refuse what cannot work with this Trainer."""
        keep_structure(pl_module)
        use_atomic_checkpoints(trainer)
        self._continuation = Continuation()
        if stage == "fit":
            check_trainer(trainer, type(self).__name__, self.at_epoch, self.refine_at_epochs)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check tables and budget before the first step, show what will be done, and go on with the random state."""
        check_optimizers(trainer, type(self).__name__)
        check_folder(trainer, bool(self.refine_at_epochs))
        # A folder of its own: no other run, and none that is resumed from the same checkpoint, writes there.
        name = trainer.strategy.broadcast(uuid4().hex[:12])
        self._folder = (run_folder(trainer) / "residuals" / name).absolute()
        if trainer.local_rank == 0:
            remove_abandoned(self._folder.parent)
        there = plan_of(pl_module).tables
        if self._compressed and not there:
            # The callback was used for another model before.
            self._start_anew()
        by_others = any(callback._compressed for callback in _compressing(trainer) if callback is not self)
        if self._compressed:
            if not set(self.refine_at_epochs) <= set(self._refined):
                check_residuals(pl_module, self._compressed, self._resumed_from)
            self._warn_of_other_settings()
        elif not (there and by_others):
            with failing_together():
                self._check_request(trainer, pl_module)
        if self._leads(trainer):
            self._continuation.on_fit_start(trainer)

    def _check_request(self, trainer: Trainer, module: LightningModule) -> None:
        there = plan_of(module).tables
        if there and self.tables == "auto":
            raise ValueError(
                f"the tables {', '.join(repr(table.name) for table in there)} are compressed already, and not by this "
                f"{type(self).__name__}: resume with the method, at_epoch and tables of the run that did it, remove "
                "the callback, restore them with densify(model), or name other modules as tables"
            )
        requests = self._requests(module)
        if len(_compressing(trainer)) > 1:
            check_order([callback._turn(module) for callback in _compressing(trainer) if not callback._compressed])
        given = known_counts(trainer, requests, self.token_counts)
        if given is not None:
            check_counts(given, requests)
        for request in requests:
            kept = self.keep_reference and reference_file(self.keep_reference, request.table.name)
            if kept and kept.exists() and not trainer.ckpt_path:
                raise ValueError(
                    f"keep_reference: {str(kept)!r} is there already, from another run, and would be lost: name "
                    "another folder, or remove it"
                )
        show_requests(requests)

    def _warn_of_other_settings(self) -> None:
        if self._settings is not None and self._settings != self._own_settings():
            rank_zero_warn(
                f"the tables were compressed with {self._settings}, and stay as they are: {self._own_settings()} comes "
                "too late. Resume from before the compression, or add a callback that compresses them again"
            )

    def _own_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = plain({"ratio": self.ratio, "size": self.size, **self.options})
        return settings

    def _leads(self, trainer: Trainer) -> bool:
        """Whether this is the callback that does for all of them what is to be done once."""
        return next(c for c in trainer.callbacks if isinstance(c, EmbeddingCompression)) is self  # type: ignore[attr-defined]

    def _turn(self, module: LightningModule) -> Turn:
        paths = frozenset(path for request in self._requests(module) for path in request.table.modules)
        return Turn(self.at_epoch, self.refine_at_epochs, paths, self.keep_reference)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for what came after the checkpoint was written."""
        if self._leads(trainer):
            self._continuation.on_train_start(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for what is left out at the end of an epoch that was resumed."""
        if self._leads(trainer):
            self._continuation.on_train_epoch_end(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is due at this epoch."""
        if self._leads(trainer) and any(callback._is_due(trainer) for callback in _compressing(trainer)):
            begin_epoch(trainer)
            self._do_all_due(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do what is due, after a checkpoint that was saved between the last step of an epoch and its end.

        Lightning leaves `on_train_epoch_start` of the next epoch out when it resumes from there.
        """
        self._continuation.on_train_batch_start()
        if batch_idx == 0 and self._leads(trainer):
            self._do_all_due(trainer, pl_module)

    @staticmethod
    def _do_all_due(trainer: Trainer, module: LightningModule) -> None:
        # In the order of their epochs, however they are listed: all may be due at once, in a trial run for one.
        for callback in _compressing(trainer):
            if callback._is_due(trainer):
                callback._do_due(trainer, module)

    def _is_due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch
        if self._unmeasured is not None:
            return True
        if is_fast_dev_run(trainer):
            return not self._compressed or len(self._refined) < len(self.refine_at_epochs)
        if not self._compressed:
            return epoch >= self.at_epoch
        return any(due <= epoch and due not in self._refined for due in self.refine_at_epochs)

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
            if self._unmeasured is not None:
                self._measure_change(trainer, module)
            if not self._compressed:
                self._compress(trainer, module, files(self.at_epoch))
            for due in self.refine_at_epochs:
                if due in self._refined:
                    continue
                if due == epoch or is_fast_dev_run(trainer):
                    self._refine(trainer, module, due, files(due))
                elif due < epoch:
                    rank_zero_warn(f"the refinement at epoch {due} is left out: training is at epoch {epoch} already")
                    self._refined.append(due)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final model and write the report."""
        if not self._compressed:
            rank_zero_warn(
                f"training ended at epoch {trainer.current_epoch}, before at_epoch={self.at_epoch}: "
                "nothing was compressed"
            )
            return
        last = [callback for callback in _compressing(trainer) if callback._compressed][-1]
        if last is not self:
            # It measures for all.
            return
        self._perplexity["final"] = self._measure(trainer, pl_module, "final")
        values = self._merged(trainer)
        write_run_report(trainer, pl_module, values)
        steps = [("dense", values["dense"]), ("compressed", values["compressed"])]
        steps += [(f"refined at epoch {entry['epoch']}", entry["value"]) for entry in values["refined"]]
        steps.append(("final", values["final"]))
        if shown := ", ".join(f"{name} {value:.2f}" for name, value in steps if value is not None):
            rank_zero_info(f"Validation perplexity: {shown}")

    def _requests(self, module: nn.Module) -> list[Request]:
        return plan_requests(module, self.method, self.ratio, self.size, self.tables, self.tie, **self.options)

    def _compress(self, trainer: Trainer, module: LightningModule, files: Files) -> None:
        # Layers that another callback has compressed before.
        before = make_dense(module, self.tables)
        try:
            requests = self._requests(module)
            counts = counts_for(trainer, module, requests, self.token_counts)
            self._perplexity["dense"] = self._measure(trainer, module, "dense", requests)
            solved = solve_requests(requests, counts, trainer.current_epoch, files)
        except BaseException:
            put_back(module, before)
            raise
        chosen = {path for table in solved for path in table.entry["modules"]}
        with uninterrupted():
            put_back(module, {path: layer for path, layer in before.items() if path not in chosen})
            known = {path: layer for path, layer in before.items() if path in chosen}
            replace_in_training(trainer, module, [(table.entry["modules"], table.factors) for table in solved], known)
            self._compressed = [table.entry for table in solved]
            # Only a refinement reads them again.
            self._counts = counts if files.keeps_residual else None
            self._unmeasured = "compressed"
            self._settings = self._own_settings()
        self._measure_change(trainer, module)

    def _refine(self, trainer: Trainer, module: LightningModule, epoch: int, files: Files) -> None:
        solved = solve_again(module, self._compressed, self.method, self.options, self._counts, epoch, files)
        with uninterrupted():
            for table in solved:
                if table.in_place_of is None:
                    replace_in_training(trainer, module, [(table.entry["modules"], table.factors)])
                    continue
                # The optimizer goes on with the parameters it knows.
                table.in_place_of.load_state_dict(table.factors.state_dict())
                table.in_place_of.provenance = table.factors.provenance
            self._compressed = [table.entry for table in solved]
            self._refined.append(epoch)
            self._unmeasured = "refined"
        self._measure_change(trainer, module)

    def _measure_change(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure and show what was changed last."""
        name = str(self._unmeasured)
        value = self._measure(trainer, module, name)
        if name == "compressed":
            self._perplexity["compressed"] = value
        else:
            self._perplexity["refined"].append({"epoch": trainer.current_epoch, "value": value})
        self._unmeasured = None
        show_and_log(trainer, module, f"{name.capitalize()} at epoch {trainer.current_epoch}")
        write_run_report(trainer, module, self._merged(trainer))

    def _measure(
        self, trainer: Trainer, module: LightningModule, name: str, requests: Sequence[Request] = ()
    ) -> float | None:
        sizes = [request.table.shape[0] for request in requests] or [
            table.spec["vocab_size"] for table in plan_of(module).tables
        ]
        value = validation_perplexity(trainer, module, sizes, self.monitor, f"Perplexity, {name}")
        if value is not None:
            log(trainer, {f"perplexity_{name}": value})
        return value

    def _merged(self, trainer: Trainer) -> dict[str, Any]:
        return merged_perplexity([callback._perplexity for callback in _compressing(trainer) if callback._compressed])


def _compressing(trainer: Trainer) -> list[EmbeddingCompression]:
    """All callbacks that compress tables, in the order in which they do."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, EmbeddingCompression)]  # type: ignore[attr-defined]
    return sorted(found, key=lambda callback: callback.at_epoch)
