"""Compressed models in files of their own: safetensors and JSON, nothing that is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_embcompress.compression.backbone_files import backbone_shapes, check_backbone_tensors
from lightning_embcompress.compression.plan import Plan, apply_plan, check_plan, plan_of
from lightning_embcompress.compression.records import check_factors, dtype_of, shown
from lightning_embcompress.integrations import huggingface
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.methods.registry import factorization_from_spec
from lightning_embcompress.quantization.aware import converted
from lightning_embcompress.tables.replacement import all_modules
from lightning_embcompress.tables.transformers_models import only_model
from lightning_embcompress.utils.files import explaining_failure, read_json, replacing, synchronize
from lightning_embcompress.utils.storage import check_whole, identity_of

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_FORMAT = "lightning-embcompress"
_CHUNK_BYTES = 2**22


def save_compressed(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model with its compressed tables: safetensors and JSON, nothing that is unpickled.

    Factors, and weights beside the tables, that are prepared for quantization are stored as the integers that they
    train for; the model itself stays as it is, and can go on training. Tensors that several layers share are stored
    once. Both files are written under temporary names and renamed, so that an interruption leaves what was there
    before. `config.json` has the checksum of the weights it belongs to: if the process is killed between the two,
    loading says so.

    Args:
        model: Any module, compressed or not.
        path: A directory, made if it is missing, for `model.safetensors` and `config.json`.

    Raises:
        ValueError: If the module is sharded, or keeps state that is not a tensor, or the directory holds a
            `config.json` that `save_compressed` did not write.
        OSError: If a file cannot be written; what was there before is as it was.
    """
    check_whole(model, "saved by save_compressed")
    with converted(model):
        _save(model, Path(path))


def _save(model: nn.Module, directory: Path) -> None:
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name!r} of the model's state is a {type(tensor).__name__}: only tensors can be saved; remove its "
                "get_extra_state"
            )
        if (identity := identity_of(tensor)) in stored:
            aliases[name] = stored[identity]
            continue
        stored[identity] = name
        tensors[name] = tensor.detach().contiguous()
    record_file = directory / CONFIG_FILE
    if record_file.exists() and not _is_ours(record_file):
        raise ValueError(
            f"{str(record_file)!r} belongs to something else, perhaps a Hugging Face model, and would be lost: save to "
            "a directory of its own, or a model of transformers with model.save_pretrained(path)"
        )
    config = {"format": _FORMAT, "plan": plan_of(model).to_dict(), "aliases": aliases}
    directory.mkdir(parents=True, exist_ok=True)
    # Left in the opposite order: the weights get their name first, when both files are whole.
    with (
        explaining_failure(directory / WEIGHTS_FILE),
        replacing(record_file) as record,
        replacing(directory / WEIGHTS_FILE) as weights,
    ):
        save_file(tensors, weights)
        config["sha256"] = {WEIGHTS_FILE: _sha256(weights)}
        record.write_text(json.dumps(config, indent=1), encoding="utf-8")
        # Here already, so that little time is between the two names.
        synchronize(record)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _is_ours(file: Path) -> bool:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("format") == _FORMAT


@overload
def load_compressed(path: str | os.PathLike[str], model: nn.Module) -> Plan: ...


@overload
def load_compressed(path: str | os.PathLike[str], model: None = None) -> nn.Module: ...


