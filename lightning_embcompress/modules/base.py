"""What every language model of the package shares: evaluation, optimizer, and the identity of its vocabulary."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_embcompress.integrations.checkpoint import restore_structure, write_record
from lightning_embcompress.layers.chunked_loss import token_chunks
from lightning_embcompress.layers.full_softmax import full_softmax_loss
from lightning_embcompress.metrics.frequency_bands import PerplexityByFrequency
from lightning_embcompress.metrics.perplexity import Perplexity, token_negative_log_likelihood

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Input ids and target ids, int64, both ``[batch_size, seq_len]``; the target -100 is not predicted."""
Stage: TypeAlias = Literal["train", "val", "test", "predict"]


class VocabularyModule(LightningModule):
    """A module whose tables have one row per token of a vocabulary, with an optimizer that is given by its factory.

    Its checkpoints say how tables are compressed, and which vocabulary the model was trained with.

    Args:
        vocab_size: Number of tokens.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer, or None for a constant rate.
        lr_scheduler_interval: Whether the scheduler steps after each ``epoch`` or each optimizer ``step``.
        lr_scheduler_monitor: Logged value that a ``ReduceLROnPlateau`` scheduler watches.
    """

    restores_structure: ClassVar[bool] = True
    """Whether checkpoints keep which tables are compressed without a callback's help."""

    def __init__(
        self,
        vocab_size: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        lr_scheduler_interval: Literal["epoch", "step"],
        lr_scheduler_monitor: str,
    ) -> None:
        """Keep the arguments."""
        super().__init__()
        self.vocab_size = vocab_size
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self.lr_scheduler_monitor = lr_scheduler_monitor
        self.vocabulary_fingerprint: str | None = None

    @override
    def setup(self, stage: str) -> None:
        """Compare the data module's vocabulary with the tables, and with the one that the model was trained with.

        Raises:
            ValueError: If it has more tokens than the tables have rows, or another fingerprint.
        """
        vocabulary = getattr(self._datamodule(), "vocabulary", None)
        if vocabulary is not None and len(vocabulary) > self.vocab_size:
            raise ValueError(
                f"The vocabulary of the data has {len(vocabulary)} tokens, but the model's tables only"
                f" vocab_size={self.vocab_size} rows. Use the vocabulary or tokenizer that the model was made for, or a"
                f" model with vocab_size={len(vocabulary)}."
            )
        known, found = self.vocabulary_fingerprint, getattr(vocabulary, "fingerprint", None)
        if None not in (found, known) and found != known:
            raise ValueError(
                f"The model was trained with a vocabulary of the fingerprint {known}, that of the data has {found}: its"
                " ids stand for other tokens. Use the data, or the vocabulary file, that it was trained with."
            )

    def _datamodule(self) -> Any:
        # `self.trainer` raises where there is none, as in `load_from_checkpoint`.
        return getattr(self._trainer, "datamodule", None)

    def parameter_groups(self) -> Any:
        """What the optimizer is made from: all parameters, or groups of them."""
        return self.parameters()

    @override
    def configure_optimizers(self) -> Any:
        """Make the optimizer over all parameters, and the scheduler."""
        optimizer = self.optimizer(self.parameter_groups())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {
            "scheduler": self.lr_scheduler(optimizer),
            "interval": self.lr_scheduler_interval,
            "monitor": self.lr_scheduler_monitor,
        }
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the structure of compressed tables, and what identifies the vocabulary, if the data module does."""
        write_record(self, checkpoint)
        vocabulary = getattr(self._datamodule(), "vocabulary", None)
        fingerprint = getattr(vocabulary, "fingerprint", self.vocabulary_fingerprint)
        if fingerprint is not None:
            checkpoint["vocabulary"] = {"size": self.vocab_size, "fingerprint": fingerprint}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the vocabulary with the one that the checkpoint was trained with, then take its tables' structure.

        Raises:
            ValueError: If the size or the fingerprint differs, or the tables do not fit; nothing is changed then.
        """
        self._check_vocabulary(checkpoint)
        restore_structure(self, checkpoint)

    def _check_vocabulary(self, checkpoint: Mapping[str, Any]) -> None:
        saved = checkpoint.get("vocabulary")
        if saved is None:
            return
        vocabulary = getattr(self._datamodule(), "vocabulary", None)
        fingerprint = getattr(vocabulary, "fingerprint", saved["fingerprint"])
        if saved["size"] != self.vocab_size or saved["fingerprint"] != fingerprint:
            raise ValueError(
                f"The checkpoint was trained with a vocabulary of {saved['size']} tokens (fingerprint"
                f" {saved['fingerprint']}), but the model has vocab_size={self.vocab_size} and the data the"
                f" fingerprint {fingerprint}. Use the vocabulary file the checkpoint was trained with."
            )
        self.vocabulary_fingerprint = saved["fingerprint"]


