"""Putting new parameters into an optimizer that is running."""

from __future__ import annotations

import math
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
    order = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    layers = [(list(old.parameters()), list(model.get_submodule(path).parameters())) for path, old in replaced.items()]
    kept = {id(parameter) for _, after in layers for parameter in after}
    gone = {id(parameter): parameter for before, _ in layers for parameter in before if id(parameter) not in kept}
    dropped = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # In place: some optimizers keep a reference to this list.
            parameters = group["params"]
            owned = {id(parameter) for parameter in parameters}
            if not owned & gone.keys():
                continue
            places = [order.get(id(parameter), math.inf) for parameter in parameters if id(parameter) not in gone]
            end = 0
            for before, after in layers:
                if not any(id(parameter) in owned & gone.keys() for parameter in before):
                    continue
                here = {id(parameter) for parameter in parameters}
                known = {id(parameter) for parameter in before}
                come = [parameter for parameter in after if id(parameter) not in known | here]
                if not come and not here & known & gone.keys():
                    continue
                # A layer tied to one before it finds the table gone: its factors follow those of that one.
                first = next((i for i, parameter in enumerate(parameters) if id(parameter) in known), end)
                new = {id(parameter) for parameter in come}
                local = [parameter for parameter in after if id(parameter) in here | new]
                rest = [parameter for parameter in parameters[first:] if id(parameter) not in known]
                parameters[first:] = local + rest
                end = first + len(local)
                if isinstance(optimizer, Adagrad):
                    # Made with its state in older versions of torch, and never given one later.
                    for parameter in come:
                        start = torch.full_like(parameter, group["initial_accumulator_value"])
                        optimizer.state[parameter] = {"step": torch.tensor(0.0), "sum": start}
            if places == sorted(places):
                # A table that became two left one place, its factors have two.
                parameters.sort(key=lambda parameter: order.get(id(parameter), math.inf))
        for parameter in gone.values():
            if optimizer.state.pop(parameter, None):
                dropped += 1
    return dropped
