"""What a model of transformers must know of its compressed tables: saving, ties, and what would corrupt them.

A model is looked after from the first table that is compressed in it to the last that is made dense again. Nothing
outlives that, and models of other libraries are not looked at: transformers is never imported here.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, wraps
from typing import Any

from torch import Tensor, nn

from lightning_embcompress.compression.backbone import backbone_of
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.integrations.sources import QUANT_METHOD
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.methods.registry import Factorization
from lightning_embcompress.quantization.aware import converted, is_prepared
from lightning_embcompress.tables.transformers_models import pretrained_models
from lightning_embcompress.utils.storage import check_plain

_DENSE_TIES = "_embcompress_dense_ties"
_RESIZE = "resize_token_embeddings"


def follow(root: nn.Module) -> None:
    """Bring the models of transformers within a module in step with its layers, after some were replaced.

    Afterwards `save_pretrained` of a model with compressed tables, or quantized weights beside them, records their
    plan, its tied factors are stored once, and what would corrupt the tables is refused; a model without is as
    transformers made it.

    Args:
        root: The module in which layers were replaced.
    """
    for model in pretrained_models(root).values():
        if _factorizations(model) or backbone_of(model) is not None:
            _hook(model)
            _declare_ties(model, root)
        elif _DENSE_TIES in model.__dict__:
            _unhook(model)


def aliases(model: nn.Module) -> dict[str, str]:
    """Compressed modules whose factors belong to another module too: their paths, and that of the one that keeps them.

    It is the one under whose name transformers keeps the dense weight, so that classes without the others find it too;
    where nothing is known of ties, the first.

    Example:
        >>> from lightning_embcompress.compression.plan import compress
        >>> model = nn.ModuleDict({"encoder": nn.Embedding(200, 8), "decoder": nn.Linear(8, 200)})
        >>> model["decoder"].weight = model["encoder"].weight
        >>> _ = compress(model, "low_rank", ratio=2)
        >>> aliases(model)
        {'decoder': 'encoder'}
    """
    _, ties = model.__dict__.get(_DENSE_TIES, (None, {}))
    sources = {source.removesuffix(".weight") for source in ties.values()}
    factorizations = _factorizations(model)
    keepers: dict[int, str] = {}
    for path in sorted(factorizations, key=lambda path: path not in sources):
        keepers.setdefault(id(factorizations[path]), path)
    found = {path: keepers[id(factorization)] for path, factorization in factorizations.items()}
    return {path: keeper for path, keeper in found.items() if path != keeper}


def _factorizations(model: nn.Module) -> dict[str, Factorization[Any]]:
    # While a model is being loaded, tied layers are without theirs.
    return {
        path: module.factorization
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, CompressedLayer) and "factorization" in module._modules
    }


class Hook:
    """Stands in for a method on one instance. A class, not a closure: the model stays picklable and can be copied."""

    def __init__(self, model: Any, name: str) -> None:
        """Remember the method of a model."""
        self.model = model
        self.name = name
        self.previous = model.__dict__.get(name)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method itself."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)

    def remove(self) -> None:
        """Give the instance back the method it had."""
        del self.model.__dict__[self.name]
        if self.previous is not None:
            self.model.__dict__[self.name] = self.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What is done in the place of the method."""
        raise NotImplementedError


class _SaveHook(Hook):
    """`save_pretrained` with the plan of the model as it is now, and every factor once."""

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # A part of the model may have been changed by itself.
        follow(self.model)
        trains_on = is_prepared(self.model) and _is_trainer_checkpoint(save_directory)
        if state_dict is not None and is_prepared(self.model) and not trains_on:
            raise ValueError(
                "the model is prepared for quantization, and a state_dict of numbers has no integers: call "
                "save_pretrained without a state_dict, or convert_qat(model) before"
            )
        with nullcontext() if trains_on else converted(self.model):
            twice = aliases(self.model)
            state = self.model.state_dict() if state_dict is None else state_dict
            prefixes = tuple(f"{path}.{name}" for path in twice for name in ("factorization.", "weight"))
            state = {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}
            # Only while it is written: a configuration is shared by models, and made into new ones, that are dense.
            with _quantization_config(self.model.config, _record(self.model, twice)):
                check_plain(self.model, "save_pretrained")
                return self.original(save_directory, is_main_process, state, *args, **kwargs)


def _is_trainer_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether the Trainer of transformers takes a directory for one of its checkpoints, from which training goes on."""
    return re.fullmatch(r"checkpoint-\d+", os.path.basename(os.path.abspath(path))) is not None


def _record(model: nn.Module, twice: Mapping[str, str]) -> dict[str, Any]:
    """The plan of a model; the first of the layers that share a table is the one under whose name it is stored."""
    plan = plan_of(model)
    tables = [replace(table, modules=tuple(sorted(table.modules, key=twice.__contains__))) for table in plan.tables]
    return {"quant_method": QUANT_METHOD, **replace(plan, tables=tuple(tables)).to_dict()}


@contextmanager
def _quantization_config(config: Any, record: dict[str, Any]) -> Iterator[None]:
    before = config.__dict__.get("quantization_config")
    method = before.get("quant_method") if isinstance(before, Mapping) else getattr(before, "quant_method", None)
    if method not in (None, QUANT_METHOD):
        method = getattr(method, "value", method)
        raise ValueError(
            f"the model is quantized by {method} besides, and {type(config).__name__} has room for one record: make "
            f"the tables dense with densify(model) before save_pretrained, or load the model without {method}, and "
            "compress and save that"
        )
    config.quantization_config = record
    try:
        yield
    finally:
        del config.quantization_config
        if before is not None:
            config.quantization_config = before


class _RefusalHook(Hook):
    """A method that would put an ordinary layer beside or in the place of a compressed one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # `set_input_embeddings` changes one layer, `resize_token_embeddings` both.
        changed = [name for name in ("input_embeddings", "output_embeddings") if self.name in (f"set_{name}", _RESIZE)]
        for layer in [getattr(self.model, f"get_{name}")() for name in changed]:
            if isinstance(layer, CompressedLayer):
                raise ValueError(
                    f"{self.name} cannot change a compressed table: the {type(layer).__name__} of "
                    f"{type(self.model).__name__} is stored as {type(layer.factorization).__name__}. Make the model "
                    f"dense with densify(model), call {self.name}, and compress it again"
                )
        return self.original(*args, **kwargs)


