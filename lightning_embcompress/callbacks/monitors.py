"""Callbacks and schedulers that compare a model with what it was: they begin anew where it becomes another one."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, SpikeDetection
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import ReduceLROnPlateau

# How far training is, not how good the model is: `monitor="step", mode="max"` keeps the latest checkpoints.
_PROGRESS = ("epoch", "step", "global_step")


def restart_comparisons(trainer: Trainer, change: str) -> None:
    """Compare a model that was made smaller with itself only.

    It is worse than the model before, on purpose: no checkpoint of it would become the best one, early stopping would
    end the run, and a plateau scheduler would lower the learning rate. So the best scores and the patience of
    `ModelCheckpoint`, `EarlyStopping`, `SpikeDetection`, their subclasses and `ReduceLROnPlateau` begin anew, and one
    line names the checkpoints that were the best ones, which stay. What they monitor is forgotten until it is logged
    again: a checkpoint in the middle of the epoch would be kept by a metric of the model before.

    Args:
        trainer: The Trainer that is fitting.
        change: What was done, such as `Compressed`.
    """
    restarted: list[str] = []
    monitors: list[str] = []
    best: list[str] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SpikeDetection):
            callback.running_mean.reset()
            restarted.append(type(callback).__name__)
        monitor = getattr(callback, "monitor", None)
        if not isinstance(callback, ModelCheckpoint | EarlyStopping) or monitor is None or monitor in _PROGRESS:
            continue
        restarted.append(type(callback).__name__)
        monitors.append(monitor)
        worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        if isinstance(callback, EarlyStopping):
            callback.best_score, callback.wait_count = worst, 0
            continue
        if callback.best_model_score is not None:
            best.append(f"{callback.best_model_path!r} ({monitor}={float(callback.best_model_score):.4g})")
        callback.best_k_models, callback.kth_best_model_path, callback.kth_value = {}, "", worst
        callback.best_model_path, callback.best_model_score, callback.current_score = "", None, None
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.best, scheduler.num_bad_epochs = scheduler.mode_worse, 0
            restarted.append(type(scheduler).__name__)
            monitors += [config.monitor] if config.monitor else []
    known = [monitor for monitor in dict.fromkeys(monitors) if trainer.callback_metrics.pop(monitor, None) is not None]
    # ModelCheckpoint refuses a monitor that a validation did not log; this model was not validated yet.
    trainer.fit_loop.epoch_loop.val_loop._has_run = False
    if known or best:
        names = ", ".join(dict.fromkeys(restarted))
        before = f"; the best of the model before is {', '.join(best)}" if best else ""
        rank_zero_info(f"{change} at epoch {trainer.current_epoch}: the comparisons of {names} begin anew{before}.")


def warn_of_early_end(trainer: Trainer, missed: str) -> None:
    """Say what was planned and did not happen, and who ended training before it.

    Args:
        trainer: The Trainer, in `on_train_end`.
        missed: Argument and value, and what did not happen.
    """
    impatient = [
        f"{type(callback).__name__}(monitor={callback.monitor!r}, patience={callback.patience})"
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and trainer.should_stop and callback.wait_count >= callback.patience
    ]
    reason = f". {' and '.join(impatient)} ended it: give it more patience, or choose earlier epochs"
    rank_zero_warn(f"training ended at epoch {trainer.current_epoch}, before {missed}{reason if impatient else ''}")
