"""The drop-in for `nn.EmbeddingBag`: rows of a factorization, summed, averaged or compared bag by bag."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_embcompress.layers.compressed import CompressedEmbedding
from lightning_embcompress.layers.offloading import with_offloaded_factors
from lightning_embcompress.layers.pooling import bag_ids, pool
from lightning_embcompress.methods.registry import Factorization

AnyEmbedding: TypeAlias = nn.Embedding | nn.EmbeddingBag
"""What looks rows up."""


class CompressedEmbeddingBag(CompressedEmbedding):
    """Drop-in for `nn.EmbeddingBag` that computes rows from a factorization.

    Args:
        factorization: The table, `[num_embeddings, embedding_dim]`.
        mode: What becomes of the rows of a bag: `"sum"`, `"mean"` or `"max"`.
        padding_idx: Id that is left out of every bag.
        max_norm: Rows of a larger norm are scaled down to it when they are read.
        norm_type: The p of that norm.
        sparse: As for `CompressedEmbedding`.
        include_last_offset: Whether offsets end with the number of ids.

    Example:
        >>> from lightning_embcompress.methods.registry import LowRank
        >>> layer = CompressedEmbeddingBag(LowRank(vocab_size=100, dim=16, rank=4), mode="sum")
        >>> layer(torch.tensor([1, 2, 3, 7]), offsets=torch.tensor([0, 3])).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        factorization: Factorization[Any],
        mode: str = "mean",
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        sparse: bool = False,
        include_last_offset: bool = False,
    ) -> None:
        """Keep the factorization and what the layer had beside its weight."""
        super().__init__(factorization, padding_idx, max_norm, norm_type, sparse=sparse)
        self.mode = mode
        self.include_last_offset = include_last_offset

    @with_offloaded_factors
    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """One vector a bag, in the dtype of the factors.

        Args:
            input: `[B, N]`, bags of `N` ids, or `[N]`, all bags one after the other.
            offsets: `[B]`, where every bag begins in `[N]` ids.
            per_sample_weights: Of the shape of `input`: what rows are multiplied by, for `mode="sum"`.

        Returns:
            `[B, embedding_dim]`; zeros for an empty bag.

        Raises:
            ValueError: If shapes do not fit, as from `nn.EmbeddingBag`.
            RuntimeError: If gradients are sparse, under `DistributedDataParallel`.
        """
        return pool_bag(self, super().forward(bag_ids(input)), input, offsets, per_sample_weights)

    def dense(self, weight: nn.Parameter) -> nn.EmbeddingBag:
        """The `nn.EmbeddingBag` that it stands for, with a weight of the table."""
        # Made on the meta device: its own weight is thrown away at once.
        bag = nn.EmbeddingBag(
            weight.shape[0],
            weight.shape[1],
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            mode=self.mode,
            sparse=self.sparse,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
            device="meta",
        )
        bag.weight = weight
        return bag

    def extra_repr(self) -> str:
        """Arguments for `print(module)`."""
        return f"{super().extra_repr()}, mode={self.mode!r}"


def read_bag(bag: nn.EmbeddingBag | CompressedEmbeddingBag, input: Tensor) -> Tensor:
    """`[*, dim]` rows of all ids of bags, without a gradient."""
    ids = bag_ids(input)
    with torch.no_grad():
        return CompressedEmbedding.forward(bag, ids) if isinstance(bag, CompressedEmbedding) else bag.weight[ids]


def pool_bag(
    bag: nn.EmbeddingBag | CompressedEmbeddingBag,
    rows: Tensor,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """What a bag makes of the rows of its ids, see `pool`."""
    given = {name: getattr(bag, name) for name in ("mode", "include_last_offset", "padding_idx")}
    return pool(rows, input, offsets, per_sample_weights, **given)
