"""The callback that compresses tables while a model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_embcompress.budget import Request, Tie, check_budget, check_counts, plan_requests
from lightning_embcompress.callbacks.evaluation import stream_token_counts, validation_perplexity
from lightning_embcompress.callbacks.optimizer import splice
from lightning_embcompress.callbacks.residual import open_table, write_residual, write_target
from lightning_embcompress.checkpoint import attach
from lightning_embcompress.factorizations import Factorization, get_method
from lightning_embcompress.layers import CompressedLayer
from lightning_embcompress.plan import model_bytes, plan_of
from lightning_embcompress.report import show_plan, show_requests, write_report
from lightning_embcompress.tables import Table, check_finite, replace_table


class EmbeddingCompression(Callback):
    """Compress the embedding and softmax tables of a model at the start of an epoch, and refine them at later ones.

    Tables are replaced in place, the optimizer goes on with the factors, and checkpoints record the structure, so
    that `ckpt_path` works from before and after the compression. Perplexity on the validation data is measured before
    and after every step, shown, logged to every logger, and written to `report.json` in the run's folder.

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
        self.options = options
        self._start_anew()

    def _start_anew(self) -> None:
        self._compressed: list[dict[str, Any]] = []
        self._refined: list[int] = []
        self._counts: Tensor | None = None
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
        }
        return deepcopy(state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = deepcopy(state_dict)
        self._compressed = state_dict["compressed"]
        self._refined = state_dict["refined"]
        self._counts = state_dict["token_counts"]
        self._perplexity = state_dict["perplexity"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the structure in checkpoints, and refuse what cannot work with this Trainer."""
        attach(pl_module)
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"{type(self).__name__} trains on one device for now, the Trainer has {trainer.world_size}: use "
                "devices=1, or compress() before training"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            # EMAWeightAveraging is a WeightAveraging, which older versions of Lightning do not have.
            names = {cls.__name__ for cls in type(callback).__mro__}
            if isinstance(callback, StochasticWeightAveraging) or "WeightAveraging" in names:
                raise ValueError(
                    f"{type(callback).__name__} averages weights by shape and breaks when tables are replaced in the "
                    f"middle of training: remove it, or compress() the model before training instead of by "
                    f"{type(self).__name__}"
                )
        last = max([self.at_epoch, *self.refine_at_epochs])
        if trainer.max_epochs not in (None, -1) and last >= trainer.max_epochs and not _fast_dev_run(trainer):
            name = "refine_at_epochs" if self.refine_at_epochs else "at_epoch"
            raise ValueError(
                f"{name} asks for epoch {last}, but max_epochs={trainer.max_epochs} ends before it (epochs count from "
                f"0): train for at least {last + 1} epochs or choose an earlier one"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check tables and budget before the first step, and show what will be done."""
        there = plan_of(pl_module).tables
        if self._compressed and not there:
            # The callback was used for another model before.
            self._start_anew()
        if self._compressed:
            self._check_residuals(pl_module)
            return
        if there and self.tables == "auto":
            raise ValueError(
                f"the tables {', '.join(repr(table.name) for table in there)} are compressed already, and not by this "
                f"{type(self).__name__}: resume with the method, at_epoch and tables of the run that did it, remove "
                "the callback, restore them with densify(model), or name other modules as tables"
            )
        requests = self._requests(pl_module)
        given = self._known_counts(trainer, requests)
        if given is not None:
            check_counts(given, requests)
        show_requests(requests)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is due at this epoch."""
        if not _fast_dev_run(trainer):
            self._do_due(trainer, pl_module, (self._folder(trainer) / "residuals").absolute())
            return
        with TemporaryDirectory(prefix="embcompress-") as folder:
            self._do_due(trainer, pl_module, Path(folder))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do what is due, after a checkpoint that was saved between the last step of an epoch and its end.

        Lightning leaves `on_train_epoch_start` of the next epoch out when it resumes from there.
        """
        if batch_idx == 0:
            self.on_train_epoch_start(trainer, pl_module)

    def _do_due(self, trainer: Trainer, module: LightningModule, residuals: Path) -> None:
        epoch = trainer.current_epoch
        everything = _fast_dev_run(trainer)
        if not self._compressed and (epoch >= self.at_epoch or everything):
            self._compress(trainer, module, residuals)
        for due in self.refine_at_epochs:
            if not self._compressed or due in self._refined:
                continue
            if due == epoch or everything:
                self._refine(trainer, module, due, residuals)
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
        self._perplexity["final"] = self._measure(trainer, pl_module, "final")
        self._write_report(trainer, pl_module)
        values = self._perplexity
        steps = [("dense", values["dense"]), ("compressed", values["compressed"])]
        steps += [(f"refined at epoch {entry['epoch']}", entry["value"]) for entry in values["refined"]]
        steps.append(("final", values["final"]))
        if shown := ", ".join(f"{name} {value:.2f}" for name, value in steps if value is not None):
            rank_zero_info(f"Validation perplexity: {shown}")

    def _requests(self, module: nn.Module) -> list[Request]:
        return plan_requests(module, self.method, self.ratio, self.size, self.tables, self.tie, **self.options)

    def _known_counts(self, trainer: Trainer, requests: Sequence[Request]) -> Any:
        # Data modules may count a corpus only when they are asked: not for a method that does not need it.
        if self.token_counts is not None or not get_method(self.method).needs_counts:
            return self.token_counts
        counts = getattr(trainer.datamodule, "token_counts", None)  # type: ignore[attr-defined]
        rows = min(request.table.shape[0] for request in requests)
        if counts is not None and len(counts) < rows:
            # Tables are often padded to a round number of rows; no token of the data is in those.
            counts = nn.functional.pad(torch.as_tensor(counts), (0, rows - len(counts)))
        return counts

    def _counts_for(self, trainer: Trainer, module: LightningModule, requests: Sequence[Request]) -> Tensor | None:
        """Token counts as they are known, or by a pass over the training data where a method needs them."""
        counts = self._known_counts(trainer, requests)
        if counts is None and get_method(self.method).needs_counts:
            layers = [module.get_submodule(path) for request in requests for path in request.table.modules]
            embedding = next((layer for layer in layers if isinstance(layer, nn.Embedding)), None)
            counts = stream_token_counts(trainer, module, embedding, requests[0].table.shape[0])
        return check_counts(counts, requests)

    def _compress(self, trainer: Trainer, module: LightningModule, residuals: Path) -> None:
        requests = self._requests(module)
        for request in requests:
            check_finite(request.table)
        counts = self._counts_for(trainer, module, requests)
        self._perplexity["dense"] = self._measure(trainer, module, "dense", requests)
        solved = []
        for request in requests:
            factors = request.solve(request.table.weight, counts)
            request.record(factors, request.table.weight, counts)
            entry: dict[str, Any] = {"modules": list(request.table.modules), "max_bytes": request.max_bytes}
            entry |= {"untied": request.untied, "residual": None, "checksum": None}
            if self.refine_at_epochs:
                path = residuals / f"{request.table.name}-epoch{trainer.current_epoch}.bin"
                entry["residual"] = str(path)
                entry["checksum"] = write_residual(path, request.table.weight, factors)
            solved.append((entry, factors))
        self._replace(trainer, module, [(entry["modules"], factors) for entry, factors in solved])
        self._compressed += [entry for entry, _ in solved]
        # Only a refinement reads them again.
        self._counts = counts if self.refine_at_epochs else None
        self._perplexity["compressed"] = self._measure(trainer, module, "compressed")
        self._show(trainer, module, f"Compressed at epoch {trainer.current_epoch}")

    def _refine(self, trainer: Trainer, module: LightningModule, epoch: int, residuals: Path) -> None:
        remaining = [later for later in self.refine_at_epochs if later > epoch]
        jobs = []
        for entry in self._compressed:
            factors = self._factorization(module, entry)
            jobs.append((entry, factors, open_table(self._residual(entry), factors, entry["checksum"])))
        targets = []
        for entry, factors, residual in jobs:
            path = residuals / f"{entry['modules'][0]}-epoch{epoch}.bin"
            target = write_target(path, residual, factors)
            # Before the first table is changed.
            check_finite(Table(tuple(entry["modules"]), target))
            targets.append((entry, factors, path, target))
        for entry, factors, path, target in targets:
            on_device = target.to(factors.device)
            table = Table(tuple(entry["modules"]), on_device)
            request = Request(table, self.method, self.options, entry["max_bytes"], entry["untied"])
            solved = request.solve(on_device, self._counts, start=factors)
            request.record(solved, on_device, self._counts)
            if solved is not factors:
                self._replace(trainer, module, [(entry["modules"], solved)])
            if remaining:
                entry["checksum"] = write_residual(path, target, solved)
                entry["residual"] = str(path)
            else:
                # The file before stays, for a run that is resumed from before this refinement.
                path.unlink()
                entry["residual"] = entry["checksum"] = None
        self._refined.append(epoch)
        value = self._measure(trainer, module, "refined")
        self._perplexity["refined"].append({"epoch": trainer.current_epoch, "value": value})
        self._show(trainer, module, f"Refined at epoch {trainer.current_epoch}")

    def _check_residuals(self, module: nn.Module) -> None:
        """Refuse to resume towards a refinement that cannot be done."""
        if set(self.refine_at_epochs) <= set(self._refined):
            return
        for entry in self._compressed:
            open_table(self._residual(entry), self._factorization(module, entry))

    def _residual(self, entry: Mapping[str, Any]) -> Path:
        if entry["residual"] is None:
            raise ValueError(
                f"no residual of table {entry['modules'][0]!r} was kept, because no refinement was planned after those "
                f"at epochs {self._refined}: resume with the refine_at_epochs that the run had"
            )
        return Path(entry["residual"])

    def _factorization(self, module: nn.Module, entry: Mapping[str, Any]) -> Factorization[Any]:
        layer = module.get_submodule(entry["modules"][0])
        if not isinstance(layer, CompressedLayer):
            raise ValueError(
                f"table {entry['modules'][0]!r} was compressed by {type(self).__name__}, but is a "
                f"{type(layer).__name__} now: it was replaced by other code and cannot be refined"
            )
        return layer.factorization

    def _replace(
        self, trainer: Trainer, module: LightningModule, solved: Sequence[tuple[Sequence[str], Factorization[Any]]]
    ) -> None:
        old = {path: module.get_submodule(path) for paths, _ in solved for path in paths}
        for paths, factorization in solved:
            replace_table(module, paths, factorization)
        # All at once: two tables may take the place of one.
        if splice(trainer.optimizers, module, old):
            names = ", ".join(repr(paths[0]) for paths, _ in solved)
            rank_zero_info(f"The optimizer's state of {names} was dropped: the factors start with none.")

    def _measure(
        self, trainer: Trainer, module: LightningModule, name: str, requests: Sequence[Request] = ()
    ) -> float | None:
        sizes = [request.table.shape[0] for request in requests] or [
            table.spec["vocab_size"] for table in plan_of(module).tables
        ]
        value = validation_perplexity(trainer, module, sizes, self.monitor, f"Perplexity, {name}")
        if value is not None:
            self._log(trainer, {f"perplexity_{name}": value})
        return value

    def _log(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        # Not `self.log`: Lightning forbids it in some of the hooks that come here.
        for logger in trainer.loggers:
            logger.log_metrics({f"embcompress/{name}": value for name, value in values.items()}, trainer.global_step)

    def _show(self, trainer: Trainer, module: LightningModule, title: str) -> None:
        plan = plan_of(module)
        show_plan(plan, module, title)
        values = {"tables_ratio": plan.ratio, "model_ratio": model_bytes(module)["ratio"]}
        for table in plan.tables:
            values[f"{table.name}/ratio"] = table.ratio
            if table.weighted_error is not None:
                values[f"{table.name}/weighted_error"] = table.weighted_error
        self._log(trainer, values)
        self._write_report(trainer, module)

    def _write_report(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and not _fast_dev_run(trainer):
            write_report(self._folder(trainer) / "report.json", module, self._perplexity)

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir)


def _fast_dev_run(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))
