"""How benchmarks fine-tune: one schedule, and a Trainer that does nothing else."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.optim.lr_scheduler import LambdaLR


def linear(optimizer: Any, steps: int) -> LambdaLR:
    """Up for a twentieth of the steps, and down to nothing."""
    rise = steps / 20
    return LambdaLR(optimizer, lambda step: min((step + 1) / rise, (steps - step) / (steps - rise)))


def trainer_of(steps: int, *callbacks: Callback) -> Trainer:
    """A Trainer of so many steps in bfloat16 on a CPU."""
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
