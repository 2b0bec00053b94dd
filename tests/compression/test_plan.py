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
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.methods.registry import BlockLowRank
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


@pytest.mark.parametrize("tied", [False, True])
def test_training_moves_the_factors_and_lowers_the_loss(tied: bool) -> None:
    model = _model(tied=tied)
    compress(model, "group_reduce", ratio=2, token_counts=_COUNTS, groups=4)
    factors = [parameter for name, parameter in model.named_parameters() if "factorization" in name]
    before = [parameter.detach().clone() for parameter in factors]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Every token, so that every block is read.
    ids = torch.arange(500)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids), ids.flip(0))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(not torch.equal(one, other) for one, other in zip(before, factors, strict=True))


def test_tied_transformer_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=2000, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    position = model.transformer.wpe
    ids = torch.randint(2000, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense = float(model(ids, labels=ids).loss)
    plan = compress(model, "group_reduce", ratio=1.3, token_counts=torch.ones(2000))
    assert [table.modules for table in plan.tables] == [("transformer.wte", "lm_head")]
    assert model.transformer.wpe is position
    assert isinstance(model.transformer.wte, CompressedEmbedding)
    assert isinstance(model.lm_head, CompressedLinear)
    loss = model(ids, labels=ids).loss
    assert float(loss.detach()) == pytest.approx(dense, rel=0.05)
    loss.backward()
    factors = model.lm_head.factorization
    assert factors is model.transformer.wte.factorization
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors.parameters())


@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("itemsize_dtype", [torch.float32, torch.bfloat16])
def test_ratio_that_cannot_be_reached_names_one_that_can(method: str, itemsize_dtype: torch.dtype) -> None:
    model = _model(tied=True).to(itemsize_dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"table 'encoder' \(500, 16\) cannot be stored in \d+ bytes") as raised:
        compress(model, method, ratio=1000, token_counts=_COUNTS)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    reachable = float(re.findall(r"bytes \(([0-9.]+)x\); ask for less", str(raised.value))[0])
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
        (
            {"ratio": 2, "size": "1kB"},
            r"give exactly one of ratio, size, bits_per_weight and max_perplexity_increase: ratio is 2",
        ),
        ({"ratio": 1}, r"ratio must be above 1 .*it is 1"),
        ({"ratio": 2, "method": "group_reduc"}, r"unknown method 'group_reduc' \(did you mean 'group_reduce'"),
        ({"ratio": 2, "group": 4}, r"unknown option 'group' \(did you mean 'groups'"),
        ({"ratio": 2, "groups": 501}, r"groups must be at most the 500 rows of the table, it is 501"),
        ({"ratio": 2, "tables": ["decodr"]}, r"no module 'decodr' \(did you mean 'decoder'"),
        ({"ratio": 2, "token_counts": None}, r"table 'encoder' by frequency: give token_counts"),
        (
            {"ratio": 2, "token_counts": torch.ones(499)},
            r"each of the 500 rows of table 'encoder', its shape is \(499,",
        ),
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


def test_frozen_tables_stay_frozen() -> None:
    model = _model()
    model.encoder.weight.requires_grad_(False)
    compress(model, "low_rank", ratio=2)
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())
    densify(model)
    assert not model.encoder.weight.requires_grad
    assert model.decoder.weight.requires_grad


def test_padding_bias_and_norm_are_kept() -> None:
    model = _model(padding_idx=3, max_norm=1.0)
    bias = model.decoder.bias
    compress(model, "group_reduce", ratio=2, token_counts=_COUNTS)
    assert model.decoder.bias is bias
    assert model.encoder(_IDS).norm(dim=-1).max() <= 1 + 1e-5
    model.encoder(torch.tensor([3, 3])).sum().backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.encoder.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_densify_gives_ordinary_layers_of_the_same_values(tied: bool) -> None:
    model = _model(tied=tied, padding_idx=3)
    compress(model, "group_reduce", ratio=2, token_counts=_COUNTS)
    before = model(_IDS)
    densify(model)
    assert type(model.encoder) is nn.Embedding
    assert type(model.decoder) is nn.Linear
    assert (model.encoder.weight is model.decoder.weight) == tied
    assert model.encoder.padding_idx == 3
    torch.testing.assert_close(model(_IDS), before, rtol=1e-4, atol=1e-4)
    assert plan_of(model) == Plan()
    # And from there again.
    assert compress(model, "low_rank", ratio=2).ratio >= 2


