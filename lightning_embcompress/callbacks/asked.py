"""What a callback was asked to do with which tables, and by what it weighs errors.

By what the loss grows by, where statistics of the model can be had, else by the frequency of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.callbacks.collecting import collect_in_training
from lightning_embcompress.compression.budget import Request, Tie, plan_requests
from lightning_embcompress.compression.loss_budget import (
    ANY_RATIO,
    Shares,
    check_predictable,
    requests_in_loss,
    shares_in_loss,
)
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.specs import plain
from lightning_embcompress.utils.division import divided


@dataclass(frozen=True)
class Asked:
    """Arguments of `EmbeddingCompression` that say what becomes of which table, and what follows from them.

    Attributes:
        config: Of the method.
        ratio: None where another budget was given.
        size: None where another budget was given.
        max_perplexity_increase: None where another budget was given.
        tables: `auto`, or paths of modules.
        tie: What becomes of a table that embedding and softmax share.
        statistics: Of the model, or a file with them; None to collect them from the training data.
        statistics_batches: Batches to collect them from; 0 for none.
        refresh_statistics: Whether they are collected anew before every refinement.

    Raises:
        ValueError: If what is asked for needs statistics and cannot have them.
    """

    config: MethodConfig
    ratio: float | None
    size: str | int | None
    max_perplexity_increase: str | float | None
    tables: str | Sequence[str]
    tie: Tie
    statistics: Statistics | str | Path | None
    statistics_batches: int
    refresh_statistics: bool

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if self.statistics_batches < 0:
            raise ValueError(f"statistics_batches must be 0 or more, it is {self.statistics_batches}")
        if self.max_perplexity_increase is not None:
            check_predictable(self.config)
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
        if self.max_perplexity_increase is not None:
            return f"max_perplexity_increase={self.max_perplexity_increase!r}"
        return f"method={self.config.method!r}" if self.config.needs_metric else ""

    def _hindrance(self, module: LightningModule) -> str:
        """Why errors are weighed by frequency though the method could do otherwise; nothing if they are not."""
        if self.statistics is None and not self.statistics_batches:
            return "statistics_batches=0 leaves out to collect statistics"
        if self.statistics is None and not module.automatic_optimization:
            return (
                f"{type(module).__name__} optimizes by hand (automatic_optimization=False), so that no statistics can "
                "be collected from its training_step: give statistics=collect_statistics(model, batches, loss_fn)"
            )
        return ""

    def by_loss(self, module: LightningModule) -> bool:
        """Whether errors are weighed by what the loss grows by.

        Args:
            module: The module that is training.

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
                f"refresh_statistics=True cannot be done: {type(module).__name__} optimizes by hand "
                "(automatic_optimization=False), so that no statistics can be collected from its training_step"
            )
        return not hindrance

    @property
    def settings(self) -> dict[str, Any]:
        """What is kept in checkpoints of what was asked for."""
        settings: dict[str, Any] = plain({"ratio": self.ratio, "size": self.size, **self.config.options})
        return (
            settings
            if self.max_perplexity_increase is None
            else {**settings, "max_perplexity_increase": self.max_perplexity_increase}
        )

    @cached_property
    def given(self) -> Statistics | None:
        """The statistics that were given, read from their file when they are first asked for."""
        return Statistics.load(self.statistics) if isinstance(self.statistics, str | Path) else self.statistics

    def counts_in_statistics(self, module: LightningModule, otherwise: Any) -> Any:
        """Token counts of the statistics that were given, if they are used, or the other ones."""
        if self.given is not None and self.by_loss(module):
            return self.given.token_counts
        return otherwise

    def check(self, trainer: Trainer, module: LightningModule, requests: Sequence[Request]) -> None:
        """Check that errors can be weighed as it is asked for, and say by what they will be.

        Args:
            trainer: The Trainer that is fitting.
            module: Its module.
            requests: What is to become of which table.

        Raises:
            FileNotFoundError: If there is no file with statistics.
            ValueError: If statistics are damaged, or of another model or vocabulary, or cannot be had, or the
                perplexity cannot be measured.
        """
        if not self.by_loss(module):
            if self.config.uses_metric:
                rank_zero_info(
                    f"{self.config.method}: errors are weighed by the frequency of tokens alone, because "
                    f"{self._hindrance(module)}."
                )
            return
        if self.max_perplexity_increase is not None and not trainer.enable_validation:
            raise ValueError(
                f"max_perplexity_increase={self.max_perplexity_increase!r} measures the perplexity on validation "
                "data, and there is none: give the "
                "Trainer validation data and the module a validation_step, or give a ratio or a size instead"
            )
        if self.given is not None:
            self.given.check([request.table for request in requests])
        origin = "the statistics that were given"
        if self.given is None:
            origin = f"statistics of {self.statistics_batches} batches of the training data"
        rank_zero_info(f"{self.config.method}: errors are weighed by what the loss grows by, by {origin}.")

    def requests(self, module: LightningModule) -> list[Request]:
        """What is to become of which table, all at the same ratio, see `plan_requests`."""
        return plan_requests(module, *self._arguments)

    def requests_in_loss(self, module: LightningModule, statistics: Statistics) -> list[Request]:
        """The same with the metric of the loss and one budget; all processes have to call it."""
        with divided():
            return requests_in_loss(module, statistics, *self._arguments)

    def shares_in_loss(self, module: LightningModule, statistics: Statistics) -> Shares:
        """What each table is worth, to search for their sizes; all processes have to call it."""
        with divided():
            return shares_in_loss(module, statistics, *self._arguments)[0]

    @property
    def _arguments(self) -> tuple[MethodConfig, float | None, str | int | None, str | Sequence[str], Tie]:
        return self.config, self._ratio, self.size, self.tables, self.tie

    @property
    def _ratio(self) -> float | None:
        return self.ratio if self.max_perplexity_increase is None else ANY_RATIO

    def find_statistics(
        self, trainer: Trainer, module: LightningModule, requests: Sequence[Request], counts: Tensor | None
    ) -> Statistics:
        """The statistics that were given, or those of the training data.

        Args:
            trainer: The Trainer that is fitting.
            module: Its module, with the tables in place.
            requests: What is to become of which table.
            counts: `[vocab_size]` token counts.
        """
        paths = [path for request in requests for path in request.table.modules]
        return self.given or self.collect(trainer, module, paths, counts)

    def collect(
        self, trainer: Trainer, module: LightningModule, paths: Sequence[str], counts: Tensor | None
    ) -> Statistics:
        """Statistics of the training data, see `collect_in_training`."""
        with isolate_rng():
            # Of batches that do not depend on what has been drawn: where a run is resumed at the start of this epoch,
            # Lightning has drawn for it already, and otherwise it has not.
            torch.manual_seed(trainer.current_epoch)
            np.random.seed(trainer.current_epoch)
            random.seed(trainer.current_epoch)
            return collect_in_training(trainer, module, list(paths), counts, self.statistics_batches)
