"""Putting other layers into a model that is training: the modules, the optimizers and the strategy follow together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed import broadcast

from lightning_embcompress.callbacks.optimizer import levels_of_adagrad, splice, start_anew
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.methods.registry import Factorization
from lightning_embcompress.tables.finding import all_modules
from lightning_embcompress.tables.replacement import check_replaceable, replace_table, restore_dense


def replace_in_training(
    trainer: Trainer,
    module: LightningModule,
    solved: Sequence[tuple[Sequence[str], Factorization[Any]]],
    replaced: Mapping[str, nn.Module] | None = None,
) -> None:
    """Put factorizations in the place of layers, let the optimizers train them, and let DDP reduce their gradients.

    Args:
        trainer: The Trainer that is fitting.
        module: Its module.
        solved: Paths of the layers of a table, and what they read from now on.
        replaced: The layers that the optimizers know, by their paths, where others stand in the module now.
    """
    old = {path: module.get_submodule(path) for paths, _ in solved for path in paths} | dict(replaced or {})
    check_replaceable(module, old)
    for paths, factorization in solved:
        replace_table(module, paths, factorization)
    # All at once: two tables may take the place of one.
    _go_on_training(trainer, module, old)


@contextmanager
def changing_in_training(trainer: Trainer, module: LightningModule, paths: Sequence[str]) -> Iterator[None]:
    """Change layers, or what is within them, in the block; then let the optimizers and DDP know their parameters.

    Args:
        trainer: The Trainer that is fitting.
        module: Its module.
        paths: Of the layers, in the order of `module.named_modules()`.
    """
    before = {path: nn.ParameterList(module.get_submodule(path).parameters()) for path in paths}
    known = {parameter: parameter._version for parameters in before.values() for parameter in parameters}
    layers = [module.get_submodule(path) for path in before]
    levels = levels_of_adagrad(trainer.optimizers, layers)
    yield
    # What was gathered of numbers is nothing to those that took their places.
    changed = [parameter for parameter, version in known.items() if parameter._version > version]
    if start_anew(trainer.optimizers, changed, layers, levels):
        rank_zero_info(f"The optimizer's state of {len(changed)} balanced factors was dropped: they start with none.")
    _go_on_training(trainer, module, before)


def _go_on_training(trainer: Trainer, module: LightningModule, replaced: Mapping[str, nn.Module]) -> None:
    if dropped := splice(trainer.optimizers, module, replaced):
        names = ", ".join(map(repr, dropped))
        rank_zero_info(f"The optimizer's state of {names} was dropped: the factors start with none.")
    _agree_on_states(trainer, module, replaced)
    rewrap(trainer)


def _agree_on_states(trainer: Trainer, module: LightningModule, replaced: Mapping[str, nn.Module]) -> None:
    """Give all processes the states of process 0: on GPUs sums that many rows add to differ in their last bits."""
    if not isinstance(trainer.strategy, DDPStrategy) or trainer.world_size == 1:
        return
    factors = [factor for path in replaced for factor in module.get_submodule(path).parameters()]
    for optimizer in trainer.optimizers:
        for factor in dict.fromkeys(factors):
            for value in optimizer.state.get(factor, {}).values():
                if isinstance(value, Tensor) and value.shape == factor.shape:
                    sent = value.contiguous()
                    broadcast(sent, 0)
                    value.copy_(sent)


def rewrap(trainer: Trainer) -> None:
    """Let DDP know of parameters that have changed: it reduces the gradients of those it was made with only."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()


@contextmanager
def uninterrupted(also_by_ctrl_c: bool = True) -> Iterator[None]:
    """Let Ctrl-C and signals that Python handles wait, so that what they save is never of half a change.

    Args:
        also_by_ctrl_c: False where the block takes long, and puts everything back when an exception leaves it: Ctrl-C
            raises one, while the handlers of other signals may save at once.
    """
    # Handlers run in the main thread only.
    is_main = threading.current_thread() is threading.main_thread()
    names = ("SIGINT",) * also_by_ctrl_c + ("SIGTERM", "SIGUSR1", "SIGUSR2") if is_main else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    # One that is not of Python (None) cannot be set again, and one of the system ends the process: only Ctrl-C waits.
    held = {number: h for number, h in handlers.items() if callable(h) or (number == signal.SIGINT and h is not None)}
    received: list[int] = []
    for number in held:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(received):
            # Not by a call: the handler may be that of the system, which ends the process.
            signal.raise_signal(number)


def make_dense(model: nn.Module, tables: str | Sequence[str]) -> dict[str, nn.Module]:
    """Turn compressed layers that are to be compressed again into dense ones.

    Args:
        model: The model.
        tables: As for `find_tables`.

    Returns:
        All compressed layers the model had, by their paths, for `put_back`; none if it stays as it is.
    """
    layers = {path: layer for path, layer in all_modules(model).items() if isinstance(layer, CompressedLayer)}
    names = [tables] if isinstance(tables, str) else tables
    if not layers or (tables != "auto" and not layers.keys() & set(names)):
        return {}
    restore_dense(model)
    return dict(layers)
