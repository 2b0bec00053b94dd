"""Models opened from files to replace their tables, written as the kind of files they came from, or trained on."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_embcompress.integrations.checkpoint import (
    RECORD_KEY,
    restore_and_tell,
    write_record,
)
from lightning_embcompress.integrations.contents import Contents, load_pretrained, quiet_transformers, read_contents
from lightning_embcompress.integrations.saved import load_compressed, save_compressed
from lightning_embcompress.integrations.skeleton import build_skeleton, choose_tables
from lightning_embcompress.integrations.sources import CONFIG_FILE, REPORT_FILE, Source, module_folders
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.tables.finding import all_modules
from lightning_embcompress.tables.transformers_models import only_model

# What only goes on with the training of the model that was: the optimizer's state of tables that are no more, the
# callbacks' memory of them, and the other model of weight averaging.
_TRAINING_KEYS = frozenset({"callbacks", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state"})

_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "*processor_config.json",
)
# Weights of the model as it was, in whatever format, and what only training goes on from.
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".msgpack", ".ot", ".gguf", ".ggml"),
    *(".onnx", ".onnx_data", ".tflite", ".mlmodel", ".pdparams", ".engine"),
)


@dataclass
class OpenedModel:
    """A model that was read from files.

    Attributes:
        source: Where it is from.
        model: A model of transformers; of other kinds, whose class is not known, a skeleton with its tables, which
            cannot be called.
        contents: The files' content, where it is a skeleton.
        tokenizer: A directory whose tokenizer is written beside a model of transformers that has none of its own.
    """

    source: Source
    model: nn.Module
    contents: Contents | None = None
    tokenizer: Path | None = None

    def default_tables(self) -> str | list[str]:
        """The tables to compress if nobody says which, as for `compress`: a skeleton's are those with the most rows.

        Raises:
            ValueError: If a skeleton does not tell them.
        """
        return "auto" if self.source.kind == "pretrained" else choose_tables(self.model)

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype of most numbers in the files; None if it is not known."""
        if self.contents is not None:
            floats = [one for one in self.contents.tensors.values() if one.is_floating_point()]
            return max(floats, key=lambda one: one.numel()).dtype if floats else None
        config = self.source.config
        name = config.get("dtype", config.get("torch_dtype"))
        found = getattr(torch, name, None) if isinstance(name, str) else None
        return found if isinstance(found, torch.dtype) else None

    @property
    def dropped(self) -> list[str]:
        """The parts of the checkpoint that are not written."""
        return [] if self.contents is None else sorted(_TRAINING_KEYS & self.contents.checkpoint.keys())

    @property
    def left_out(self) -> list[str]:
        """Files and folders of the directory that are not copied: they hold the weights in other formats."""
        return self._beside[1] if self.source.is_directory else []

    def write(self, path: Path) -> None:
        """Write the model as it is now, as the kind of files it came from, with all that lies beside them.

        Args:
            path: An empty directory, or a file that does not exist yet.
        """
        if self.source.is_directory:
            self._write_directory(path)
        else:
            assert self.contents is not None
            self._write_checkpoint(path, self.contents)

    def _write_directory(self, path: Path) -> None:
        model: Any = self.model
        if self.source.kind == "saved":
            save_compressed(model, path)
        else:
            arguments = {}
            if module_folders(self.source.path):
                # Programs of sentence-transformers may never import this package. There transformers reports tables as
                # missing, and loads all else; their entries would end it.
                layers = all_modules(model).items()
                tables = {f"{name}.weight" for name, layer in layers if isinstance(layer, CompressedLayer)}
                arguments["state_dict"] = {
                    name: tensor for name, tensor in model.state_dict().items() if name not in tables
                }
            with quiet_transformers():
                model.save_pretrained(path, **arguments)
        copy_beside(self.beside(), path)

    def beside(self) -> dict[str, Path]:
        """Files that are not of the model, by their places in the directory."""
        found = {name: self.source.path / name for name in self._beside[0]}
        if self.tokenizer is not None and not self.source.has_tokenizer:
            found |= {file.name: file for pattern in _TOKENIZER_FILES for file in self.tokenizer.glob(pattern)}
        return found

    @cached_property
    def _beside(self) -> tuple[list[str], list[str]]:
        """Files beside the weights, relative to the directory; and what there is of the weights in other formats.

        As it was before anything was written, which may be in the same directory.

        Nobody here knows what they are for: modules that sentence-transformers runs after the model, a card, code. A
        folder that holds weights is another model, unless a list of modules names it.
        """
        folder, modules = self.source.path, module_folders(self.source.path)
        own = {file.name for file in self.source.weights} | {CONFIG_FILE, REPORT_FILE}
        kept: list[str] = []
        left_out: list[str] = []
        for entry in sorted(folder.iterdir()):
            if entry.is_file():
                is_weights = entry.name.endswith(_WEIGHT_SUFFIXES)
                if entry.name in own or entry.name.endswith(".index.json"):
                    continue
                (left_out if is_weights else kept).append(entry.name)
            elif not entry.name.startswith("."):
                files = [file for file in sorted(entry.rglob("*")) if file.is_file()]
                is_other = entry.name not in modules and any(file.name.endswith(_WEIGHT_SUFFIXES) for file in files)
                if is_other:
                    left_out.append(f"{entry.name}/")
                else:
                    kept += [str(file.relative_to(folder)) for file in files]
        return kept, left_out

    def _write_checkpoint(self, path: Path, contents: Contents) -> None:
        """Write a checkpoint as the Trainer does with `weights_only`, and with all that others have put there."""
        checkpoint = {name: value for name, value in contents.checkpoint.items() if name not in _TRAINING_KEYS}
        checkpoint.pop(RECORD_KEY, None)
        write_record(self.model, checkpoint)
        old = checkpoint["state_dict"]
        # What `get_extra_state` returned, and tensors without memory of their own, are taken over as they are.
        others = {name: value for name, value in old.items() if name not in contents.tensors}
        state = OrderedDict({**self.model.state_dict(), **others})
        if hasattr(old, "_metadata"):
            # The versions of modules, by which some of them tell how to read their tensors.
            state._metadata = old._metadata  # type: ignore[attr-defined]
        checkpoint["state_dict"] = state
        torch.save(checkpoint, path)


