"""Callbacks: when tables are compressed, refined and measured."""

from lightning_embcompress.callbacks.compression import EmbeddingCompression
from lightning_embcompress.callbacks.methods import GroupReduce, SharedBasis, TensorTrain, TransformCoding
from lightning_embcompress.callbacks.quantization_aware import QuantizationAware

__all__ = [
    "EmbeddingCompression",
    "GroupReduce",
    "QuantizationAware",
    "SharedBasis",
    "TensorTrain",
    "TransformCoding",
]
