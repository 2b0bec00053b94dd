"""Weights that are read as they are stored in few bits, by `torch.nn.utils.parametrize`: in training, and packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import (
    ParametrizationList,
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)

from lightning_embcompress.methods.quantizers.factors import (
    HALVES,
    PackedFactor,
    Quantization,
    matrix_shape,
    rounded_to,
)
from lightning_embcompress.methods.quantizers.integer_quantizer import fake_quantize, group_scales, scales_shape
from lightning_embcompress.methods.quantizers.packed_rows import read_packed_rows

Storage: TypeAlias = Quantization | Literal["float16", "bfloat16"]
"""How a weight is stored: integers in groups, or numbers of 16 bits."""


def storage_of(
    name: str,
    group_size: int = 64,
    scale_dtype: Literal["float16", "bfloat16"] = "float16",
    ranges: Literal["minmax", "learned"] = "minmax",
) -> Storage:
    """How weights are stored, by the name of a dtype: `int8`, `int6`, `int4`, ..., `float16` or `bfloat16`.

    Raises:
        ValueError: If there is no such one, or groups are not possible.

    Example:
        >>> storage_of("int8", group_size=128).bytes_of((10, 128)), storage_of("float16")
        (1300, 'float16')
    """
    if name in ("float16", "bfloat16"):
        return "float16" if name == "float16" else "bfloat16"
    widths = {f"int{bits}": bits for bits in range(2, 9)}
    if name not in widths:
        raise ValueError(f"{name!r} is no way to store weights: known are {', '.join(widths)}, float16 and bfloat16")
    return Quantization(widths[name], group_size, scale_dtype, ranges)


class FakeQuantizedWeight(nn.Module):
    """Reads a weight as it will be stored; gradients go straight through, see `FakeQuantizedFactor`.

    Args:
        weight: The weight, for its shape and its ranges.
        storage: How it will be stored.
        frozen: Whether ranges are kept as they are.
    """

    scales: Tensor | None

    def __init__(self, weight: Tensor, storage: Storage, frozen: bool = False) -> None:
        """Begin with the ranges of the weight."""
        super().__init__()
        self.storage, self.frozen = storage, False
        self.matrix = matrix_shape(weight.shape)
        self.register_buffer("scales", None)
        if isinstance(storage, Quantization) and storage.ranges == "learned":
            del self._buffers["scales"]
            self.scales = nn.Parameter(self._ranges(weight).to(weight.dtype), requires_grad=weight.requires_grad)
        if frozen:
            self.freeze(weight)

    def _ranges(self, weight: Tensor) -> Tensor:
        assert isinstance(self.storage, Quantization)
        of = self.storage
        if weight.is_meta:
            return weight.new_zeros(scales_shape(*self.matrix, of.group_size), dtype=of.scales)
        return group_scales(weight.detach().reshape(self.matrix), of.bits, of.group_size, of.scales)

    def freeze(self, weight: Tensor) -> None:
        """Keep the ranges as they are for a weight."""
        if not isinstance(self.storage, Quantization):
            return
        self.frozen = True
        if isinstance(self.scales, nn.Parameter):
            self.scales.requires_grad_(False)
        elif self.scales is None:
            self.scales = self._ranges(weight).to(weight.dtype)

    def forward(self, original: Tensor) -> Tensor:
        """The weight as it will be stored."""
        if not isinstance(self.storage, Quantization):
            return rounded_to(original, HALVES[self.storage])
        weight, of = original.reshape(self.matrix), self.storage
        scales = self._ranges(original) if self.scales is None else rounded_to(self.scales, of.scales)
        kept = self.scales is not None
        return fake_quantize(weight, scales, of.bits, of.group_size, clips=kept).view(original.shape)


class PackedWeight(nn.Module):
    """Reads a weight from its bytes: packed integers and their scales, or numbers of 16 bits.

    Args:
        shape: Of the weight.
        storage: How it is stored.
        dtype: Of what is read; it follows the model's casts.
        device: Where it is.
    """

    unit: Tensor

    def __init__(self, shape: Sequence[int], storage: Storage, dtype: torch.dtype, device: torch.device) -> None:
        """Keep the shape."""
        super().__init__()
        self.shape, self.storage = torch.Size(shape), storage
        self.register_buffer("unit", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def empty(self) -> tuple[Tensor, ...]:
        """Bytes without values, ready to be loaded into."""
        if isinstance(self.storage, Quantization):
            packed = PackedFactor(self.shape, self.storage, self.unit.dtype, self.unit.device)
            return packed.codes, packed.scales
        rows, columns = matrix_shape(self.shape)
        return (torch.zeros(rows, 2 * columns, dtype=torch.uint8, device=self.unit.device),)

    def bytes_of(self, weight: Tensor, scales: Tensor | None) -> tuple[Tensor, ...]:
        """A weight as it is stored, with scales that were kept in training, or those of its values."""
        matrix = weight.detach().reshape(matrix_shape(self.shape))
        if not isinstance(self.storage, Quantization):
            return (matrix.to(HALVES[self.storage]).view(torch.uint8),)
        of = self.storage
        if scales is None:
            scales = group_scales(matrix, of.bits, of.group_size, of.scales)
        packed = PackedFactor(self.shape, of, self.unit.dtype, weight.device)
        packed.fill(matrix, scales.detach().to(of.scales))
        return packed.codes, packed.scales

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Bytes of a weight, with the ranges of its values."""
        return self.empty() if weight.is_meta else self.bytes_of(weight, None)

    def forward(self, *parts: Tensor) -> Tensor:
        """The weight."""
        dtype = self.unit.dtype
        if not isinstance(self.storage, Quantization):
            return parts[0].view(HALVES[self.storage]).to(dtype).view(self.shape)
        codes, scales = parts
        of, (rows, columns) = self.storage, matrix_shape(self.shape)
        places = torch.arange(rows, device=codes.device)
        found = read_packed_rows(codes, scales.view(of.scales), places, of.bits, columns, of.group_size, dtype)
        return found.view(self.shape)


