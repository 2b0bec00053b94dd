"""The record of the structure inside checkpoints, and compressed models in files of their own."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_embcompress.factorizations import factorization_from_spec
from lightning_embcompress.layers import CompressedLayer
from lightning_embcompress.plan import Plan, apply_plan, check_plan, plan_of
from lightning_embcompress.tables import all_modules

RECORD_KEY = "embcompress"
"""Where a Lightning checkpoint keeps the plan; a checkpoint of a dense model has no such key."""

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_FORMAT = "lightning-embcompress"

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


def save_compressed(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model with its compressed tables: safetensors and JSON, nothing that is unpickled.

    Tensors that several layers share are stored once. Both files are written under temporary names and renamed, so
    that an interruption leaves what was there before.

    Args:
        model: Any module, compressed or not.
        path: A directory, made if it is missing, for `model.safetensors` and `config.json`.

    Raises:
        ValueError: If the module keeps state that is not a tensor, or the directory holds a `config.json` that
            `save_compressed` did not write.
    """
    directory = Path(path)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name!r} of the model's state is a {type(tensor).__name__}: only tensors can be saved; remove its "
                "get_extra_state"
            )
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        # Tensors without elements share a null pointer: they are not aliases of each other.
        if tensor.numel() and identity in stored:
            aliases[name] = stored[identity]
            continue
        stored[identity] = name
        tensors[name] = tensor.detach().contiguous()
    record_file = directory / CONFIG_FILE
    if record_file.exists() and not _is_ours(record_file):
        raise ValueError(
            f"{str(record_file)!r} belongs to something else, perhaps a Hugging Face model, and would be lost: save to "
            "a directory of its own"
        )
    config = {"format": _FORMAT, "plan": plan_of(model).to_dict(), "aliases": aliases}
    directory.mkdir(parents=True, exist_ok=True)
    weights, record = directory / f".{WEIGHTS_FILE}.tmp", directory / f".{CONFIG_FILE}.tmp"
    try:
        save_file(tensors, weights)
        record.write_text(json.dumps(config, indent=1), encoding="utf-8")
        os.replace(weights, directory / WEIGHTS_FILE)
        os.replace(record, directory / CONFIG_FILE)
    finally:
        weights.unlink(missing_ok=True)
        record.unlink(missing_ok=True)


def _is_ours(file: Path) -> bool:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("format") == _FORMAT


def load_compressed(path: str | os.PathLike[str], model: nn.Module) -> Plan:
    """Load what `save_compressed` wrote into a model built as it was before compression, in place.

    Args:
        path: The directory.
        model: A module of the same architecture; its tables are replaced.

    Returns:
        The plan of the model.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or does not fit the model, which is then as it was.

    Example:
        >>> import tempfile
        >>> from lightning_embcompress.plan import compress
        >>> model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000))
        >>> _ = compress(model, "low_rank", ratio=4)
        >>> fresh = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed(model, folder)
        ...     plan = load_compressed(folder, fresh)
        >>> ids = torch.tensor([1, 2])
        >>> torch.equal(model(ids), fresh(ids))
        True
    """
    directory = Path(path)
    for file in (directory / CONFIG_FILE, directory / WEIGHTS_FILE):
        if not file.is_file():
            raise FileNotFoundError(f"{str(directory)!r} is not a compressed model: {file.name} is missing")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(directory / CONFIG_FILE)!r} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ValueError(f"{str(directory / CONFIG_FILE)!r} was not written by save_compressed")
    plan = Plan.from_dict(config.get("plan"))
    check_plan(model, plan)
    tensors = _read_tensors(directory / WEIGHTS_FILE, config.get("aliases", {}))
    _check_tensors(directory, model, plan, tensors)
    apply_plan(model, plan)
    model.load_state_dict(tensors)
    return plan_of(model)


def _read_tensors(file: Path, aliases: Any) -> dict[str, Tensor]:
    """Tensors of a file by all their names: those that layers share are in it once."""
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is damaged or cut short: {error}") from error
    if not isinstance(aliases, dict):
        raise ValueError(f"{str(file.parent / CONFIG_FILE)!r} is damaged: 'aliases' is {aliases!r}")
    for name, source in aliases.items():
        if source not in tensors:
            raise ValueError(f"{str(file.parent)!r} is damaged: {source!r} is missing from {file.name}")
        tensors[name] = tensors[source]
    return tensors


def _check_tensors(directory: Path, model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Compare tensors with what a model will have once it is compressed as planned, before it is changed."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compressed = [(path, layer) for path, layer in all_modules(model).items() if isinstance(layer, CompressedLayer)]
    for path, layer in compressed:
        expected = _without(expected, f"{path}.factorization.")
        expected[f"{path}.weight"] = (layer.factorization.vocab_size, layer.factorization.dim)
    for table in plan.tables:
        factorization = factorization_from_spec(table.spec, getattr(torch, table.dtype))
        for path in table.modules:
            expected = _without(expected, f"{path}.weight")
            for name, tensor in factorization.state_dict().items():
                expected[f"{path}.factorization.{name}"] = tuple(tensor.shape)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{str(directory)!r} does not fit the model: {name!r} is {found.get(name, 'missing')} in the file "
                f"and {expected.get(name, 'missing')} in the model"
            )
    for table in plan.tables:
        # Loaded on trial: only the factorization itself knows which values are possible.
        prefix = f"{table.name}.factorization."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        try:
            factorization_from_spec(table.spec, getattr(torch, table.dtype)).load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{str(directory / WEIGHTS_FILE)!r} is damaged: {error}") from error


def _without(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
