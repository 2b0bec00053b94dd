"""Models in files: opened so that their tables can be replaced, and written as what they came from."""

from __future__ import annotations

import pickle
import re
import shutil
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_embcompress.cli.skeleton import build_skeleton, choose_tables, tie_equal
from lightning_embcompress.compression.plan import Plan, plan_of
from lightning_embcompress.compression.records import check_factors
from lightning_embcompress.compression.report import say
from lightning_embcompress.integrations.checkpoint import RECORD_KEY, write_record
from lightning_embcompress.integrations.saved import check_sums, save_compressed, with_aliases
from lightning_embcompress.integrations.sources import Source

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
_LICENSE_FILES = ("LICENSE*", "NOTICE*")


class OpenedModel(ABC):
    """A model that was read.

    Attributes:
        source: Where it is from.
        model: What holds its tables.
    """

    source: Source
    model: nn.Module

    @abstractmethod
    def default_tables(self) -> str | list[str]:
        """What to compress if nobody says: as for `compress`."""

    @abstractmethod
    def write(self, path: Path) -> None:
        """Write the model as it is now.

        Args:
            path: An empty directory, or a file that does not exist yet.
        """


class PretrainedModel(OpenedModel):
    """A model of transformers, of the class that its configuration names.

    Args:
        source: A directory of `save_pretrained`.
        dtype: Of the weights; None for that of the files.
        tokenizer: A directory whose tokenizer is written beside the model, if it has none of its own.

    Raises:
        ValueError: If transformers cannot load it, or it would not be whole.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None = None, tokenizer: Path | None = None) -> None:
        """Load it."""
        self.source = source
        self.tokenizer = tokenizer
        if source.config.get("quantization_config") is not None:
            # Transformers would say it in the middle of many lines.
            read_plan(source.config["quantization_config"], source.name)
        with quiet_transformers():
            self.model = self._load(model_class(source), dtype)

    def _load(self, kind: Any, dtype: torch.dtype | None) -> nn.Module:
        path = str(self.source.path)
        arguments = {"dtype": "auto" if dtype is None else dtype, "local_files_only": True}
        try:
            model, found = kind.from_pretrained(path, output_loading_info=True, **arguments)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ValueError(f"{self.source.name!r} cannot be loaded: {one_line(error)}") from error
        absent = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
        if absent:
            shown = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
            raise ValueError(
                f"{self.source.name!r} is not a whole {type(model).__name__}: {len(absent)} of its tensors are missing "
                f"from the files or are of another shape ({shown}), and would be random"
            )
        unknown = sorted(map(str, found["unexpected_keys"]))
        if unknown:
            shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
            say(f"No part of a {type(model).__name__}, and not written: {len(unknown)} tensors ({shown})")
        loaded: nn.Module = model
        check_factors(plan_of(loaded).tables, loaded.state_dict(), repr(self.source.name))
        return loaded

    def default_tables(self) -> str:
        """The model says which they are."""
        return "auto"

    def write(self, path: Path) -> None:
        """Write what `from_pretrained` reads, and the files of the tokenizer."""
        model: Any = self.model
        with quiet_transformers():
            model.save_pretrained(path)
        written = {file.name for file in path.iterdir()}
        folder = self.source.path if self.source.has_tokenizer or self.tokenizer is None else self.tokenizer
        patterns = [(folder, _TOKENIZER_FILES), (self.source.path, _LICENSE_FILES)]
        for origin, names in patterns:
            for file in [file for name in names for file in origin.glob(name)]:
                if file.is_file() and file.name not in written:
                    shutil.copyfile(file, path / file.name)


class CheckpointModel(OpenedModel):
    """The tables of a LightningModule of any class, in a checkpoint; everything else in it is kept as it is.

    Args:
        source: A checkpoint of the Trainer.
        dtype: What its floating-point tensors are cast to; None for nothing.
        trust: Whether it may hold objects that can run code when they are loaded.

    Raises:
        ValueError: If it is no checkpoint, or cannot be read without trust.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None = None, trust: bool = False) -> None:
        """Read it, without reading its tensors before they are used."""
        self.source = source
        self.checkpoint = _read_checkpoint(source, trust)
        state = self.checkpoint["state_dict"]
        # What `get_extra_state` returned, and tensors without memory of their own, are taken over as they are.
        self.others = {name: value for name, value in state.items() if not _is_plain(value)}
        tensors = {name: value for name, value in state.items() if name not in self.others}
        record = self.checkpoint.get(RECORD_KEY)
        plan = Plan() if record is None else read_plan(record, source.name)
        self.model = build_skeleton(tensors, plan, repr(source.name), dtype)

    def default_tables(self) -> list[str]:
        """The layers with the most rows."""
        return _largest_layers(self.model)

    def write(self, path: Path) -> None:
        """Write a checkpoint as the Trainer does with `weights_only`, and with all that others have put there."""
        checkpoint = {name: value for name, value in self.checkpoint.items() if name not in _TRAINING_KEYS}
        checkpoint.pop(RECORD_KEY, None)
        write_record(self.model, checkpoint)
        old = checkpoint["state_dict"]
        state = OrderedDict({**self.model.state_dict(), **self.others})
        if hasattr(old, "_metadata"):
            # The versions of modules, by which some of them tell how to read their tensors.
            state._metadata = old._metadata  # type: ignore[attr-defined]
        checkpoint["state_dict"] = state
        torch.save(checkpoint, path)

    @property
    def dropped(self) -> list[str]:
        """What of the checkpoint is not written."""
        return sorted(_TRAINING_KEYS & self.checkpoint.keys())


