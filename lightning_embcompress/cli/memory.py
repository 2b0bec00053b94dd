"""Devices and memory of the shell's commands: what is taken, what it needs, and what to lower."""

from __future__ import annotations

import torch
from torch import nn

from lightning_embcompress.cli.usage import UsageError
from lightning_embcompress.compression.report import say
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.utils.devices import find_device, free_memory


def named_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        UsageError: If it is not there.
    """
    try:
        return find_device(name)
    except ValueError as error:
        raise UsageError(f"--device {name}: {error}") from error


def default_max_tokens(device: torch.device) -> int:
    """Tokens that a perplexity is measured on: on a CPU about a minute of a model of 100 million parameters."""
    return 2**14 if device.type == "cpu" else 2**18


def what_to_lower(batch_tokens: int | None) -> str:
    """The remedy where memory runs out."""
    fewer = "take fewer tokens at once with --batch_tokens"
    if batch_tokens is not None:
        fewer = f"lower --batch_tokens {batch_tokens}"
    return f"{fewer}, or take --dtype bfloat16 or another --device"


def say_memory(model: nn.Module, device: torch.device, workspace: int) -> None:
    """Say how much memory a run needs at least, and whether it is there."""
    weights, free = int(model_bytes(model)["stored_bytes"]), free_memory(device)
    there = "" if free is None else f"; {free / 1e9:.2f} GB are free"
    say(
        f"Memory on {device}: {weights / 1e9:.2f} GB for the model and at least {workspace / 1e9:.2f} GB to work in"
        f"{there}"
    )