class LanguageModel(VocabularyModule):
    """Base of the language models: a subclass says how it trains and how it scores, the rest is here.

    Validation and test always use the full softmax. They log ``val_loss`` and ``test_loss`` in nats per token,
    ``val_perplexity`` and ``test_perplexity``, over all tokens of the epoch and all processes, and with
    ``frequency_bands`` also ``val_perplexity/rank_1-100`` and so on.

    Args:
        vocab_size: Number of tokens.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer, or None for a constant rate.
        lr_scheduler_interval: Whether the scheduler steps after each ``epoch`` or each optimizer ``step``.
        lr_scheduler_monitor: Logged value that a ``ReduceLROnPlateau`` scheduler watches.
        frequency_bands: Whether to measure the perplexity by frequency band too, from the data module's
            ``token_counts``; costs a second pass over the logits.
    """

    monitored_loss: ClassVar[str] = "val_loss"
    """The logged loss by which callbacks measure the perplexity."""

    def __init__(
        self,
        vocab_size: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        lr_scheduler_interval: Literal["epoch", "step"],
        lr_scheduler_monitor: str,
        frequency_bands: bool,
    ) -> None:
        """Keep the arguments and make the metrics."""
        super().__init__(vocab_size, optimizer, lr_scheduler, lr_scheduler_interval, lr_scheduler_monitor)
        self.frequency_bands = frequency_bands
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()
        self.val_bands: PerplexityByFrequency | None = None
        self.test_bands: PerplexityByFrequency | None = None

    @abstractmethod
    def logits(self, inputs: Tensor, stage: Stage) -> Tensor:
        """Score every next token, ``[batch_size, seq_len, vocab_size]``, as the continuation of the stage's text."""

    def start_text(self, stage: Stage) -> None:
        """Forget the stage's text: the next batch is a beginning. Nothing to do for a model without memory."""

    def text_state(self) -> dict[str, Any]:
        """Entries of a checkpoint by which the training text is continued, of all processes, which all call this."""
        return {}

    def continue_text(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue the training text, when training starts, from the `text_state` that a checkpoint holds."""

    def use_dense_gradients(self) -> None:
        """Train with gradients that every optimizer takes. Nothing to do for a model that has no others."""

    @override
    def setup(self, stage: str) -> None:
        """Check the data module's vocabulary and read its token counts.

        Raises:
            ValueError: If the vocabulary does not fit the model.
        """
        super().setup(stage)
        if not self.frequency_bands:
            # Not even looked at: counting a corpus may take long.
            return
        counts = getattr(self._datamodule(), "token_counts", None)
        if counts is None:
            rank_zero_warn("frequency_bands=True has no effect: there is no data module with `token_counts`.")
            return
        self.val_bands = PerplexityByFrequency(torch.as_tensor(counts))
        self.test_bands = PerplexityByFrequency(torch.as_tensor(counts))

    def scores(self, batch: Any, stage: Stage) -> tuple[Tensor, Tensor]:
        """Score a batch for evaluation.

        Args:
            batch: A :data:`Batch`, or what else a subclass takes.
            stage: The text it belongs to.

        Returns:
            Logits, ``[batch_size, seq_len, vocab_size]``, and target ids, int64, ``[batch_size, seq_len]``.
        """
        inputs, targets = batch
        return self.logits(inputs, stage), targets

    def head_inputs(self, batch: Any, stage: Stage) -> tuple[nn.Module, Tensor, Tensor] | None:
        """What `scores` computes logits from, for losses and evaluation, which need only some of them at a time.

        Args:
            batch: As for `scores`.
            stage: The text it belongs to, which goes on with it.

        Returns:
            The head, hidden states ``[batch_size, seq_len, dim]`` of which it gives the logits row by row, and target
            ids, int64, ``[batch_size, seq_len]``. None where logits are made in another way; nothing is done then.
        """
        return None

    def known_head(self, batch: Any, stage: Stage) -> tuple[nn.Module, Tensor, Tensor] | None:
        """`head_inputs`, or None where a subclass scores in a way of its own that it cannot know of.

        Args:
            batch: As for `scores`.
            stage: The text it belongs to, which goes on with it.
        """
        classes = type(self).__mro__
        of_head, *of_scores = (
            next(index for index, one in enumerate(classes) if name in vars(one))
            for name in ("head_inputs", "logits", "scores", "forward")
        )
        return self.head_inputs(batch, stage) if of_head <= min(of_scores) else None

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the full softmax loss in nats per token; logged for the whole epoch at its end."""
        return self._evaluation_step(batch, "val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the full softmax loss in nats per token; logged for the whole epoch at its end."""
        return self._evaluation_step(batch, "test")

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the negative log-likelihood of every target in nats, ``[batch_size, seq_len]``; 0 where ignored.

        Not the logits: Lightning keeps all predictions, and those of 100 windows of 128 x 20 tokens over 793,471 words
        are 800 GB.
        """
        shape, parts = self._scored(batch, "predict")
        found = [token_negative_log_likelihood(logits, targets).flatten() for logits, targets in parts]
        return torch.cat(found).view(shape)

    def _scored(self, batch: Any, stage: Stage) -> tuple[torch.Size, Iterator[tuple[Tensor, Tensor]]]:
        """The shape of the targets, and logits with their targets: those of a few tokens at a time where possible."""
        known = self.known_head(batch, stage)
        if known is None:
            logits, targets = self.scores(batch, stage)
            return targets.shape, iter([(logits, targets)])
        head, hidden, targets = known
        flat, ids = hidden.flatten(0, -2), targets.flatten()
        return targets.shape, ((head(flat[part]), ids[part]) for part in token_chunks(head, flat))

    def _metrics(self, stage: Stage) -> tuple[Perplexity, PerplexityByFrequency | None]:
        return (self.val_perplexity, self.val_bands) if stage == "val" else (self.test_perplexity, self.test_bands)

    def _evaluation_step(self, batch: Any, stage: Stage) -> Tensor:
        perplexity, bands = self._metrics(stage)
        _, parts = self._scored(batch, stage)
        total = count = torch.zeros((), device=self.device)
        for logits, targets in parts:
            mean, scored = full_softmax_loss(logits, targets)
            perplexity.update(nll_sum=mean * scored, count=scored)
            if bands is not None:
                bands.update(logits, targets)
            total, count = total + mean * scored, count + scored
        return total / count.clamp(min=1)

    @override
    def on_validation_epoch_start(self) -> None:
        """Start the text and the sums anew, also after a callback's own evaluation in between."""
        self._start_evaluation("val")

    @override
    def on_test_epoch_start(self) -> None:
        """Start the text and the sums anew."""
        self._start_evaluation("test")

    @override
    def on_predict_epoch_start(self) -> None:
        """Start the text anew."""
        self.start_text("predict")

    def _start_evaluation(self, stage: Stage) -> None:
        self.start_text(stage)
        for metric in self._metrics(stage):
            if metric is not None:
                metric.reset()

    @override
    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss`` and ``val_perplexity``, over all tokens of all processes."""
        self._log_evaluation("val")

    @override
    def on_test_epoch_end(self) -> None:
        """Log ``test_loss`` and ``test_perplexity``, over all tokens of all processes."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: Stage) -> None:
        perplexity, bands = self._metrics(stage)
        value = perplexity.compute()
        self.log(f"{stage}_loss", value.log())
        self.log(f"{stage}_perplexity", value, prog_bar=True)
        for name, band_value in ({} if bands is None else bands.compute()).items():
            self.log(f"{stage}_perplexity/{name}", band_value)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the structure of the tables, the vocabulary's identity, and within an epoch the state of the text."""
        super().on_save_checkpoint(checkpoint)
        # Training cannot go on from a checkpoint of the weights alone, which has no optimizer.
        if "optimizer_states" in checkpoint:
            checkpoint.update(self.text_state())
