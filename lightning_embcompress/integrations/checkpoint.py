"""The record of the structure inside Lightning checkpoints, and loading a compressed model from one."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from lightning_embcompress.compression.backbone import backbone_of
from lightning_embcompress.compression.backbone_files import check_backbone_tensors
from lightning_embcompress.compression.plan import Plan, apply_plan, check_plan, plan_of
from lightning_embcompress.compression.records import check_factors
from lightning_embcompress.integrations.checkpoint_io import check_whole_file, read_mapped
from lightning_embcompress.integrations.sources import INSTANTIATORS
from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.tables.finding import all_modules

RECORD_KEY = "embcompress"
"""Where a Lightning checkpoint keeps the plan; a checkpoint of a dense model has no such key."""

_PARAMETERS_KEY = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
_INSTANTIATOR_KEY = "_instantiator"
_VERSION_KEY = "pytorch-lightning_version"

_Module = TypeVar("_Module", bound=LightningModule)


def write_record(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Record the structure of a module in its checkpoint, if any of it is compressed."""
    plan = plan_of(module)
    if plan.tables or plan.backbone:
        tables = [replace(table, modules=tuple(map(_unwrapped, table.modules))) for table in plan.tables]
        backbone = plan.backbone and replace(
            plan.backbone, weights={_unwrapped(n): s for n, s in plan.backbone.weights.items()}
        )
        checkpoint[RECORD_KEY] = replace(plan, tables=tuple(tables), backbone=backbone).to_dict()
        _name_instantiator(checkpoint)
        state = checkpoint.get("state_dict") or {}
        for path in (path for table in tables for path in table.modules):
            # Sharded modules leave their entries out of state dicts, of which this may be a whole one.
            if any(name.startswith(f"{path}.factorization.") for name in state):
                state.setdefault(f"{path}.weight", torch.empty(0))


def _name_instantiator(checkpoint: dict[str, Any]) -> None:
    """Let `Class.load_from_checkpoint` build a module that takes the structure, see `instantiators`."""
    parameters = checkpoint.get(_PARAMETERS_KEY, {})
    # What is one argument of the class, such as `hparams`, is handed to it as a whole.
    if isinstance(parameters, dict) and checkpoint.get(LightningModule.CHECKPOINT_HYPER_PARAMS_NAME) in (
        None,
        "kwargs",
    ):
        known = parameters.get(_INSTANTIATOR_KEY)
        checkpoint[_PARAMETERS_KEY] = {**parameters, _INSTANTIATOR_KEY: INSTANTIATORS.get(known, known)}


def restore_structure(
    module: nn.Module, checkpoint: Mapping[str, Any], complete: bool = True, where: str | None = None
) -> None:
    """Give a module the structure that a checkpoint was written with, before its weights are loaded.

    A checkpoint without a record is one of a dense model: a module that is compressed is made dense for it. Strategies
    that shard a model load its weights before any hook is called, and hand over a checkpoint without them: then the
    structure must be the same already.

    Args:
        module: What is loaded into.
        checkpoint: What `torch.load` gave.
        complete: Whether the checkpoint must have all factors by now. False where a hook may still add some.
        where: What messages call the checkpoint; None for the file that the Trainer loads, if there is one.

    Raises:
        ValueError: If this is not a checkpoint, its plan does not fit the module, or its factors do not fit the plan or
            hold values that are not finite. The module is as it was.
    """
    if where is None:
        path = getattr(getattr(module, "_trainer", None), "ckpt_path", None)
        where = "the checkpoint" if path is None else repr(str(path))
    state, record = checkpoint.get("state_dict"), checkpoint.get(RECORD_KEY)
    if not isinstance(state, Mapping) and (state is not None or _VERSION_KEY not in checkpoint):
        raise ValueError(
            f"not a Lightning checkpoint: it has no 'state_dict', but the keys {sorted(map(str, checkpoint))[:8]}"
        )
    plan = read_plan(record, where)
    if state is None:
        _check_sharded(module, plan)
        return
    if record is None:
        _check_record_is_there(module, state)
    check_plan(module, plan)
    if state:
        check_factors(plan.tables, state, where, complete)
        check_backbone_tensors(plan.backbone, state, where, complete)
    if plan != plan_of(module):
        apply_plan(module, plan)


