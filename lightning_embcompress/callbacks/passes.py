"""What passes over data from within a fit share: batches as the module's steps get them, and the run as it was."""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from lightning_embcompress.layers.table_weight import TableWeight
from lightning_embcompress.utils.division import count_processes, sum_over_processes
from lightning_embcompress.utils.progress import progress_bar

_CONTAINERS = (dict, OrderedDict, defaultdict, list, tuple, set, deque)


class Logged:
    """Takes the place of `module.log`: keeps the values of losses and drops everything else.

    Args:
        monitor: The name of one; None for all with "loss" in their names.
        usual: The name of the one that counts where there are several.
    """

    def __init__(self, monitor: str | None = None, usual: str | None = None) -> None:
        """Begin with no value."""
        self.monitor = monitor
        self.usual = usual
        self.batch: Any = None
        self.loader_index = 0
        self.sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self.metrics: dict[str, Metric] = {}
        self.seen: set[str] = set()

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """As `LightningModule.log` is called."""
        self.seen.add(name)
        if self.monitor is None:
            wanted = "loss" in name.lower()
        else:
            # What Lightning calls it if there are several loaders, or it is logged for every step too.
            wanted = self.monitor in (name, f"{name}/dataloader_idx_{self.loader_index}", f"{name}_epoch")
        if not wanted:
            return
        name = self.monitor or name
        if isinstance(value, Metric):
            self.metrics[name] = value
            return
        weight = extract_batch_size(self.batch) if batch_size is None else batch_size
        self.sums[name] += torch.tensor([float(value) * weight, weight], dtype=torch.float64)

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """As `LightningModule.log_dict` is called."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def names(self) -> list[str]:
        """Names of the losses that any process has logged; of several the usual one alone."""
        own = [*self.sums, *self.metrics]
        found: list[list[str]] = [own] * count_processes()
        if len(found) > 1:
            # A process without a batch may have logged nothing.
            torch.distributed.all_gather_object(found, own)
        names = sorted(set().union(*found))
        return [self.usual] if self.usual is not None and self.usual in names else names

    def mean(self) -> float | None:
        """The mean of the loss, over all processes; None if there are several losses, or none.

        Raises:
            ValueError: If there is none under the name of `monitor`.
        """
        names = self.names()
        if self.monitor is not None and not names:
            raise ValueError(
                f"monitor {self.monitor!r} is not logged in validation; logged are {sorted(self.seen) or 'none'}"
            )
        if len(names) != 1:
            return None
        if names[0] in self.metrics:
            # Over all processes by itself.
            return float(self.metrics[names[0]].compute())
        total, weight = sum_over_processes(self.sums[names[0]])
        return float(total / weight)


@contextmanager
def validating(trainer: Trainer) -> Iterator[None]:
    """As in Lightning's own loop: steps and hooks ask the trainer whether it is training."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = stage