def test_one_table_can_be_compressed_after_the_other() -> None:
    model = _model()
    compress(model, "group_reduce", ratio=2, token_counts=_COUNTS, tables=["decoder"])
    plan = compress(model, "low_rank", ratio=3, tables=["encoder"])
    assert [(table.name, table.method) for table in plan.tables] == [
        ("encoder", "low_rank"),
        ("decoder", "group_reduce"),
    ]


@pytest.mark.parametrize("method", [*_METHODS, "cp"])
def test_is_reproducible_and_leaves_global_states_alone(method: str) -> None:
    tensorly = pytest.importorskip("tensorly")
    backend = tensorly.get_backend()
    one, other = _model(), _model()
    one.load_state_dict(other.state_dict())
    for seed, model in enumerate((one, other)):
        torch.manual_seed(seed)
        np.random.seed(seed)
        state, expected = torch.get_rng_state(), np.random.RandomState(seed).random_sample(3)
        compress(model, method, ratio=1.9, token_counts=_COUNTS)
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.random_sample(3), expected)
    assert torch.equal(one(_IDS), other(_IDS))
    state = torch.get_rng_state()
    densify(one)
    assert torch.equal(torch.get_rng_state(), state)
    assert tensorly.get_backend() == backend


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


def test_plan_takes_the_dtype_of_the_model() -> None:
    plan = compress(_model().bfloat16(), "low_rank", ratio=2)
    model = _model()
    apply_plan(model, plan)
    assert model.encoder.factorization.dtype == torch.float32
    assert model(_IDS).dtype == torch.float32


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float31"}, r"unknown dtype 'float31'"),
        ({"dtype": "int64"}, r"unknown dtype 'int64'"),
        ({"modules": "encoder"}, r"'modules' of the compression plan must be a list of paths, it is 'encoder'"),
        ({"modules": []}, r"'modules' of the compression plan must be a list of paths, it is \[\]"),
        ({"spec": None}, r"'spec' of the compression plan must be a mapping, it is None"),
        ({"more": 1}, r"must have the keys"),
    ],
)
def test_tables_of_a_plan_that_are_damaged(change: dict[str, Any], message: str) -> None:
    record = compress(_model(), "low_rank", ratio=2).to_dict()
    record["tables"][1] |= change
    with pytest.raises(ValueError, match=message):
        Plan.from_dict(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": ["decodr"]}, r"the plan compresses module 'decodr', but the model has no embedding or projection"),
        (
            {"spec": {"kind": "low_rank", "vocab_size": 501, "dim": 16, "rank": 1}},
            r"'decoder' is 501 x 16, the model's is",
        ),
        ({"spec": {"kind": "low_rank", "vocab_size": 500, "dim": 16, "rank": 17}}, r"rank must be from 0 to .* 16"),
        ({"spec": {"kind": "other", "vocab_size": 500, "dim": 16}}, r"unknown kind of factorization 'other'"),
        ({"spec": {}}, r"'spec' of table 'decoder' in the compression plan: unknown kind of factorization None"),
    ],
)
def test_plans_that_do_not_fit_change_nothing(change: dict[str, Any], message: str) -> None:
    record = compress(_model(), "low_rank", ratio=2).to_dict()
    record["tables"][1] |= change
    model = _model()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        apply_plan(model, Plan.from_dict(record))
    assert dict(model.named_modules()) == modules


def test_options_reach_the_solver() -> None:
    model = _model()
    plan = compress(model, "group_reduce", ratio=2, token_counts=_COUNTS, groups=3, refine_rounds=0)
    assert isinstance(model.encoder.factorization, BlockLowRank)
    assert len(model.encoder.factorization.sizes) == 3
    assert [table.options for table in plan.tables] == [{"groups": 3, "refine_rounds": 0}] * 2


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
