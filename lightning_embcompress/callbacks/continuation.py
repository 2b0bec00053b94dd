"""What a checkpoint of Lightning leaves out, so that a resumed run goes on as the uninterrupted one would have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn

from lightning_embcompress.utils.division import count_processes
from lightning_embcompress.utils.random_state import gather_over_processes, random_state, set_random_state

RUN_KEY = "embcompress_run"
"""Where a checkpoint keeps it."""


class Continuation:
    """Keeps the random state of all processes and the due steps of plateau schedulers; its methods follow the hooks.

    Lightning keeps no random state. It lets `ReduceLROnPlateau` step after the checkpoints of an epoch's end are
    written, does not make up for that when it resumes from there, and leaves the step out at the end of an epoch that
    was resumed in its middle.
    """

    def __init__(self) -> None:
        """Begin a run that goes on from nothing."""
        self._run: dict[str, Any] | None = None
        self._has_trained = False
        self._has_stepped = False
        self._group: Any = None

    def on_save_checkpoint(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Note it in a checkpoint. All processes have to come here, as saving a checkpoint asks for.

        Where one process saves because of an error, the others will not: then its own state is all there is.
        """
        states = [random_state(trainer.strategy.root_device)]
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            states = gather_over_processes(states[0], self._group)
        steps = [] if self._has_stepped else _steps_to_come(trainer)
        checkpoint[RUN_KEY] = {"random_states": states, "plateau": steps}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take it from a checkpoint, if it is there.

        Raises:
            ValueError: If it is damaged.
        """
        run = checkpoint.get(RUN_KEY)
        if run is None:
            return
        if not isinstance(run, Mapping) or not all(
            isinstance(run.get(key), list) for key in ("random_states", "plateau")
        ):
            raise _damaged(run)
        for step in run["plateau"]:
            kinds = {"scheduler": int, "value": float, "after": int}
            if not isinstance(step, Mapping) or any(type(step.get(key)) is not kind for key, kind in kinds.items()):
                raise _damaged(step)
        self._run = dict(run)

    def on_fit_start(self, trainer: Trainer) -> None:
        """Set the random state before Lightning draws for the first epoch.

        Raises:
            ValueError: If the state is damaged.
        """
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

    def on_train_start(self, trainer: Trainer) -> None:
        """Take the steps that came after the checkpoint was written."""
        if self._run is not None:
            _take(trainer, self._run["plateau"])

    def on_train_batch_start(self) -> None:
        """Note that training has gone on."""
        self._has_trained, self._has_stepped, self._run = True, False, None

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Do what Lightning leaves out at the end of the epoch that was resumed."""
        if self._has_trained and trainer.fit_loop.restarting:
            _take(trainer, _steps_to_come(trainer))
            self._has_stepped = True
        elif not self._has_trained:
            # An epoch is closed again: Lightning has drawn for the next one, and will do so once more.
            self._set_random_state(trainer)


def begin_epoch(trainer: Trainer) -> None:
    """Let a checkpoint that is saved within `on_train_epoch_start` be one of the start of this epoch.

    Lightning sets the progress of the epoch before back only after the hook: a checkpoint that Ctrl-C or a full disk
    leaves there would be resumed as if this epoch were done.

    Args:
        trainer: The Trainer, within that hook.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if progress.is_last_batch:
        progress.reset_on_run()


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