@contextmanager
def undisturbed(module: LightningModule, logged: Logged) -> Iterator[None]:
    """Divert what a module logs, and let it and its parts change nothing that lasts.

    Attributes, such as modes, a hidden state that is carried from step to step, a counter, a list of outputs or the
    state of a metric, are put back as they were: in between there are copies of tensors and of the containers of Python
    with what they hold; other objects are put back, but not copied. Buffers, the random state and which parameters are
    frozen are put back too, but nothing is known of parameters.
    """
    own = set(vars(nn.Module())) - {"training"}
    before = [
        (part, {name: value for name, value in vars(part).items() if name not in own}) for part in module.modules()
    ]
    # A step that is left early may have toggled an optimizer, and not back.
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    buffers = [
        (part._buffers, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    known: dict[int, Any] = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    with isolate_rng():
        try:
            for part, values in before:
                vars(part).update({name: copied(value, known) for name, value in values.items()})
                if isinstance(part, Metric | MetricCollection):
                    # As Lightning leaves them after an epoch in which they were logged.
                    part.reset()
            module.log, module.log_dict = logged.log, logged.log_dict  # type: ignore[method-assign]
            yield
        finally:
            for part, values in before:
                for name in set(vars(part)) - own - set(values):
                    del vars(part)[name]
                vars(part).update(values)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            for owner, name, buffer, value in buffers:
                owner[name] = buffer.copy_(value)


def copied(value: Any, known: dict[int, Any]) -> Any:
    """A copy of plain data, in which what was one object is one again."""
    if id(value) in known:
        return known[id(value)]
    kind = type(value)
    if isinstance(value, TableWeight):
        # It has no values.
        return value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.requires_grad:
        known[id(value)] = value.clone()
    elif kind is tuple:
        known[id(value)] = tuple(copied(item, known) for item in value)
    elif kind in _CONTAINERS:
        known[id(value)] = same = copy.copy(value)
        if isinstance(value, dict):
            same.update({key: copied(item, known) for key, item in value.items()})
        elif kind in (list, deque):
            for index, item in enumerate(value):
                same[index] = copied(item, known)
    else:
        return value
    return known[id(value)]


@contextmanager
def loggers_off(trainer: Trainer) -> Iterator[None]:
    """Let what a step writes to the loggers by itself go nowhere."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


Batches: TypeAlias = Iterator[tuple[Any, int, int]]
"""Batches on the module's device, as its steps get them, with their index and that of their loader."""


@contextmanager
def data_pass(
    trainer: Trainer,
    module: LightningModule,
    logged: Logged,
    loaders: Any,
    mode: Any,
    limits: float | list[int | float],
    title: str,
) -> Iterator[Batches]:
    """Read the batches of loaders, and leave the run as it was, see `undisturbed`.

    Args:
        trainer: The Trainer that is fitting.
        module: Its module.
        logged: Gets what the module logs.
        loaders: Any collection of loaders; their generators are put back.
        mode: How they are combined.
        limits: How many batches of all, or of each, are read at most.
        title: What the progress bar says.
    """
    limit = sum(limits) if isinstance(limits, list) else limits
    count = int(limit) if math.isfinite(limit) else None

    def read(loader: CombinedLoader, advance: Callable[[float], None]) -> Batches:
        # The loader itself does not stop at a limit of training: Lightning's loop does.
        numbers = itertools.count() if count is None else range(count)
        for _, (batch, batch_index, loader_index) in zip(numbers, loader, strict=False):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=loader_index)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=loader_index), batch_index, loader_index
            advance(1)

    with (
        undisturbed(module, logged),
        loggers_off(trainer),
        progress_bar(title, total=count, unit="batches") as advance,
        _apart(loaders, mode) as loader,
    ):
        loader.limits = limits
        yield read(loader, advance)


def training_pass(
    trainer: Trainer, module: LightningModule, limit: float, title: str
) -> AbstractContextManager[Batches]:
    """Read the first batches of the training data, see `data_pass`."""
    mode = getattr(trainer.fit_loop._combined_loader, "_mode", "max_size_cycle")
    # No loss has this name: nothing is kept.
    return data_pass(trainer, module, Logged(""), trainer.train_dataloader, mode, limit, title)


@contextmanager
def _apart(loaders: Any, mode: Any) -> Iterator[CombinedLoader]:
    """Loaders of the same data with iterators of their own, whose generators are put back afterwards.

    Training has made its iterator of the first epoch already, and persistent workers serve one iterator only.
    """
    combined = CombinedLoader(loaders, mode)
    generators = {}
    copies = []
    for loader in combined.flattened:
        if isinstance(loader, DataLoader):
            for owner in (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
                generator = getattr(owner, "generator", None)
                if isinstance(generator, torch.Generator):
                    generators[generator] = generator.get_state()
            loader = copy.copy(loader)
            loader._iterator = None
        copies.append(loader)
    combined.flattened = copies
    try:
        yield combined
    finally:
        for generator, state in generators.items():
            generator.set_state(state)


def step_arguments(step: Callable[..., Any], batch: Any, batch_index: int, *loader_index: int) -> tuple[Any, ...]:
    """What Lightning calls a step with: modules may leave the index of the batch out."""
    if not is_param_in_hook_signature(step, "batch_idx", min_args=2):
        return (batch, *loader_index)
    return (batch, batch_index, *loader_index)
