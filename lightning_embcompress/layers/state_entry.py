"""The entry of a compressed table in state dicts, for which compressed and dense models refuse each other's.

A state dict has the factors of a compressed table under names that a dense model does not know, and the weight of a
dense table under one that a compressed layer does not: whoever loads without `strict` would leave the tables as they
were, without a word. So a compressed layer has an entry `weight` too, of a shape that no table has. Torch refuses it in
the place of a dense weight, however it is loaded, as `weight.copy_(entry)` does; and a compressed layer looks at what
it is given itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_embcompress.utils.storage import is_sharded


def table_entry(layer: nn.Module, factors: nn.Module) -> Tensor | None:
    """The entry of a layer, an empty tensor; None where there are no values to be lost, or not all of them.

    It is on the CPU wherever the factors are, and has their dtype: what reads a state dict takes the dtype of a model
    from any of its tensors. On the meta device there are no values. Of a sharded model every process has a part, and
    what stores that asks for every name of the model in a file, which may be one of before there were entries.

    Args:
        layer: The layer.
        factors: Its factorization.
    """
    tensors = [*factors.parameters(), *factors.buffers()]
    if any(tensor.is_meta for tensor in tensors) or _is_part(layer):
        return None
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
    return torch.empty(0, dtype=dtype, device="cpu")


def _is_part(layer: nn.Module) -> bool:
    # What FSDP leaves on all modules within its own.
    return is_sharded(layer) or getattr(layer, "_is_fsdp_managed_module", False)


def is_table_entry(value: Any) -> bool:
    """Whether something in a state dict is the entry of a compressed table.

    Example:
        >>> is_table_entry(torch.empty(0)), is_table_entry(torch.empty(100, 16))
        (True, False)
    """
    return isinstance(value, Tensor) and value.shape == (0,)


def what_does_not_fit(
    layer: nn.Module, factors: nn.Module, state: Mapping[str, Any], prefix: str, unexpected: list[str]
) -> str | None:
    """Say why a state dict is not one of a compressed layer: a dense weight, or the factors of another structure.

    Nothing of the layer, or what there is to train of it, may be given: programs load such parts without `strict`.

    Args:
        layer: The layer.
        factors: Its factorization.
        state: The state dict.
        prefix: With what the names of the layer begin.
        unexpected: Names that are said to be unknown, of which those of the entry are taken out.
    """
    name, start, stored = f"{prefix}weight", f"{prefix}factorization.", type(factors).__name__
    # Those without elements are left when names of shared tensors are dropped, because they share no memory.
    empty = {key for key, value in state.items() if isinstance(value, Tensor) and not value.numel()}
    given = {key.removeprefix(start) for key in state.keys() - empty if key.startswith(start)}
    # `torch.distributed.checkpoint` leaves out what wraps modules, and puts it back for parameters and buffers alone.
    unwrapped = ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
    is_lost = unwrapped != name and unwrapped in unexpected and not given
    unexpected[:] = [key for key in unexpected if key not in (name, unwrapped)]
    if is_lost or not is_table_entry(state.get(name, torch.empty(0))):
        shape = " x ".join(map(str, getattr(state.get(name), "shape", ())))
        return (
            f"{name} is a dense table{f' of {shape}' if shape else ''}, and the table of this {type(layer).__name__} "
            f"is stored as {stored}: make the model dense with densify(model) before the state dict of a dense model "
            "is loaded, and compress it afterwards"
        )
    # Strategies that shard a model load it in ways of their own.
    if not given or _is_part(layer):
        return None
    trained = {name for name, factor in factors.named_parameters() if factor.requires_grad and factor.numel()}
    if odd := [*sorted(given - factors.state_dict(keep_vars=True).keys()), *sorted(trained - given)]:
        return (
            f"{start}{odd[0]} is {'no factor of' if odd[0] in given else 'missing for'} this {type(layer).__name__}, "
            f"whose table is stored as {stored}: the state dict is of a table that was compressed otherwise. Give the "
            "model the structure it was saved with before it is loaded, by apply_plan(model, plan), or load the file "
            "with load_compressed or load_from_checkpoint"
        )
    return None
