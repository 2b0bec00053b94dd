"""The record of the structure inside Lightning checkpoints, and loading a compressed model from one."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from torch import nn

from lightning_embcompress.plan import Plan, apply_plan, plan_of

RECORD_KEY = "embcompress"
"""Where a Lightning checkpoint keeps the plan; a checkpoint of a dense model has no such key."""

_Module = TypeVar("_Module", bound=LightningModule)


def write_record(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Record the structure of a module in its checkpoint, if any of it is compressed."""
    plan = plan_of(module)
    if plan.tables:
        checkpoint[RECORD_KEY] = plan.to_dict()


def restore_structure(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give a module the structure that a checkpoint was written with, before its weights are loaded.

    A checkpoint without a record is one of a dense model: a module that is compressed is made dense for it.

    Raises:
        ValueError: If this is not a checkpoint, or its plan does not fit the module, which is then as it was.
    """
    if not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(
            f"not a Lightning checkpoint: it has no 'state_dict', but the keys {sorted(map(str, checkpoint))[:8]}"
        )
    record = checkpoint.get(RECORD_KEY)
    plan = Plan() if record is None else Plan.from_dict(record)
    if plan != plan_of(module):
        apply_plan(module, plan)


def restores_structure(module: LightningModule | type[LightningModule]) -> bool:
    """Whether a module calls `write_record` and `restore_structure` in its own hooks."""
    return bool(getattr(module, "restores_structure", False))


def attach(module: LightningModule) -> None:
    """Make a module keep its structure in checkpoints, and take it from them. Doing it twice changes nothing.

    The hooks are replaced on the instance, because callbacks are left out of weights-only checkpoints and their
    `on_load_checkpoint` comes after the weights are loaded, when it is too late. A module with a true
    `restores_structure` does both itself, after checks of its own, and is left alone.
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
        restore_structure(self.module, checkpoint)
        self.original(checkpoint)


def check_checkpoint_file(path: str | os.PathLike[str]) -> None:
    """Refuse a file that is not a whole checkpoint, before anything is built for it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is cut short or is something else.
    """
    if "://" in str(path):
        # Not on this machine: Lightning reads it through fsspec, and says what is wrong with it.
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    # `torch.save` writes a zip archive, whose directory stands at the end: a truncated file has none.
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{str(path)!r} is not a whole checkpoint: it was cut short or is another kind of file "
            f"({Path(path).stat().st_size} bytes). Resume from an earlier one"
        )


def load_from_checkpoint(cls: type[_Module], path: str | os.PathLike[str], **kwargs: Any) -> _Module:
    """`cls.load_from_checkpoint(path)` for any LightningModule class and a checkpoint that may be compressed.

    Args:
        cls: The class that the checkpoint was trained with; it need not know of compression.
        path: A Lightning checkpoint.
        **kwargs: What `LightningModule.load_from_checkpoint` takes: `map_location`, hyper-parameters.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a whole checkpoint, or its plan does not fit the module.
    """
    check_checkpoint_file(path)
    if restores_structure(cls):
        restored: _Module = cls.load_from_checkpoint(Path(path), **kwargs)
        return restored

    def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        restore_structure(self, checkpoint)
        cls.on_load_checkpoint(self, checkpoint)

    # A subclass for the time of loading, so that the class itself is never changed.
    loader: Any = type(cls.__name__, (cls,), {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__})
    model: _Module = loader.load_from_checkpoint(path, **kwargs)
    model.__class__ = cls
    return model