class SavedModel(OpenedModel):
    """What `save_compressed` has written, of a model of any class.

    Args:
        source: Its directory.
        dtype: What its floating-point tensors are cast to; None for nothing.

    Raises:
        ValueError: If a file is damaged.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None = None) -> None:
        """Read it; of its tensors, only the factors are copied."""
        self.source = source
        check_sums(source.path, source.config)
        tensors = with_aliases(read_tensors(source.weights), source.config.get("aliases", {}), source.path)
        plan = read_plan(source.config.get("plan"), source.name)
        self.model = build_skeleton(tensors, plan, repr(source.name), dtype)

    def default_tables(self) -> list[str]:
        """The layers with the most rows."""
        return _largest_layers(self.model)

    def write(self, path: Path) -> None:
        """Write what `load_compressed` reads."""
        save_compressed(self.model, path)


def open_model(
    source: Source, dtype: str | None = None, trust: bool = False, tokenizer: Path | None = None
) -> OpenedModel:
    """Read a model.

    Args:
        source: Where it is.
        dtype: What it is cast to (`"bfloat16"`); None for its own.
        trust: Whether a checkpoint may hold objects that can run code when they are loaded.
        tokenizer: A directory whose tokenizer is written beside a model of transformers that has none.

    Raises:
        ValueError: If it cannot be read.
    """
    wanted = None if dtype is None else getattr(torch, dtype)
    if source.kind == "pretrained":
        return PretrainedModel(source, wanted, tokenizer)
    if source.kind == "checkpoint":
        return CheckpointModel(source, wanted, trust)
    return SavedModel(source, wanted)


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
            f"have{own}: load it in Python, call lightning_embcompress.compress(model, ...), and save it there"
        )
    return found


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """Map the tensors of some files into memory.

    Raises:
        ValueError: If a file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            else:
                tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{str(file)!r} is damaged or cut short: {one_line(error)}") from error
    return tensors


def in_shell_terms(message: str) -> str:
    """A message about arguments of `compress` as one about options of the command."""
    return message.replace("as in tables=['encoder']", "as in --tables encoder").replace(
        "in tables=[...]", "with --tables"
    )


def one_line(error: BaseException) -> str:
    """The beginning of a message, which others write on many lines."""
    return " ".join(str(error).split())[:300]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing: what matters of it is said in our own words."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _largest_layers(skeleton: Any) -> list[str]:
    paths = choose_tables(skeleton)
    tie_equal(skeleton, paths)
    return paths


def read_plan(record: Any, name: str) -> Plan:
    """Read the plan of a model.

    Raises:
        ValueError: If it is none, or one of a newer version.
    """
    try:
        return Plan.from_dict(record)
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be read: {error}") from error


def _read_checkpoint(source: Source, trust: bool) -> dict[str, Any]:
    try:
        # Mapped: an optimizer's state, which is not needed, is never read.
        checkpoint = torch.load(source.path, map_location="cpu", weights_only=not trust, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{source.name!r} holds more than tensors and plain values ({found[1] if found else one_line(error)}), "
            "which can run code when it is loaded; if you trust where it comes from, add --trust_source"
        ) from error
    except (RuntimeError, EOFError, ImportError, AttributeError) as error:
        raise ValueError(f"{source.name!r} cannot be read as a checkpoint: {one_line(error)}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        found_keys = sorted(map(str, checkpoint))[:6] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{source.name!r} is not a checkpoint of Lightning's Trainer: it has no 'state_dict', but {found_keys}; "
            "load it into its model in Python, and call lightning_embcompress.compress(model, ...) there"
        )
    return checkpoint


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
