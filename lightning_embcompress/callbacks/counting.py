"""Where a callback takes token counts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_embcompress.callbacks.evaluation import stream_token_counts
from lightning_embcompress.compression.budget import Request, check_counts
from lightning_embcompress.compression.distribution import failing_together


def known_counts(trainer: Trainer, requests: Sequence[Request], given: Any) -> Any:
    """Token counts as they were given or as the data module has them; None if nobody has.

    Args:
        trainer: The Trainer that is fitting.
        requests: What is to become of which table, all by one method.
        given: `[vocab_size]` counts that the user gave, or None.
    """
    # Data modules may count a corpus only when they are asked: not for a method that does not need it.
    if given is not None or not requests[0].config.needs_counts:
        return given
    counts = getattr(trainer.datamodule, "token_counts", None)  # type: ignore[attr-defined]
    rows = min(request.table.shape[0] for request in requests)
    if counts is not None and len(counts) < rows:
        # Tables are often padded to a round number of rows; no token of the data is in those.
        counts = nn.functional.pad(torch.as_tensor(counts), (0, rows - len(counts)))
    return counts


def counts_for(trainer: Trainer, module: LightningModule, requests: Sequence[Request], given: Any) -> Tensor | None:
    """Token counts as they are known, or by a pass over the training data where the method needs them.

    Args:
        trainer: The Trainer that is fitting.
        module: Its module, with the tables in place.
        requests: What is to become of which table, all by one method.
        given: `[vocab_size]` counts that the user gave, or None.

    Raises:
        ValueError: If they do not fit the tables.
    """
    with failing_together():
        counts = known_counts(trainer, requests, given)
    if counts is None and requests[0].config.needs_counts:
        layers = [module.get_submodule(path) for request in requests for path in request.table.modules]
        embedding = next((layer for layer in layers if isinstance(layer, nn.Embedding)), None)
        counts = stream_token_counts(trainer, module, embedding, requests[0].table.shape[0])
    return check_counts(counts, requests)
