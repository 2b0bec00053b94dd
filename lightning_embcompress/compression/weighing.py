"""What the rows of tables are weighed by: counts, checked against the tables and the method, and rows that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_embcompress.calibration.counts import Vocabulary, counts_by_table
from lightning_embcompress.calibration.special_tokens import KeepRows, protected_counts, rows_to_keep, special_tokens
from lightning_embcompress.methods.config import MethodConfig, MetricConfig
from lightning_embcompress.tables.finding import Table


def check_counts(tables: Sequence[Table], config: MethodConfig, token_counts: Any) -> list[Tensor | None]:
    """Check token counts against the tables that need them.

    Returns:
        For every table a `[vocab_size]` tensor, or None.

    Raises:
        ValueError: If they are needed and missing, of the wrong length, negative or not finite.
    """
    if token_counts is not None:
        return list(counts_by_table(token_counts, [Vocabulary(table.modules, table.shape[0]) for table in tables]))
    if config.needs_counts:
        raise ValueError(
            f"method {config.method!r} weights the rows of table {tables[0].name!r} by frequency: give token_counts, "
            "how often every token occurs in the training data (torch.bincount(ids, minlength=vocab_size)), or use a "
            "method that needs none"
        )
    return [None] * len(tables)


def check_unseen_weight(config: MethodConfig) -> None:
    """Refuse to weigh unseen tokens where rows are weighted as published."""
    if isinstance(config, MetricConfig) and config.unseen_weight is not None and not config.weighs_by_counts:
        raise ValueError(
            f"unseen_weight={config.unseen_weight} is of the metric of the loss, which {config.method!r} has from "
            "statistics alone: give statistics=collect_statistics(model, batches), or leave it out"
        )


def kept_rows(tables: Sequence[Table], config: MethodConfig, keep_rows: KeepRows) -> list[list[int]]:
    """Ids that are named to be kept, for every table."""
    kept = [rows_to_keep(table, keep_rows, tables) for table in tables]
    if any(kept) and not (config.needs_counts or config.uses_metric):
        raise ValueError(
            f"keep_rows cannot be followed by {config.method!r}, which does not weigh rows by how often they occur: "
            "leave it out, or use a method that does, such as the default"
        )
    return kept


def protected(model: nn.Module, table: Table, counts: Tensor | None, kept: Sequence[int]) -> Tensor | None:
    """Counts in which neither special tokens nor those that were named are rare."""
    if counts is None:
        return None
    special = {**dict.fromkeys(kept, "named"), **special_tokens(model, table)}
    return protected_counts(counts, special, table.padding)
