"""Compressed models in files of their own: safetensors and JSON, nothing that is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, overload

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_embcompress.compression.backbone_files import backbone_shapes, check_backbone_tensors
from lightning_embcompress.compression.plan import Plan, apply_plan, check_plan, plan_of
from lightning_embcompress.compression.records import check_factors
from lightning_embcompress.integrations.contents import load_pretrained, read_contents, read_plan_of, sha256
from lightning_embcompress.integrations.row_files import DEFAULT_CACHE, RowFiles, rows_on_disk, tables_on_disk
from lightning_embcompress.integrations.skeleton import build_skeleton, put_at
from lightning_embcompress.integrations.sources import CONFIG_FILE, SAVED_FORMAT, WEIGHTS_FILE, Source, find_directory
from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLayer
from lightning_embcompress.quantization.aware import converted
from lightning_embcompress.tables.finding import all_modules
from lightning_embcompress.tables.transformers_models import only_model
from lightning_embcompress.utils.chunk_sums import SUFFIX
from lightning_embcompress.utils.files import explaining_failure, replacing, synchronize
from lightning_embcompress.utils.inference import outside_inference_mode
from lightning_embcompress.utils.storage import allocate, check_in_memory, check_plain, check_whole, identity_of

Rows: TypeAlias = Literal["memory", "mmap"]
"""Where the rows of tables are that are looked up alone."""


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
        ValueError: If the module is sharded, or keeps state that is not a tensor, or weights that another library has
            quantized, or the directory holds a `config.json` that `save_compressed` did not write.
        OSError: If a file cannot be written; what was there before is as it was.
    """
    check_whole(model, "saved by save_compressed")
    check_in_memory(model, "the model")
    with converted(model):
        check_plain(model, "save_compressed")
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
        if tensor.is_meta:
            raise ValueError(f"{name!r} of the model is on the meta device and has no values: load the model before")
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
    config = {"format": SAVED_FORMAT, "plan": plan_of(model).to_dict(), "aliases": aliases}
    directory.mkdir(parents=True, exist_ok=True)
    # Left in the opposite order: the weights get their name first, when both files are whole.
    with (
        explaining_failure(directory / WEIGHTS_FILE),
        replacing(record_file) as record,
        replacing(directory / WEIGHTS_FILE) as weights,
    ):
        save_file(tensors, weights)
        config["sha256"] = {WEIGHTS_FILE: sha256(weights)}
        record.write_text(json.dumps(config, indent=1), encoding="utf-8")
        # Here already, so that little time is between the two names.
        synchronize(record)
        # Of a file that was there before.
        (directory / (WEIGHTS_FILE + SUFFIX)).unlink(missing_ok=True)


def _is_ours(file: Path) -> bool:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("format") == SAVED_FORMAT


@overload
def load_compressed(
    path: str | os.PathLike[str], model: nn.Module, *, rows: Rows = "memory", row_cache: str | int = DEFAULT_CACHE
) -> Plan: ...


@overload
def load_compressed(
    path: str | os.PathLike[str], model: None = None, *, rows: Rows = "memory", row_cache: str | int = DEFAULT_CACHE
) -> nn.Module: ...


