"""Compress the embedding and softmax tables of language models inside PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_embcompress.registration import register

if TYPE_CHECKING:
    from lightning_embcompress.callbacks import (
        EmbeddingCompression,
        GroupReduce,
        QuantizationAware,
        TensorTrain,
        TransformCoding,
    )
    from lightning_embcompress.checkpoint import keep_structure, load_from_checkpoint, structure_from_checkpoint
    from lightning_embcompress.factorizations import Quantization
    from lightning_embcompress.fused_loss import fused_cross_entropy
    from lightning_embcompress.generation import generate_from_best
    from lightning_embcompress.modules import CompressedLanguageModel
    from lightning_embcompress.plan import Plan, apply_plan, compress, densify, plan_of
    from lightning_embcompress.quantization import convert, prepare, quantize
    from lightning_embcompress.reference import open_reference
    from lightning_embcompress.saved import load_compressed, save_compressed
    from lightning_embcompress.serving import optimize_for_inference
    from lightning_embcompress.sharding import compress_or_restore, shard_tables
    from lightning_embcompress.statistics import Statistics, collect_statistics

__version__ = "0.1.0"

__all__ = [
    "CompressedLanguageModel",
    "EmbeddingCompression",
    "GroupReduce",
    "Plan",
    "Quantization",
    "QuantizationAware",
    "Statistics",
    "TensorTrain",
    "TransformCoding",
    "apply_plan",
    "collect_statistics",
    "compress",
    "compress_or_restore",
    "convert",
    "densify",
    "fused_cross_entropy",
    "generate_from_best",
    "keep_structure",
    "load_compressed",
    "load_from_checkpoint",
    "open_reference",
    "optimize_for_inference",
    "plan_of",
    "prepare",
    "quantize",
    "save_compressed",
    "shard_tables",
    "structure_from_checkpoint",
]

_HOMES = {
    "callbacks": ("EmbeddingCompression", "GroupReduce", "QuantizationAware", "TensorTrain", "TransformCoding"),
    "checkpoint": ("keep_structure", "load_from_checkpoint", "structure_from_checkpoint"),
    "factorizations": ("Quantization",),
    "fused_loss": ("fused_cross_entropy",),
    "generation": ("generate_from_best",),
    "modules": ("CompressedLanguageModel",),
    "plan": ("Plan", "apply_plan", "compress", "densify", "plan_of"),
    "quantization": ("convert", "prepare", "quantize"),
    "reference": ("open_reference",),
    "saved": ("load_compressed", "save_compressed"),
    "serving": ("optimize_for_inference",),
    "sharding": ("compress_or_restore", "shard_tables"),
    "statistics": ("Statistics", "collect_statistics"),
}

# Makes `from_pretrained` of transformers load compressed models; imports nothing.
register()


def __getattr__(name: str) -> Any:
    # Only when asked for: the commands answer help and mistakes without waiting for torch.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
