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
    from lightning_embcompress.compression.plan import compress, densify, plan_of
    from lightning_embcompress.integrations.checkpoint import load_from_checkpoint
    from lightning_embcompress.integrations.saved import load_compressed, save_compressed
    from lightning_embcompress.layers.serving import optimize_for_inference
    from lightning_embcompress.methods.registry import Quantization
    from lightning_embcompress.modules import CompressedLanguageModel
    from lightning_embcompress.quantization.aware import convert_qat, prepare_qat, quantize_tables

__version__ = "0.1.0"

__all__ = [
    "CompressedLanguageModel",
    "EmbeddingCompression",
    "GroupReduce",
    "Quantization",
    "QuantizationAware",
    "SharedBasis",
    "Statistics",
    "TensorTrain",
    "TransformCoding",
    "collect_statistics",
    "compress",
    "convert_qat",
    "densify",
    "load_compressed",
    "load_from_checkpoint",
    "optimize_for_inference",
    "plan_of",
    "prepare_qat",
    "quantize_tables",
    "save_compressed",
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
    "compression.plan": ("compress", "densify", "plan_of"),
    "integrations.checkpoint": ("load_from_checkpoint",),
    "integrations.saved": ("load_compressed", "save_compressed"),
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