def copy_beside(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files into a directory, but for those that it has.

    Args:
        files: By their places in it.
        folder: The directory.
    """
    for name, file in files.items():
        if file.is_file() and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def open_model(
    source: Source, dtype: str | None = None, trust: bool = False, tokenizer: Path | None = None
) -> OpenedModel:
    """Read a model whose tables are to be replaced; one whose class is not known is not built for it.

    Args:
        source: The model.
        dtype: What it is cast to (`"bfloat16"`); None for its own.
        trust: Whether a checkpoint may hold objects, which can run code when they are loaded.
        tokenizer: A directory whose tokenizer is written beside a model of transformers that has none.

    Raises:
        ValueError: If it cannot be read.
    """
    wanted = None if dtype is None else getattr(torch, dtype)
    if source.kind == "pretrained":
        if (source.path / "adapter_config.json").is_file():
            raise ValueError(
                f"{source.name!r} has an adapter of PEFT beside the model, which would be lost: merge it into that "
                "first (merge_and_unload, save_pretrained)"
            )
        return OpenedModel(source, load_pretrained(source, wanted), tokenizer=tokenizer)
    contents = read_contents(source, trust)
    return OpenedModel(source, build_skeleton(contents.tensors, contents.plan, repr(source.name), wanted), contents)


def load_weights(module: LightningModule, source: Source) -> None:
    """Give a module the structure and the weights of files.

    Args:
        module: What is loaded into, dense or compressed.
        source: A checkpoint of its class, what `save_compressed` wrote of one, or a compressed model of transformers
            as it is in the module.

    Raises:
        ValueError: If the files are damaged or do not fit; tables and weights are as they were.
    """
    if source.kind == "pretrained" and "quantization_config" not in source.config:
        raise ValueError(f"weights={source.name!r} is a model of its own: give it as model, without weights.")
    if source.kind != "checkpoint":
        load_compressed(source.path, only_model(module) if source.kind == "pretrained" else module)
        return
    # The class's own way, so that its hooks see the checkpoint; the arguments are those of the module that is there.
    checkpoint = read_contents(source).checkpoint
    restore_and_tell(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
