"""Compress the embedding and softmax tables of language models inside PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_embcompress.registration import register

if TYPE_CHECKING:
    from lightning_embcompress.callbacks import EmbeddingCompression, GroupReduce, TensorTrain
    from lightning_embcompress.checkpoint import keep_structure, load_from_checkpoint, structure_from_checkpoint
    from lightning_embcompress.plan import Plan, apply_plan, compress, densify, plan_of
    from lightning_embcompress.saved import load_compressed, save_compressed

__version__ = "0.1.0"

__all__ = [
    "EmbeddingCompression",
    "GroupReduce",
    "Plan",
    "TensorTrain",
    "apply_plan",
    "compress",
    "densify",
    "keep_structure",
    "load_compressed",
    "load_from_checkpoint",
    "plan_of",
    "save_compressed",
    "structure_from_checkpoint",
]

_HOMES = {
    "callbacks": ("EmbeddingCompression", "GroupReduce", "TensorTrain"),
    "checkpoint": ("keep_structure", "load_from_checkpoint", "structure_from_checkpoint"),
    "plan": ("Plan", "apply_plan", "compress", "densify", "plan_of"),
    "saved": ("load_compressed", "save_compressed"),
}

# Makes `from_pretrained` of transformers load compressed models; imports nothing.
register()


def __getattr__(name: str) -> Any:
    # Only when asked for: the commands answer help and mistakes without waiting for torch.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
