"""When callbacks that compress do their work: at the start of epochs, one after the other, whatever was resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_embcompress.callbacks.checks import check_copies, check_package, check_trainer
from lightning_embcompress.callbacks.evaluation import validation_perplexity
from lightning_embcompress.callbacks.rehearsal import rehearse
from lightning_embcompress.callbacks.reporting import log, write_run_report
from lightning_embcompress.callbacks.spawning import check_spawned, hand_back
from lightning_embcompress.integrations.checkpoint import keep_structure
from lightning_embcompress.integrations.checkpoint_io import use_atomic_checkpoints
from lightning_embcompress.tables.finding import Table
from lightning_embcompress.utils.division import count_processes
from lightning_embcompress.utils.random_state import gather_over_processes, random_state, set_random_state

RUN_KEY = "embcompress_run"
"""Where a checkpoint keeps what Lightning leaves out."""


class ScheduledCallback(Callback, ABC):
    """Does what is due at the start of an epoch, and lets a resumed run go on as the uninterrupted one would have.

    Of several in one run the first leads: it lets all do what is due in the order of their epochs, and keeps in
    checkpoints the random state of all processes and the due steps of plateau schedulers. Lightning keeps no random
    state. It lets `ReduceLROnPlateau` step after the checkpoints of an epoch's end are written, does not make up for
    that when it resumes from there, and leaves the step out at the end of an epoch that was resumed in its middle.

    Attributes:
        at_epoch: Epoch at which it does its first work.
        refine_at_epochs: Epochs at which it does more.
        monitor: Name of the loss that validation logs, to measure the perplexity by; None for the only one.
    """

    refine_at_epochs: Sequence[int] = ()
    comes_last: ClassVar[bool] = False
    """Whether it does its work after others that are due at the same epoch."""

    def __init__(self, at_epoch: int, monitor: str | None) -> None:
        """Begin a run that goes on from nothing."""
        if not isinstance(at_epoch, int) or at_epoch < 0:
            raise ValueError(f"at_epoch must be a whole number, 0 or more, it is {at_epoch!r}")
        self.at_epoch, self.monitor = at_epoch, monitor
        self._begin_run()
        self._resumed_from: str | None = None

    def _begin_run(self) -> None:
        self._run: dict[str, Any] | None = None
        self._has_trained = False
        self._has_stepped = False
        self._group: Any = None

    @abstractmethod
    def _is_due(self, trainer: Trainer) -> bool:
        """Whether something is to be done at the start of this epoch."""

    @abstractmethod
    def _do_due(self, trainer: Trainer, module: LightningModule) -> None:
        """Do it."""

    def tables_to_come(self, module: LightningModule) -> list[Table]:
        """The dense tables that it will replace; none where that is done."""
        return []

    def former_keys(self) -> list[str]:
        """Keys under which older versions kept the state of such a callback in checkpoints."""
        return []

    def report_entries(self, module: LightningModule) -> dict[str, Any]:
        """What it adds to `report.json`."""
        return {}

    def _write_report(self, trainer: Trainer, module: LightningModule, perplexity: Mapping[str, Any]) -> None:
        """Write `report.json` with the entries of all of them; all processes have to call it."""
        entries: dict[str, Any] = {}
        for callback in scheduled(trainer):
            entries |= callback.report_entries(module)
        write_run_report(trainer, module, perplexity, entries)

    def _measure(self, trainer: Trainer, module: LightningModule, name: str) -> float | None:
        """Measure and log the perplexity on the validation data; None where that cannot be done."""
        value = validation_perplexity(trainer, module, self.monitor, f"Perplexity, {name}")
        if value is not None:
            log(trainer, {f"perplexity_{name.replace(' ', '_')}": value})
        return value

    def _leads(self, trainer: Trainer) -> bool:
        """Whether this is the callback that does for all of them what is to be done once."""
        return next(c for c in trainer.callbacks if isinstance(c, ScheduledCallback)) is self  # type: ignore[attr-defined]

    def _do_all_due(self, trainer: Trainer, module: LightningModule) -> None:
        # In the order of their epochs, however they are listed: all may be due at once, in a trial run for one.
        for callback in scheduled(trainer):
            if callback._is_due(trainer):
                callback._do_due(trainer, module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what Lightning leaves out. All processes have to come here, as saving a checkpoint asks for.

        Where one process saves because of an error, the others will not: then its own state is all there is.
        """
        if not self._leads(trainer):
            return
        states = [random_state(trainer.strategy.root_device)]
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            states = gather_over_processes(states[0], self._group)
        steps = [] if self._has_stepped else _steps_to_come(trainer)
        checkpoint[RUN_KEY] = {"random_states": states, "plateau": steps}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note where training goes on from, and take the state of an older version, by the key it had there.

        Raises:
            ValueError: If what was kept of the run is damaged.
        """
        states = checkpoint.get("callbacks", {})
        if self.state_key not in states and (known := [key for key in self.former_keys() if key in states]):
            states[self.state_key] = states[known[0]]
        if self._leads(trainer) and (run := checkpoint.get(RUN_KEY)) is not None:
            _check_run(run)
            self._run = dict(run)
        self._resumed_from = None if trainer.ckpt_path is None else str(trainer.ckpt_path)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run, keep the structure in checkpoints, and refuse what cannot work with this Trainer."""
        check_package(trainer, type(self).__name__)
        self._begin_run()
        keep_structure(pl_module)
        use_atomic_checkpoints(trainer)
        if stage == "fit":
            check_trainer(trainer, type(self).__name__, self.at_epoch, self.refine_at_epochs)
            if self._leads(trainer):
                check_spawned(trainer, pl_module, type(self).__name__)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand dense weights back to a main process whose module is dense."""
        if stage == "fit" and self._leads(trainer):
            hand_back(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the random state before Lightning draws for the first epoch.

        Raises:
            ValueError: If the state is damaged.
        """
        if not self._leads(trainer):
            return
        if self._group is None and count_processes() > 1 and dist.is_gloo_available():
            # Of its own: a signal may let the processes save while they exchange gradients.
            self._group = dist.new_group(backend="gloo")
        self._set_random_state(trainer)

    def _set_random_state(self, trainer: Trainer) -> None:
        if self._run is None:
            return
        states = self._run["random_states"]
        if len(states) == trainer.world_size:
            set_random_state(states[trainer.global_rank], trainer.strategy.root_device)
            return
        rank_zero_warn(
            f"the checkpoint holds the random state of {len(states)} processes, and there are {trainer.world_size}: "
            "random numbers go on otherwise than they would have"
        )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the steps of schedulers that came after the checkpoint was written."""
        if self._run is not None:
            _take(trainer, self._run["plateau"])

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what Lightning leaves out at the end of the epoch that was resumed."""
        if not self._leads(trainer):
            return
        if self._has_trained and trainer.fit_loop.restarting:
            _take(trainer, _steps_to_come(trainer))
            self._has_stepped = True
        elif not self._has_trained:
            # An epoch is closed again: Lightning has drawn for the next one, and will do so once more.
            self._set_random_state(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is due at this epoch."""
        if self._leads(trainer) and any(callback._is_due(trainer) for callback in scheduled(trainer)):
            # Lightning sets the progress of the epoch before back only after this hook: a checkpoint that Ctrl-C or a
            # full disk leaves here would be resumed as if this epoch were done.
            progress = trainer.fit_loop.epoch_loop.batch_progress
            if progress.is_last_batch:
                progress.reset_on_run()
            self._do_all_due(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do what is due, after a checkpoint that was saved between the last step of an epoch and its end.

        Lightning leaves `on_train_epoch_start` of the next epoch out when it resumes from there.

        Raises:
            ValueError: Before the first step, if the steps of the module need the tables dense.
        """
        if not self._has_trained and (tables := self.tables_to_come(pl_module)):
            # What was copied since training began, too.
            layers = {path: pl_module.get_submodule(path) for table in tables for path in table.modules}
            check_copies(trainer, type(self).__name__, layers)
            rehearse(trainer, pl_module, type(self).__name__, tables, batch, batch_idx)
        self._has_trained, self._has_stepped, self._run = True, False, None
        if batch_idx == 0 and self._leads(trainer):
            self._do_all_due(trainer, pl_module)


def scheduled(trainer: Trainer) -> list[ScheduledCallback]:
    """All of them in the order of their epochs."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, ScheduledCallback)]  # type: ignore[attr-defined]
    return sorted(found, key=lambda callback: (callback.at_epoch, callback.comes_last))


def _check_run(run: Any) -> None:
    """Refuse a damaged record of a run."""
    if not isinstance(run, Mapping) or not all(isinstance(run.get(key), list) for key in ("random_states", "plateau")):
        raise _damaged(run)
    for step in run["plateau"]:
        kinds = {"scheduler": int, "value": float, "after": int}
        if not isinstance(step, Mapping) or any(type(step.get(key)) is not kind for key, kind in kinds.items()):
            raise _damaged(step)


def _steps_to_come(trainer: Trainer) -> list[dict[str, Any]]:
    """Steps of `ReduceLROnPlateau` that come between this moment and the end of the epoch."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    epochs = trainer.fit_loop.epoch_progress.current
    if epochs.ready == epochs.completed:
        # The end of the epoch is over, as in `on_train_end`.
        return []
    # Within `on_train_batch_end` the validation that says how good the epoch was is still to come.
    if not progress.is_last_batch or progress.current.completed < progress.current.processed:
        return []
    steps = []
    for index, config in enumerate(trainer.lr_scheduler_configs):
        due = config.interval == "epoch" and (trainer.current_epoch + 1) % config.frequency == 0
        value = trainer.callback_metrics.get(config.monitor) if config.monitor else None
        if config.reduce_on_plateau and due and value is not None:
            steps.append({"scheduler": index, "value": float(value), "after": config.scheduler.last_epoch})
    return steps


def _take(trainer: Trainer, steps: list[dict[str, Any]]) -> None:
    for step in steps:
        if not 0 <= step["scheduler"] < len(trainer.lr_scheduler_configs):
            raise _damaged(step)
        scheduler: Any = trainer.lr_scheduler_configs[step["scheduler"]].scheduler
        # Unless somebody has taken it already.
        if scheduler.last_epoch == step["after"]:
            scheduler.step(step["value"])


def _damaged(found: Any) -> ValueError:
    shown = repr(found)[:100]
    return ValueError(
        f"{RUN_KEY!r} of the checkpoint is damaged: {shown}. Resume from another one, or with the schedulers of the run"
    )
