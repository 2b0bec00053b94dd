"""What passes over data from within a fit share: batches as the module's steps get them, and the run as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from lightning_embcompress.utils.division import sum_over_processes

_CONTAINERS = (dict, OrderedDict, defaultdict, list, tuple, set, deque)


def mean_over_processes(total: float, count: float) -> float | None:
    """The mean over all processes; None where none of them has counted anything."""
    total, count = sum_over_processes(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / count if count else None


class Logged:
    """Takes the place of `module.log`: keeps the values of one name and drops everything else.

    Args:
        monitor: The name; None to drop everything.
    """

    def __init__(self, monitor: str | None) -> None:
        """Begin with no value."""
        self.monitor = monitor
        self.batch: Any = None
        self.loader_index = 0
        self.total = 0.0
        self.weight = 0
        self.metric: Metric | None = None
        self.seen: set[str] = set()

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """As `LightningModule.log` is called."""
        self.seen.add(name)
        # The second is what Lightning calls it if there are several loaders.
        if self.monitor not in (name, f"{name}/dataloader_idx_{self.loader_index}"):
            return
        if isinstance(value, Metric):
            self.metric = value
            return
        weight = extract_batch_size(self.batch) if batch_size is None else batch_size
        self.total += float(value) * weight
        self.weight += weight

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        """As `LightningModule.log_dict` is called."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def mean(self) -> float:
        """The mean of what was logged, over all processes.

        Raises:
            ValueError: If there was nothing.
        """
        if self.metric is not None:
            # Over all processes by itself.
            return float(self.metric.compute())
        mean = mean_over_processes(self.total, self.weight)
        if mean is None:
            raise ValueError(
                f"monitor {self.monitor!r} is not logged in validation; logged are {sorted(self.seen) or 'none'}"
            )
        return mean


@contextmanager
def undisturbed(module: LightningModule, logged: Logged) -> Iterator[None]:
    """Divert what the module logs, and put back its modes, buffers, metrics and the random state afterwards.

    Also which parameters are frozen: a step that is left early may have toggled an optimizer, and not back.
    """
    training = [(part, part.training) for part in module.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    # What `toggle_optimizer` will put back.
    toggled = module._param_requires_grad_state
    buffers = [
        (part._buffers, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    # Whole, for some keep more than what `add_state` knows of.
    metrics = [(part, _state(part)) for part in module.modules() if isinstance(part, Metric | MetricCollection)]
    with isolate_rng():
        for metric, _ in metrics:
            # As Lightning leaves them after an epoch in which they were logged.
            metric.reset()
        module.log, module.log_dict = logged.log, logged.log_dict  # type: ignore[method-assign]
        try:
            yield
        finally:
            del module.log, module.log_dict
            for part, mode in training:
                part.training = mode
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            module._param_requires_grad_state = toggled
            for owner, name, buffer, value in buffers:
                owner[name] = buffer.copy_(value)
            for metric, state in metrics:
                metric.__dict__.clear()
                metric.__dict__.update(state)


def _state(metric: Metric | MetricCollection) -> dict[str, Any]:
    if isinstance(metric, MetricCollection):
        return {**metric.__dict__, "_groups": copy.deepcopy(metric._groups)}
    states = {name: getattr(metric, name) for name in metric._defaults}
    copies = {name: list(state) if isinstance(state, list) else state.clone() for name, state in states.items()}
    return {**metric.__dict__, **copies}


@contextmanager
def apart(loaders: Any, mode: Any) -> Iterator[CombinedLoader]:
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


def batches_of(
    trainer: Trainer, module: LightningModule, loader: CombinedLoader, limits: float | list[float]
) -> Iterator[tuple[Any, int, int]]:
    """Batches on the module's device, as its steps get them, with their index and that of their loader."""
    loader.limits = limits
    for batch, batch_index, loader_index in loader:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=loader_index)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=loader_index), batch_index, loader_index


def step_arguments(step: Callable[..., Any], batch: Any, batch_index: int, *loader_index: int) -> tuple[Any, ...]:
    """What Lightning calls a step with: modules may leave the index of the batch out."""
    if not is_param_in_hook_signature(step, "batch_idx", min_args=2):
        return (batch, *loader_index)
    return (batch, batch_index, *loader_index)


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Let a module and its parts change copies of their attributes, which they get back afterwards as they were.

    Such as a hidden state that is carried from step to step, a counter or a list of outputs. Copied are tensors that
    are no parameters, and the containers of Python with what they hold; other objects are put back, but not copied.
    Parameters, buffers and metrics are left alone, see `undisturbed`.
    """
    own = set(vars(nn.Module()))
    before = [
        (part, {name: value for name, value in vars(part).items() if name not in own})
        for part in module.modules()
        if not isinstance(part, Metric | MetricCollection)
    ]
    known: dict[int, Any] = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    try:
        for part, values in before:
            vars(part).update({name: _copied(value, known) for name, value in values.items()})
        yield
    finally:
        for part, values in before:
            for name in set(vars(part)) - own - set(values):
                del vars(part)[name]
            vars(part).update(values)


def _copied(value: Any, known: dict[int, Any]) -> Any:
    """A copy of plain data, in which what was one object is one again."""
    if id(value) in known:
        return known[id(value)]
    kind = type(value)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.requires_grad:
        known[id(value)] = value.clone()
    elif kind is tuple:
        known[id(value)] = tuple(_copied(item, known) for item in value)
    elif kind in _CONTAINERS:
        known[id(value)] = same = copy.copy(value)
        if isinstance(value, dict):
            same.update({key: _copied(item, known) for key, item in value.items()})
        elif kind in (list, deque):
            for index, item in enumerate(value):
                same[index] = _copied(item, known)
    else:
        return value
    return known[id(value)]
