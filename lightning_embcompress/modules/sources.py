"""Language models by path, as a fine-tuning opens them, and the record by which a checkpoint builds one again."""

from __future__ import annotations

import contextvars
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_embcompress.integrations.checkpoint import load_from_checkpoint, restore_structure, restores_structure
from lightning_embcompress.integrations.checkpoint_io import read_without_tensors
from lightning_embcompress.integrations.saved import load_compressed
from lightning_embcompress.integrations.sources import Source, find_source
from lightning_embcompress.methods.specs import plain
from lightning_embcompress.metrics.perplexity import Perplexity
from lightning_embcompress.modules.base import VocabularyModule
from lightning_embcompress.modules.huggingface import HuggingFaceCausalLM
from lightning_embcompress.modules.lstm import LSTMLanguageModel
from lightning_embcompress.tables.transformers_models import only_model, pretrained_models

_Result = TypeVar("_Result")

# Built again from what a checkpoint says. No other class: a file must not choose what code is run.
_CLASSES: dict[str, type[VocabularyModule]] = {cls.__name__: cls for cls in (LSTMLanguageModel, HuggingFaceCausalLM)}
# Classes that checkpoints are made with, and the hyper-parameters by which theirs are told: further ones register here.
_CHECKPOINTS: dict[type[VocabularyModule], set[str]] = {
    LSTMLanguageModel: {"embedding_dim", "hidden_size", "tie_weights"},
    HuggingFaceCausalLM: {"pretrained", "config", "gradient_checkpointing"},
}
_NOT_RECORDED = ("optimizer", "lr_scheduler")
# What a model of transformers notes of itself once it is built.
_UPDATED = ("pretrained", "config")


def open_model(model: nn.Module | str | None, weights: str | None, name: str = "model") -> LightningModule:
    """Open a language model.

    Args:
        model: A LightningModule, which is used as it is; a model of transformers; or a path: a checkpoint of an
            `LSTMLanguageModel`, of a `HuggingFaceCausalLM` or of a fine-tuning of one of them, a directory that
            `save_pretrained` has written, or a name on the Hugging Face hub.
        weights: What is loaded into a `model` that is a module: a checkpoint of its class, or a directory that
            `save_compressed` or `save_pretrained` has written. None for nothing.
        name: What messages call the argument.

    Returns:
        The model, in the mode in which it was; one that was read from files is in training mode.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If it is no language model, or needs to be given as a module.
        TypeError: If it is of a type that cannot be used.
    """
    if isinstance(model, str | Path):
        if weights is not None:
            raise ValueError(
                f"weights={weights!r} are loaded into a {name} that is given as a module, but {name}={str(model)!r} is"
                " a path of its own: leave one of them out."
            )
        return _read(find_source(str(model)), name)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a LightningModule, a model of transformers or a path, not {model!r}.")
    opened = _as_lightning(model, name)
    if is_overridden("configure_model", opened):
        # Layers that are built late: their tables must be there.
        opened.configure_model()
    if weights is not None:
        _load(opened, weights)
    return opened


def register_checkpoint_class(kind: type[VocabularyModule], marks: set[str]) -> None:
    """Let checkpoints of a class be opened by their path.

    Args:
        kind: The class.
        marks: Hyper-parameters that its checkpoints have, and those of no other class.
    """
    _CHECKPOINTS[kind] = marks


def architecture_of(model: LightningModule) -> dict[str, Any] | None:
    """What a checkpoint says of a model so that it can be built again without the files that it came from.

    Returns:
        The name of its class, and the arguments of those classes that `build` knows.
    """
    cls = type(model)
    if _CLASSES.get(cls.__name__) is not cls:
        return {"class": f"{cls.__module__}.{cls.__qualname__}"}
    recorded = dict(model.hparams)
    outer = recorded.get("model")
    if isinstance(outer, Mapping) and "init_args" in outer:
        # Built by LightningCLI within another module, whose arguments it was told instead of its own.
        recorded = {**dict(outer["init_args"]), **{key: recorded[key] for key in _UPDATED if key in recorded}}
    names = [name for name in inspect.signature(cls).parameters if name not in _NOT_RECORDED]
    arguments = {name: plain(recorded[name]) for name in names if name in recorded}
    return {"class": cls.__name__, "arguments": json.loads(json.dumps(arguments))}


def build(architecture: Mapping[str, Any]) -> LightningModule:
    """Build a model from what `architecture_of` has said of it; its weights are those of a new one.

    Raises:
        ValueError: If it is of a class that is not known here.
    """
    name = str(architecture.get("class"))
    if name not in _CLASSES:
        raise ValueError(
            f"The checkpoint is a fine-tuning of a {name}, which a file cannot build: build it yourself and pass it,"
            f" as in CompressedLanguageModel.load_from_checkpoint(path, model={name.rpartition('.')[2]}(...))."
        )
    return apart_from_recipe(lambda: _CLASSES[name](**architecture["arguments"]))


