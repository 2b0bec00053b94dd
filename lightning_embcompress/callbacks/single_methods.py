"""A callback a method: `EmbeddingCompression` with the fields of the method's config as arguments of its own."""

from __future__ import annotations

from lightning_embcompress.callbacks.compression import EmbeddingCompression
from lightning_embcompress.methods.registry import (
    GroupReduceConfig,
    SharedBasisConfig,
    TensorTrainConfig,
    TransformCodingConfig,
)


class GroupReduce(EmbeddingCompression, config=GroupReduceConfig):
    """Compress tables by GroupReduce as published: frequency groups, each of a low rank of its own (arXiv 1806.06950).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = GroupReduce(ratio=6.6, at_epoch=2, refine_at_epochs=[3, 4], groups=20)
        >>> trainer = Trainer(max_epochs=5, callbacks=[callback], accelerator="cpu", logger=False)
    """


class SharedBasis(EmbeddingCompression, config=SharedBasisConfig):
    """Compress tables to frequency groups in one basis of the loss, with ranks by marginal gain.

    Example:
        >>> callback = SharedBasis(ratio=4, at_epoch=2)
    """


class TransformCoding(EmbeddingCompression, config=TransformCodingConfig):
    """Compress tables to codes: frequency groups in one basis of the loss, each component at a width of its own.

    Example:
        >>> callback = TransformCoding(max_perplexity_increase="1%", at_epoch=4)
    """


class TensorTrain(EmbeddingCompression, config=TensorTrainConfig):
    """Compress tables by TensorGPT: a tensor train for the vector of every token (arXiv 2307.00526).

    Example:
        >>> callback = TensorTrain(max_rank=4, at_epoch=1)
    """
