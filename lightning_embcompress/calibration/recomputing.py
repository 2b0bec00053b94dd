"""Layers whose insides are computed once more on the way back, where memory is too short to keep them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def stacked_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a model runs one after the other: members of lists that are in no other list."""
    found: list[nn.Module] = []
    for part in model.children():
        found += list(part) if isinstance(part, nn.ModuleList) else stacked_layers(part)
    return found


@contextmanager
def calling(module: nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """Call something with the forward pass of a module and its arguments, in the place of that pass."""
    # That of a wrapper, as accelerate has them, is the instance's own.
    own = vars(module).get("forward")
    module.forward = partial(instead, module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def recomputing(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Keep only what layers are given for the way back (Chen et al. 2016, arXiv 1604.06174)."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(calling(layer, partial(checkpoint, use_reentrant=False)))
        yield


def kept_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that are kept of a forward pass for the way back, those of parameters and buffers left out."""
    # Not by its address, which devices of others do not tell.
    owned = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        result = run()
    total = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in owned)
    del result
    return total