@outside_inference_mode
def load_compressed(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    rows: Rows = "memory",
    row_cache: str | int = DEFAULT_CACHE,
) -> Plan | nn.Module:
    """Load what `save_compressed`, or `save_pretrained` of a compressed model of transformers, wrote.

    Args:
        path: The directory.
        model: A module of the same architecture, dense or compressed in whatever way: its tables are replaced, in
            place; it keeps its dtype, and its device unless that is the meta device. It may hold the model of
            transformers that was saved. Without it the model is built as the directory says, which only one that
            `save_pretrained` wrote does; of tables alone, as `embcompress compress-table` writes them, it has their
            layers at their paths.
        rows: `memory`, or `mmap`: tables that are looked up alone, embeddings that no softmax shares, stay in their
            file, and a lookup reads the rows that it needs. They do not train.
        row_cache: Of rows that stay in the file, most bytes that are kept decoded, the last ones asked for, of every
            table; in bytes or as `"64MB"`.

    Returns:
        The plan of the model that was given, or the model that was built.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or does not fit the model, which is then as it was.

    Example:
        >>> import tempfile
        >>> import torch
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
    if rows not in get_args(Rows):
        raise ValueError(f"rows must be one of {', '.join(map(repr, get_args(Rows)))}, it is {rows!r}")
    source = find_directory(Path(path))
    is_saved = source.kind == "saved"
    if not is_saved and "quantization_config" not in source.config:
        raise ValueError(
            f"{source.name!r} was not written by save_compressed, nor by save_pretrained of a compressed model"
        )
    files = RowFiles.of(source, row_cache) if rows == "mmap" and is_saved else None
    if model is None and source.config.get("has_tables_only"):
        return _tables_alone(source, files)
    if model is None and is_saved:
        raise ValueError(
            f"{source.name!r} was written by save_compressed and does not say what kind of model it is: build one "
            "as it was before compression and pass it, as in load_compressed(path, model)"
        )
    if model is None:
        with rows_on_disk(row_cache) if rows == "mmap" else nullcontext():
            return load_pretrained(source)
    # A LightningModule, say, around the model that was saved.
    model = model if is_saved else only_model(model) or model
    plan, on_disk = read_plan_of(source), {}
    check_plan(model, plan)
    if rows == "mmap":
        files = files or RowFiles.of(source, row_cache)
        on_disk = tables_on_disk(plan, model, files)
        tensors = _beside(files, plan, on_disk, source)
    else:
        tensors = read_contents(source).tensors
    in_memory = replace(plan, tables=tuple(table for table in plan.tables if table.name not in on_disk))
    if not is_saved:
        tensors |= {name: tensors[stored] for name, stored in _aliases(model, in_memory, tensors).items()}
    stays = {path for table in plan.tables if table.name in on_disk for path in table.modules}
    _check_tensors(repr(source.name), model, in_memory, tensors, stays, bool(source.config.get("has_tables_only")))
    check_in_memory(model, "the model")
    for path in stays:
        layer = model.get_submodule(path)
        if isinstance(layer, AnyEmbedding) and layer.weight.is_meta:
            # No memory for what is on disk: one number stands for all.
            layer.weight = nn.Parameter(torch.empty((), dtype=layer.weight.dtype).expand(layer.weight.shape))
    allocate(model)
    apply_plan(model, plan, on_disk)
    model.load_state_dict(tensors, strict=not stays and not source.config.get("has_tables_only"))
    return plan_of(model)


def _tables_alone(source: Source, files: RowFiles | None) -> nn.Module:
    """Layers of tables that were compressed without their model."""
    if files is None:
        contents = read_contents(source)
        return build_skeleton(contents.tensors, contents.plan, repr(source.name))
    model = nn.Module()
    for table in read_plan_of(source).tables:
        if (rows := files.table(table)) is None:
            raise ValueError(f"table {table.name!r} has nothing to be read by rows: load it with rows='memory'")
        for path in table.modules:
            put_at(model, path, CompressedEmbedding(rows))
    return model


def _beside(files: RowFiles, plan: Plan, on_disk: Mapping[str, Any], source: Source) -> dict[str, Tensor]:
    """Tensors beside tables whose rows stay in files, by all their names."""
    stays = tuple(
        f"{path}.{own}"
        for table in plan.tables
        if table.name in on_disk
        for path in table.modules
        for own in ("factorization.", "weight")
    )
    tensors = {name: tensor.read() for name, tensor in files.tensors.items() if not name.startswith(stays)}
    aliases = source.config.get("aliases", {})
    return tensors | {name: tensors[stored] for name, stored in aliases.items() if stored in tensors}


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


def _check_tensors(
    where: str, model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], stays: Collection[str], tables_only: bool
) -> None:
    """Compare tensors with what a model will have once it is compressed as planned, before it is changed.

    Those of layers that stay on disk are not looked at; nor what a model has beside tables, where there are no others.
    """
    check_factors(plan.tables, tensors, where)
    check_backbone_tensors(plan.backbone, tensors, where)
    layers = {path: layer for path, layer in all_modules(model).items() if isinstance(layer, CompressedLayer)}
    state = {name: tensor for name, tensor in model.state_dict().items() if _table_of(name) not in layers}
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for path, layer in layers.items():
        expected[f"{path}.weight"] = (layer.factorization.vocab_size, layer.factorization.dim)
    expected = backbone_shapes(model, plan.backbone, expected)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    tables = {path for table in plan.tables for path in table.modules} | set(stays)
    for name in sorted(found if tables_only else expected.keys() | found.keys()):
        if _table_of(name) not in tables and expected.get(name) != found.get(name):
            raise ValueError(
                f"{where} does not fit the model: {name!r} is {found.get(name, 'missing')} in the file and "
                f"{expected.get(name, 'missing')} in the model"
            )


def _table_of(name: str) -> str:
    """The layer whose table a tensor is, or a factor of it; of other tensors, their name."""
    path, is_factor, _ = name.partition(".factorization.")
    return path if is_factor else name.removesuffix(".weight")