def shape_of(kept: ParametrizationList) -> torch.Size:
    """Shape of the weight."""
    reading = kept[0]
    return reading.shape if isinstance(reading, PackedWeight) else kept.original.shape


def dtype_of(kept: ParametrizationList) -> torch.dtype:
    """Dtype of the weight as it is read."""
    reading = kept[0]
    return reading.unit.dtype if isinstance(reading, PackedWeight) else kept.original.dtype


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


@torch.no_grad()
def pack(kept: ParametrizationList) -> ParametrizationList:
    """What reads a weight once it is not trained any more, from what reads it in training."""
    trained, weight = kept[0], kept.original
    assert isinstance(trained, FakeQuantizedWeight)
    reading = PackedWeight(weight.shape, trained.storage, weight.dtype, weight.device)
    packed = parametrized(reading, torch.empty(weight.shape, dtype=weight.dtype, device="meta"))
    for index, part in enumerate(reading.bytes_of(weight, trained.scales)):
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
            if isinstance(kept[0], FakeQuantizedWeight | PackedWeight):
                found[f"{path}.{name}" if path else name] = kept
    return found


def parametrized_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the quantized weights as they were, and as they are in the state dict now.

    Example:
        >>> model = nn.Linear(64, 512, bias=False)
        >>> storage = Quantization(bits=8, group_size=64)
        >>> install(model, "weight", pack(parametrized(FakeQuantizedWeight(model.weight, storage), model.weight)))
        >>> parametrized_bytes(model)
        (131072, 33792)
    """
    lists = {id(kept): kept for kept in readings(model).values()}.values()
    dense = sum(shape_of(kept).numel() * dtype_of(kept).itemsize for kept in lists)
    return dense, sum(tensor.nbytes for kept in lists for tensor in kept.state_dict().values())