def read_plan(record: Any, where: str) -> Plan:
    """Read the record of a plan; nothing where there is none.

    Raises:
        ValueError: If it is damaged, or one of a newer version; the message begins with `where`.
    """
    try:
        return Plan() if record is None else Plan.from_dict(record)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def _check_sharded(module: nn.Module, plan: Plan) -> None:
    own, wanted = (
        {tuple(map(_unwrapped, table.modules)): table.spec for table in some.tables} for some in (plan_of(module), plan)
    )
    if own != wanted:
        names = ", ".join(sorted(repr(paths[0]) for paths in own.keys() | wanted.keys()))
        raise ValueError(
            f"the tables {names} are stored otherwise in the checkpoint than in the model, and a sharded model cannot "
            "be changed any more: give it the structure before it is sharded, with apply_plan(self, "
            "structure_from_checkpoint(path)) at the end of configure_model"
        )


def _check_record_is_there(module: nn.Module, state: Mapping[str, Any]) -> None:
    stored = {name.partition(".factorization.")[0] for name in state if ".factorization." in name}
    for path, layer in all_modules(module).items():
        if path in stored and isinstance(layer, CompressedLayer | AnyEmbedding | nn.Linear):
            raise ValueError(
                f"the checkpoint has factors of table {path!r}, but does not say how it is compressed: it was saved "
                "without the callback. Load it with model.load_state_dict into a model that was compressed in the same "
                "way, and call keep_structure(model) before you train a model that was compressed by hand"
            )
    backbone = backbone_of(module)
    if backbone is not None and not backbone.weights.keys() & state.keys():
        raise ValueError(
            f"the checkpoint has no weight {next(iter(backbone.weights))!r}, and does not say how it is quantized: "
            "it was "
            "saved without the callback. Load it with model.load_state_dict into a model that was quantized likewise"
        )


def _unwrapped(path: str) -> str:
    """A path as it is in state dicts, which know nothing of what wraps modules to shard or to recompute them."""
    for wrapper in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        path = ".".join(part for part in path.split(".") if part != wrapper)
    return path


def is_spawned(trainer: Trainer) -> bool:
    """Whether this process hands nothing but weights back to the one that started it, as under `ddp_spawn`."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def restores_structure(module: LightningModule | type[LightningModule]) -> bool:
    """Whether a module calls `write_record` and `restore_structure` in its own hooks."""
    return bool(getattr(module, "restores_structure", False))


def keep_structure(module: LightningModule) -> None:
    """Make the checkpoints of a module keep its structure, and give it back. Doing it twice changes nothing.

    For a module that is compressed by hand; the callbacks do it themselves. The hooks are replaced on the instance,
    because callbacks are left out of weights-only checkpoints and their `on_load_checkpoint` comes after the weights
    are loaded, when it is too late. A module with a true `restores_structure` does both itself, after checks of its
    own, and is left alone.

    Args:
        module: Any LightningModule, compressed or not.

    Example:
        >>> module = LightningModule()
        >>> keep_structure(module)
    """
    if not restores_structure(module) and not isinstance(module.__dict__.get("on_save_checkpoint"), _SaveHook):
        module.on_save_checkpoint = _SaveHook(module, module.on_save_checkpoint)  # type: ignore[method-assign]
        module.on_load_checkpoint = _LoadHook(module, module.on_load_checkpoint)  # type: ignore[method-assign]


class _SaveHook:
    """A class, not a closure: the module stays picklable."""

    def __init__(self, module: LightningModule, original: Callable[[dict[str, Any]], None]) -> None:
        self.module = module
        self.original = original

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.original(checkpoint)
        write_record(self.module, checkpoint)


class _LoadHook(_SaveHook):
    def __call__(self, checkpoint: dict[str, Any]) -> None:
        own = getattr(self.original, "__func__", None) is not LightningModule.on_load_checkpoint
        restore_structure(self.module, checkpoint, complete=not own)
        self.original(checkpoint)


def restore_and_tell(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Give a module the structure of a checkpoint and let its own hook see it, before its weights are loaded.

    Args:
        module: What is loaded into.
        checkpoint: Of its class; its hook may change it.

    Raises:
        ValueError: If the tables do not fit; nothing is changed then.
    """
    keeps_itself = restores_structure(module) or isinstance(module.__dict__.get("on_load_checkpoint"), _LoadHook)
    (module.on_load_checkpoint if keeps_itself else _LoadHook(module, module.on_load_checkpoint))(checkpoint)


