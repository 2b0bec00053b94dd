"""Where tensors keep their values: which of them are one, and which are spread over processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

_PLAIN = (Tensor, nn.Parameter, DTensor)


def place_of(tensor: Tensor) -> int:
    """Where the values of a tensor begin: the same for those that share them.

    Tensors without memory of their own (shards, on the meta device, without elements) all have a null pointer, although
    they are not one: each is a place by itself. For parameters that layers share to be one there too, take them from
    `state_dict(keep_vars=True)`, which does not wrap them anew under every name.

    Example:
        >>> import torch
        >>> table = torch.zeros(3, 2)
        >>> place_of(table) == place_of(table[:1]), place_of(table) == place_of(table[1:])
        (True, False)
    """
    return tensor.data_ptr() or id(tensor)


def identity_of(tensor: Tensor) -> tuple[object, ...]:
    """What is equal only for tensors that are one: the same values, in the same order, read in the same way."""
    return place_of(tensor), tensor.shape, tensor.stride(), tensor.dtype


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 or FSDP has sharded any of a module.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    return any(isinstance(parameter, DTensor) for parameter in module.parameters()) or any(
        isinstance(part, FullyShardedDataParallel) for part in module.modules()
    )


def holds_views(module: nn.Module) -> bool:
    """Whether a tensor to train is no parameter, as the views of its flat parameter that FSDP leaves in their places.

    Example:
        >>> holds_views(nn.Linear(2, 2))
        False
    """
    values = (value for part in module.modules() for value in vars(part).values())
    # What stands for a weight, and has no memory, is of a class of its own.
    return any(type(value) in _PLAIN and value.requires_grad for value in values)


def check_whole(module: nn.Module, action: str) -> None:
    """Refuse a module of which this process has only a part.

    Args:
        module: The module.
        action: What cannot be done with it (`"saved by save_compressed"`).

    Raises:
        ValueError: Naming the remedy.
    """
    if is_sharded(module):
        raise ValueError(
            f"the {type(module).__name__} is sharded, and cannot be {action}: every process has a part of it only. "
            "Save a full checkpoint (ModelParallelStrategy(save_distributed_checkpoint=False), or "
            "FSDPStrategy(state_dict_type='full')), and load it in one process by "
            "lightning_embcompress.load_from_checkpoint(Class, path)"
        )


def check_plain(module: nn.Module, action: str) -> None:
    """Refuse a module with tensors that hold more than their values, as those of torchao and bitsandbytes do.

    Args:
        module: The module.
        action: What cannot store them (`"save_compressed"`).

    Raises:
        ValueError: Naming the first of them and the remedy.

    Example:
        >>> check_plain(nn.Linear(2, 2), "save_compressed")
    """
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and type(tensor) not in _PLAIN:
            path, _, own = name.rpartition(".")
            kind, library = type(tensor).__name__, type(tensor).__module__.partition(".")[0]
            remedy = f"save the model before {library} quantizes it, and quantize what is loaded"
            # Every tensor has the method, for what torch itself quantizes.
            if type(tensor).dequantize is not Tensor.dequantize:
                remedy += (
                    f"; or make the weight ordinary, as in layer = model.get_submodule({path!r}) and layer.{own} = "
                    f"torch.nn.Parameter(layer.{own}.dequantize())"
                )
            raise ValueError(
                f"{action} cannot store {name!r}, a {kind} of {library}, in a file of plain tensors: {remedy}"
            )


def check_in_memory(module: nn.Module, where: str) -> None:
    """Refuse a module whose values accelerate keeps elsewhere while it is not called.

    Args:
        module: The module.
        where: What messages call it.

    Raises:
        ValueError: Naming the remedy.
    """
    is_hooked = any("_hf_hook" in vars(part) for part in module.modules())
    if is_hooked and any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ValueError(
            f"{where} is offloaded by accelerate, and has no values here: bring them back with "
            "accelerate.hooks.remove_hook_from_submodules(model), and offload the model again afterwards"
        )


def allocate(module: nn.Module) -> None:
    """Put empty tensors in the place of those on the meta device, ready to be loaded into; what is shared stays shared.

    Raises:
        ValueError: If a buffer is among them that state dicts do not have. The module is as it was.

    Example:
        >>> layer = nn.Linear(2, 3, device="meta")
        >>> allocate(layer)
        >>> layer.weight.device
        device(type='cpu')
    """
    stored = module.state_dict(keep_vars=True).keys()
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name not in stored:
            raise ValueError(
                f"the buffer {name!r} is on the meta device, and no file has its values: build the model on a real "
                "device"
            )
    made: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if tensor not in made:
                    empty = torch.empty_like(tensor, device=torch.get_default_device())
                    trains = tensor.requires_grad
                    made[tensor] = nn.Parameter(empty, trains) if isinstance(tensor, nn.Parameter) else empty
                tensors[name] = made[tensor]  # type: ignore[assignment]


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of one of a module's state dict, a parameter that does not train or a buffer.

    Args:
        module: The module.
        name: Of the tensor there.
        value: What takes its place; nothing is copied.
    """
    path, _, own = name.rpartition(".")
    part = module.get_submodule(path)
    if own in part._parameters:
        part._parameters[own] = nn.Parameter(value, requires_grad=False)
    else:
        part._buffers[own] = value