class _ResizeHook(_RefusalHook):
    def __call__(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        # Many programs ask for the size of their tokenizer, whether it has changed or not.
        embedding = self.model.get_input_embeddings()
        now = getattr(embedding, "num_embeddings", None)
        if new_num_tokens in (None, now) and not args and not kwargs.get("pad_to_multiple_of"):
            return embedding
        return super().__call__(new_num_tokens, *args, **kwargs)


class _SubmoduleHook(Hook):
    """`get_submodule`, which gives prompt learning of PEFT the embedding by the name it has in BERT.

    In other models PEFT takes the first parameter with a row for every token for that of an embedding.
    """

    def __call__(self, target: str) -> Any:
        try:
            return self.original(target)
        except AttributeError:
            embedding = self.model.get_input_embeddings() if target == "embeddings.word_embeddings" else None
            if not isinstance(embedding, CompressedLayer):
                raise
            return embedding


_HOOKS: dict[str, type[Hook]] = {
    "get_submodule": _SubmoduleHook,
    "save_pretrained": _SaveHook,
    _RESIZE: _ResizeHook,
    "set_input_embeddings": _RefusalHook,
    "set_output_embeddings": _RefusalHook,
}


@cache
def _watch_assembled(kind: Any) -> None:
    """Let models that are put together of compressed ones afterwards, which no layer tells, be saved as compressed."""
    save = kind.save_pretrained

    @wraps(save)
    def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
        if _DENSE_TIES not in model.__dict__:
            follow(model)
            if _DENSE_TIES in model.__dict__:
                return model.save_pretrained(*args, **kwargs)
        return save(model, *args, **kwargs)

    kind.save_pretrained = save_pretrained


def _hook(model: Any) -> None:
    if _DENSE_TIES in model.__dict__:
        return
    _watch_assembled(sys.modules["transformers.modeling_utils"].PreTrainedModel)
    model.__dict__[_DENSE_TIES] = (model.__dict__.get("_tied_weights_keys"), dict(model.all_tied_weights_keys))
    for name, hook in _HOOKS.items():
        model.__dict__[name] = hook(model, name)


def _unhook(model: Any) -> None:
    for name in _HOOKS:
        model.__dict__[name].remove()
    own_keys, ties = model.__dict__.pop(_DENSE_TIES)
    del model._tied_weights_keys
    parameters = dict(model.named_parameters(remove_duplicate=False))
    model.all_tied_weights_keys = {
        target: source
        for target, source in ties.items()
        if target in parameters and parameters[target] is parameters.get(source)
    }
    if own_keys is not None:
        model._tied_weights_keys = own_keys
    elif model.all_tied_weights_keys != ties:
        # Factors of their own became weights of their own, which no call of `tie_weights` may tie again.
        model._tied_weights_keys = dict(model.all_tied_weights_keys)


def _declare_ties(model: Any, root: nn.Module) -> None:
    """Name the ties as they are now, for `tie_weights` and whatever places or saves tied weights together."""
    _, dense = model.__dict__[_DENSE_TIES]
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    kept = {target: source for target, source in dense.items() if target in there and source in there}
    factors = {f"{path}.factorization": f"{source}.factorization" for path, source in aliases(model).items()}
    model._tied_weights_keys = {**kept, **factors}
    # By their full names here; buffers are left out, because transformers looks these names up among parameters.
    model.all_tied_weights_keys = kept | {
        f"{path}.{name}": f"{source}.{name}"
        for path, source in factors.items()
        for name, _ in model.get_submodule(source).named_parameters()
    }
    # Only where nothing is left of what it stands for: some models read it to decide which others are tied.
    if (
        dense
        and getattr(model.config, "tie_word_embeddings", False)
        and all(_is_broken(model, *tie) for tie in dense.items())
    ):
        _give_own_config(model, root).tie_word_embeddings = False


def _is_broken(model: Any, target: str, source: str) -> bool:
    """Whether the layers of two weights, which were one while dense, no longer share what they read."""
    if not target.endswith(".weight"):
        return False
    layers = [model.get_submodule(name.rpartition(".")[0]) for name in (target, source)]
    # While a model is being loaded, tied layers are without factors.
    factors = [layer._modules.get("factorization") for layer in layers if isinstance(layer, CompressedLayer)]
    return len(factors) == 1 or (len(factors) == 2 and None not in factors and factors[0] is not factors[1])


def _give_own_config(model: Any, root: nn.Module) -> Any:
    """Replace a configuration, which other models may share, by a copy wherever it is used within a module."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in root.modules():
        if module.__dict__.get("config") is shared:
            module.config = own
    return own
