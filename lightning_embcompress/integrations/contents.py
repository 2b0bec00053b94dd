"""The content of a model's files: its tensors, mapped into memory, and the plan of its tables."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_embcompress.compression.plan import Plan, plan_of
from lightning_embcompress.compression.records import check_factors, shown
from lightning_embcompress.compression.report import say
from lightning_embcompress.integrations.checkpoint import RECORD_KEY, read_plan
from lightning_embcompress.integrations.checkpoint_io import read_mapped, readable
from lightning_embcompress.integrations.sources import CONFIG_FILE, Source
from lightning_embcompress.utils.progress import progress_bar

_CHUNK_BYTES = 2**22


@dataclass(frozen=True)
class Contents:
    """The content of a model's files.

    Attributes:
        tensors: The plain tensors of its state dict. What transformers ties is there under one name.
        plan: How its tables are compressed; an empty one for a dense model.
        checkpoint: All of a checkpoint; empty for a directory.
    """

    tensors: dict[str, Tensor]
    plan: Plan
    checkpoint: dict[str, Any] = field(default_factory=dict)


def read_contents(source: Source, trust: bool = False) -> Contents:
    """Map the tensors of a model into memory, and read its plan.

    Args:
        source: The model.
        trust: Whether a checkpoint may hold objects, which can run code when they are loaded.

    Raises:
        ValueError: If a file is damaged, or holds objects and is not trusted.
    """
    if source.kind == "checkpoint":
        checkpoint = read_mapped(source.path, weights_only=not trust)
        state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
        if not isinstance(state, Mapping):
            found = sorted(map(str, checkpoint))[:6] if isinstance(checkpoint, dict) else type(checkpoint).__name__
            raise ValueError(
                f"{source.name!r} is not a checkpoint of Lightning's Trainer: it has no 'state_dict', but {found}; "
                "load it into its model in Python, and call lightning_embcompress.compress(model, ...) there"
            )
        plain = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        tensors = {name: one for name, one in plain.items() if one.layout is torch.strided and not one.is_quantized}
        return Contents(tensors, read_plan(checkpoint.get(RECORD_KEY), repr(source.name)), checkpoint)
    is_saved = source.kind == "saved"
    plan = read_plan_of(source)
    if is_saved:
        _check_sums(source)
    tensors = {}
    for file in source.weights:
        try:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            else:
                with readable(file):
                    tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} is damaged or cut short: {one_line(error)}") from error
    return Contents(_with_aliases(tensors, source) if is_saved else tensors, plan)


def read_plan_of(source: Source) -> Plan:
    """The plan of a directory.

    Raises:
        ValueError: If it is damaged.
    """
    record = source.config.get("plan", {}) if source.kind == "saved" else source.config.get("quantization_config")
    return read_plan(record, repr(source.name))


def load_pretrained(source: Source, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a model of transformers, dense or compressed, of the class that its configuration names.

    Args:
        source: A directory of `save_pretrained`.
        dtype: Of the weights; None for that of the files.

    Raises:
        ValueError: If transformers cannot load it, or it would not be whole.
    """
    # Transformers would say it in the middle of many lines.
    read_plan(source.config.get("quantization_config"), repr(source.name))
    arguments = {"dtype": "auto" if dtype is None else dtype, "local_files_only": True, "output_loading_info": True}
    wanted = model_class(source)
    with quiet_transformers(), progress_bar(f"Loading {source.name}", total=None):
        try:
            model, found = wanted.from_pretrained(str(source.path), **arguments)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ValueError(f"{source.name!r} cannot be loaded: {one_line(error)}") from error
    kind = type(model).__name__
    if absent := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise ValueError(
            f"{source.name!r} is not a whole {kind}: {len(absent)} of its tensors are missing from the files or are of "
            f"another shape ({_listed(absent)}), and would be random"
        )
    if unknown := sorted(map(str, found["unexpected_keys"])):
        say(f"No part of a {kind}, and not written: {len(unknown)} tensors ({_listed(unknown)})")
    loaded: nn.Module = model
    check_factors(plan_of(loaded).tables, loaded.state_dict(), repr(source.name))
    return loaded


def model_class(source: Source) -> Any:
    """The class of transformers that a configuration names; `AutoModelForCausalLM` if it names none.

    Not always that one: it would give an encoder a new, random softmax.

    Raises:
        ValueError: If the installed transformers has no such class.
    """
    import transformers

    architectures = source.config.get("architectures") or ["AutoModelForCausalLM"]
    found = getattr(transformers, str(architectures[0]), None)
    if found is None or not hasattr(found, "from_pretrained"):
        own = " (it has code of its own, which is not run)" if "auto_map" in source.config else ""
        raise ValueError(
            f"{source.name!r} is a {architectures[0]!r}, which transformers {transformers.__version__} does not "
            f"have{own}: build the model in Python, and pass it to load_compressed(path, model) or compress(model, ...)"
        )
    return found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing: what matters of it is said in our own words."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The beginning of a message, which others write on many lines."""
    return " ".join(str(error).split())[:300]


def sha256(file: Path) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check_sums(source: Source) -> None:
    """Compare the weights with their checksums, which directories of earlier versions do not have."""
    sums = source.config.get("sha256", {})
    known = {file.name: file for file in source.weights}
    if not isinstance(sums, dict) or not sums.keys() <= known.keys():
        raise ValueError(f"{str(source.path / CONFIG_FILE)!r} is damaged: 'sha256' is {shown(sums)}")
    for name, expected in sums.items():
        if sha256(known[name]) != expected:
            raise ValueError(
                f"{str(known[name])!r} is damaged or cut short, or is not the one that {CONFIG_FILE} beside it was "
                "written with: saving was interrupted between the two files, or one of them was copied alone. Save the "
                "model again, or copy both; if you changed the weights yourself, remove 'sha256' from "
                f"{CONFIG_FILE}"
            )


def _with_aliases(tensors: dict[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Tensors by all their names: those that layers share are stored once."""
    aliases = source.config.get("aliases", {})
    if not isinstance(aliases, dict) or not all(isinstance(stored, str) for stored in aliases.values()):
        raise ValueError(f"{str(source.path / CONFIG_FILE)!r} is damaged: 'aliases' is {shown(aliases)}")
    for stored in aliases.values():
        if stored not in tensors:
            raise ValueError(f"{source.name!r} is damaged: {shown(stored)} is missing from {source.weights[0].name}")
    return {**tensors, **{name: tensors[stored] for name, stored in aliases.items()}}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
