"""Putting new parameters into an optimizer that is running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim import Adagrad, Optimizer


def splice(optimizers: Sequence[Optimizer], model: nn.Module, replaced: Mapping[str, nn.Module]) -> int:
    """Let optimizers train the layers that took the place of others.

    The new parameters stand where the old ones stood, in the same group: the number of groups stays what it is (which
    learning-rate schedulers and resuming rely on), and their order is that of the rebuilt model's parameters, so that
    a resumed run finds every state where it belongs. The old parameters' state goes: moments of a table mean nothing
    to its factors.

    Args:
        optimizers: All optimizers of the run.
        model: The model, with the new layers in place.
        replaced: The old layers by their paths, in the order of `model.named_modules()`.

    Returns:
        How many old parameters had a state that was dropped.
    """
    dropped = 0
    for path, old in replaced.items():
        before = list(old.parameters())
        after = list(model.get_submodule(path).parameters())
        gone = {id(parameter) for parameter in before} - {id(parameter) for parameter in after}
        come = {id(parameter) for parameter in after} - {id(parameter) for parameter in before}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                # In place: some optimizers keep a reference to this list.
                parameters = group["params"]
                if not any(id(parameter) in gone for parameter in parameters):
                    continue
                here = {id(parameter) for parameter in parameters}
                local = [parameter for parameter in after if id(parameter) in come or id(parameter) in here]
                owned = {id(parameter) for parameter in before}
                first = next(i for i, parameter in enumerate(parameters) if id(parameter) in owned)
                rest = [parameter for parameter in parameters[first:] if id(parameter) not in owned]
                parameters[first:] = local + rest
                if isinstance(optimizer, Adagrad):
                    # Made with its state in older versions of torch, and never given one later.
                    for parameter in local:
                        if id(parameter) in come:
                            start = torch.full_like(parameter, group["initial_accumulator_value"])
                            optimizer.state[parameter] = {"step": torch.tensor(0.0), "sum": start}
            for parameter in before:
                if id(parameter) in gone and optimizer.state.pop(parameter, None):
                    dropped += 1
    return dropped
