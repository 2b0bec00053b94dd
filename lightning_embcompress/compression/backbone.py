"""The backbone in few bits: the linear and recurrent weights of a model beside its tables, in training and stored.

A weight is parametrized (`torch.nn.utils.parametrize`): whoever reads it gets what will be stored. In training that is
the parameter as it was, which optimizers know, rounded; converted it is packed integers with scales of 16 bits, or
numbers of 16 bits, plain bytes in the state dict that no cast of the model changes. Linear layers are no exception:
torchao (0.18, CPU) converts them to one int4 a byte, with five bytes of scale and offset a group, in tensors that
safetensors does not save, and unties them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.layers.parametrized_weights import (
    dtype_of,
    install,
    pack,
    parametrized,
    reading_of,
    readings,
    restore,
    unfilled,
)
from lightning_embcompress.methods.quantizers.factors import FakeQuantizer, check_storable
from lightning_embcompress.methods.quantizers.quantization import HALVES, Quantization, State, Storage
from lightning_embcompress.tables.finding import all_modules, find_tables
from lightning_embcompress.tables.listeners import layers_replaced
from lightning_embcompress.tables.transformers_models import vocabulary_layers

_KINDS = {nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell}
_KINDS |= {nn.Linear, NonDynamicallyQuantizableLinear, nn.MultiheadAttention}
_MOST_WEIGHTS = 100_000
_MOST_ROWS = 2**31


@dataclass(frozen=True)
class Backbone:
    """Which weights of the backbone are quantized, and how.

    Attributes:
        weights: Their shapes by their names, as `named_parameters` of the model has them that is not quantized.
        storage: How they are stored.
        state: Whether they train, or are packed.
    """

    weights: Mapping[str, tuple[int, ...]]
    storage: Storage
    state: State

    @property
    def is_prepared(self) -> bool:
        """Whether they train, and can be packed."""
        return self.state != "packed"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        record = {"weights": {name: list(shape) for name, shape in self.weights.items()}}
        if isinstance(self.storage, Quantization):
            return {**record, "quantization": self.storage.record(self.state)}
        return {**record, "dtype": self.storage, "state": self.state}

    @classmethod
    def from_dict(cls, record: Any) -> Backbone:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: If it is something else.
        """
        weights = record.get("weights") if isinstance(record, Mapping) else None
        if not isinstance(weights, Mapping) or not 1 <= len(weights) <= _MOST_WEIGHTS:
            raise ValueError("'backbone' of the compression plan must have 'weights', shapes by names")
        for name, shape in weights.items():
            known = isinstance(name, str) and isinstance(shape, list | tuple) and len(shape) == 2
            if not known or not all(type(size) is int and 1 <= size <= _MOST_ROWS for size in shape):
                raise ValueError(f"'weights' of the backbone in the compression plan: {str(name)[:80]!r} has no shape")
        shapes = {name: tuple(shape) for name, shape in weights.items()}
        if record.keys() == {"weights", "quantization"}:
            try:
                return cls(shapes, *Quantization.from_record(record["quantization"]))
            except ValueError as error:
                raise ValueError(f"'backbone' of the compression plan: {error}") from error
        dtype, state = record.get("dtype"), record.get("state")
        known = record.keys() == {"weights", "dtype", "state"} and isinstance(dtype, str) and isinstance(state, str)
        if not known or dtype not in HALVES or state not in ("fake", "packed"):
            raise ValueError(
                "'backbone' of the compression plan must have a 'quantization', or a 'dtype' of float16 or bfloat16 "
                "and a 'state' of fake or packed"
            )
        return cls(shapes, dtype, state)

    def reading(self, weight: nn.Parameter) -> ParametrizationList:
        """What reads a weight, ready to be loaded into."""
        if self.state == "packed":
            return unfilled(weight, self.storage)
        return parametrized(FakeQuantizer(weight, self.storage, self.state == "frozen"), weight)


