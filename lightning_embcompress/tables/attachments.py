"""Attachments of a layer: whatever others have put on it, which goes over to the layer that takes its place."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

from lightning_embcompress.utils.storage import check_in_memory

_CONTENTS = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
# Hooks of all kinds and whether the layer is training: all that any module has, apart from its tensors and children.
_OF_ANY_MODULE = frozenset(vars(nn.Module())) - _CONTENTS
_LAYERS: tuple[Any, ...] = (nn.Embedding, nn.EmbeddingBag, nn.Linear)
# Of a layer itself: its successor gets these, or what they stand for, when it is built.
_OF_ANY_LAYER = frozenset(name for layer in _LAYERS for name in layer.__constants__)
_OF_SOME_LAYERS = frozenset({"scale", "embed_scale", "scalar_embed_scale", "best"})
# Dropped, see `replacement._say_compiled`.
_COMPILED = "_compiled_call_impl"
_OWN = _OF_ANY_LAYER | _OF_SOME_LAYERS | _CONTENTS | {_COMPILED}


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Put the attachments of a layer on the one that takes its place.

    Both have the same dictionaries of hooks from then on: a handle of one registered before removes it from both.
    Bound methods of the old layer, and the forward that accelerate gave it, are bound to the new one.

    Args:
        old: An embedding or a softmax, dense or compressed.
        new: Its successor, just built.

    Example:
        >>> import torch
        >>> old, new = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> handle = old.register_forward_hook(lambda module, inputs, output: output.zero_())
        >>> old.tag = 3
        >>> carry_over(old, new)
        >>> new.tag, new(torch.ones(2)).tolist()
        (3, [0.0, 0.0, 0.0])
        >>> handle.remove()
        >>> len(new._forward_hooks)
        0
    """
    for name, value in vars(old).items():
        if name in _OF_ANY_MODULE or name not in _OWN | vars(new).keys():
            vars(new)[name] = _rebound(value, old, new)
    # Its children too.
    new.train(old.training)
    for name, buffer in old._buffers.items():
        if name not in _OWN | new._buffers.keys():
            new.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    for hook in new._load_state_dict_pre_hooks.values():
        # Torch keeps the module that such a hook is called with, not alive, in the hook.
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]


def exchange_references(model: nn.Module, successors: Mapping[nn.Module, nn.Module]) -> None:
    """Let attributes of modules that are a layer, a method of it, or a list, tuple or dictionary with it follow.

    Args:
        model: In which layers were replaced.
        successors: The layers that took the places of others, by those.

    Example:
        >>> model, new = nn.Sequential(nn.Linear(2, 3)), nn.Linear(2, 3)
        >>> model.heads, model.project = [model[0]], model[0].forward
        >>> exchange_references(model, {model[0]: new})
        >>> model.heads[0] is new, model.project == new.forward
        (True, True)
    """

    def follow(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return successors.get(value, value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and value.__self__ in successors:
            return _rebound(value, value.__self__, successors[value.__self__])
        return value

    for part in model.modules():
        for name, value in vars(part).items():
            if name in _CONTENTS:
                continue
            if type(value) is tuple:
                vars(part)[name] = tuple(map(follow, value))
            elif type(value) is list:
                value[:] = map(follow, value)
            elif type(value) is dict:
                value.update({key: follow(one) for key, one in value.items()})
            else:
                vars(part)[name] = follow(value)


def kept_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in plain attributes of a module, or in lists, tuples and dictionaries there, by the attributes."""
    for name, value in vars(module).items():
        if name in _CONTENTS:
            continue
        values = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
        yield from ((name, one) for one in values if isinstance(one, Tensor))


def check_attachments(where: str, layer: nn.Module) -> None:
    """Refuse a layer with attachments that cannot go over to another one.

    Args:
        where: What messages call the layer.
        layer: An embedding or a softmax, dense or compressed.

    Raises:
        ValueError: If its forward, or another method, is replaced by other than accelerate, its weight is computed or
            has hooks, it has parameters or children of others, or accelerate has offloaded it; with the remedy.
    """
    for name, value in vars(layer).items():
        if not callable(getattr(type(layer), name, None)) or _is_own_method(value, layer, name):
            continue
        if name != "forward" or not _is_of_accelerate(layer):
            raise ValueError(
                f"{where} has a {name} of its own, {value!r}, which would go on calling the layer that is replaced: "
                "register a hook in its place (register_forward_hook, register_state_dict_post_hook, ...), which "
                "stays, or set it afterwards"
            )
    check_in_memory(layer, where)
    others = [name for name in (*layer._parameters, *layer._modules) if name not in ("weight", "bias", "factorization")]
    if others:
        raise ValueError(
            f"{where} has {', '.join(map(repr, others))} beside its weight and bias, of pruning, of a normalization of "
            "its weight, or your own: remove them before (torch.nn.utils.remove_weight_norm, "
            "torch.nn.utils.prune.remove, ...), or keep them on another module"
        )
    weight = layer._parameters.get("weight")
    if weight is not None and (weight._backward_hooks or weight._post_accumulate_grad_hooks):
        raise ValueError(
            f"the weight of {where} has hooks for its gradient, which a compressed table does not have: remove them "
            "(handle.remove(); wandb.unwatch()) before"
        )


def _is_own_method(value: Any, layer: nn.Module, name: str) -> bool:
    # As accelerate leaves the forward when its hooks are removed.
    is_bound = isinstance(value, MethodType) and value.__self__ is layer
    return is_bound and value.__func__ is getattr(type(layer), name)


def _is_of_accelerate(layer: nn.Module) -> bool:
    """Whether `accelerate.hooks.add_hook_to_module` has wrapped the layer's own forward, and nobody another one."""
    forward, inner = vars(layer).get("forward"), vars(layer).get("_old_forward")
    return (
        isinstance(forward, functools.partial)
        and forward.func.__module__ == "accelerate.hooks"
        and [one is layer for one in forward.args] == [True]
        and _is_own_method(inner, layer, "forward")
    )


def _rebound(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """A method of the old layer as one of the new; other values are the same."""
    if isinstance(value, MethodType) and value.__self__ is old:
        name = value.__name__
        is_of_class = getattr(type(old), name, None) is value.__func__
        return MethodType(getattr(type(new), name) if is_of_class else value.__func__, new)
    if isinstance(value, functools.partial) and any(one is old for one in value.args):
        bound = functools.partial(value.func, *(new if one is old else one for one in value.args), **value.keywords)
        wrapped = vars(value).get("__wrapped__")
        return bound if wrapped is None else functools.update_wrapper(bound, _rebound(wrapped, old, new))
    return value
