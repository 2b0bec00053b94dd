"""What a callback shows and logs of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_embcompress.callbacks.checks import is_fast_dev_run
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.compression.report import show_plan, write_report
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.utils.files import remove_abandoned

# Of every table.
_LOGGED = ("ratio", "bits_per_weight", "weighted_error", "predicted_loss")


def unmeasured() -> dict[str, Any]:
    """The perplexities of a run for `report.json`, before the first is measured."""
    return {"dense": None, "compressed": None, "refined": [], "final": None, "split": "validation"}


def _folder_name(trainer: Trainer) -> str:
    # A URL as it is, which a path would not keep.
    return str(trainer.log_dir or trainer.default_root_dir)


def write_run_report(
    trainer: Trainer, module: LightningModule, perplexity: Mapping[str, Any], entries: Mapping[str, Any]
) -> None:
    """Write `report.json` into the run's folder, if that is one; all processes have to call it.

    Checkpoints hold what stands in it: what hinders it is a warning, and training goes on.
    """
    if is_fast_dev_run(trainer):
        return
    folder = _folder_name(trainer)
    if not trainer.is_global_zero:
        return
    if "://" in folder:
        rank_zero_warn(f"report.json is not written: {folder!r} is no folder of this machine")
        return
    try:
        write_report(Path(folder) / "report.json", module, perplexity, entries)
    except OSError as error:
        rank_zero_warn(str(error))


def residual_folder(trainer: Trainer, is_refined: bool) -> Path:
    """A folder in that of the run, where residuals can be kept; all processes have to ask.

    No other run, and none that is resumed from the same checkpoint, writes there.

    Args:
        trainer: The Trainer.
        is_refined: Whether there will be residuals.

    Raises:
        ValueError: If the run's folder is not in a file system, where they could be mapped into memory.
    """
    folder = _folder_name(trainer)
    if is_refined and "://" in folder:
        raise ValueError(
            f"refine_at_epochs keeps what compression left out in files of the run's folder, and {folder!r} is no "
            "folder of this machine: name a local one, as in Trainer(default_root_dir=...) or the logger's save_dir; "
            "checkpoints may go elsewhere, by the dirpath of ModelCheckpoint"
        )
    found = (Path(folder) / "residuals" / trainer.strategy.broadcast(uuid4().hex[:12])).absolute()
    if trainer.local_rank == 0:
        remove_abandoned(found.parent)
    return found


def log(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Give values to every logger, under `embcompress/`."""
    # Not `self.log`: Lightning forbids it in some of the hooks that come here.
    for logger in trainer.loggers:
        logger.log_metrics({f"embcompress/{name}": value for name, value in values.items()}, trainer.global_step)


def show_and_log(trainer: Trainer, module: LightningModule, title: str) -> None:
    """Print what the tables have become, and log their ratios and errors."""
    plan = plan_of(module)
    show_plan(module, title)
    values = {"tables_ratio": plan.ratio, "model_ratio": model_bytes(module)["ratio"]}
    if plan.bits_per_weight is not None:
        values["tables_bits_per_weight"] = plan.bits_per_weight
    for table in plan.tables:
        known = {name: getattr(table, name) for name in _LOGGED}
        values |= {f"{table.name}/{name}": value for name, value in known.items() if value is not None}
    log(trainer, values)


def show_loss(
    trainer: Trainer, module: LightningModule, names: Sequence[str], dense: float | None, compressed: float | None
) -> None:
    """Say and log what the loss was predicted to grow by, in nats, beside what it has grown by.

    Args:
        trainer: The Trainer.
        module: Its module, with the tables compressed.
        names: Of the tables that were compressed.
        dense: Perplexity before; None if it is not known.
        compressed: Perplexity after; None if it is not known.
    """
    losses = [table.predicted_loss for table in plan_of(module).tables if table.name in names]
    known = [loss for loss in losses if loss is not None]
    if not known or len(known) < len(losses):
        return
    values, measured = {"predicted_loss": sum(known)}, "not measured"
    if dense is not None and compressed is not None and math.isfinite(dense) and math.isfinite(compressed):
        values["measured_loss"] = math.log(compressed / dense)
        measured = f"measured {values['measured_loss']:+.4f} (perplexity {compressed / dense - 1:+.2%})"
    rank_zero_info(f"The loss was predicted to grow by {sum(known):.4f} nats: {measured}.")
    log(trainer, values)


def merged_perplexity(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The perplexities of a run for `report.json`, of callbacks in the order in which they compress."""
    merged = dict(steps[0])
    for later in steps[1:]:
        merged["compressed"] = later["compressed"]
        merged["refined"] = [*merged["refined"], *later["refined"]]
        merged["final"] = merged["final"] if later["final"] is None else later["final"]
    return merged


def show_perplexities(measured: Mapping[str, Any]) -> None:
    """Say what the perplexity was after every step of a run."""
    steps = [("dense", measured["dense"]), ("compressed", measured["compressed"])]
    steps += [(f"refined at epoch {entry['epoch']}", entry["value"]) for entry in measured["refined"]]
    steps.append(("final", measured["final"]))
    if shown := ", ".join(f"{name} {value:.2f}" for name, value in steps if value is not None):
        rank_zero_info(f"Validation perplexity: {shown}")
