"""Callbacks: when tables are compressed, refined and measured."""

from lightning_embcompress.callbacks.compression import EmbeddingCompression
from lightning_embcompress.callbacks.group_reduce import GroupReduce

__all__ = ["EmbeddingCompression", "GroupReduce"]
