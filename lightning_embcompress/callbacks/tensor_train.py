"""TensorGPT as a callback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_embcompress.callbacks.compression import EmbeddingCompression
from lightning_embcompress.compression.budget import Tie


class TensorTrain(EmbeddingCompression):
    """Compress tables by TensorGPT: a tensor train for the vector of every token (arXiv 2307.00526).

    This is `EmbeddingCompression` with `method="tensor_train"` and the options of the method by name.

    Args:
        max_rank: Largest rank of the trains; it decides the size. With 768 columns, 1 gives 38.40 times fewer
            parameters and 4 gives 3.31 times fewer.
        ratio: Instead of a rank, dense bytes over stored bytes, for every table: the largest rank that fits is taken.
        size: Instead of a rank, bytes of all tables together: `80MB` (MB = 10⁶ bytes).
        shape: Sizes of the modes that a vector is folded to, with a product of at least its length (`[4, 4, 4, 3, 4]`
            for 768); by default as many twos as it takes.
        at_epoch: Epoch at whose start the tables are compressed; 0 is before the first step.
        refine_at_epochs: Later epochs at whose start they are solved again.
        tables: `auto`, or the names of the modules.
        tie: What becomes of a table that embedding and softmax share: `keep`, `untie` or `auto`.
        monitor: Name of a loss that validation logs, to measure the perplexity by.
        keep_reference: Folder in which the dense tables are kept when they are compressed.

    Raises:
        ValueError: If an argument is out of its range; when training starts, if the tables, the ratio or the epochs
            cannot be used.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = TensorTrain(max_rank=4, at_epoch=1)
        >>> trainer = Trainer(max_epochs=5, callbacks=[callback], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        max_rank: int | None = None,
        *,
        ratio: float | None = None,
        size: str | int | None = None,
        shape: Sequence[int] | None = None,
        at_epoch: int = 0,
        refine_at_epochs: Sequence[int] = (),
        tables: str | list[str] = "auto",
        tie: Tie = "keep",
        monitor: str | None = None,
        keep_reference: str | Path | None = None,
    ) -> None:
        """Check what can be checked without a model."""
        super().__init__(
            "tensor_train",
            ratio=ratio,
            size=size,
            at_epoch=at_epoch,
            refine_at_epochs=refine_at_epochs,
            tables=tables,
            tie=tie,
            monitor=monitor,
            keep_reference=keep_reference,
            max_rank=max_rank,
            shape=None if shape is None else tuple(shape),
        )
