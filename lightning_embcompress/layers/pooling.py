"""What `nn.EmbeddingBag` does with the rows of its ids, whatever they are computed from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def bag_ids(input: Tensor) -> Tensor:
    """All ids of bags, without their borders if they are nested."""
    # Only a nested tensor has the method.
    nested: Any = input
    ids: Tensor = nested.values() if input.is_nested else input
    return ids


def pool(
    rows: Tensor,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    *,
    mode: str = "mean",
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sum, average or compare the rows of every bag.

    Args:
        rows: `[*, dim]`, a row for each of `bag_ids(input)`.
        input: `[B, N]` ids, bags of `N` each, or `[N]`, all bags one after the other.
        offsets: `[B]`, where every bag begins in `[N]` ids.
        per_sample_weights: Of the shape of `input`: what rows are multiplied by, for `mode="sum"`.
        mode: `"sum"`, `"mean"` or `"max"`.
        include_last_offset: Whether offsets end with the number of ids.
        padding_idx: Id that is left out of every bag.

    Returns:
        `[B, dim]`; zeros for an empty bag.

    Raises:
        ValueError: If shapes do not fit, as from `nn.EmbeddingBag`.

    Example:
        >>> pool(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([7, 3, 7]), torch.tensor([0, 1]), mode="sum")
        tensor([[1.],
                [7.]])
    """
    ids = bag_ids(input)
    if input.is_nested:
        nested: Any = input
        offsets, include_last_offset = nested.offsets(), True
        per_sample_weights = None if per_sample_weights is None else bag_ids(per_sample_weights)
    # A bag of `nn.functional` over the rows that were read, each at a place of its own, and zeros for what is left out.
    table = rows.reshape(-1, rows.shape[-1])
    places = torch.arange(len(table), device=ids.device, dtype=ids.dtype).view(ids.shape)
    left_out = len(table)
    if padding_idx is not None:
        places = places.masked_fill(ids == padding_idx, left_out)
    if padding_idx is not None or not left_out:
        table = F.pad(table, (0, 0, 0, 1))
    return F.embedding_bag(
        places,
        table,
        offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=None if padding_idx is None else left_out,
    )
