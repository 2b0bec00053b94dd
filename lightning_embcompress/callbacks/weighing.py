"""By what a callback weighs errors: by what the loss grows by, where statistics can be had, else by token frequency."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.callbacks.collecting import collect_in_training
from lightning_embcompress.callbacks.evaluation import NOTHING_TO_COUNT, stream_token_counts
from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.tasks import Task
from lightning_embcompress.compression.weighing import check_counts
from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.layers.compressed import CompressedEmbedding
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.tables.automatic import is_one_vocabulary, vocabulary_size
from lightning_embcompress.tables.finding import Table
from lightning_embcompress.utils.division import failing_together


@dataclass(frozen=True)
class Weighing:
    """What a callback was told of the errors of tables, and where it finds what it was not told.

    Attributes:
        config: Of the method.
        budget: How small the tables are to become.
        token_counts: `[vocab_size]` how often every token occurs, or such counts by the paths of tables; None to ask
            the data module or the training data.
        statistics: Of the model, or a file with them; None to collect them from the training data.
        statistics_batches: Batches to collect them from; 0 for none.
        refresh_statistics: Whether they are collected anew before every refinement.

    Raises:
        ValueError: If what is asked for needs statistics and cannot have them.
    """

    config: MethodConfig
    budget: Budget | None
    token_counts: Any
    statistics: Statistics | str | Path | None
    statistics_batches: int
    refresh_statistics: bool

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if self.statistics is not None and self.token_counts is not None:
            raise ValueError(
                "give statistics or token_counts, not both: statistics have token counts of their own, those of "
                "collect_statistics(..., token_counts=...)"
            )
        if self.statistics_batches < 0:
            raise ValueError(f"statistics_batches must be 0 or more, it is {self.statistics_batches}")
        if self._needs_loss and self.statistics is None and not self.statistics_batches:
            raise ValueError(
                f"{self._needs_loss} has to know what errors cost, and statistics_batches=0 leaves no way to: give "
                "statistics, or a number of batches to collect them from, such as the default of 200"
            )
        if self.refresh_statistics and not self.statistics_batches:
            raise ValueError(
                "refresh_statistics=True collects statistics before every refinement, and statistics_batches=0 leaves "
                "nothing to collect them from: give a number of batches, such as the default of 200"
            )

    @property
    def _needs_loss(self) -> str:
        """The argument that can only be followed where it is known what errors cost; nothing if there is none."""
        if self.budget is not None and self.budget.is_searched:
            return f"max_perplexity_increase={self.budget.max_perplexity_increase!r}"
        return f"method={self.config.method!r}" if self.config.needs_metric else ""

    def _hindrance(self, module: LightningModule) -> str:
        """Why errors are weighed by frequency though the method could do otherwise; nothing if they are not."""
        if self.statistics is None and not self.statistics_batches:
            return "statistics_batches=0 leaves out to collect statistics"
        if self.statistics is None and not module.automatic_optimization:
            return (
                f"{type(module).__name__} uses manual optimization (automatic_optimization=False), so that no "
                "statistics can be collected from its training_step: give statistics=collect_statistics(model, "
                "batches, loss_fn)"
            )
        return ""

    def by_loss(self, module: LightningModule) -> bool:
        """Whether errors are weighed by what the loss grows by.

        Raises:
            ValueError: If that is asked for and not possible.
        """
        if not self.config.uses_metric:
            return False
        hindrance = self._hindrance(module)
        if hindrance and self._needs_loss:
            raise ValueError(f"{self._needs_loss} has to know what errors cost: {hindrance}")
        if self.refresh_statistics and not module.automatic_optimization:
            raise ValueError(
                f"refresh_statistics=True cannot be done: {type(module).__name__} uses manual optimization "
                "(automatic_optimization=False), so that no statistics can be collected from its training_step"
            )
        return not hindrance

    @cached_property
    def given(self) -> Statistics | None:
        """The statistics that were given, read from their file when they are first asked for."""
        return Statistics.load(self.statistics) if isinstance(self.statistics, str | Path) else self.statistics

    def check(self, trainer: Trainer, module: LightningModule, tasks: Sequence[Task]) -> None:
        """Check that errors can be weighed as it is asked for, and say by what they will be.

        Args:
            trainer: The Trainer that is fitting.
            module: Its module.
            tasks: What is to be compressed.

        Raises:
            FileNotFoundError: If there is no file with statistics.
            ValueError: If statistics or token counts are damaged, or of another model or vocabulary, or cannot be had,
                or the perplexity cannot be measured.
        """
        tables = [task.table for task in tasks]
        if (counts := self.known_counts(trainer, module, tables)) is not None:
            check_counts(tables, self.config, counts)
        elif self.config.needs_counts and None in _counted_embeddings(module, tables).values():
            raise ValueError(NOTHING_TO_COUNT)
        if not self.by_loss(module):
            if self.config.uses_metric:
                why = f"errors are weighed by the frequency of tokens alone, because {self._hindrance(module)}"
                rank_zero_info(f"{self.config.method}: {why}.")
            return
        if self.budget is not None and self.budget.is_searched and not trainer.enable_validation:
            raise ValueError(
                f"max_perplexity_increase={self.budget.max_perplexity_increase!r} measures the perplexity on "
                "validation data, and there is none: give the Trainer validation data and the module a "
                "validation_step, or give another budget instead"
            )
        origin = f"statistics of {self.statistics_batches} batches of the training data"
        if self.given is not None:
            self.given.check(tables)
            origin = "the statistics that were given"
        rank_zero_info(f"{self.config.method}: errors are weighed by what the loss grows by, by {origin}.")

    def known_counts(self, trainer: Trainer, module: LightningModule, tables: Sequence[Table]) -> Any:
        """Token counts as they were given or as the data module has them; None if nobody has.

        Args:
            trainer: The Trainer that is fitting.
            module: Its module.
            tables: What is to be compressed.
        """
        if self.given is not None and self.by_loss(module):
            return {table.name: self.given.counts_of(table.modules) for table in tables}
        # Data modules may count a corpus only when they are asked: not for a method that does not need it.
        if self.token_counts is not None or not self.config.needs_counts:
            return self.token_counts
        counts = getattr(trainer.datamodule, "token_counts", None)  # type: ignore[attr-defined]
        sizes = {table.shape[0] for table in tables}
        if counts is None or isinstance(counts, Mapping):
            return counts
        if not is_one_vocabulary(sizes):
            # Of which vocabulary they are is not known.
            return None
        if len(counts) < min(sizes):
            # Tables are often padded to a round number of rows; no token of the data is in those.
            counts = nn.functional.pad(torch.as_tensor(counts), (0, min(sizes) - len(counts)))
        return counts

    def find_counts(self, trainer: Trainer, module: LightningModule, tables: Sequence[Table]) -> Any:
        """The same, or those of a pass over the training data where the method needs them."""
        with failing_together():
            counts = self.known_counts(trainer, module, tables)
        if counts is None and self.config.needs_counts:
            embeddings = _counted_embeddings(module, tables)
            streamed = {
                rows: stream_token_counts(trainer, module, embedding, rows) for rows, embedding in embeddings.items()
            }
            counts = {table.name: streamed[table.shape[0]] for table in tables}
        return counts

    def find_statistics(
        self, trainer: Trainer, module: LightningModule, paths: Sequence[str], counts: Any
    ) -> Statistics | None:
        """The statistics that were given, or those of the training data; None where errors are weighed without.

        Args:
            trainer: The Trainer that is fitting.
            module: Its module, with the tables in place.
            paths: Of the modules that read the tables.
            counts: `[vocab_size]` token counts, or such counts by the paths of tables.
        """
        if not self.by_loss(module):
            return None
        return self.given or self.collect(trainer, module, paths, counts)

    def collect(self, trainer: Trainer, module: LightningModule, paths: Sequence[str], counts: Any) -> Statistics:
        """Statistics of the training data, see `collect_in_training`."""
        with isolate_rng():
            # Of batches that do not depend on what has been drawn: where a run is resumed at the start of this epoch,
            # Lightning has drawn for it already, and otherwise it has not.
            torch.manual_seed(trainer.current_epoch)
            np.random.seed(trainer.current_epoch)
            random.seed(trainer.current_epoch)
            return collect_in_training(trainer, module, list(paths), counts, self.statistics_batches)


def _counted_embeddings(module: nn.Module, tables: Sequence[Table]) -> dict[int, nn.Module | None]:
    """Of every vocabulary, by its rows, the embedding whose ids are counted."""
    layers = [module.get_submodule(path) for table in tables for path in table.modules]
    # Of a head alone the ids are those that another embedding of the same vocabulary reads.
    candidates = [*layers, *module.modules()]
    sizes = dict.fromkeys(table.shape[0] for table in tables)
    embeddings = [layer for layer in candidates if isinstance(layer, AnyEmbedding | CompressedEmbedding)]
    by_size = {layer.num_embeddings: layer for layer in reversed(embeddings)}
    counted = {rows: vocabulary_size(rows, by_size) for rows in sizes}
    return {rows: None if size is None else by_size[size] for rows, size in counted.items()}
