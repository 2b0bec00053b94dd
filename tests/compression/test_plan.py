"""Compressing whole models: what is asked for, what is refused, and the record of it."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_embcompress.compression.plan import PLAN_VERSION, Plan, apply_plan, compress, densify, plan_of
from toys import LanguageModel, falling_counts

# Two that stand for all, of which tests/methods/test_contract.py has the whole matrix.
_METHODS = ("group_reduce", "transform_coding")


_IDS = torch.tensor([[1, 5, 499], [0, 5, 17]])
_COUNTS = falling_counts(500)


def _model(vocab_size: int = 500, **changes: Any) -> LanguageModel:
    return LanguageModel(vocab_size, 16, **changes)


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compresses_in_place(method: str, tied: bool, dtype: torch.dtype) -> None:
    model = _model(tied=tied).to(dtype)
    before = model(_IDS).detach().float()
    plan = compress(model, method, ratio=1.5, token_counts=_COUNTS)
    after = model(_IDS)
    change = (after.detach().float() - before).norm() / before.norm()
    assert after.dtype == dtype
    assert after.shape == before.shape
    assert 0 < change < 0.7
    assert [table.modules for table in plan.tables] == (
        [("encoder", "decoder")] if tied else [("encoder",), ("decoder",)]
    )
    for table in plan.tables:
        assert table.ratio >= 1.5
        assert table.method == method
        assert table.dense_bytes == 500 * 16 * dtype.itemsize
        assert table.dtype == str(dtype).removeprefix("torch.")
        assert table.weighted_error is not None
        assert 0 < table.weighted_error < 0.3
    assert plan.ratio >= 1.5
    after.float().logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("itemsize_dtype", [torch.float32, torch.bfloat16])
def test_ratio_that_cannot_be_reached_names_one_that_can(method: str, itemsize_dtype: torch.dtype) -> None:
    model = _model(tied=True).to(itemsize_dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"table 'encoder' \(500, 16\) cannot be stored in \d+ bytes") as raised:
        compress(model, method, ratio=1000, token_counts=_COUNTS)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    reachable = float(re.findall(r"bytes \(([0-9.]+)x, .*\); ask for less", str(raised.value))[0])
    smallest = int(re.findall(r"smallest it can be is (\d+) bytes", str(raised.value))[0])
    # The very figure of the message can be asked for.
    assert compress(copy.deepcopy(model), method, ratio=reachable, token_counts=_COUNTS).ratio >= reachable
    assert compress(copy.deepcopy(model), method, size=smallest, token_counts=_COUNTS).stored_bytes <= smallest
    with pytest.raises(ValueError, match="cannot be stored"):
        compress(model, method, ratio=reachable * 1.02, token_counts=_COUNTS)


def test_size_covers_all_tables() -> None:
    model = _model(2000)
    plan = compress(model, "low_rank", size="0.1MB")
    assert len(plan.tables) == 2
    assert 80_000 < plan.stored_bytes <= 100_000
    with pytest.raises(ValueError, match=r"size '1MB' is not below the 0.064 MB that the tables 'encoder', 'decoder'"):
        compress(_model(), "low_rank", size="1MB")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"give exactly one of ratio, size, bits_per_weight and max_perplexity_increase: ratio is None"),
        ({"ratio": 2, "size": "1kB"}, r"exactly one of ratio, size, .*: ratio is 2"),
        ({"ratio": 1}, r"ratio must be above 1 .*it is 1"),
        ({"ratio": 2, "method": "group_reduc"}, r"unknown method 'group_reduc' \(did you mean 'group_reduce'"),
        ({"ratio": 2, "group": 4}, r"unknown option 'group' \(did you mean 'groups'"),
        ({"ratio": 2, "groups": 501}, r"groups must be at most the 500 rows of the table, it is 501"),
        ({"ratio": 2, "tables": ["decodr"]}, r"no module 'decodr' \(did you mean 'decoder'"),
        ({"ratio": 2, "token_counts": None}, r"table 'encoder' by frequency: give token_counts"),
        ({"ratio": 2, "token_counts": torch.ones(499)}, r"500 rows of table 'encoder', its shape is \(499,"),
        ({"ratio": 2, "token_counts": torch.ones(500, 1)}, r"its shape is \(500, 1\)"),
        ({"ratio": 2, "token_counts": [3] * 499 + [-2]}, r"not negative; entry 499 is -2 \(1 such entries\)"),
        ({"ratio": 2, "token_counts": [float("nan")] * 500}, r"finite and not negative; entry 0 is nan \(500 such"),
    ],
)
def test_requests_that_cannot_be_met_change_nothing(given: dict[str, Any], message: str) -> None:
    model = _model()
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compress(model, **{"token_counts": _COUNTS, **given})
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_values_that_are_not_finite_change_nothing() -> None:
    model = _model()
    # In the second table: the first must not have been replaced by then.
    model.decoder.weight.data[[4, 9], 1] = float("nan")
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"table 'decoder' has NaN or infinite values in 2 .*\(rows 4, 9\)"):
        compress(model, "low_rank", ratio=2)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("counts", [_COUNTS.tolist(), _COUNTS.numpy(), _COUNTS.double(), np.zeros(500)])
def test_counts_of_any_kind(counts: Any) -> None:
    model = _model()
    assert compress(model, "group_reduce", ratio=2, token_counts=counts).ratio >= 2
    assert model(_IDS).isfinite().all()


def test_one_table_can_be_compressed_after_the_other() -> None:
    model = _model()
    compress(model, "group_reduce", ratio=2, token_counts=_COUNTS, tables=["decoder"])
    plan = compress(model, "low_rank", ratio=3, tables=["encoder"])
    assert [(table.name, table.method) for table in plan.tables] == [
        ("encoder", "low_rank"),
        ("decoder", "group_reduce"),
    ]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", _METHODS)
def test_plan_rebuilds_the_structure_empty(method: str, tied: bool) -> None:
    model, fresh = _model(tied=tied), _model(tied=tied)
    plan = compress(model, method, ratio=1.9, token_counts=_COUNTS)
    record = json.loads(json.dumps(plan.to_dict()))
    apply_plan(fresh, Plan.from_dict(record))
    assert plan_of(fresh) == plan == plan_of(model)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(_IDS), model(_IDS))
    # Also over another structure, and back to a dense one.
    other = _model(tied=tied)
    compress(other, "low_rank", ratio=5)
    apply_plan(other, plan)
    assert plan_of(other) == plan
    apply_plan(other, Plan())
    other.load_state_dict(_model(tied=tied).state_dict())
    assert type(other.encoder) is nn.Embedding
    assert (other.encoder.weight is other.decoder.weight) == tied


def test_plan_of_a_module_that_is_registered_twice() -> None:
    def build() -> nn.Module:
        model = _model()
        model.alias = model.encoder
        return model

    model, fresh = build(), build()
    plan = compress(model, "low_rank", ratio=2)
    apply_plan(fresh, plan)
    fresh.load_state_dict(model.state_dict())
    assert fresh.alias.factorization is fresh.encoder.factorization
    assert torch.equal(fresh(_IDS), model(_IDS))
    densify(fresh)
    assert fresh.alias.weight is fresh.encoder.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": PLAN_VERSION + 1}, r"version .*: upgrade lightning-embcompress"),
        ({"version": "1"}, r"version '1'"),
        ({"tables": None}, r"not a compression plan"),
        ({"tables": [{}]}, r"must have the keys"),
        ({"tables": [3]}, r"must have the keys .* got 3"),
    ],
)
def test_records_that_are_no_plans(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_dict({"version": 1, "tables": [], **change})


@pytest.mark.parametrize("record", [None, [], "plan", 3, {}])
def test_anything_else_is_no_plan(record: Any) -> None:
    with pytest.raises(ValueError, match="not a compression plan"):
        Plan.from_dict(record)


@pytest.mark.parametrize("version", [1, 2])
def test_plans_of_older_versions_are_read(version: int) -> None:
    model, fresh = _model(tied=True), _model(tied=True)
    plan = compress(model, "low_rank", ratio=2)
    record = json.loads(json.dumps(plan.to_dict()))
    assert record["version"] == PLAN_VERSION
    for table in record["tables"]:
        assert table.pop("predicted_loss") is None
        if version == 1:
            assert table.pop("untied") is None
    record["version"] = version
    read = Plan.from_dict(record)
    assert read.tables == plan.tables
    apply_plan(fresh, read)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(_IDS), model(_IDS))
    # What was read is written as what it is now.
    assert plan_of(fresh).to_dict() == plan.to_dict()


def test_a_variant_of_an_older_version_is_a_method_now() -> None:
    model = _model(tied=True)
    plan = compress(model, "shared_basis", ratio=2, groups=3, token_counts=_COUNTS)
    record = json.loads(json.dumps(plan.to_dict()))
    options = {"variant": "loss", "groups": 3, "grouping": "equal"}
    record |= {
        "version": 5,
        "tables": [{**table, "method": "group_reduce", "options": options} for table in record["tables"]],
    }
    assert Plan.from_dict(record) == plan