def structure_from_checkpoint(path: str | os.PathLike[str]) -> Plan:
    """Read which tables are compressed in a checkpoint, and how, without reading its tensors.

    For models that are sharded when they are built: give them the structure first, in `configure_model`, with
    `compression.plan.apply_plan(self, structure_from_checkpoint(path))`.

    Args:
        path: A file of Lightning's Trainer, or the directory that strategies write which save every shard by itself.

    Returns:
        The plan, for `apply_plan`; an empty one for a checkpoint of a dense model.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is no whole checkpoint, holds more than tensors and plain values, or its plan is damaged.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lightning_embcompress import compress
        >>> model = nn.Sequential(nn.Embedding(2000, 64))
        >>> _ = compress(model, "low_rank", ratio=4)
        >>> checkpoint = {"pytorch-lightning_version": "2.6.0", "state_dict": model.state_dict()}
        >>> write_record(model, checkpoint)
        >>> fresh = nn.Sequential(nn.Embedding(2000, 64))
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save(checkpoint, file.name)
        ...     apply_plan(fresh, structure_from_checkpoint(file.name))
        >>> type(fresh[0]).__name__
        'CompressedEmbedding'
    """
    checkpoint = read_mapped(path)
    # In a directory the tensors are elsewhere.
    if not isinstance(checkpoint, Mapping) or not {"state_dict", _VERSION_KEY} & checkpoint.keys():
        raise ValueError(f"{str(path)!r} is not a checkpoint of Lightning's Trainer: it has no 'state_dict'")
    return read_plan(checkpoint.get(RECORD_KEY), repr(str(path)))


def load_from_checkpoint(cls: type[_Module], path: str | os.PathLike[str], **kwargs: Any) -> _Module:
    """`cls.load_from_checkpoint(path)` for any LightningModule class and a checkpoint that may be compressed.

    Lightning's own method reads a compressed checkpoint too, where this package is imported. This one looks for damage
    first, loads nothing but tensors and plain values, and reads checkpoints of before Lightning's could.

    Args:
        cls: The class that the checkpoint was trained with; it need not know of compression.
        path: A Lightning checkpoint.
        **kwargs: What `LightningModule.load_from_checkpoint` takes: `map_location`, hyper-parameters. With
            `weights_only=False` also objects are loaded that can run code: only from a source you trust.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds more than tensors and plain values, or its plan does not fit the module.
    """
    check_whole_file(path)
    if kwargs.get("weights_only") is None:
        # Older versions of Lightning do not take it, and would load whatever there is.
        read_mapped(path)
        kwargs.pop("weights_only", None)
        if "weights_only" in inspect.signature(cls.load_from_checkpoint).parameters:
            kwargs["weights_only"] = True
    where = str(path) if "://" in str(path) else Path(path)
    if restores_structure(cls):
        restored: _Module = cls.load_from_checkpoint(where, **kwargs)
        return restored
    complete = cls.on_load_checkpoint is LightningModule.on_load_checkpoint

    def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        restore_structure(self, checkpoint, complete, repr(str(path)))
        cls.on_load_checkpoint(self, checkpoint)

    # A subclass for the time of loading, so that the class itself is never changed.
    loader: Any = type(cls.__name__, (cls,), {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__})
    model: _Module = loader.load_from_checkpoint(where, **kwargs)
    model.__class__ = cls
    return model