def backbone_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of a model that are linear or recurrent and belong to no table, by their names.

    They are those of `nn.Linear`, `nn.MultiheadAttention`, `nn.LSTM`, `nn.GRU`, `nn.RNN`, their cells, and `Conv1D` of
    transformers, but not of classes derived from them, which may read them otherwise. A projection with as many rows as
    the vocabulary is a table, whether it is compressed or not.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 8), nn.LSTM(8, 16), nn.Linear(16, 4), nn.Linear(4, 100))
        >>> list(backbone_weights(model))
        ['1.weight_ih_l0', '1.weight_hh_l0', '2.weight']
    """
    library = sys.modules.get("transformers.pytorch_utils")
    kinds = {*_KINDS, getattr(library, "Conv1D", nn.Linear)}
    sizes = _vocabulary_sizes(model)
    heads = {id(layer) for _, projections in vocabulary_layers(model).values() for layer in projections}
    found: dict[str, nn.Parameter] = {}
    others: set[int] = set()
    for path, module in all_modules(model).items():
        is_head = type(module) is nn.Linear and (module.out_features in sizes or id(module) in heads)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if type(module) in kinds and not is_head and "weight" in name and parameter.dim() == 2:
                found[f"{path}.{name}" if path else name] = parameter
            else:
                others.add(id(parameter))
    # What an embedding reads too is a table.
    return {name: weight for name, weight in found.items() if id(weight) not in others and weight.numel()}


def _vocabulary_sizes(model: nn.Module) -> set[int]:
    compressed = {m.factorization.vocab_size for m in model.modules() if isinstance(m, CompressedLayer)}
    if compressed:
        return compressed
    try:
        return {table.shape[0] for table in find_tables(model)}
    except ValueError:
        # There are none, or the model does not say which they are.
        return set()


def plan_backbone(model: nn.Module, storage: Storage) -> Backbone:
    """The backbone as it will train for fewer bits, for `apply_backbone` to carry out.

    The parameters then stay the same objects; their names become those of `torch.nn.utils.parametrize`, and in
    `parameters()` they come after the others of their layer.

    Args:
        model: The model; it is not changed.
        storage: How they will be stored.

    Raises:
        ValueError: If there are no such weights, they are quantized already, or a value cannot be stored so.

    Example:
        >>> model = nn.LSTM(8, 16)
        >>> apply_backbone(model, plan_backbone(model, Quantization(bits=8)))
        >>> convert_backbone(model)
        True
    """
    if (there := backbone_of(model)) is not None:
        done = "prepared for quantization" if there.is_prepared else "packed"
        raise ValueError(f"the backbone's weights ({next(iter(there.weights))!r}, ...) are {done} already")
    weights = backbone_weights(model)
    if not weights:
        raise ValueError("the model has no backbone: no linear or recurrent weights beside its tables")
    for name, weight in weights.items():
        check_storable(f"weight {name!r}", weight, storage)
    return Backbone({name: tuple(weight.shape) for name, weight in weights.items()}, storage, "fake")


def convert_backbone(model: nn.Module) -> bool:
    """Pack the weights that are prepared, in place: afterwards they do not train.

    Returns:
        Whether there were any.
    """
    prepared = {name: kept for name, kept in readings(model).items() if isinstance(kept[0], FakeQuantizer)}
    _install_all(model, prepared, pack)
    return bool(prepared)


@contextmanager
def converted_backbone(model: nn.Module) -> Iterator[None]:
    """Pack the weights that are prepared for a while: afterwards the model is as it was, and goes on training."""
    before = readings(model)
    try:
        convert_backbone(model)
        yield
    finally:
        _install_all(model, before)


def freeze_backbone_ranges(model: nn.Module) -> None:
    """Keep the ranges of the weights that are prepared as they are from now on."""
    for kept in readings(model).values():
        if isinstance(kept[0], FakeQuantizer):
            kept[0].freeze(kept.original)


def backbone_of(model: nn.Module) -> Backbone | None:
    """Read off a model which weights of its backbone are quantized; None if none is."""
    lists = readings(model)
    if not lists:
        return None
    reading = reading_of(next(iter(lists.values())))
    state: State = "packed"
    if isinstance(reading, FakeQuantizer):
        state = "frozen" if reading.frozen else "fake"
    return Backbone({name: tuple(reading_of(kept).shape) for name, kept in lists.items()}, reading.storage, state)


def check_backbone(model: nn.Module, backbone: Backbone | None) -> None:
    """Check that a model has the weights of a backbone.

    Raises:
        ValueError: Naming the first that it has not.
    """
    modules, lists = all_modules(model), readings(model)
    for name, shape in {} if backbone is None else backbone.weights.items():
        path, _, own = name.rpartition(".")
        found: Any = lists[name][0] if name in lists else modules.get(path, model)._parameters.get(own)
        if found is None or path not in modules or len(found.shape) != 2:
            raise ValueError(
                f"the plan quantizes the weight {name!r}, but the model has no linear or recurrent weight of that name"
            )
        if tuple(found.shape) != shape:
            raise ValueError(
                f"the plan's weight {name!r} has the shape {list(shape)}, the model's {list(found.shape)}: build the "
                "model with the sizes that the checkpoint was trained with"
            )


def apply_backbone(model: nn.Module, backbone: Backbone | None) -> None:
    """Give a model the structure of a backbone that fits it (`check_backbone`), ready to be loaded into.

    Args:
        model: The model.
        backbone: The backbone; None makes it ordinary.
    """
    if backbone_of(model) == backbone:
        return
    restore_backbone(model, fill=False)
    if backbone is not None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        _install_all(model, {name: parameters[name] for name in backbone.weights}, backbone.reading)
        layers_replaced(model)


def _install_all(
    model: nn.Module, sources: Mapping[str, Any], make: Callable[[Any], ParametrizationList] = lambda kept: kept
) -> None:
    """Let weights be read by what is made of their sources, of a shared one once; all is made before any is read."""
    made: dict[int, ParametrizationList] = {}
    for source in sources.values():
        if id(source) not in made:
            made[id(source)] = make(source)
    for name, source in sources.items():
        path, _, own = name.rpartition(".")
        install(model.get_submodule(path), own, made[id(source)])


@torch.no_grad()
def restore_backbone(model: nn.Module, fill: bool = True) -> None:
    """Make the backbone's weights ordinary parameters again, with the values that are stored or, to be loaded, none."""
    parameters: dict[int, nn.Parameter] = {}
    for name, kept in readings(model).items():
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        if id(kept) not in parameters:
            if isinstance(kept[0], FakeQuantizer):
                parameters[id(kept)] = cast(nn.Parameter, kept.original)
                if fill:
                    kept.original.copy_(kept())
            else:
                place: Any = {"dtype": dtype_of(kept), "device": next(kept.buffers()).device}
                values = kept() if fill else torch.empty(reading_of(kept).shape, **place)
                parameters[id(kept)] = nn.Parameter(values)
        # A module of two paths is restored at the first.
        if is_parametrized(module, own):
            restore(module, own, parameters[id(kept)])
    layers_replaced(model)
