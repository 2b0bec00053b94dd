"""Runs in processes that Lightning starts by itself: `ddp_spawn`, `ddp_fork` and `ddp_notebook`.

The Trainer, the module and the callbacks are copied into the processes. Afterwards Lightning loads the state dict of
the first one, without `strict`, into the module of the main process, where no hook is called. That module is as it was
before, so the one in the process is made dense before its state dict is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_embcompress.compression.plan import densify, plan_of
from lightning_embcompress.integrations.checkpoint import is_spawned
from lightning_embcompress.tables.finding import Table


def check_spawned(trainer: Trainer, module: LightningModule, name: str) -> None:
    """Say what the main process will get, in `setup`.

    Args:
        trainer: The Trainer that is to fit.
        module: Its module, as it is in the main process too.
        name: Of the callback that asks.

    Raises:
        ValueError: If the module is compressed already: another structure could not be handed back.
    """
    if not is_spawned(trainer):
        return
    if (there := plan_of(module)).tables or there.backbone:
        raise ValueError(
            f"{name} may change the compressed tables of {type(module).__name__} in processes that hand nothing but "
            "weights back to the main process, whose module stays as it is: use strategy='ddp', or make it dense with "
            "densify(module) before"
        )
    rank_zero_warn(
        f"The run is in processes of its own, which hand weights back to the main process. Its "
        f"{type(module).__name__} stays dense, and gets the values of the compressed tables. Load the compressed one "
        f"from a checkpoint of this run, with lightning_embcompress.load_from_checkpoint({type(module).__name__}, "
        "trainer.checkpoint_callback.best_model_path), or use strategy='ddp'"
    )


def check_ties(trainer: Trainer, name: str, tie: str, tables: Sequence[Table]) -> None:
    """Refuse to untie tables that the main process has as one.

    Raises:
        ValueError: Naming the table.
    """
    shared = [table.name for table in tables if len(table.modules) > 1]
    if tie != "keep" and shared and is_spawned(trainer):
        raise ValueError(
            f"tie={tie!r} of {name} may make two tables of {shared[0]!r}, which is one in the main process, to which "
            "weights are handed back: use tie='keep', or strategy='ddp'"
        )


def hand_back(trainer: Trainer, module: LightningModule) -> None:
    """Make the module dense where its state dict goes to the main process, after all checkpoints are written."""
    # Those of the other processes of a machine are thrown away.
    if is_spawned(trainer) and trainer.local_rank == 0:
        densify(module)
