"""What the shell's commands read: which kind of model a path or a name stands for. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning_embcompress.utils.files import read_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REPORT_FILE = "report.json"
"""What the shell's commands write beside a model."""
SAVED_FORMAT = "lightning-embcompress"
"""The `format` in `config.json` of what `save_compressed` wrote."""
QUANT_METHOD = "embcompress"
"""Under this name `config.json` of a model of transformers records the plan, and transformers finds our quantizer."""
_INSTANTIATORS = "lightning_embcompress.integrations.instantiators"
INSTANTIATORS = {
    None: f"{_INSTANTIATORS}.instantiate",
    "lightning.pytorch.cli.instantiate_module": f"{_INSTANTIATORS}.instantiate_by_cli",
}
"""What compressed checkpoints name to be built with, by what those of dense modules name."""

# In the order in which transformers looks for them.
_WEIGHTS = (WEIGHTS_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".json", ".yaml", ".yml")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
# What a repository of the hub also holds: the same weights in other formats, and other repositories' layouts.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*")
_HUB_IGNORED = ("consolidated*", "original/*", "onnx/*", "openvino/*", "*/*.safetensors")

Kind: TypeAlias = Literal["pretrained", "checkpoint", "saved"]
"""A directory of `save_pretrained`, a file of Lightning's Trainer, or a directory of `save_compressed`."""


@dataclass(frozen=True)
class Source:
    """A model in files.

    Attributes:
        name: What a person calls it.
        path: The directory or the file.
        kind: What it is.
        config: Content of its `config.json`; empty for a checkpoint.
        weights: Files with its tensors.
    """

    name: str
    path: Path
    kind: Kind
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[Path, ...] = ()

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory, and so is what is made of it."""
        return self.kind != "checkpoint"

    @property
    def has_tokenizer(self) -> bool:
        """Whether there are files of a tokenizer beside the model."""
        # Asked here, because transformers makes an empty tokenizer of a directory that has none.
        return self.is_directory and any(next(self.path.glob(name), None) for name in _TOKENIZER_FILES)


def find_source(name: str) -> Source:
    """Find the model that a person means.

    Args:
        name: A directory that `save_pretrained` or `save_compressed` has written, a checkpoint of Lightning's Trainer,
            or the name of a model on the Hugging Face hub, which is then downloaded to transformers' cache.

    Raises:
        FileNotFoundError: If there is no such file or directory, or files of it are missing.
        ValueError: If it is something else.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return find_directory(path, name)
    if path.is_file():
        return _checkpoint(name, path)
    # `models/gpt2` where there is a folder `models` is a file's name, if a wrong one.
    is_local = path.suffix in _FILE_SUFFIXES or (len(path.parts) > 1 and path.parent.is_dir())
    if _HUB_NAME.fullmatch(name) and not is_local:
        return find_directory(_download(name), name)
    raise FileNotFoundError(
        f"there is no file or directory {name!r}: give a directory with {CONFIG_FILE}, a checkpoint of Lightning's "
        "Trainer, or the name of a model on the Hugging Face hub"
    )


def _checkpoint(name: str, path: Path) -> Source:
    if path.suffix in (".yaml", ".yml"):
        raise ValueError(f"{name!r} is no model; if it is a recipe: embcompress run {name}")
    if path.suffix in (".safetensors", ".json"):
        raise ValueError(f"{name!r} is a part of a model: give its directory, {str(path.parent)!r}")
    # `torch.save` writes a zip archive, whose directory stands at the end: a truncated file has none.
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{name!r} is not a checkpoint of Lightning's Trainer: it was cut short or is another kind of file "
            f"({path.stat().st_size} bytes)"
        )
    return Source(name, path, "checkpoint", weights=(path,))


def find_directory(path: Path, name: str | None = None) -> Source:
    """Find the model in a directory.

    Args:
        path: A directory that `save_pretrained` or `save_compressed` has written.
        name: What messages call it; None for its path.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If it is something else.
    """
    name = str(path) if name is None else name
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{name!r} is not a model: it has no {CONFIG_FILE}{_hint(path)}")
    config = read_json(path / CONFIG_FILE)
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and method != QUANT_METHOD:
        raise ValueError(
            f"{name!r} is quantized by {method!r}, which would be lost: start from the model before it was quantized"
        )
    if config.get("format") == SAVED_FORMAT:
        return Source(name, path, "saved", config, _weights(name, path))
    if "model_type" in config:
        return Source(name, path, "pretrained", config, _weights(name, path))
    raise ValueError(
        f"{name!r} is not a model: its {CONFIG_FILE} has no 'model_type', as save_pretrained writes it, and was not "
        "written by save_compressed"
    )


def module_folders(path: Path) -> set[str]:
    """Folders of a directory in which sentence-transformers keeps the modules that it runs beside a model.

    Example:
        >>> module_folders(Path("nosuch"))
        set()
    """
    try:
        modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        return {str(module["path"]).partition("/")[0] for module in modules} - {""}
    # There is none, or it is of another program.
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _hint(path: Path) -> str:
    checkpoints = sorted(path.glob("*.ckpt"))
    if checkpoints:
        return f"; to read a checkpoint in it, name the file, for example {str(checkpoints[-1])!r}"
    if (path / ".metadata").is_file():
        return (
            "; if it is a sharded checkpoint of Lightning, make it one file first: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    if (path / "adapter_config.json").is_file():
        return "; it is an adapter of PEFT: merge it into its model first (merge_and_unload, save_pretrained)"
    folders = [path / folder for folder in sorted(module_folders(path))]
    for folder in folders:
        # Layers beside a transformer have a configuration too.
        if (folder / CONFIG_FILE).is_file() and "model_type" in read_json(folder / CONFIG_FILE):
            return f"; if it is a model of sentence-transformers, name the folder of its transformer: {str(folder)!r}"
    if folders:
        return (
            "; if it is a model of sentence-transformers, none of its modules is a transformer: compress it in Python, "
            "with compress(SentenceTransformer(path), ...) and save_compressed"
        )
    return ": give a directory that save_pretrained or save_compressed has written"


def _weights(name: str, path: Path) -> tuple[Path, ...]:
    """The files with the tensors, all of which must be there."""
    first = next((path / file for file in _WEIGHTS if (path / file).is_file()), None)
    if first is None:
        raise FileNotFoundError(
            f"{name!r} is not a whole model: it has none of {', '.join(_WEIGHTS)}; copy the weights there, or save the "
            "model again"
        )
    if first.suffix != ".json":
        return (first,)
    shards = read_json(first).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{str(first)!r} is damaged: 'weight_map' is {shards!r}")
    files = tuple(path / str(file) for file in sorted(set(shards.values())))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name!r} is not a whole model: {', '.join(missing)} of its {len(files)} files of weights "
            f"{'is' if len(missing) == 1 else 'are'} missing; copy what is missing there, or save the model again"
        )
    return files


def _download(name: str) -> Path:
    """A model of the hub, in transformers' cache."""
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_IGNORED)))
        if not any((path / file).is_file() for file in _WEIGHTS):
            # An older model, of which there are no other weights.
            path = Path(snapshot_download(name, allow_patterns=[*_HUB_FILES, "pytorch_model*.bin"]))
        if modules := module_folders(path):
            path = Path(snapshot_download(name, allow_patterns=[f"{folder}/*" for folder in sorted(modules)]))
    # Whatever can go wrong between here and a server, the remedy is the same.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"there is no file or directory {name!r}, and it cannot be read from the Hugging Face hub: {reason}"
        ) from error
    return path
