"""Token counts: how often every token occurs in the training data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def checked_counts(token_counts: Any, sizes: Mapping[str, int]) -> Tensor:
    """Check token counts against tables.

    Args:
        token_counts: How often every token occurs.
        sizes: Rows of the tables, by their names.

    Returns:
        `[vocab_size]` tensor on the CPU.

    Raises:
        ValueError: If they are of the wrong length, negative or not finite.
    """
    counts = torch.as_tensor(token_counts).detach().cpu()
    for name, vocab_size in sizes.items():
        if counts.shape != (vocab_size,):
            raise ValueError(
                f"token_counts must have one entry for each of the {vocab_size} rows of table {name!r}, its shape is "
                f"{tuple(counts.shape)}"
            )
    bad = (~torch.isfinite(counts.double()) | (counts < 0)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"token_counts must be finite and not negative; entry {bad[0]} is {counts[bad[0]].item()} "
            f"({len(bad)} such entries)"
        )
    return counts
