"""Factors take the place of tables in optimizers that are running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_embcompress.callbacks.optimizer import (
    levels_of_adagrad,
    pull_back,
    splice,
    squares_pulled_back,
    start_anew,
)
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.methods.registry import LowRank
from lightning_embcompress.tables.replacement import replace_table


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


def _compress(model: nn.Module, optimizer: Optimizer) -> list[str]:
    old = {path: model.get_submodule(path) for path in ("0", "2")}
    compress(model, "group_reduce", ratio=2, token_counts=torch.arange(600, 0, -1), groups=3)
    return splice([optimizer], model, old)


def test_names_of_parameters_go_with_them() -> None:
    model = _model(tied=False)
    optimizer = Adam(
        [("shift" if name == "1.bias" else name, parameter) for name, parameter in model.named_parameters()]
    )
    _compress(model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == ["shift" if name == "1.bias" else name for name in names]


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
    dropped = [] if isinstance(optimizer, SGD | Adagrad) else ["0"] if tied else ["0", "2"]
    assert _compress(model, optimizer) == dropped
    (group,) = optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.parameters()]
    assert optimizer.state[model[2].bias] is bias_state
    before = [parameter.detach().clone() for parameter in model.parameters()]
    _step(model, optimizer)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_sums_of_adagrad_go_on_as_those_of_the_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3000, 64), nn.Tanh(), nn.Linear(64, 3000))
    model[2].weight = model[0].weight
    optimizer = Adagrad(model.parameters(), lr=0.1)
    # Rows of frequent tokens, and some columns, have larger gradients.
    rows, columns = torch.logspace(0, -2, 3000).unsqueeze(1), torch.logspace(0, 1, 64)
    for _ in range(3):
        model[0].weight.grad = rows * columns * torch.randn(3000, 64)
        optimizer.step()
    sums, bias = optimizer.state[model[0].weight]["sum"].clone(), optimizer.state[model[2].bias]["sum"]
    old = {path: model.get_submodule(path) for path in ("0", "2")}
    compress(model, "low_rank", ratio=2)
    assert splice([optimizer], model, old) == []
    table = model[0].factorization
    expected = {
        "coefficients": sums @ table.basis.detach().square().T,
        "basis": table.coefficients.detach().square().T @ sums,
    }
    for name, value in expected.items():
        state = optimizer.state[table.get_parameter(name)]
        assert state["step"] == 3
        # Of single rows and columns the draw says about as much as they have entries.
        assert state["sum"].sum().item() == pytest.approx(value.sum().item(), rel=0.05)
        for dim in (0, 1):
            error = (state["sum"].sum(dim) / value.sum(dim)).log().abs()
            assert error.mean() < 0.35
    assert optimizer.state[model[2].bias]["sum"] is bias


@pytest.mark.parametrize("method", ["group_reduce", "tensor_train", "transform_coding"])
def test_adagrad_starts_factors_as_a_table(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(600, 16), nn.Tanh(), nn.Linear(16, 600))
    optimizer = Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.25)
    old = {"0": model[0]}
    compress(model, method, ratio=1.5, tables=["0"], token_counts=torch.arange(600, 0, -1))
    assert splice([optimizer], model, old) == []
    factorization = model[0].factorization
    for factor in factorization.parameters():
        state = optimizer.state[factor]
        assert state["sum"].shape == factor.shape
        assert bool((state["sum"] >= 0.25).all())
        assert bool(state["sum"].isfinite().all())
    # About those of many draws, of all entries of a factor.
    factors = list(factorization.parameters())
    means = [0.0] * len(factors)
    for _ in range(40):
        draw = 0.5 * (2.0 * torch.randint(0, 2, (600, 16)) - 1)
        found = torch.autograd.grad(factorization.rows(torch.arange(600)), factors, draw)
        means = [mean + one.square().mean().item() / 40 for mean, one in zip(means, found, strict=True)]
    for factor, mean in zip(factors, means, strict=True):
        assert optimizer.state[factor]["sum"].mean().item() >= 0.6 * mean
        drawn = dict(squares_pulled_back(factorization, 0.25))[factor].mean().item()
        assert drawn == pytest.approx(mean, rel=0.6)


def _trained_by_adagrad(tied: bool) -> tuple[nn.Sequential, Adagrad, Callable[[], float], Tensor]:
    """A model that has learnt all but everything, and its next step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(600, 32), nn.Tanh(), nn.Linear(32, 600))
    if tied:
        model[2].weight = model[0].weight
    optimizer = Adagrad(model.parameters(), lr=0.3, initial_accumulator_value=1e-6)
    ids = torch.randint(0, 600, (256,), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids), (ids * 7) % 600)
        loss.backward()
        optimizer.step()
        return loss.item()

    for _ in range(60):
        step()
    return model, optimizer, step, torch.bincount(ids, minlength=600) + 1


@pytest.mark.parametrize("method", ["low_rank", "group_reduce"])
def test_adagrad_does_not_throw_a_trained_model_away(method: str) -> None:
    model, optimizer, step, counts = _trained_by_adagrad(tied=False)
    old = {path: model.get_submodule(path) for path in ("0", "2")}
    compress(model, method, ratio=1.3, token_counts=counts)
    assert splice([optimizer], model, old) == []
    losses = [step() for _ in range(10)]
    # From the first value again, steps of the basis would raise the loss more than ten times.
    assert losses == sorted(losses, reverse=True)
    # Nor when the same table is stored in another structure,
    old = {path: model.get_submodule(path) for path in ("0", "2")}
    for path in old:
        table = model.get_submodule(path).factorization.materialize()
        replace_table(model, [path], LowRank.decompose(table.detach(), table.nbytes))
    assert splice([optimizer], model, old) == []
    others = [step() for _ in range(10)]
    assert max(others) < 2 * losses[0]
    # or in factors of another balance.
    layers = [model[0], model[2]]
    factors = [factor for layer in layers for factor in layer.factorization.parameters()]
    levels = levels_of_adagrad([optimizer], layers)
    for layer in layers:
        layer.factorization.balance()
    assert not start_anew([optimizer], factors, layers, levels)
    assert max(step() for _ in range(10)) < 2 * losses[0]
    assert all(optimizer.state[factor]["step"] > 60 for factor in factors)


