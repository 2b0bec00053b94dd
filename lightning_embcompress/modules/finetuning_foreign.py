"""What a module that holds another LightningModule does for it: hooks, checkpoints, and the measure of its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_embcompress.callbacks.passes import step_arguments
from lightning_embcompress.integrations.checkpoint import RECORD_KEY
from lightning_embcompress.layers.full_softmax import full_softmax_loss
from lightning_embcompress.metrics.frequency_bands import PerplexityByFrequency
from lightning_embcompress.metrics.perplexity import Perplexity
from lightning_embcompress.modules.base import LanguageModel
from lightning_embcompress.modules.finetuning_parts import Parts, Watch
from lightning_embcompress.modules.finetuning_sources import load_checkpoint_into

PREFIX = "model."
"""Of the names of a model's tensors and layers in the module that holds it."""

FORWARDED = (
    "prepare_data",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "configure_callbacks",
    "on_fit_end",
    "on_train_start",
    "on_train_end",
    "on_train_epoch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_model_zero_grad",
    "on_test_start",
    "on_test_end",
    "on_test_batch_start",
    "on_test_batch_end",
    "on_predict_start",
    "on_predict_end",
    "on_predict_epoch_end",
    "on_predict_batch_start",
    "on_predict_batch_end",
    "backward",
    "on_before_backward",
    "on_after_backward",
    "on_before_zero_grad",
    "on_before_optimizer_step",
    "optimizer_zero_grad",
    "optimizer_step",
    "lr_scheduler_step",
)
"""Hooks that only the model has: all but those that its holder has too, and those of sharded models."""

MODE_HOOKS = (
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_test_model_eval",
    "on_test_model_train",
    "on_predict_model_eval",
)
"""Hooks that change the mode of a model: its holder's goes with it."""


def forward_hooks(holder: LightningModule, model: LightningModule) -> None:
    """Let a module that holds a model have those hooks that only the model has."""
    for name in (*FORWARDED, *MODE_HOOKS):
        if is_overridden(name, model):
            # On the instance: Lightning asks which of them a module has.
            hook = partial(_change_mode, holder, name) if name in MODE_HOOKS else getattr(model, name)
            setattr(holder, name, hook)


def _change_mode(holder: LightningModule, name: str) -> None:
    # The holder's own mode first: the model may change nothing but itself.
    holder.training = name.endswith("_train")
    getattr(holder.model, name)()


def step_output(step: Callable[..., Any], batch: Any, batch_idx: int) -> Any:
    """Call a step of a module, which may leave the index of the batch out."""
    return step(*step_arguments(step, batch, batch_idx))


def loss_of(output: Any) -> Tensor | None:
    """The loss of what a training step returns; None if it skips the step."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def warn_of_unknown_targets(model: LightningModule) -> None:
    """Say that distillation cannot leave out the positions that have no target."""
    rank_zero_warn(
        f"The training_step of {type(model).__name__} computes no cross-entropy over the very positions that its head"
        " is called with, as where logits are shifted, so which of them have no target is not known: distillation"
        " counts all, padding too. Call the head with the positions alone that the loss reads."
    )


def evaluate_foreign(
    model: LightningModule,
    parts: Parts,
    step: Callable[..., Any],
    batch: Any,
    batch_idx: int,
    perplexity: Perplexity,
    bands: PerplexityByFrequency | None,
) -> Any:
    """Run a step of evaluation of any module, and measure the cross-entropy over the vocabulary that it computes.

    Args:
        model: The module.
        parts: Where its tables are.
        step: `validation_step` or `test_step` of it.
        batch: Goes to the step.
        batch_idx: Goes to the step.
        perplexity: Is updated.
        bands: Is updated, if there is one.

    Returns:
        What the step returns.
    """

    def measure(logits: Tensor, targets: Tensor) -> None:
        # Within `__torch_function__` no mode is in force: what this computes is not seen.
        loss, count = full_softmax_loss(logits, targets)
        perplexity.update(nll_sum=loss * count, count=count)
        if bands is not None:
            bands.update(logits, targets)

    with Watch(model, parts, head=True, on_loss=measure) as watch:
        output = step_output(step, batch, batch_idx)
    if not watch.scored and batch_idx == 0:
        rank_zero_warn(
            f"The {getattr(step, '__name__', 'step')} of {type(model).__name__} computes no cross-entropy over"
            f" {parts.vocab_size} classes, so its perplexity is not known, and what it logs itself is all there is."
        )
    return output


@dataclass
class NestedCheckpoint:
    """A checkpoint of a module that holds a model, as one of that model.

    Attributes:
        checkpoint: Of the module that holds it.
    """

    checkpoint: dict[str, Any]

    def load_into(self, model: LightningModule) -> None:
        """Let the model take its structure, and what else it keeps, before weights are loaded.

        Raises:
            ValueError: If it does not fit the model; nothing is changed then.
        """
        own = dict(self.checkpoint)
        state, record = own.get("state_dict"), own.get(RECORD_KEY)
        if isinstance(state, Mapping):
            own["state_dict"] = {name.removeprefix(PREFIX): value for name, value in state.items()}
        if isinstance(record, Mapping) and isinstance(record.get("tables"), list):
            tables = [_without_prefix(table, "modules") for table in record["tables"]]
            backbone = {"backbone": _without_prefix(record["backbone"], "weights")} if "backbone" in record else {}
            own[RECORD_KEY] = {**record, "tables": tables, **backbone}
        load_checkpoint_into(model, own)
        if isinstance(state, Mapping) and not isinstance(model, LanguageModel):
            # Its hook may have changed what is loaded.
            named = {PREFIX + name: value for name, value in own["state_dict"].items()}
            self.checkpoint["state_dict"] = named


def _without_prefix(entry: Any, names: str) -> Any:
    named = entry.get(names) if isinstance(entry, Mapping) else None
    if isinstance(named, Mapping):
        return {**entry, names: {str(path).removeprefix(PREFIX): value for path, value in named.items()}}
    if isinstance(named, list):
        return {**entry, names: [str(path).removeprefix(PREFIX) for path in named]}
    return entry
