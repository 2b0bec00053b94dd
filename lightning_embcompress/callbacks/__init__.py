"""Callbacks: when tables are compressed, refined and measured.

`compression` says when, `solving` and `replacing` do it, `reporting` shows and logs it, `evaluation` measures.
"""

from lightning_embcompress.callbacks.compression import EmbeddingCompression
from lightning_embcompress.callbacks.quantization_aware import QuantizationAware
from lightning_embcompress.callbacks.single_methods import GroupReduce, SharedBasis, TensorTrain, TransformCoding

__all__ = [
    "EmbeddingCompression",
    "GroupReduce",
    "QuantizationAware",
    "SharedBasis",
    "TensorTrain",
    "TransformCoding",
]
