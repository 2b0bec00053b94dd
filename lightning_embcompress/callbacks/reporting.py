"""What a callback shows and logs of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lightning_embcompress.plan import model_bytes, plan_of
from lightning_embcompress.report import show_plan


def run_folder(trainer: Trainer) -> Path:
    """Where the run writes. All processes have to ask: under DDP it is the folder of the first."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def log(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Give values to every logger, under `embcompress/`."""
    # Not `self.log`: Lightning forbids it in some of the hooks that come here.
    for logger in trainer.loggers:
        logger.log_metrics({f"embcompress/{name}": value for name, value in values.items()}, trainer.global_step)


def show_and_log(trainer: Trainer, module: LightningModule, title: str) -> None:
    """Print what the tables have become, and log their ratios and errors."""
    plan = plan_of(module)
    show_plan(plan, module, title)
    values = {"tables_ratio": plan.ratio, "model_ratio": model_bytes(module)["ratio"]}
    for table in plan.tables:
        values[f"{table.name}/ratio"] = table.ratio
        if table.weighted_error is not None:
            values[f"{table.name}/weighted_error"] = table.weighted_error
    log(trainer, values)
