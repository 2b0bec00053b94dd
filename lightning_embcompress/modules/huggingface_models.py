"""Models of transformers by the names and configurations that recipes give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lightning_embcompress.integrations.contents import one_line
from lightning_embcompress.methods.config import nearest

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_pretrained(name: str, dtype: str) -> Any:
    """Load a causal language model, in training mode.

    Args:
        name: A directory that `save_pretrained` has written, or a name on the Hugging Face hub.
        dtype: Of the weights.

    Raises:
        ValueError: If it cannot be loaded.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ValueError(
                f"pretrained={name!r} has no config.json: give a directory that save_pretrained has written. To train "
                "from scratch set pretrained to null and describe the model with config."
            )
        name = str(directory)
    elif directory.exists() or directory.is_absolute() or name.startswith((".", "~")):
        raise ValueError(
            f"pretrained={name!r} is not a directory: give one that save_pretrained has written, or a name on the "
            "Hugging Face hub."
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"pretrained={name!r} cannot be loaded: give a directory that save_pretrained has written, or the name of "
            f"a causal language model on the Hugging Face hub. What transformers says: {one_line(error)}"
        ) from error
    # It comes in evaluation mode, in which Lightning would train it, without dropout.
    return model.train()


def pretrained_vocab_size(name: str) -> int | None:
    """Rows of the table of a pretrained model, as its configuration says; None where there is none to be read.

    Args:
        name: A directory, or a name on the Hugging Face hub.

    Example:
        >>> pretrained_vocab_size("/no/such/folder")
    """
    directory = Path(name).expanduser()
    try:
        config = AutoConfig.from_pretrained(str(directory) if directory.is_dir() else name).get_text_config()
    # Loading the model says what is wrong with it.
    except (OSError, ValueError):
        return None
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def from_config(config: PretrainedConfig, dtype: str) -> Any:
    """Build a causal language model with random weights.

    Args:
        config: Its configuration.
        dtype: Of the weights.

    Raises:
        ValueError: If there is no causal language model of this type.
    """
    auto: Any = AutoModelForCausalLM  # its functions have no types
    try:
        return auto.from_config(config, dtype=getattr(torch, dtype)).train()
    except Exception as error:  # every type finds out in its own way what it cannot be built from
        raise ValueError(
            f"config of type {config.model_type!r} gives no causal language model. What transformers says: "
            f"{one_line(error)}"
        ) from error


def checkpoint_activations(model: Any) -> None:
    """Compute layers again in the backward pass.

    Raises:
        ValueError: If the model cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"{type(model).__name__} does not support gradient_checkpointing=True: set it to false.")
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # as older versions of transformers call it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def read_config(config: Mapping[str, Any] | str, vocab_size: int | None) -> PretrainedConfig:
    """Make the configuration of a model from scratch.

    Args:
        config: A mapping with `model_type`, or a directory or hub name whose `config.json` is read.
        vocab_size: Rows of the table, where a mapping that a person wrote does not say it.

    Raises:
        ValueError: If it cannot be read, or names what the type does not know.
    """
    if isinstance(config, str):
        directory = Path(config).expanduser()
        try:
            read: PretrainedConfig = AutoConfig.from_pretrained(str(directory) if directory.exists() else config)
            return read
        except (OSError, ValueError) as error:
            raise ValueError(
                f"config={config!r} cannot be read: give a mapping with model_type, a directory with config.json, or a "
                f"name on the Hugging Face hub. What transformers says: {one_line(error)}"
            ) from error
    given = dict(config)
    model_type = given.pop("model_type", None)
    if model_type is None:
        raise ValueError("config has no model_type: name the architecture, for example {'model_type': 'gpt2'}.")
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError:
        meant = nearest(str(model_type), transformers.CONFIG_MAPPING)
        raise ValueError(f"config.model_type={model_type!r} is not an architecture of transformers{meant}.") from None
    if "transformers_version" not in given:
        # What a person wrote; a whole configuration may come from another version, with other keys.
        known = set(default.to_dict()) | set(default.attribute_map)
        for key in given:
            if key not in known and not hasattr(default, key):
                raise ValueError(f"config.{key} is not a key of {type(default).__name__}{nearest(key, known)}.")
        if vocab_size is not None:
            given.setdefault("vocab_size", vocab_size)
    rows = given.get("vocab_size", getattr(default, "vocab_size", None))
    for name in _SPECIAL_IDS:
        # The type's defaults are those of a vocabulary of its own.
        if name not in given and rows is not None and _beyond(getattr(default, name, None), rows):
            given[name] = None
        elif rows is not None and _beyond(given.get(name), rows):
            raise ValueError(
                f"config.{name}={given[name]} is not in the table, which has vocab_size={rows} rows: give an id below "
                f"{rows}, or null."
            )
    try:
        return AutoConfig.for_model(model_type, **given)
    except Exception as error:  # every type checks its values in its own way
        raise ValueError(f"config of type {model_type!r} is not valid: {one_line(error)}") from error


def _beyond(token_id: Any, rows: int) -> bool:
    ids = token_id if isinstance(token_id, list) else [token_id]
    return any(isinstance(one, int) and one >= rows for one in ids)


def recorded(config: PretrainedConfig) -> dict[str, Any]:
    """Give a configuration as plain JSON values, without what only its files are concerned with."""
    record: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in record.items() if key not in ("quantization_config", "_name_or_path")}
