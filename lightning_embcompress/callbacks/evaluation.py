"""Passes over the data from within a callback: perplexity and token counts, leaving the run as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_embcompress.callbacks.passes import (
    Logged,
    apart,
    batches_of,
    mean_over_processes,
    step_arguments,
    undisturbed,
)
from lightning_embcompress.utils.division import sum_over_processes
from lightning_embcompress.utils.progress import progress_bar


def validation_perplexity(
    trainer: Trainer, module: LightningModule, vocab_sizes: Sequence[int], monitor: str | None, title: str
) -> float | None:
    """Perplexity of a module on the validation data of a running fit, by a loop of its own without gradients.

    Every batch goes through the module's validation hooks and `validation_step`, as in Lightning's own loop and with
    the same limits, but nothing is logged and neither the random state nor modes, buffers or metrics of the module
    change. Without `monitor` the loss is the cross-entropy that the step computes over one of the vocabularies,
    averaged over targets. Of several processes each reads its own part of the data, and all get the mean over all.

    Args:
        trainer: The Trainer that is fitting.
        module: Its module.
        vocab_sizes: Class counts by which the loss at the head is recognised.
        monitor: Name of a logged loss in nats per token to use instead.
        title: What the progress bar says.

    Returns:
        The exponential of the mean loss; None where there is no validation data, or the step computes no such loss.

    Raises:
        ValueError: If the step logs nothing under the name of `monitor`.
    """
    if not trainer.enable_validation:
        return None
    loop = trainer.fit_loop.epoch_loop.val_loop
    stage = trainer.state.stage
    # As in Lightning's own loop: data hooks ask the trainer whether it is training.
    trainer.validating = True
    try:
        if trainer.val_dataloaders is None:
            loop.setup_data()
        limits = trainer.num_val_batches
        total = sum(limits)
        if not total:
            return None
        loss = _HeadCrossEntropy(vocab_sizes)
        logged = Logged(monitor)
        with (
            undisturbed(module, logged),
            torch.no_grad(),
            progress_bar(title, total=1 if math.isinf(total) else total) as advance,
            apart(trainer.val_dataloaders, getattr(loop._combined_loader, "_mode", "sequential")) as loader,
        ):
            module.on_validation_model_eval()
            module.on_validation_start()
            module.on_validation_epoch_start()
            for batch, batch_index, loader_index in batches_of(trainer, module, loader, limits):
                logged.batch, logged.loader_index = batch, loader_index
                arguments = (batch, batch_index, loader_index) if len(limits) > 1 else (batch, batch_index)
                module.on_validation_batch_start(*arguments)
                with trainer.precision_plugin.val_step_context(), loss:
                    outputs = module.validation_step(*step_arguments(module.validation_step, *arguments))
                module.on_validation_batch_end(outputs, *arguments)
                advance(1)
            module.on_validation_epoch_end()
            module.on_validation_end()
            # Here, where a monitored metric still has its state.
            mean = mean_over_processes(loss.total, loss.count) if monitor is None else logged.mean()
    finally:
        trainer.state.stage = stage
    if mean is None:
        rank_zero_warn(
            f"the validation_step of {type(module).__name__} computes no cross-entropy over "
            f"{' or '.join(map(str, sorted(set(vocab_sizes))))} classes, so its perplexity is not known: name a "
            "logged loss as monitor, if there is one in nats per token"
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

    `training_step` is entered with every batch and left again at the first moment the tokens are known: when the
    embedding is called or, for a module without one, when the cross-entropy is. Nothing is trained. Data that never
    ends, or can be read only once, needs given counts instead.

    Args:
        trainer: The Trainer that is fitting.
        module: Its module.
        embedding: The layer whose ids are counted; None to count targets of the head.
        vocab_size: Number of tokens.

    Returns:
        `[vocab_size]` int64 counts.

    Raises:
        ValueError: If no token was seen.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)

    def count(ids: Tensor) -> None:
        ids = ids.detach().flatten().cpu()
        counts.add_(torch.bincount(ids[(ids >= 0) & (ids < vocab_size)], minlength=vocab_size))
        raise _SeenEnough

    def count_inputs(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        count(arguments[0] if arguments else next(iter(keywords.values())))

    limit = trainer.num_training_batches
    mode = getattr(trainer.fit_loop._combined_loader, "_mode", "max_size_cycle")
    with ExitStack() as stack:
        stack.enter_context(undisturbed(module, Logged(None)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(trainer.precision_plugin.train_step_context())
        if embedding is not None:
            hook = embedding.register_forward_pre_hook(count_inputs, with_kwargs=True)
            stack.callback(hook.remove)
        advance = stack.enter_context(progress_bar("Counting tokens", total=limit if math.isfinite(limit) else 1))
        loader = stack.enter_context(apart(trainer.train_dataloader, mode))
        if embedding is None:
            stack.enter_context(_HeadCrossEntropy([vocab_size], on_targets=count))
        # The loader itself does not stop at a limit of training: Lightning's loop does.
        batches = islice(batches_of(trainer, module, loader, limit), int(limit) if math.isfinite(limit) else None)
        for batch, batch_index, _ in batches:
            with suppress(_SeenEnough):
                module.training_step(*step_arguments(module.training_step, batch, batch_index))
            advance(1)
    counts = sum_over_processes(counts)
    if not counts.any():
        raise ValueError(
            "no token was seen in the training data: give the callback token_counts, how often every token occurs"
        )
    return counts


class _SeenEnough(Exception):
    """Leaves a training step as soon as its tokens are counted."""


class _HeadCrossEntropy(TorchFunctionMode):
    """Adds up the cross-entropy that is computed over a vocabulary, wherever it is called from."""

    def __init__(self, vocab_sizes: Sequence[int], on_targets: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.vocab_sizes = set(vocab_sizes)
        self.on_targets = on_targets
        self.total = 0.0
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.cross_entropy, F.nll_loss):
            self._add(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _add(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        target: Tensor,
        weight: Any = None,
        size_average: Any = None,
        ignore_index: int = -100,
        *_: Any,
        **__: Any,
    ) -> None:
        classes = input.shape[1] if input.dim() > 1 else input.shape[0]
        if classes not in self.vocab_sizes or target.is_floating_point():
            return
        valid = target != ignore_index
        if self.on_targets is not None:
            self.on_targets(target[valid])
        # Plain and summed, whatever weights, smoothing or reduction the module's own loss has.
        self.total += float(func(input.float(), target, ignore_index=ignore_index, reduction="sum"))
        self.count += int(valid.sum())
