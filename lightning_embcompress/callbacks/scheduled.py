"""When callbacks that compress do their work: at the start of epochs, one after the other, whatever was resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_embcompress.callbacks.continuation import Continuation, begin_epoch


class ScheduledCallback(Callback, ABC):
    """Does what is due at the start of an epoch, and lets a resumed run go on as the uninterrupted one would have.

    Of several in one run the first leads: it keeps what is kept once, and lets all do what is due in the order of their
    epochs.

    Attributes:
        at_epoch: Epoch at which it does its first work.
    """

    at_epoch: int
    comes_last: ClassVar[bool] = False
    """Whether it does its work after others that are due at the same epoch."""

    def __init__(self) -> None:
        """Begin a run that goes on from nothing."""
        self._continuation = Continuation()
        self._resumed_from: str | None = None

    @abstractmethod
    def _is_due(self, trainer: Trainer) -> bool:
        """Whether something is to be done at the start of this epoch."""

    @abstractmethod
    def _do_due(self, trainer: Trainer, module: LightningModule) -> None:
        """Do it."""

    def report_entries(self, module: LightningModule) -> dict[str, Any]:
        """What it adds to `report.json`."""
        return {}

    def _leads(self, trainer: Trainer) -> bool:
        """Whether this is the callback that does for all of them what is to be done once."""
        return next(c for c in trainer.callbacks if isinstance(c, ScheduledCallback)) is self  # type: ignore[attr-defined]

    def _do_all_due(self, trainer: Trainer, module: LightningModule) -> None:
        # In the order of their epochs, however they are listed: all may be due at once, in a trial run for one.
        for callback in _scheduled(trainer):
            if callback._is_due(trainer):
                callback._do_due(trainer, module)

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
        """Begin a run."""
        self._continuation = Continuation()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the random state."""
        if self._leads(trainer):
            self._continuation.on_fit_start(trainer)

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
        if self._leads(trainer) and any(callback._is_due(trainer) for callback in _scheduled(trainer)):
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


def _scheduled(trainer: Trainer) -> list[ScheduledCallback]:
    """All of them in the order of their epochs."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, ScheduledCallback)]  # type: ignore[attr-defined]
    return sorted(found, key=lambda callback: (callback.at_epoch, callback.comes_last))
