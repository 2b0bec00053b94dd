"""Compress the embedding and softmax tables of language models inside PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_embcompress.integrations.registration import register

if TYPE_CHECKING:
    from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
    from lightning_embcompress.callbacks import (
        EmbeddingCompression,
        GroupReduce,
        QuantizationAware,
        SharedBasis,
        TensorTrain,
        TransformCoding,
    )
    from lightning_embcompress.compression.plan import Plan, apply_plan, compress, densify, plan_of
    from lightning_embcompress.compression.reference import open_reference
    from lightning_embcompress.integrations.checkpoint import (
        keep_structure,
        load_from_checkpoint,
        structure_from_checkpoint,
    )
    from lightning_embcompress.integrations.saved import load_compressed, save_compressed
    from lightning_embcompress.integrations.sharding import compress_or_restore, shard_tables
    from lightning_embcompress.layers.fused_loss import fused_cross_entropy
    from lightning_embcompress.layers.generation import generate_from_best
    from lightning_embcompress.layers.serving import optimize_for_inference
    from lightning_embcompress.methods.registry import Quantization
    from lightning_embcompress.modules import CompressedLanguageModel
    from lightning_embcompress.quantization.aware import convert_qat, prepare_qat, quantize_tables

__version__ = "0.1.0"

__all__ = [
    "CompressedLanguageModel",
    "EmbeddingCompression",
    "GroupReduce",
    "Plan",
    "Quantization",
    "QuantizationAware",
    "SharedBasis",
    "Statistics",
    "TensorTrain",
    "TransformCoding",
    "apply_plan",
    "collect_statistics",
    "compress",
    "compress_or_restore",
    "convert_qat",
    "densify",
    "fused_cross_entropy",
    "generate_from_best",
    "keep_structure",
    "load_compressed",
    "load_from_checkpoint",
    "open_reference",
    "optimize_for_inference",
    "plan_of",
    "prepare_qat",
    "quantize_tables",
    "save_compressed",
    "shard_tables",
    "structure_from_checkpoint",
]

_HOMES = {
    "calibration.statistics": ("Statistics", "collect_statistics"),
    "callbacks": (
        "EmbeddingCompression",
        "GroupReduce",
        "QuantizationAware",
        "SharedBasis",
        "TensorTrain",
        "TransformCoding",
    ),
    "compression.plan": ("Plan", "apply_plan", "compress", "densify", "plan_of"),
    "compression.reference": ("open_reference",),
    "integrations.checkpoint": ("keep_structure", "load_from_checkpoint", "structure_from_checkpoint"),
    "integrations.saved": ("load_compressed", "save_compressed"),
    "integrations.sharding": ("compress_or_restore", "shard_tables"),
    "layers.fused_loss": ("fused_cross_entropy",),
    "layers.generation": ("generate_from_best",),
    "layers.serving": ("optimize_for_inference",),
    "methods.registry": ("Quantization",),
    "modules": ("CompressedLanguageModel",),
    "quantization.aware": ("convert_qat", "prepare_qat", "quantize_tables"),
}

# Makes `from_pretrained` of transformers load compressed models; imports nothing.
register()


def __getattr__(name: str) -> Any:
    # Only when asked for: the commands answer help and mistakes without waiting for torch.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
