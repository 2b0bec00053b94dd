"""Compress the embedding and softmax tables of language models inside PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_embcompress.registration import register

if TYPE_CHECKING:
    from lightning_embcompress.callbacks import EmbeddingCompression, GroupReduce, TensorTrain
    from lightning_embcompress.checkpoint import load_from_checkpoint
    from lightning_embcompress.plan import Plan, compress, densify
    from lightning_embcompress.saved import load_compressed, save_compressed

__version__ = "0.1.0"

__all__ = [
    "EmbeddingCompression",
    "GroupReduce",
    "Plan",
    "TensorTrain",
    "compress",
    "densify",
    "load_compressed",
    "load_from_checkpoint",
    "save_compressed",
]

_HOMES = {
    "callbacks": ("EmbeddingCompression", "GroupReduce", "TensorTrain"),
    "checkpoint": ("load_from_checkpoint",),
    "plan": ("Plan", "compress", "densify"),
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