def test_sums_of_a_table_that_becomes_two_are_those_of_both() -> None:
    model, optimizer, step, counts = _trained_by_adagrad(tied=True)
    sums = optimizer.state[model[0].weight]["sum"].mean().item()
    old = {path: model.get_submodule(path) for path in ("0", "2")}
    compress(model, "low_rank", ratio=1.3, token_counts=counts, tie="untie")
    assert model[0].factorization is not model[2].factorization
    assert splice([optimizer], model, old) == []
    for place in (0, 2):
        table = model[place].factorization
        # Of gradients that are all alike.
        expected = sums * table.basis.square().sum(dim=1).mean().item()
        assert optimizer.state[table.coefficients]["sum"].mean().item() == pytest.approx(expected, rel=0.5)
    losses = [step() for _ in range(10)]
    assert max(losses) < 2 * losses[0]


def test_groups_stay_apart() -> None:
    model = _model(tied=False)
    biases = [parameter for name, parameter in model.named_parameters() if "bias" in name]
    others = [parameter for name, parameter in model.named_parameters() if "bias" not in name]
    optimizer = AdamW([{"params": others, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}])
    lists = [group["params"] for group in optimizer.param_groups]
    _compress(model, optimizer)
    decayed, plain = (group["params"] for group in optimizer.param_groups)
    # The same lists, for some optimizers keep references to them.
    assert lists[0] is decayed
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


def test_momentum_goes_on_as_that_of_the_factors() -> None:
    model = _model(tied=True)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    _step(model, optimizer)
    moment = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    old = {path: model.get_submodule(path) for path in ("0", "2")}
    compress(model, "low_rank", ratio=2)
    assert splice([optimizer], model, old) == []
    table = model[0].factorization
    # m_U = m_W Bᵀ and m_B = Uᵀ m_W.
    expected = {"coefficients": moment @ table.basis.T, "basis": table.coefficients.T @ moment}
    for name, value in expected.items():
        found = optimizer.state[table.get_parameter(name)]["momentum_buffer"]
        torch.testing.assert_close(found, value.detach(), rtol=1e-4, atol=1e-6)
    _step(model, optimizer)
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))


@pytest.mark.parametrize("method", ["group_reduce", "transform_coding"])
def test_the_momentum_is_a_gradient(method: str) -> None:
    model = nn.Sequential(nn.Embedding(150, 16)).double()
    compress(model, method, ratio=1.5, token_counts=torch.arange(150, 0, -1))
    table = model[0].factorization
    moment = torch.randn(150, 16, generator=torch.Generator().manual_seed(1)).double()
    found = pull_back(table, moment)
    assert [id(parameter) for parameter, _ in found] == [id(parameter) for parameter in table.parameters()]
    # The table moves by what its factors move, so ⟨M, W⟩ changes by their product with the momentum: by differences.
    step = 1e-6
    for parameter, value in found:
        direction = torch.randn_like(parameter)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
                ends.append((table.materialize() * moment).sum())
                parameter -= sign * step * direction
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), (direction * value).sum(), rtol=1e-5, atol=1e-5)


def test_momentum_of_a_table_that_becomes_two_is_dropped() -> None:
    model = _model(tied=True)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    _step(model, optimizer)
    old = {path: model.get_submodule(path) for path in ("0", "2")}
    compress(model, "low_rank", ratio=4, tie="untie")
    assert splice([optimizer], model, old) == ["0"]


def test_a_frozen_basis_has_no_momentum() -> None:
    table = LowRank(50, 8, 3)
    table.basis.requires_grad_(False)
    assert [id(parameter) for parameter, _ in pull_back(table, torch.ones(50, 8))] == [id(table.coefficients)]


def test_the_table_in_one_of_several_optimizers() -> None:
    model = _model(tied=False)
    tables = SGD([model[0].weight, model[2].weight], lr=0.1, momentum=0.9)
    others, apart = Adam([model[2].bias]), Adam(model[1].parameters())
    ids = torch.arange(0, 599, 7)
    nn.functional.cross_entropy(model(ids), ids + 1).backward()
    for optimizer in (tables, others, apart):
        optimizer.step()
    old = {path: model.get_submodule(path) for path in ("0", "2")}
    compress(model, "low_rank", ratio=2)
    assert splice([others, apart, tables], model, old) == []
    factors = [parameter for path in old for parameter in model.get_submodule(path).factorization.parameters()]
    assert [id(parameter) for parameter in tables.param_groups[0]["params"]] == [id(factor) for factor in factors]
    assert [len(optimizer.state) for optimizer in (others, apart, tables)] == [1, 2, 4]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad])
def test_what_has_other_values_starts_anew(kind: type[torch.optim.Optimizer]) -> None:
    changed, kept = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = kind([changed, kept], lr=0.1)
    for _ in range(2):
        (changed.sum() + kept.sum()).backward()
        optimizer.step()
    before = dict(optimizer.state[kept])
    start_anew([optimizer], [changed])
    fresh = kind([changed], lr=0.1)
    found, expected = (some.state.get(changed, {}) for some in (optimizer, fresh))
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    assert optimizer.state[kept] == before
    optimizer.step()
    assert optimizer.state[changed]["step"] == 1
    assert optimizer.state[kept]["step"] == 3
