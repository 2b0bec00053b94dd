"""The terms of a fine-tuning's loss: cross-entropy, distillation and reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_embcompress.layers.chunked_loss import ChunkedLoss, loss_of_head, loss_of_logits
from lightning_embcompress.layers.distillation import Distillation, TeacherScores, check_distillation
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX
from lightning_embcompress.modules.base import LanguageModel
from lightning_embcompress.modules.finetuning.parts import Parts, Seen, own_step, watch
from lightning_embcompress.modules.finetuning.teacher import Teacher


@dataclass(frozen=True)
class Terms:
    """A weighted sum of terms, in nats per token.

    Attributes:
        cross_entropy: Weight of the loss that the model's own `training_step` computes.
        distillation: Weight of the divergence from the teacher.
        reconstruction: Weight of the distance of the tables from the teacher's.
        top_k: How many of the teacher's likeliest tokens are told apart; None for all.
        temperature: What logits of teacher and model are divided by to be compared.
        rows: Rows of each table that are drawn at every step for the reconstruction; None for those of the batch.

    Raises:
        ValueError: If one is out of range, or there is no term.
    """

    cross_entropy: float
    distillation: float
    reconstruction: float
    top_k: int | None
    temperature: float
    rows: int | None

    def __post_init__(self) -> None:
        """Check the values."""
        check_distillation(self.top_k, self.temperature)
        weights = {name: getattr(self, name) for name in ("cross_entropy", "distillation", "reconstruction")}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}_weight={weight} must be 0 or more, and finite.")
        if not any(weights.values()):
            raise ValueError("All weights are 0, so that there is no loss: set cross_entropy_weight=1.")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"reconstruction_rows={self.rows} must be at least 1; None takes the tokens of the batch.")

    @property
    def are_the_models_own(self) -> bool:
        """Whether the loss is the one that the model's own step computes."""
        return (self.cross_entropy, self.distillation, self.reconstruction) == (1, 0, 0)

    def training_step(
        self,
        model: LightningModule,
        teacher: Teacher,
        batch: Any,
        batch_idx: int,
        seed: int,
        log: Callable[..., None],
    ) -> Any:
        """Compute the weighted sum for a batch.

        Args:
            model: The model that is fine-tuned.
            teacher: Its dense original.
            batch: As the model takes it.
            batch_idx: Its index in the epoch.
            seed: By which rows are drawn for the reconstruction.
            log: As `LightningModule.log`; gets the terms without their weights, and the sum as `train_loss`.

        Returns:
            What the model's own step returns, with the sum in place of its loss.
        """
        output: Any = None
        own: Any = None
        scores = found = None
        if self.distillation:
            # First: what it takes is gone again before the model's own graph is there.
            scores = teacher.scores(batch, batch_idx, self.top_k, self.temperature)
        foreign = not isinstance(model, LanguageModel)
        with watch(model, teacher.parts, head=foreign and scores is not None) as seen:
            if scores is not None and isinstance(model, LanguageModel):
                found = self._of_logits(model, batch, scores)
                log("train_cross_entropy", found.terms[0], batch_size=1)
                loss = found.loss
            else:
                output = own_step(model, batch, batch_idx)
                own = output.get("loss") if isinstance(output, Mapping) else output
                if not isinstance(own, Tensor):
                    # The module skips this step.
                    return output
                loss = self.cross_entropy * own
        if scores is not None and found is None:
            found = self._of_hidden_states(model, teacher.parts, seen, own, scores)
            loss = loss + found.loss
        if found is not None:
            log("train_distillation", found.terms[1], batch_size=1)
        if self.reconstruction:
            term = teacher.reconstruction(model, seen.ids, self.rows, seed)
            log("train_reconstruction", term.detach(), batch_size=1)
            loss = loss + self.reconstruction * term
        log("train_loss", loss.detach(), prog_bar=True, batch_size=1)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _of_logits(self, model: LanguageModel, batch: Any, scores: TeacherScores) -> ChunkedLoss:
        """Cross-entropy and distillation of a language model of this package, from the same logits."""
        settings = (scores, self.temperature, self.cross_entropy, self.distillation)
        known = model.known_head(batch, "train")
        if known is None:
            logits, targets = model.scores(batch, "train")
            return loss_of_logits(logits, Distillation(targets, *settings), overwrite=True)
        head, hidden, targets = known
        return loss_of_head(head, hidden, Distillation(targets, *settings))

    def _of_hidden_states(
        self, model: LightningModule, parts: Parts, seen: Seen, own: Tensor, scores: TeacherScores
    ) -> ChunkedLoss:
        """Distillation of the logits that the head gives once more: a module may have changed its own."""
        hidden, head = seen.hidden_states(model), parts.head(model)
        assert head is not None
        # Which token it is makes no difference without the cross-entropy.
        targets = torch.where(seen.is_scored(own), 0, IGNORE_INDEX)
        return loss_of_head(head, hidden, Distillation(targets, scores, self.temperature, 0.0, self.distillation))
