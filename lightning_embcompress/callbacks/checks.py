"""What cannot work with a Trainer, said before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import LBFGS
from torch.optim.swa_utils import AveragedModel

from lightning_embcompress.compression.budget import BUDGETS, Budget
from lightning_embcompress.compression.reference import reference_file
from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.tables.finding import Table


def check_package(trainer: Trainer, name: str) -> None:
    """Refuse the Trainer of another package.

    Raises:
        ValueError: Naming it.
    """
    if not isinstance(trainer, Trainer):
        package = type(trainer).__module__.partition(".")[0]
        raise ValueError(
            f"{name} is a callback of lightning.pytorch, and this Trainer is one of {package}, which is another "
            "package with classes of its own: import lightning.pytorch in place of it everywhere"
        )


def check_trainer(trainer: Trainer, name: str, at_epoch: int, refine_at_epochs: Sequence[int]) -> None:
    """Refuse strategies, callbacks and epochs that cannot work.

    Args:
        trainer: The Trainer, in `setup`.
        name: Of the callback that asks.
        at_epoch: Epoch of compression.
        refine_at_epochs: Epochs of refinement.

    Raises:
        ValueError: Naming the remedy.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise ValueError(
            f"{name} cannot replace tables under {type(strategy).__name__}, which shards the model and makes its "
            "optimizer first: remove the callback and call "
            "lightning_embcompress.integrations.sharding.compress_or_restore(self, ...) in "
            "configure_model, which compresses at the start; or use strategy='ddp'"
        )
    # DeepSpeed and XLA are made of DDP.
    other = strategy.restore_checkpoint_after_setup or isinstance(strategy, XLAStrategy | SingleDeviceXLAStrategy)
    if other or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ValueError(
            f"{name} works on one device and under DDP, not under {type(strategy).__name__}: use strategy='ddp', or "
            "compress(model, ...) before training"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # EMAWeightAveraging is a WeightAveraging, which older versions of Lightning do not have.
        names = {cls.__name__ for cls in type(callback).__mro__}
        if isinstance(callback, StochasticWeightAveraging) or "WeightAveraging" in names:
            raise ValueError(
                f"{type(callback).__name__} averages weights by shape and breaks when tables are replaced in the "
                f"middle of training: remove it, or compress() the model before training instead of by {name}"
            )
        if isinstance(callback, BaseFinetuning):
            raise ValueError(
                f"{type(callback).__name__} keeps the names of parameters in its state and does not find them again "
                "when a run is resumed whose tables were replaced: freeze and unfreeze parameters by hand, or "
                f"compress() the model before training instead of by {name}"
            )
    last = max([at_epoch, *refine_at_epochs])
    # With fast_dev_run everything happens in the only epoch.
    if trainer.max_epochs not in (None, -1) and last >= trainer.max_epochs and not is_fast_dev_run(trainer):
        argument = "refine_at_epochs" if refine_at_epochs else "at_epoch"
        raise ValueError(
            f"{argument} asks for epoch {last}, but max_epochs={trainer.max_epochs} ends before it (epochs count from "
            f"0): train for at least {last + 1} epochs or choose an earlier one"
        )


def check_copies(trainer: Trainer, name: str, layers: Mapping[str, nn.Module]) -> None:
    """Refuse what keeps layers, or copies of them, and would go on with those when they are replaced.

    Args:
        trainer: The Trainer that is fitting.
        name: Of the callback that asks.
        layers: Those that it replaces or has replaced, by their paths in the module.

    Raises:
        ValueError: Naming the remedy.
    """
    remedy = f"or do before training what {name} does"
    paths = {id(layer): path for path, layer in layers.items()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        pruned = callback._parameters_to_prune if isinstance(callback, ModelPruning) else ()
        if known := [paths[id(layer)] for layer, _ in pruned if id(layer) in paths]:
            raise ValueError(
                f"{type(callback).__name__} prunes the layer {known[0]!r}, which {name} replaces in the middle of "
                f"training: name other layers by parameters_to_prune, {remedy}"
            )
    shapes = {_shape_of(layer): path for path, layer in layers.items()}
    of_callbacks = [(f"of {type(one).__name__}", part) for one in trainer.callbacks for part in vars(one).values()]  # type: ignore[attr-defined]
    for where, part in [*trainer.lightning_module.named_modules(), *of_callbacks]:
        copies = part.modules() if isinstance(part, AveragedModel) else ()
        if known := [shapes[_shape_of(copy)] for copy in copies if _shape_of(copy) in shapes]:
            raise ValueError(
                f"AveragedModel {where!r} averages weights by shape, also those of {known[0]!r}, and breaks when "
                f"{name} replaces it in the middle of training: average parts without tables, {remedy}"
            )


def _shape_of(layer: nn.Module) -> Any:
    """Of its weight; the layer itself if it has none, which is like no other."""
    weight = getattr(layer, "weight", None)
    return layer if weight is None else tuple(weight.shape)


def check_gradients(trainer: Trainer, name: str, tables: Sequence[Table]) -> None:
    """Refuse gradients of tables where those of their factors cannot be had, or would not be used.

    Args:
        trainer: The Trainer that is fitting.
        name: Of the callback that asks.
        tables: What it is to replace.

    Raises:
        ValueError: Naming the remedy.
    """
    for table in tables:
        for optimizer in trainer.optimizers:
            owned = any(table.weight is one for group in optimizer.param_groups for one in group["params"])
            # Of other packages too.
            if owned and "Muon" in type(optimizer).__name__:
                raise ValueError(
                    f"{type(optimizer).__name__} trains matrices only, and not all factors that {name} puts in the "
                    f"place of table {table.name!r} are: give its weight to another optimizer, such as Adam"
                )
        for path in table.modules:
            layer = trainer.lightning_module.get_submodule(path)
            if isinstance(trainer.strategy, DDPStrategy) and isinstance(layer, AnyEmbedding) and layer.sparse:
                raise ValueError(
                    f"module {path!r} of table {table.name!r} has sparse=True, and DistributedDataParallel takes "
                    f"sparse gradients of nn.Embedding alone, not of the factors that {name} puts in its place: set "
                    "`sparse = False` on it and train it with an optimizer of dense gradients, such as Adam; or train "
                    "on one device"
                )


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the only epoch is one of a trial run."""
    return bool(getattr(trainer, "fast_dev_run", False))


def check_optimizers(trainer: Trainer, name: str) -> None:
    """Refuse optimizers that cannot go on when some of their parameters are replaced.

    Raises:
        ValueError: Naming the remedy.
    """
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            raise ValueError(
                f"ZeroRedundancyOptimizer deals parameters out to the processes when it is made, and {name} replaces "
                "some of them later: use the optimizer itself, or compress() the model before training"
            )
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"LBFGS keeps its history over all parameters in one vector, and {name} replaces some of them later: "
                "use another optimizer, such as Adam, or compress() the model before training"
            )


class Turn(NamedTuple):
    """When one of the callbacks compresses and refines which modules, and where it keeps what they were."""

    at_epoch: int
    refine_at_epochs: Sequence[int]
    modules: frozenset[str]
    reference: Path | None = None


def check_order(turns: Sequence[Turn]) -> None:
    """Refuse callbacks that would compress a table at the same time, or refine one that another has compressed since.

    Raises:
        ValueError: Naming the table and the epochs.
    """
    ordered = sorted(turns, key=lambda turn: turn.at_epoch)
    for index, first in enumerate(ordered):
        for second in ordered[index + 1 :]:
            if not first.modules & second.modules:
                continue
            name = min(first.modules & second.modules)
            if first.at_epoch == second.at_epoch:
                raise ValueError(
                    f"two callbacks compress table {name!r} at epoch {first.at_epoch}: give them different tables, or "
                    "one of them a later at_epoch"
                )
            if late := [epoch for epoch in first.refine_at_epochs if epoch >= second.at_epoch]:
                raise ValueError(
                    f"table {name!r} is to be refined at epoch {late[0]}, but another callback compresses it anew at "
                    f"epoch {second.at_epoch}: let refine_at_epochs end before it"
                )
            if first.reference is not None and first.reference == second.reference:
                raise ValueError(
                    f"keep_reference={str(first.reference)!r} of two callbacks would keep table {name!r} as it is at "
                    f"epochs {first.at_epoch} and {second.at_epoch} in the same file: name two folders"
                )


def check_references(folder: Path, tables: Sequence[Table]) -> None:
    """Refuse to write over dense tables that another run has kept.

    Raises:
        ValueError: Naming the file.
    """
    for table in tables:
        kept = reference_file(folder, table.name)
        if kept.exists():
            raise ValueError(
                f"keep_reference: {str(kept)!r} is there already, from another run, and would be lost: name another "
                "folder, or remove it"
            )


def settings_of(config: MethodConfig, budget: Budget | None) -> dict[str, Any]:
    """Budget and options, as they are kept in checkpoints."""
    return {**({} if budget is None else budget.given), **config.options}


def warn_of_other_settings(kept: Mapping[str, Any] | None, config: MethodConfig, budget: Budget | None) -> None:
    """Say that tables were compressed with other settings than those that are asked for now.

    Args:
        kept: The settings of a checkpoint, of this version or an older one; None where it has none.
        config: Of the method.
        budget: How small the tables are to become.
    """
    if kept is None:
        return
    # Older versions kept what was not given, too.
    defaults = {field.name: field.default for field in fields(config)}
    known = {
        name: value
        for name, value in kept.items()
        if value is not None and (name in BUDGETS or value != defaults.get(name, value))
    }
    if known != (asked := settings_of(config, budget)):
        rank_zero_warn(
            f"{asked} is ignored: the tables were compressed with {known} already. Resume from before the "
            "compression, or add a callback that compresses them again"
        )
