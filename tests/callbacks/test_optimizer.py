"""Factors take the place of tables in optimizers that are running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_embcompress.callbacks.optimizer import splice
from lightning_embcompress.plan import compress


def _model(tied: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(600, 16), nn.Linear(16, 16), nn.Linear(16, 600))
    if tied:
        model[2].weight = model[0].weight
    return model


def _step(model: nn.Module, optimizer: Optimizer) -> None:
    ids = torch.arange(0, 599, 7)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(ids), ids + 1).backward()
    optimizer.step()


def _compress(model: nn.Module, optimizer: Optimizer) -> int:
    old = {path: model.get_submodule(path) for path in ("0", "2")}
    compress(model, "group_reduce", ratio=2, token_counts=torch.arange(600, 0, -1), groups=3)
    return splice([optimizer], model, old)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: Adam(parameters, lr=1e-2),
        lambda parameters: AdamW(parameters, lr=1e-2),
        lambda parameters: SGD(parameters, lr=1e-1, momentum=0.9),
        lambda parameters: Adagrad(parameters, lr=1e-1, initial_accumulator_value=0.5),
        lambda parameters: RMSprop(parameters, lr=1e-2),
    ],
)
def test_factors_train_in_the_order_of_the_model(make: Callable[[Any], Optimizer], tied: bool) -> None:
    model = _model(tied)
    optimizer = make(model.parameters())
    _step(model, optimizer)
    bias_state = optimizer.state[model[2].bias]
    assert _compress(model, optimizer) == (1 if tied else 2)
    (group,) = optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.parameters()]
    assert optimizer.state[model[2].bias] is bias_state
    before = [parameter.detach().clone() for parameter in model.parameters()]
    _step(model, optimizer)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_adagrad_starts_factors_from_its_initial_accumulator() -> None:
    model = _model(tied=False)
    optimizer = Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.25)
    _step(model, optimizer)
    _compress(model, optimizer)
    factor = model[0].factorization.basis
    assert torch.equal(optimizer.state[factor]["sum"], torch.full_like(factor, 0.25))


def test_groups_stay_apart() -> None:
    model = _model(tied=False)
    biases = [parameter for name, parameter in model.named_parameters() if "bias" in name]
    others = [parameter for name, parameter in model.named_parameters() if "bias" not in name]
    optimizer = AdamW([{"params": others, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}])
    _compress(model, optimizer)
    decayed, plain = (group["params"] for group in optimizer.param_groups)
    assert [id(parameter) for parameter in plain] == [id(bias) for bias in biases]
    expected = [parameter for name, parameter in model.named_parameters() if "bias" not in name]
    assert [id(parameter) for parameter in decayed] == [id(parameter) for parameter in expected]


def test_frozen_tables_stay_out() -> None:
    model = _model(tied=False)
    model[0].weight.requires_grad_(False)
    optimizer = Adam(parameter for parameter in model.parameters() if parameter.requires_grad)
    _compress(model, optimizer)
    trained = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert not trained & {id(parameter) for parameter in model[0].parameters()}
    assert not any(parameter.requires_grad for parameter in model[0].parameters())