def load_compressed(path: str | os.PathLike[str], model: nn.Module | None = None) -> Plan | nn.Module:
    """Load what `save_compressed`, or `save_pretrained` of a compressed model of transformers, wrote.

    Args:
        path: The directory.
        model: A module of the same architecture, dense or compressed in whatever way: its tables are replaced, in
            place; it keeps its dtype. It may hold the model of transformers that was saved. Without it the model is
            built as the directory says, which only one that `save_pretrained` wrote does.

    Returns:
        The plan of the model that was given, or the model that was built.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or does not fit the model, which is then as it was.

    Example:
        >>> import tempfile
        >>> from lightning_embcompress.compression.plan import compress
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
    config = _read_config(directory)
    if config.get("format") != _FORMAT:
        if model is None:
            return _build_pretrained(directory, config)
        # A LightningModule, say, around the model that was saved.
        model = only_model(model) or model
    elif model is None:
        raise ValueError(
            f"{str(directory)!r} was written by save_compressed and does not say what kind of model it is: build one "
            "as it was before compression and pass it, as in load_compressed(path, model)"
        )
    record = config.get("quantization_config") if config.get("format") != _FORMAT else config.get("plan")
    plan = Plan.from_dict(record)
    check_plan(model, plan)
    tensors = _read_tensors(directory, config, model, plan)
    _check_tensors(directory, model, plan, tensors)
    apply_plan(model, plan)
    model.load_state_dict(tensors)
    return plan_of(model)


def _read_config(directory: Path) -> dict[str, Any]:
    """`config.json`, after a look at whether all files are there."""
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{str(directory)!r} is not a compressed model: {file.name} is missing")
    config = read_json(file)
    quantization = config.get("quantization_config")
    of_transformers = isinstance(quantization, dict) and quantization.get("quant_method") == huggingface.QUANT_METHOD
    if config.get("format") != _FORMAT and not of_transformers:
        raise ValueError(
            f"{str(file)!r} was not written by save_compressed, nor by save_pretrained of a compressed model"
        )
    for weights in _weight_files(directory):
        if not weights.is_file():
            raise FileNotFoundError(
                f"{str(directory)!r} is not a whole compressed model: {weights.name} is missing; copy it there, or "
                "save the model again"
            )
    check_sums(directory, config)
    return config


def check_sums(directory: Path, config: Mapping[str, Any]) -> None:
    """Compare the weights with what is said of them, which directories of earlier versions do not say.

    Args:
        directory: What `save_compressed` wrote.
        config: Content of its `config.json`.

    Raises:
        ValueError: If a file of weights is not the one that `config.json` was written with.
    """
    sums = config.get("sha256", {}) if config.get("format") == _FORMAT else {}
    known = {file.name: file for file in _weight_files(directory)}
    if not isinstance(sums, dict) or not sums.keys() <= known.keys():
        raise ValueError(f"{str(directory / CONFIG_FILE)!r} is damaged: 'sha256' is {shown(sums)}")
    for name, expected in sums.items():
        if _sha256(known[name]) != expected:
            raise ValueError(
                f"{str(known[name])!r} is damaged or cut short, or is not the one that {CONFIG_FILE} beside it was "
                "written with: saving was interrupted between the two files, or one of them was copied alone. Save the "
                "model again, or copy both; if you changed the weights yourself, remove 'sha256' from "
                f"{CONFIG_FILE}"
            )


def _weight_files(directory: Path) -> list[Path]:
    """The file of the weights, or those that it was split into."""
    index = directory / INDEX_FILE
    if (directory / WEIGHTS_FILE).is_file() or not index.is_file():
        return [directory / WEIGHTS_FILE]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{str(index)!r} is damaged: 'weight_map' is {names!r}")
    return [directory / str(name) for name in sorted(set(names.values()))]


def _build_pretrained(directory: Path, config: Mapping[str, Any]) -> nn.Module:
    """The model that a directory of transformers describes."""
    import transformers

    Plan.from_dict(config["quantization_config"])
    architectures = config.get("architectures") or ["AutoModelForCausalLM"]
    architecture = getattr(transformers, str(architectures[0]), None)
    if architecture is None:
        raise ValueError(
            f"{str(directory / CONFIG_FILE)!r} names the architecture {architectures[0]!r}, which transformers "
            f"{transformers.__version__} does not have: build the model and pass it, as in load_compressed(path, model)"
        )
    model: nn.Module = architecture.from_pretrained(directory)
    check_factors(plan_of(model).tables, model.state_dict(), repr(str(directory)))
    return model


def _read_tensors(directory: Path, config: Mapping[str, Any], model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Tensors by all their names: those that layers share are stored once."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(directory):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is damaged or cut short: {str(error)[:300]}") from error
    aliases = config.get("aliases", {}) if config.get("format") == _FORMAT else _aliases(model, plan, tensors)
    return with_aliases(tensors, aliases, directory)


def with_aliases(tensors: Mapping[str, Tensor], aliases: Any, directory: Path) -> dict[str, Tensor]:
    """Tensors by all their names.

    Args:
        tensors: Those that are stored, by the names they are stored under.
        aliases: Of other names, under which a tensor is stored.
        directory: What messages call it.

    Raises:
        ValueError: If `aliases` is no such mapping, or names a tensor that is not there.
    """
    if not isinstance(aliases, dict) or not all(isinstance(source, str) for source in aliases.values()):
        raise ValueError(f"{str(directory / CONFIG_FILE)!r} is damaged: 'aliases' is {shown(aliases)}")
    for source in aliases.values():
        if source not in tensors:
            raise ValueError(f"{str(directory)!r} is damaged: {shown(source)} is missing from {WEIGHTS_FILE}")
    return {**tensors, **{name: tensors[source] for name, source in aliases.items()}}


def _aliases(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Other names of tensors that transformers stored under one: those of the plan's ties, and of the model's own."""
    aliases: dict[str, str] = {}
    for table in plan.tables:
        stored = [name for name in tensors if name.startswith(f"{table.name}.factorization.")]
        for path in table.modules[1:]:
            aliases |= {path + name.removeprefix(table.name): name for name in stored}
    state = model.state_dict(keep_vars=True)
    stored_names = {id(tensor): name for name, tensor in state.items() if name in tensors}
    return aliases | {
        name: stored_names[id(tensor)]
        for name, tensor in state.items()
        if name not in tensors and id(tensor) in stored_names
    }


def _check_tensors(directory: Path, model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Compare tensors with what a model will have once it is compressed as planned, before it is changed."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compressed = [(path, layer) for path, layer in all_modules(model).items() if isinstance(layer, CompressedLayer)]
    for path, layer in compressed:
        expected = _without(expected, f"{path}.factorization.")
        expected[f"{path}.weight"] = (layer.factorization.vocab_size, layer.factorization.dim)
    for table in plan.tables:
        factorization = factorization_from_spec(table.spec, dtype_of(table.dtype), torch.device("meta"))
        for path in table.modules:
            expected = _without(expected, f"{path}.weight")
            for name, tensor in factorization.state_dict().items():
                expected[f"{path}.factorization.{name}"] = tuple(tensor.shape)
    expected = backbone_shapes(model, plan.backbone, expected)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{str(directory)!r} does not fit the model: {name!r} is {found.get(name, 'missing')} in the file "
                f"and {expected.get(name, 'missing')} in the model"
            )
    check_factors(plan.tables, tensors, repr(str(directory / WEIGHTS_FILE)))
    check_backbone_tensors(plan.backbone, tensors, repr(str(directory / WEIGHTS_FILE)))


def _without(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
