"""GroupReduce as a callback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from lightning_embcompress.callbacks.compression import EmbeddingCompression
from lightning_embcompress.compression.budget import Tie


class GroupReduce(EmbeddingCompression):
    """Compress tables by GroupReduce: frequency groups, each of a low rank of its own (arXiv 1806.06950).

    This is `EmbeddingCompression` with `method="group_reduce"` and the options of the method by name.

    Args:
        ratio: Dense bytes over stored bytes, for every table.
        size: Instead of a ratio, bytes of all tables together: `80MB` (MB = 10⁶ bytes).
        at_epoch: Epoch at whose start the tables are compressed; 0 is before the first step.
        refine_at_epochs: Later epochs at whose start they are solved again.
        groups: Number of groups. None for 5 up to 30,000 words, else 20.
        refine_rounds: Most rounds of moving words between groups when the tables are solved; 0 for none.
        grouping: How it groups words to begin with: groups of `equal` size, or by `kmeans` of their frequencies.
        tables: `auto`, or the names of the modules.
        tie: What becomes of a table that embedding and softmax share: `keep`, `untie` or `auto`.
        monitor: Name of a loss that validation logs, to measure the perplexity by.
        token_counts: `[vocab_size]` how often every token occurs in the training data, if the data module does not
            say it.
        keep_reference: Folder in which the dense tables are kept when they are compressed.

    Raises:
        ValueError: If an argument is out of its range; when training starts, if the tables, the budget or the epochs
            cannot be used.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = GroupReduce(ratio=6.6, at_epoch=2, refine_at_epochs=[3, 4], groups=20)
        >>> trainer = Trainer(max_epochs=5, callbacks=[callback], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        *,
        ratio: float | None = None,
        size: str | int | None = None,
        at_epoch: int = 0,
        refine_at_epochs: Sequence[int] = (),
        groups: int | None = None,
        refine_rounds: int = 5,
        grouping: Literal["equal", "kmeans"] = "equal",
        tables: str | list[str] = "auto",
        tie: Tie = "keep",
        monitor: str | None = None,
        token_counts: list[int] | Tensor | None = None,
        keep_reference: str | Path | None = None,
    ) -> None:
        """Check what can be checked without a model."""
        super().__init__(
            "group_reduce",
            ratio=ratio,
            size=size,
            at_epoch=at_epoch,
            refine_at_epochs=refine_at_epochs,
            tables=tables,
            tie=tie,
            monitor=monitor,
            token_counts=token_counts,
            keep_reference=keep_reference,
            groups=groups,
            refine_rounds=refine_rounds,
            grouping=grouping,
        )
