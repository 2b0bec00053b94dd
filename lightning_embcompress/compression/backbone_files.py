"""Tensors of a backbone in few bits, as they come from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_embcompress.compression.backbone import Backbone
from lightning_embcompress.compression.records import check_layout, check_values
from lightning_embcompress.layers.parametrized_weights import reading_of, readings
from lightning_embcompress.methods.quantizers.factors import Unpacker
from lightning_embcompress.methods.quantizers.quantization import HALVES


def backbone_shapes(
    model: nn.Module, backbone: Backbone | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors once it has the structure of a backbone, from those that it has now."""
    expected = dict(shapes)
    for name, kept in readings(model).items():
        expected = {key: shape for key, shape in expected.items() if not key.startswith(_prefix(name))}
        expected[name] = tuple(reading_of(kept).shape)
    for name in () if backbone is None else backbone.weights:
        expected.pop(name, None)
        expected |= {key: tuple(tensor.shape) for key, tensor in _expected(cast(Backbone, backbone), name).items()}
    return expected


def check_backbone_tensors(
    backbone: Backbone | None, state: Mapping[str, Any], where: str, complete: bool = True
) -> None:
    """Check the tensors of a backbone before a model is changed for them.

    Args:
        backbone: Which weights are quantized in the file.
        state: A state dict; tensors of other modules are not looked at.
        where: What messages call it.
        complete: Whether all must be there.

    Raises:
        ValueError: If a tensor is missing or one too many, of another shape or dtype, or has values that are not
            finite.
    """
    if backbone is None:
        return
    # The last of the bytes of a weight are 16-bit numbers: its scales, or all there is.
    halves = HALVES[backbone.storage if isinstance(backbone.storage, str) else backbone.storage.scale_dtype]
    for name in backbone.weights:
        expected = _expected(backbone, name)
        found = {key: value for key, value in state.items() if key.startswith(_prefix(name)) or key == name}
        if not found and not complete:
            continue
        check_layout(expected, found, "", where)
        last = list(expected)[-1]
        if expected[last].dtype == torch.uint8:
            found[last] = found[last].contiguous().view(halves)
        check_values(found, where)


def finish_loading(model: nn.Module, is_missing: Callable[[Tensor], bool]) -> None:
    """Make weights usable whose tensors were put into place one by one, in a model that was on the meta device.

    Args:
        model: The model.
        is_missing: Whether a tensor was not loaded.

    Raises:
        ValueError: If one was not.
    """
    for name, kept in readings(model).items():
        tensors = kept.state_dict(keep_vars=True)
        for key, tensor in tensors.items():
            if is_missing(tensor):
                raise ValueError(
                    f"{_prefix(name) + key!r} was not loaded: it is missing from the model's files, or was to stay "
                    "on disk. Take all files of one save_pretrained, and load them to memory"
                )
        reading = kept[0]
        if isinstance(reading, Unpacker):
            # Not stored: it follows from the model.
            reading.unit = torch.empty_like(reading.unit, device=next(iter(tensors.values())).device)


def _prefix(name: str) -> str:
    """With what the tensors of a quantized weight begin in a state dict."""
    path, _, own = name.rpartition(".")
    return f"{path}.parametrizations.{own}." if path else f"parametrizations.{own}."


def _expected(backbone: Backbone, name: str) -> dict[str, Tensor]:
    """Tensors of a weight, on the meta device, by their names in a state dict."""
    empty = backbone.reading(nn.Parameter(torch.empty(backbone.weights[name], device="meta")))
    return {_prefix(name) + key: tensor for key, tensor in empty.state_dict().items()}
