"""Weights of foreign layers in few bits, read by `torch.nn.utils.parametrize`: in training, and packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import (
    ParametrizationList,
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)

from lightning_embcompress.methods.quantizers.factors import FakeQuantizer, StoredParameter, Unpacker
from lightning_embcompress.methods.quantizers.quantization import Storage


def parametrized(reading: nn.Module, weight: Tensor) -> ParametrizationList:
    """What `register_parametrization` makes of a weight, to be put where it is read."""
    holder = nn.Module()
    if isinstance(weight, nn.Parameter):
        holder.register_parameter("weight", weight)
    else:
        holder.register_buffer("weight", weight)
    register_parametrization(holder, "weight", reading, unsafe=True)
    kept: ParametrizationList = holder.parametrizations["weight"]  # type: ignore[index,assignment]
    return kept


def reading_of(kept: ParametrizationList) -> StoredParameter:
    """The one parametrization of a quantized weight."""
    return cast(StoredParameter, kept[0])


def dtype_of(kept: ParametrizationList) -> torch.dtype:
    """Dtype of a weight as it is read."""
    reading = reading_of(kept)
    return reading.dtype if isinstance(reading, Unpacker) else kept.original.dtype


def unfilled(weight: Tensor, storage: Storage) -> ParametrizationList:
    """What reads a weight of this shape, dtype and device from bytes, which are to be loaded or filled in."""
    reading = Unpacker(weight.shape, storage, weight.dtype, weight.device)
    return parametrized(reading, torch.empty(weight.shape, dtype=weight.dtype, device="meta"))


@torch.no_grad()
def pack(kept: ParametrizationList) -> ParametrizationList:
    """What reads a weight once it is not trained any more, from what reads it in training."""
    trained = cast(FakeQuantizer, kept[0])
    packed = unfilled(kept.original, trained.storage)
    for index, part in enumerate(cast(Unpacker, packed[0]).encode(kept.original, trained.scales)):
        getattr(packed, f"original{index}").copy_(part)
    return packed


def install(module: nn.Module, name: str, kept: ParametrizationList) -> None:
    """Let a module read one of its weights by a parametrization, whatever reads it now."""
    if not is_parametrized(module, name):
        register_parametrization(module, name, nn.Identity(), unsafe=True)
        if isinstance(module, nn.RNNBase):
            _read_once(module)
    kept.train(module.training)
    cast(nn.ModuleDict, module.parametrizations)[name] = kept


def restore(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Make a weight of a module an ordinary parameter again, in the place that it had among the others."""
    install(module, name, parametrized(nn.Identity(), weight))
    # Copies of the module are of the same class, and go on reading what is taken from it.
    cls = type(module)
    own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, own)
    remove_parametrizations(module, name, leave_parametrized=False)
    _in_order(module)


def _in_order(module: nn.Module) -> None:
    """Put a parameter that was registered again where layers have it: weights before biases."""
    if isinstance(module, nn.RNNBase):
        names = module._flat_weights_names
        if "_flat_weights" not in vars(module) and not is_parametrized(module):
            module._flat_weights = [getattr(module, one) for one in names]
    else:
        # What was registered last is the last of the weights.
        names = [one for one in module._parameters if "weight" in one]
    own = module._parameters
    module._parameters = {one: own[one] for one in names if one in own} | own


def _read_once(module: nn.RNNBase) -> None:
    """Let a recurrent layer read its weights anew whenever it is called, once.

    It keeps a list of its weights, made when they are assigned or cast; of parametrized ones these are values of then.
    The class is one that `register_parametrization` has made for this module alone.
    """
    cls: Any = type(module)
    (base,) = cls.__bases__
    if "_flat_weights" in vars(cls):
        return

    def weights(self: Any) -> list[Tensor]:
        in_use: list[Tensor] | None = vars(self).get("_weights_in_use")
        return [getattr(self, name) for name in self._flat_weights_names] if in_use is None else in_use

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self)["_weights_in_use"] = weights(self)
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            del vars(self)["_weights_in_use"]

    vars(module).pop("_flat_weights")
    # Casts assign a list, which is of no use.
    cls._flat_weights = property(weights, lambda self, value: None)
    cls.forward = forward


def readings(model: nn.Module) -> dict[str, ParametrizationList]:
    """What reads quantized weights, by the names of the weights."""
    found: dict[str, ParametrizationList] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not is_parametrized(module):
            continue
        for name, kept in cast(Mapping[str, ParametrizationList], module.parametrizations).items():
            if isinstance(kept[0], StoredParameter):
                found[f"{path}.{name}" if path else name] = kept
    return found


def parametrized_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the quantized weights as they were, and as they are in the state dict now.

    Example:
        >>> model = nn.Linear(64, 512, bias=False)
        >>> from lightning_embcompress.methods.quantizers.quantization import storage_of
        >>> storage = storage_of("int8")
        >>> install(model, "weight", pack(parametrized(FakeQuantizer(model.weight, storage), model.weight)))
        >>> parametrized_bytes(model)
        (131072, 33792)
    """
    lists = _lists(model)
    dense = sum(reading_of(kept).shape.numel() * dtype_of(kept).itemsize for kept in lists)
    return dense, sum(tensor.nbytes for kept in lists for tensor in kept.state_dict().values())


def parametrized_numbers(model: nn.Module) -> tuple[int, int]:
    """How many numbers the quantized weights are, and how many the state dict has in their place."""
    lists = _lists(model)
    weights = sum(reading_of(kept).shape.numel() for kept in lists)
    return weights, sum(tensor.numel() for kept in lists for tensor in kept.state_dict().values())


def _lists(model: nn.Module) -> list[ParametrizationList]:
    return list({id(kept): kept for kept in readings(model).values()}.values())
