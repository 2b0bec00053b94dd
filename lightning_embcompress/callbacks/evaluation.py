"""Validation perplexity and token counts by passes from within a fit, which leave the run as it was."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_embcompress.calibration.words import WordMasks
from lightning_embcompress.callbacks.passes import Logged, data_pass, step_arguments, training_pass, validating
from lightning_embcompress.layers.pooling import bag_ids
from lightning_embcompress.utils.division import sum_over_processes

NOTHING_TO_COUNT = (
    "no embedding reads the table, so that nobody can see in the training data how often every token occurs: give the "
    "callback token_counts, of the targets of the head"
)


def validation_perplexity(trainer: Trainer, module: LightningModule, monitor: str | None, title: str) -> float | None:
    """Perplexity of a module on the validation data of a running fit, by a loop of its own without gradients.

    Every batch goes through the module's validation hooks and `validation_step`, as in Lightning's own loop and with
    the same limits, but nothing is logged and neither the random state nor modes, buffers or metrics of the module
    change. The perplexity is the exponential of a loss that the module logs, in nats per token, averaged as Lightning
    averages what is logged. Of several processes each reads its own part of the data, and all get the mean over all.

    Args:
        trainer: The Trainer that is fitting.
        module: Its module.
        monitor: Name of the logged loss; None for the one that the module itself names, as `monitored_loss`, or else
            the only one with "loss" in its name.
        title: What the progress bar says.

    Returns:
        The exponential of the mean loss; None where there is no validation data, or without `monitor` not exactly one
        loss is logged, of which a warning tells.

    Raises:
        ValueError: If the step logs nothing under the name of `monitor`.
    """
    if not trainer.enable_validation:
        return None
    loop = trainer.fit_loop.epoch_loop.val_loop
    with validating(trainer):
        if trainer.val_dataloaders is None:
            loop.setup_data()
        loaders, limits = trainer.val_dataloaders, trainer.num_val_batches
        if not sum(limits):
            return None
        logged = Logged(monitor, getattr(module, "monitored_loss", None))
        mode = getattr(loop._combined_loader, "_mode", "sequential")
        with torch.no_grad(), data_pass(trainer, module, logged, loaders, mode, limits, title) as batches:
            module.on_validation_model_eval()
            module.on_validation_start()
            module.on_validation_epoch_start()
            for batch, batch_index, loader_index in batches:
                logged.batch, logged.loader_index = batch, loader_index
                arguments = (batch, batch_index, loader_index) if len(limits) > 1 else (batch, batch_index)
                module.on_validation_batch_start(*arguments)
                with trainer.precision_plugin.val_step_context():
                    outputs = module.validation_step(*step_arguments(module.validation_step, *arguments))
                module.on_validation_batch_end(outputs, *arguments)
            module.on_validation_epoch_end()
            module.on_validation_end()
            # Here, where a monitored metric still has its state.
            names, mean = logged.names(), logged.mean()
    if mean is None:
        rank_zero_warn(
            f"the perplexity of {type(module).__name__} is not known, because its validation logs "
            f"{'several losses' if names else 'no loss'} ({', '.join(names or sorted(logged.seen)) or 'nothing'}): "
            "name the one in nats per token as monitor"
        )
        return None
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def stream_token_counts(
    trainer: Trainer, module: LightningModule, embedding: nn.Module | None, vocab_size: int
) -> Tensor:
    """Count the tokens of the training data by one pass over it, for modules whose data module has no counts.

    `training_step` is entered with every batch and left again where it calls the embedding. Nothing is trained, and
    padding is not counted, see `WordMasks`. Data that never ends, or can be read only once, needs given counts instead.

    Args:
        trainer: The Trainer that is fitting.
        module: Its module.
        embedding: The layer whose ids are counted, if there is one.
        vocab_size: Number of tokens.

    Returns:
        `[vocab_size]` int64 counts.

    Raises:
        ValueError: If there is no embedding, or no token was seen.
    """
    if embedding is None:
        raise ValueError(NOTHING_TO_COUNT)
    counts = torch.zeros(vocab_size, dtype=torch.long)
    path = next(path for path, layer in module.named_modules() if layer is embedding)
    masks = WordMasks(module, {path: embedding})

    def count(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        read = bag_ids((arguments[0] if arguments else next(iter(keywords.values()))).detach())
        ids = read[masks.words(path, read)].cpu()
        counts.add_(torch.bincount(ids[(ids >= 0) & (ids < vocab_size)], minlength=vocab_size))
        raise _SeenEnough

    limit, hook = trainer.num_training_batches, embedding.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with (
            torch.no_grad(),
            masks.watching(),
            # Compiled code would not know of the hooks, or be compiled anew with them.
            torch.compiler.set_stance("force_eager"),
            training_pass(trainer, module, limit, "Counting tokens") as batches,
        ):
            for batch, batch_index, _ in batches:
                masks.begin(batch)
                with suppress(_SeenEnough), trainer.precision_plugin.train_step_context():
                    module.training_step(*step_arguments(module.training_step, batch, batch_index))
    finally:
        hook.remove()
    counts = sum_over_processes(counts)
    if not counts.any():
        raise ValueError(
            "no token was seen in the training data: give the callback token_counts, how often every token occurs"
        )
    return counts


class _SeenEnough(Exception):
    """Leaves a training step as soon as its tokens are counted."""
