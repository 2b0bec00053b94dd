"""Callbacks: when tables are compressed, refined and measured."""

from lightning_embcompress.callbacks.compression import EmbeddingCompression
from lightning_embcompress.callbacks.group_reduce import GroupReduce
from lightning_embcompress.callbacks.quantization_aware import QuantizationAware
from lightning_embcompress.callbacks.tensor_train import TensorTrain
from lightning_embcompress.callbacks.transform_coding import TransformCoding

__all__ = ["EmbeddingCompression", "GroupReduce", "QuantizationAware", "TensorTrain", "TransformCoding"]
