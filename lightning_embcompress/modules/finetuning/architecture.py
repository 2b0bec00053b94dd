"""Language models by path, as a fine-tuning opens them, and the record by which a checkpoint builds one again."""

from __future__ import annotations

import contextvars
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_embcompress.integrations.checkpoint import load_from_checkpoint
from lightning_embcompress.integrations.contents import read_contents
from lightning_embcompress.integrations.opening import load_weights
from lightning_embcompress.integrations.sources import Source, find_source
from lightning_embcompress.methods.specs import plain
from lightning_embcompress.modules.base import VocabularyModule
from lightning_embcompress.modules.huggingface import HuggingFaceCausalLM
from lightning_embcompress.modules.lstm import LSTMLanguageModel
from lightning_embcompress.tables.transformers_models import pretrained_models

_Result = TypeVar("_Result")

# Built again from what a checkpoint says. No other class: a file must not choose what code is run.
_CLASSES: dict[str, type[VocabularyModule]] = {cls.__name__: cls for cls in (LSTMLanguageModel, HuggingFaceCausalLM)}
OPENED: dict[type[LightningModule], tuple[set[str], dict[str, Any]]] = {
    LSTMLanguageModel: ({"embedding_dim", "hidden_size", "tie_weights"}, {}),
    HuggingFaceCausalLM: ({"pretrained", "config", "gradient_checkpointing"}, {}),
}
"""Classes whose checkpoints are opened, by hyper-parameters that no other class has; and those that are changed."""
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
    opened = model
    if not isinstance(opened, LightningModule):
        if "" not in pretrained_models(model):
            raise TypeError(
                f"{name} is a {type(model).__name__}, which is neither a LightningModule nor a model of transformers:"
                " wrap it in a LightningModule whose training_step computes its loss."
            )
        opened = apart_from_recipe(lambda: HuggingFaceCausalLM.from_model(model))
    if is_overridden("configure_model", opened):
        # Layers that are built late: their tables must be there.
        opened.configure_model()
    if weights is not None:
        load_weights(opened, find_source(weights))
    return opened


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
    opened = apart_from_recipe(lambda: _read_checkpoint(source))
    inner = getattr(opened, "model", None)
    # A fine-tuning of a model: what was fine-tuned is meant, and not its teacher or its losses.
    return inner if isinstance(inner, LightningModule) else opened


def _read_checkpoint(source: Source) -> LightningModule:
    """Build the LightningModule of a checkpoint, and load it."""
    found = read_contents(source).checkpoint.get("hyper_parameters")
    hyper_parameters = found if isinstance(found, dict) else {}
    # Lightning notes the name of a class for runs of the command line only.
    path = hyper_parameters.get("_class_path")
    for kind, (marks, changed) in OPENED.items():
        is_kind = marks <= hyper_parameters.keys() if path is None else str(path).rpartition(".")[2] == kind.__name__
        if is_kind:
            return load_from_checkpoint(kind, source.path, map_location="cpu", **changed)
    known = ", ".join(kind.__name__ for kind in OPENED)
    raise ValueError(
        f"{source.name!r} is not a checkpoint of {known}, as far as its hyper-parameters say: build the model, and "
        "give it as model and the checkpoint as weights."
    )
