"""Where a model computes: on a device, or, if it is larger than the memory there, block by block through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lightning_embcompress.utils.devices import free_memory

_CPU = torch.device("cpu")


class Placement:
    """Moves a model between a device and main memory, where it is read and written.

    Tables are solved on the device too, but not on `mps`, which has no float64. Of a model that is larger than the
    device's memory the blocks that do not fit stay in main memory, and accelerate brings each to the device whenever it
    is called; what autograd keeps goes to main memory meanwhile.

    Args:
        model: In main memory.
        device: Where it computes.
        workspace: Bytes that are needed on the device beside the weights.
        is_called: Whether the model is called at all, and not only its tables are solved.

    Attributes:
        is_larger: Whether the model does not fit.

    Raises:
        ValueError: If it does not, and accelerate is missing, or the model does not say what its blocks are.
    """

    def __init__(self, model: nn.Module, device: torch.device, workspace: int = 0, is_called: bool = True) -> None:
        """Look whether the model fits."""
        self.model, self.device = model, device
        self.workspace = workspace
        free = free_memory(device) if is_called and device.type != "cpu" else None
        needed = workspace + sum(tensor.nbytes for tensor in _tensors(model) if tensor.device.type != device.type)
        self.is_larger = free is not None and needed > free
        if not self.is_larger:
            return
        assert free is not None
        what = f"the model takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
        if find_spec("accelerate") is None:
            raise ValueError(
                f"{what} on {str(device)!r}: install accelerate, which brings it there block by block (pip install "
                "accelerate), or take a smaller dtype or device cpu"
            )
        if not self._blocks():
            raise ValueError(
                f"{what} on {str(device)!r}, and {type(model).__name__} does not name its blocks: take a smaller dtype "
                "or device cpu"
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model on the device, to be called."""
        with ExitStack() as stack:
            if self.is_larger:
                self.model.to(_CPU)
                self._place_blocks(stack)
            else:
                self.model.to(self.device)
                if self.device.type == "mps":
                    stack.callback(self.model.to, _CPU)
            yield

    @contextmanager
    def solving(self, tables: Sequence[str]) -> Iterator[None]:
        """Tables where they are solved, by the paths of their modules; afterwards the model is in main memory."""
        try:
            if self.device.type != "mps":
                for path in tables:
                    self.model.get_submodule(path).to(self.device)
            yield
        finally:
            self.model.to(_CPU)

    def _blocks(self) -> list[nn.Module]:
        names = set(getattr(self.model, "_no_split_modules", None) or ())
        return [part for part in self.model.modules() if type(part).__name__ in names]

    def _place_blocks(self, stack: ExitStack) -> None:
        accelerate: Any = import_module("accelerate")
        blocks = self._blocks()
        sizes = [_bytes(block) for block in blocks]
        # Beside all else one block is there while it computes, and the next one comes.
        spare = (free_memory(self.device) or 0) - self.workspace - (_bytes(self.model) - sum(sizes)) - 2 * max(sizes)
        stack.callback(self.model.to, _CPU)
        _move_around(self.model, {id(block) for block in blocks}, self.device)
        for block, size in zip(blocks, sizes, strict=True):
            spare -= size
            if spare >= 0:
                block.to(self.device)
            else:
                accelerate.cpu_offload(block, execution_device=self.device, offload_buffers=True)
                stack.callback(accelerate.hooks.remove_hook_from_submodules, block)
        # Else the weights of all blocks would be there at the end of the forward pass, for the backward pass.
        stack.enter_context(torch.autograd.graph.save_on_cpu())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))


def _move_around(module: nn.Module, blocks: set[int], device: torch.device) -> None:
    """Move all of a module but some blocks in it."""
    if id(module) in blocks:
        return
    if not any(id(part) in blocks for part in module.modules()):
        module.to(device)
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
    for child in module.children():
        _move_around(child, blocks, device)
