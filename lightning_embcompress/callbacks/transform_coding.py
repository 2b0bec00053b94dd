"""Transform coding as a callback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.callbacks.compression import EmbeddingCompression
from lightning_embcompress.compression.budget import Tie


class TransformCoding(EmbeddingCompression):
    """Compress tables to codes: frequency groups in one basis of the loss, each component at a width of its own.

    This is `EmbeddingCompression` with `method="transform_coding"` and the options of the method by name.

    Args:
        ratio: Dense bytes over stored bytes of all tables together; of every table where there are no statistics.
        size: Instead of a ratio, bytes of all tables together: `80MB` (MB = 10⁶ bytes).
        max_perplexity_increase: Instead of a size, the most that the perplexity on the validation data may grow by,
            `1%` or `0.01`.
        at_epoch: Epoch at whose start the tables are compressed; 0 is before the first step.
        refine_at_epochs: Later epochs at whose start they are solved again.
        groups: Number of groups to begin with; None or `auto` for the best of 1, 2, 4, ... 32.
        refine_rounds: Most rounds of moving words between groups when the tables are solved; 0 for none.
        bits: The one width of coefficients that are kept, 1 to 8; None for the best of several for every component.
        tables: `auto`, or the names of the modules.
        tie: What becomes of a table that embedding and softmax share: `keep`, `untie` or `auto`.
        monitor: Name of a loss that validation logs, to measure the perplexity by.
        token_counts: `[vocab_size]` how often every token occurs in the training data, if the data module does not
            say it.
        statistics: Of the model, or the file that `Statistics.save` has written, in place of collecting them.
        statistics_batches: Batches of training data, in each process, from which they are collected; 0 for none.
        refresh_statistics: Whether they are collected anew before every refinement.
        keep_reference: Folder in which the dense tables are kept when they are compressed.

    Raises:
        ValueError: If an argument is out of its range; when training starts, if the tables, the budget or the epochs
            cannot be used.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = TransformCoding(max_perplexity_increase="1%", at_epoch=4)
        >>> trainer = Trainer(max_epochs=5, callbacks=[callback], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        *,
        ratio: float | None = None,
        size: str | int | None = None,
        max_perplexity_increase: str | float | None = None,
        at_epoch: int = 0,
        refine_at_epochs: Sequence[int] = (),
        groups: int | Literal["auto"] | None = None,
        refine_rounds: int = 5,
        bits: int | None = None,
        tables: str | list[str] = "auto",
        tie: Tie = "keep",
        monitor: str | None = None,
        token_counts: list[int] | Tensor | None = None,
        statistics: Statistics | str | Path | None = None,
        statistics_batches: int = 200,
        refresh_statistics: bool = False,
        keep_reference: str | Path | None = None,
    ) -> None:
        """Check what can be checked without a model."""
        super().__init__(
            "transform_coding",
            ratio=ratio,
            size=size,
            max_perplexity_increase=max_perplexity_increase,
            at_epoch=at_epoch,
            refine_at_epochs=refine_at_epochs,
            tables=tables,
            tie=tie,
            monitor=monitor,
            token_counts=token_counts,
            statistics=statistics,
            statistics_batches=statistics_batches,
            refresh_statistics=refresh_statistics,
            keep_reference=keep_reference,
            groups=groups,
            refine_rounds=refine_rounds,
            bits=bits,
        )