def apart_from_recipe(make: Callable[[], _Result]) -> _Result:
    """Make a module within the constructor of another one, with hyper-parameters of its own.

    LightningCLI tells a module that it builds by a context variable what its hyper-parameters are, and a module within
    it would take them for its own.
    """
    return contextvars.Context().run(make)


def _read(source: Source, name: str) -> LightningModule:
    if source.kind == "pretrained":
        # The directory of a model of the hub, too, so that it is downloaded once.
        return apart_from_recipe(lambda: HuggingFaceCausalLM(pretrained=str(source.path)))
    if source.kind == "saved":
        raise ValueError(
            f"{name}={source.name!r} was written by save_compressed and does not say what kind of model it is: build"
            f" one as it was before compression, and give it as {name} and the directory as weights."
        )
    checkpoint = read_without_tensors(source.path)
    hyper_parameters = checkpoint.get("hyper_parameters") if isinstance(checkpoint, Mapping) else None
    kind = _class_of(hyper_parameters if isinstance(hyper_parameters, Mapping) else {})
    if kind is None:
        raise ValueError(
            f"{name}={source.name!r} is not a checkpoint of an LSTMLanguageModel or a HuggingFaceCausalLM, as far as"
            f" its hyper-parameters say: build the model, and give it as {name} and the checkpoint as weights."
        )
    # A part that was frozen there is trained again, unless it is to be frozen here too.
    changed: dict[str, Any] = {} if kind in _CLASSES.values() else {"freeze": None, "teacher_shares_backbone": False}
    opened = apart_from_recipe(lambda: load_from_checkpoint(kind, source.path, map_location="cpu", **changed))
    inner = getattr(opened, "model", None)
    # A fine-tuning of a model: what was fine-tuned is meant, and not its teacher or its losses.
    return inner if isinstance(inner, LightningModule) else opened


def _class_of(hyper_parameters: Mapping[str, Any]) -> type[VocabularyModule] | None:
    """The class that a checkpoint was made with: Lightning notes its name for runs of the command line only."""
    if "_class_path" in hyper_parameters:
        name = str(hyper_parameters["_class_path"]).rpartition(".")[2]
        return next((kind for kind in _CHECKPOINTS if kind.__name__ == name), None)
    return next((kind for kind, marks in _CHECKPOINTS.items() if marks <= hyper_parameters.keys()), None)


def _as_lightning(model: nn.Module, name: str) -> LightningModule:
    if isinstance(model, LightningModule):
        return model
    if "" not in pretrained_models(model):
        raise TypeError(
            f"{name} is a {type(model).__name__}, which is neither a LightningModule nor a model of transformers: wrap"
            " it in a LightningModule whose training_step computes its loss."
        )
    given: Any = model
    config = json.loads(given.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    # On the meta device the model that is built from the configuration takes neither time nor memory.
    with torch.device("meta"):
        wrapper = apart_from_recipe(lambda: HuggingFaceCausalLM(config=config))
    wrapper.model = given
    wrapper.val_perplexity, wrapper.test_perplexity = Perplexity(), Perplexity()
    return wrapper


def _load(model: LightningModule, weights: str) -> None:
    source = find_source(weights)
    if source.kind == "saved" or "quantization_config" in source.config:
        load_compressed(source.path, only_model(model) if source.kind == "pretrained" else model)
        return
    if source.kind == "pretrained":
        raise ValueError(
            f"weights={weights!r} is a model of transformers of its own: give it as model, without weights."
        )
    # The class's own way, so that its hooks see the checkpoint; the arguments are those of the module that is there.
    checkpoint: dict[str, Any] = torch.load(source.path, map_location="cpu", weights_only=True, mmap=True)
    state = checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        raise ValueError(f"weights={weights!r} is no checkpoint of Lightning's Trainer: it has no 'state_dict'.")
    load_checkpoint_into(model, checkpoint)
    model.load_state_dict(checkpoint["state_dict"])


def load_checkpoint_into(model: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Give a model the structure of a checkpoint and let its own hook see it, before its weights are loaded.

    Args:
        model: What is loaded into.
        checkpoint: Of its class; its hook may change it.

    Raises:
        ValueError: If the tables do not fit; nothing is changed then.
    """
    if not restores_structure(model):
        own = type(model).on_load_checkpoint is not LightningModule.on_load_checkpoint
        restore_structure(model, checkpoint, complete=not own)
    model.on_load_checkpoint(checkpoint)
