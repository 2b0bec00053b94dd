"""The first batch with compressed layers in place: what they cannot do is refused before training, not at the epoch."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from lightning_embcompress.callbacks.passes import Logged, copied, loggers_off, step_arguments, undisturbed, validating
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.layers.table_weight import TableWeight
from lightning_embcompress.layers.weight_refusals import WeightError
from lightning_embcompress.methods.registry import FullTable
from lightning_embcompress.tables.finding import Table
from lightning_embcompress.tables.replacement import put_back, replace_table


def rehearse(
    trainer: Trainer, module: LightningModule, name: str, tables: Sequence[Table], batch: Any, batch_idx: int
) -> None:
    """Call the steps of a module once while its tables are read by compressed layers, and leave all as it was.

    The layers store the tables as they are, so that nothing is computed but what a step computes. A step that needs
    the numbers of a table, as a penalty on `decoder.weight.norm()` does, would train until the tables are compressed
    and fail then; one that has a layer from a closure would go on with the dense one. The same holds for the
    hooks of validation and of checkpoints. Any other error is left to the step itself: hooks that it relies on may not
    have been called yet.

    Args:
        trainer: The Trainer that is fitting.
        module: Its module, with dense tables.
        name: Of the callback that is to replace them.
        tables: What it is to replace.
        batch: The first batch, as the steps get it.
        batch_idx: Its index.

    Raises:
        ValueError: If a step needs what a compressed layer does not have, or goes on with a dense one.
    """
    before = {path: module.get_submodule(path) for table in tables for path in table.modules}
    called: set[nn.Module] = set()
    handle = register_module_forward_pre_hook(lambda layer, _: called.add(layer))
    try:
        for table in tables:
            factors = FullTable.of(cast(nn.Parameter, table.weight))
            replace_table(module, table.modules, factors, for_a_while=True)
        with undisturbed(module, Logged("")), loggers_off(trainer):
            # By itself it would step.
            if module.automatic_optimization:
                with trainer.precision_plugin.train_step_context():
                    _call(module.training_step, *_arguments(module.training_step, batch, batch_idx))
            if is_overridden("validation_step", module):
                with validating(trainer), torch.no_grad(), trainer.precision_plugin.val_step_context():
                    _call(module.on_validation_model_eval)
                    _call(module.on_validation_start)
                    _call(module.on_validation_epoch_start)
                    _call(module.validation_step, *_arguments(module.validation_step, batch, batch_idx))
                    _call(module.on_validation_epoch_end)
            checkpoint = {"state_dict": dict(module.state_dict())}
            _call(module.on_save_checkpoint, checkpoint)
        if any(isinstance(value, TableWeight) for value in tree_leaves(checkpoint)):
            raise _NotDense(
                "its on_save_checkpoint stores the weight of a layer, which has no numbers to store: take "
                "layer.factorization.materialize() there, or nothing, as the state dict has the factors"
            )
        if stale := [path for path, layer in before.items() if layer in called]:
            raise _NotDense(f"its steps call {stale[0]!r} by a reference that does not follow, as in a closure")
    except _NotDense as error:
        names = ", ".join(repr(table.name) for table in tables)
        raise ValueError(f"{name} cannot compress the tables {names} of {type(module).__name__}: {error}") from error
    finally:
        handle.remove()
        put_back(module, before)


class _NotDense(Exception):
    """A step cannot do with compressed layers in the place of dense ones."""


def _arguments(step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[Any, ...]:
    return step_arguments(step, copied(batch, {}), batch_idx)


def _call(hook: Callable[..., Any], *arguments: Any) -> None:
    try:
        hook(*arguments)
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        lacks = isinstance(error, AttributeError) and isinstance(frames[-1].f_locals.get("self"), CompressedLayer)
        if isinstance(error, WeightError) or lacks:
            name = getattr(hook, "__name__", "on_save_checkpoint")
            raise _NotDense(f"its {name} needs them dense. {error}") from error
