"""Passes over the data from within a callback: perplexity and token counts, leaving the run as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric

from lightning_embcompress.progress import progress_bar


def validation_perplexity(
    trainer: Trainer, module: LightningModule, vocab_sizes: Sequence[int], monitor: str | None, title: str
) -> float | None:
    """Perplexity of a module on the validation data of a running fit, by a loop of its own without gradients.

    Every batch goes through `validation_step`, as in Lightning's own loop and with the same limits, but nothing is
    logged and neither the random state nor modes nor metrics of the module change. Without `monitor` the loss is the
    cross-entropy that the step computes over one of the vocabularies, averaged over targets.

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
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not trainer.enable_validation:
        return None
    if trainer.val_dataloaders is None:
        loop.setup_data()
    limits = trainer.num_val_batches
    total = sum(limits)
    if not total:
        return None
    loss = _HeadCrossEntropy(vocab_sizes)
    logged = _Logged(monitor)
    several = len(limits) > 1
    with _undisturbed(module, logged), torch.no_grad(), trainer.precision_plugin.val_step_context():
        module.eval()
        module.on_validation_epoch_start()
        bar_total = 1 if math.isinf(total) else total
        with loss, progress_bar(title, total=bar_total) as advance:
            for batch, batch_index, loader_index in _batches(
                trainer, module, CombinedLoader(trainer.val_dataloaders, "sequential"), limits
            ):
                logged.batch_size = extract_batch_size(batch)
                arguments = (batch, batch_index, loader_index) if several else (batch, batch_index)
                module.validation_step(*arguments)
                advance(1)
        module.on_validation_epoch_end()
    if monitor is not None:
        return math.exp(logged.mean())
    return math.exp(loss.total / loss.count) if loss.count else None


def stream_token_counts(
    trainer: Trainer, module: LightningModule, embedding: nn.Module | None, vocab_size: int
) -> Tensor:
    """Count the tokens of the training data by one pass over it, for modules whose data module has no counts.

    `training_step` is entered with every batch and left again at the first moment the tokens are known: when the
    embedding is called or, for a module without one, when the cross-entropy is. Nothing is trained.

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
        ids = ids.detach().flatten()
        counts.add_(torch.bincount(ids[(ids >= 0) & (ids < vocab_size)], minlength=vocab_size).cpu())
        raise _SeenEnough

    loader = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
    limit = trainer.num_training_batches
    with ExitStack() as stack:
        stack.enter_context(_undisturbed(module, _Logged(None)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(trainer.precision_plugin.train_step_context())
        if embedding is not None:
            hook = embedding.register_forward_pre_hook(lambda _, arguments: count(arguments[0]))
            stack.callback(hook.remove)
        else:
            stack.enter_context(_HeadCrossEntropy([vocab_size], on_targets=count))
        advance = stack.enter_context(progress_bar("Counting tokens", total=limit if math.isfinite(limit) else 1))
        for batch, batch_index, _ in _batches(trainer, module, loader, limit):
            with suppress(_SeenEnough):
                module.training_step(batch, batch_index)
            advance(1)
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


class _Logged:
    """Takes the place of `module.log`: keeps the values of one name and drops everything else."""

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor
        self.batch_size = 1
        self.total = 0.0
        self.weight = 0
        self.metric: Metric | None = None
        self.seen: set[str] = set()

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        self.seen.add(name)
        if name != self.monitor:
            return
        if isinstance(value, Metric):
            self.metric = value
            return
        weight = self.batch_size if batch_size is None else batch_size
        self.total += float(value) * weight
        self.weight += weight

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def mean(self) -> float:
        if self.metric is not None:
            return float(self.metric.compute())
        if not self.weight:
            raise ValueError(
                f"monitor {self.monitor!r} is not logged in validation; logged are {sorted(self.seen) or 'none'}"
            )
        return self.total / self.weight


@contextmanager
def _undisturbed(module: LightningModule, logged: _Logged) -> Iterator[None]:
    """Divert what the module logs, and put back its modes, its metrics and the random state afterwards."""
    training = [(part, part.training) for part in module.modules()]
    metrics = [
        (metric, {name: _copied(getattr(metric, name)) for name in metric._defaults}, metric._update_count)
        for metric in module.modules()
        if isinstance(metric, Metric)
    ]
    with isolate_rng():
        module.log, module.log_dict = logged.log, logged.log_dict  # type: ignore[method-assign]
        try:
            yield
        finally:
            del module.log, module.log_dict
            for part, mode in training:
                part.training = mode
            for metric, state, updates in metrics:
                metric.reset()
                for name, value in state.items():
                    setattr(metric, name, value)
                metric._update_count = updates


def _copied(state: Any) -> Any:
    return list(state) if isinstance(state, list) else state.clone()


def _batches(
    trainer: Trainer, module: LightningModule, loader: CombinedLoader, limits: float | list[float]
) -> Iterator[tuple[Any, int, int]]:
    """Batches on the module's device, as its steps get them, with their index and that of their loader."""
    loader.limits = limits
    for batch, batch_index, loader_index in loader:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=loader_index)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=loader_index), batch_index, loader_index
