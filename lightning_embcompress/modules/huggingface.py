"""Any causal language model of transformers as a LightningModule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_embcompress.layers.full_softmax import full_softmax_loss, head_softmax_loss
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX, Perplexity
from lightning_embcompress.modules.base import LanguageModel, Stage
from lightning_embcompress.modules.huggingface_models import (
    checkpoint_activations,
    from_config,
    load_pretrained,
    read_config,
    recorded,
)
from lightning_embcompress.utils.storage import is_sharded

# Whatever is done to logits shows up to this size, which float16 has too.
_LARGE_LOGIT = 1e4


class HuggingFaceCausalLM(LanguageModel):
    """A causal language model of transformers: pretrained, or trained from scratch from its configuration.

    A batch is a mapping with ``input_ids`` and optionally ``attention_mask`` (0 for padding, on either side) and
    ``labels`` (default: the ids), int64 ``[batch_size, seq_len]``. Labels are shifted inside, as in transformers: the
    label at a position is predicted from the positions before it. Labels of -100, padding, and the token after padding
    on the left are not predicted. A pair of inputs and targets that are shifted already, as the data modules of this
    package give it, is a batch too.

    Logged: ``train_loss``, ``val_loss``, ``test_loss`` in nats per token, ``val_perplexity`` and ``test_perplexity``,
    and with ``frequency_bands`` also ``val_perplexity/rank_1-100`` and so on.

    The configuration is kept in checkpoints: ``HuggingFaceCausalLM.load_from_checkpoint(path)`` needs neither the hub
    nor the directory that the model came from.

    Args:
        pretrained: A directory that ``save_pretrained`` has written, or a name on the Hugging Face hub.
        config: In place of ``pretrained``, to train from scratch: a mapping with ``model_type`` and what differs from
            that type's defaults (``{"model_type": "gpt2", "n_layer": 2}``), or a directory or hub name whose
            ``config.json`` is read.
        vocab_size: Number of tokens of the data. A ``config`` mapping without a ``vocab_size`` gets a table of as many
            rows; any other table must have at least as many. ``None`` for the model's own.
        dtype: Of the weights: ``float32``, ``bfloat16`` or ``float16``. For training in bfloat16 leave it and set the
            Trainer's ``precision`` to ``bf16-mixed``.
        gradient_checkpointing: Whether layers are computed again in the backward pass instead of being kept: less
            memory, about a third more time.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer, or None for a constant rate.
        lr_scheduler_interval: Whether the scheduler steps after each ``epoch`` or each optimizer ``step``.
        lr_scheduler_monitor: Logged value that a ``ReduceLROnPlateau`` scheduler watches.
        frequency_bands: Whether validation and test also measure the perplexity by frequency band of the target, from
            the data module's ``token_counts``; costs a second pass over the logits.

    Attributes:
        model: The model of transformers.

    Raises:
        ValueError: If not exactly one of ``pretrained`` and ``config`` is given, if it cannot be loaded or is no causal
            language model, or if its table has fewer rows than ``vocab_size``.

    Example:
        >>> import torch
        >>> config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32}
        >>> model = HuggingFaceCausalLM(config=config, vocab_size=100)
        >>> model(torch.randint(100, (2, 5))).shape
        torch.Size([2, 5, 100])
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | str | None = None,
        vocab_size: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
        lr_scheduler_monitor: str = "val_loss",
        frequency_bands: bool = False,
    ) -> None:
        """Build the model."""
        if (pretrained is None) == (config is None):
            given = "neither is" if pretrained is None else f"pretrained={pretrained!r} and config are both"
            raise ValueError(
                f"Exactly one of pretrained and config must be given, but {given}: pretrained is a directory or hub "
                "name to go on from, config describes a model to train from scratch. Set the other to null."
            )
        if config is None:
            model = load_pretrained(str(pretrained), dtype)
        else:
            model = from_config(read_config(config, vocab_size), dtype)
        table_size = int(model.get_input_embeddings().num_embeddings)
        if vocab_size is not None and vocab_size > table_size:
            raise ValueError(
                f"The data has vocab_size={vocab_size} tokens, but the model's table only {table_size} rows. Use the "
                "tokenizer that belongs to the model or, to train from scratch, a config without a vocab_size."
            )
        super().__init__(
            table_size, optimizer, lr_scheduler, lr_scheduler_interval, lr_scheduler_monitor, frequency_bands
        )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        # Plain JSON values, so that checkpoints load with `weights_only=True`; in place of `pretrained`, which may not
        # be there any more when one is loaded.
        self.hparams.update(pretrained=None, config=recorded(model.config))
        self.model: Any = model
        self._takes_position_ids = "position_ids" in inspect.signature(model.forward).parameters
        self._head_is_last: bool | None = None
        if gradient_checkpointing:
            checkpoint_activations(model)

    @classmethod
    def from_model(cls, model: Any, **training: Any) -> Self:
        """Wrap a model of transformers as it is.

        Args:
            model: Any causal language model, compressed or not; it is not copied.
            **training: Arguments of the class that are about training.
        """
        # On the meta device the model that is built from the configuration takes neither time nor memory.
        with torch.device("meta"):
            wrapper = cls(config=recorded(model.config), **training)
        wrapper.model = model
        wrapper.val_perplexity, wrapper.test_perplexity = Perplexity(), Perplexity()
        return wrapper

    @override
    def setup(self, stage: str) -> None:
        """Check that the data fits the model, and read its token counts.

        Raises:
            ValueError: If the data module has more tokens than the table rows, or longer blocks than the model has
                positions.
        """
        super().setup(stage)
        datamodule = self._datamodule()
        positions = getattr(self.model.config, "max_position_embeddings", None)
        block_size = getattr(datamodule, "block_size", None)
        if isinstance(positions, int) and isinstance(block_size, int) and block_size > positions:
            raise ValueError(
                f"block_size={block_size} of {type(datamodule).__name__} is more than the {positions} positions of the "
                f"model: set the data's block_size to at most {positions}."
            )

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Score every next token.

        Args:
            input_ids: Token ids, int64, shape ``[batch_size, seq_len]``.
            attention_mask: 0 where ``input_ids`` is padding, on either side, else 1; None for no padding.

        Returns:
            Logits, shape ``[batch_size, seq_len, vocab_size]``, in the dtype of the weights, or of autocast.
        """
        scored: Tensor = self.model(**self._arguments(input_ids, attention_mask)).logits
        return scored

    def _arguments(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
            if self._takes_position_ids:
                # Some models count the padding on the left as positions, if nobody tells them.
                arguments["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return arguments

    @override
    def logits(self, inputs: Tensor, stage: Stage) -> Tensor:
        """Score every next token, ``[batch_size, seq_len, vocab_size]``; every row of a batch is a text of its own."""
        return self.forward(inputs)

    @override
    def scores(self, batch: Any, stage: Stage) -> tuple[Tensor, Tensor]:
        """Score a batch.

        Args:
            batch: A mapping, or a pair of inputs and targets (see the class).
            stage: Not used.

        Returns:
            Logits, ``[batch_size, seq_len, vocab_size]``, and target ids, int64, ``[batch_size, seq_len]``, -100 where
            nothing is predicted, as at the last position of a mapping.
        """
        arguments, targets = _read(batch)
        return self.forward(*arguments), targets

    @override
    def head_inputs(self, batch: Any, stage: Stage) -> tuple[nn.Module, Tensor, Tensor] | None:
        """The head and its hidden states, see `LanguageModel.head_inputs`; None where more is done to the logits."""
        if not self._ends_with_its_head():
            return None
        arguments, targets = _read(batch)
        states: Tensor = self.model.base_model(**self._arguments(*arguments)).last_hidden_state
        return self.model.get_output_embeddings(), states, targets

    def _ends_with_its_head(self) -> bool:
        """Whether the logits are what the head makes of the last hidden state, and nobody but the head is to see them.

        Models are asked for what they do, once: some scale their logits or cap them. Numbers of all sizes take the
        place of the head's, for those of a new model may be so small that a cap does nothing to them.
        """
        model = self.model
        is_watched = model._forward_hooks or model._forward_pre_hooks or model._compiled_call_impl is not None
        if is_watched or is_sharded(model):
            return False
        if self._head_is_last is None:
            modes = {module: module.training for module in model.modules()}
            ids = torch.arange(2, device=next(model.parameters()).device).unsqueeze(0) % self.vocab_size
            model.eval()
            try:
                # Autocast could keep the weights as they are cast here, without a graph, for the step that follows.
                with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
                    self._head_is_last = self._shows_its_head(ids)
            finally:
                for module, mode in modes.items():
                    module.training = mode
        return self._head_is_last

    def _shows_its_head(self, ids: Tensor) -> bool:
        head = self.model.get_output_embeddings()
        states = getattr(self.model.base_model(**self._arguments(ids)), "last_hidden_state", None)
        if head is None or not isinstance(states, Tensor):
            return False
        seen: list[tuple[Any, Tensor]] = []

        def replace(_: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor:
            sizes = torch.linspace(
                -_LARGE_LOGIT, _LARGE_LOGIT, logits.numel(), dtype=logits.dtype, device=logits.device
            )
            seen.append((inputs[0] if inputs else None, sizes.view(logits.shape)))
            return seen[-1][1]

        handle = head.register_forward_hook(replace)
        try:
            found = self.model(**self._arguments(ids)).logits
        finally:
            handle.remove()
        if len(seen) != 1 or not isinstance(seen[0][0], Tensor):
            return False
        given, logits = seen[0]
        return torch.equal(given, states) and torch.equal(logits.to(found.dtype), found)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss in nats per token, logged as ``train_loss``."""
        known = self.known_head(batch, "train")
        if known is None:
            logits, targets = self.scores(batch, "train")
            # The gradient takes the memory of the logits, which nobody else has.
            loss, _ = full_softmax_loss(logits, targets, overwrite=True)
        else:
            head, states, targets = known
            loss, _ = head_softmax_loss(head, states, targets)
        self.log("train_loss", loss, prog_bar=True, batch_size=targets.shape[0])
        return loss

    def save_pretrained(self, path: str | Path) -> None:
        """Save the model as transformers does, compressed or not.

        Args:
            path: A directory, made if it is missing. ``AutoModelForCausalLM.from_pretrained`` loads it, where this
                package is imported if tables are compressed.
        """
        self.model.save_pretrained(str(path))


def _read(batch: Any) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    """Ids and attention mask of a batch, and targets."""
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        return (batch["input_ids"], mask), _targets(batch.get("labels", batch["input_ids"]), mask)
    inputs, targets = batch
    return (inputs, None), targets


def _targets(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Shift labels to where they are predicted: `labels[:, t + 1]` at position `t`.

    The logits keep their last position, whose target is ignored: cutting it off would copy them.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    if attention_mask is not None:
        # What stands on padding predicts nothing either: on the left, that would be the first token of the text.
        padding = attention_mask.eq(0)
        targets.masked_fill_(padding, IGNORE_INDEX)
        targets[:, :-1].masked_fill_(padding[:, 1:], IGNORE_INDEX)
    return targets
