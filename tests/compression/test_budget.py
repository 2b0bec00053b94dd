"""How large factors become: options that say so instead of a ratio, and tables that are untied."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_embcompress.compression.budget import Budget, parse_size
from lightning_embcompress.compression.plan import Plan, apply_plan, compress, densify, plan_of
from lightning_embcompress.integrations.saved import load_compressed, save_compressed
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.methods.registry import METHODS, GroupReduceConfig, TransformCodingConfig
from toys import LanguageModel, falling_counts

_IDS = torch.tensor([[1, 5, 499], [0, 5, 17]])
_COUNTS = falling_counts(500)


def _model(vocab_size: int = 500, dim: int = 16, tied: bool = False) -> LanguageModel:
    return LanguageModel(vocab_size, dim, tied=tied)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("80MB", 80_000_000), ("1.5 gb", 1_500_000_000), (12345, 12345), ("700", 700), ("3k", 3000), ("9B", 9)],
)
def test_sizes(size: str | int, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "MB", "-3MB", "80MiB", "0", "8 0MB", 0, "nan"])
def test_sizes_that_cannot_be_read(size: str | int) -> None:
    with pytest.raises(ValueError, match="size must be a number of bytes such as '80MB'"):
        parse_size(size)


_SIZES: dict[str, dict[str, Any]] = {
    "cp": {"rank": 9},
    "low_rank": {"rank": 3},
    "product_quantization": {"subspaces": 5, "bits": 4},
    "tensor_train": {"max_rank": 1},
    "tensor_train_matrix": {"max_rank": 5},
    "tucker": {"ranks": [7, 6, 9]},
    "weighted_low_rank": {"rank": 3},
}


_OF_NUMPY: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "group_reduce",
        {
            "ratio": np.float64(2),
            "groups": np.int64(5),
            "refine_rounds": torch.tensor(1),
            "move_fraction": np.float32(0.5),
        },
        {"groups": 5, "refine_rounds": 1, "move_fraction": 0.5},
    ),
    ("tucker", {"ranks": np.array([7, 6, 9])}, {"ranks": [7, 6, 9]}),
    ("tensor_train", {"max_rank": np.int32(1), "shape": (np.int64(4), 4)}, {"max_rank": 1, "shape": [4, 4]}),
]


@pytest.mark.parametrize(("method", "given", "recorded"), _OF_NUMPY)
def test_numbers_of_numpy_are_recorded_as_plain_ones(
    method: str, given: dict[str, Any], recorded: dict[str, Any], tmp_path: Path
) -> None:
    plan = compress(model := _model(), method, token_counts=_COUNTS.numpy(), **given)
    record = plan.to_dict()
    assert [table.options for table in plan.tables] == [recorded] * 2
    # JSON has them as they are, and so does a checkpoint that may hold nothing else.
    read = json.loads(json.dumps(record))
    assert read == record
    assert repr(read) == repr(record)
    torch.save(record, tmp_path / "record.pt")
    assert Plan.from_dict(torch.load(tmp_path / "record.pt", weights_only=True)) == plan
    plain = compress(same := _model(), method, token_counts=_COUNTS, **{"ratio": given.get("ratio"), **recorded})
    assert plain == plan
    assert torch.equal(model(_IDS), same(_IDS))


def test_options_that_fix_the_size_are_all_tested() -> None:
    assert set(_SIZES) == {name for name in sorted(METHODS) if METHODS[name].config().size_fields}


@pytest.mark.parametrize("method", sorted(_SIZES))
def test_an_option_that_fixes_the_size_takes_the_place_of_a_ratio(method: str) -> None:
    model = _model(tied=True)
    plan = compress(model, method, token_counts=_COUNTS, **_SIZES[method])
    chosen = METHODS[method]
    options = chosen.config(**_SIZES[method])
    assert options.fixes_size
    for table in plan.tables:
        assert table.options == _SIZES[method]
        # All but the digits of a rank, which are counted at their widest.
        assert 0 <= chosen.factorization.smallest_bytes(500, 16, 4, options) - table.stored_bytes < 3
        assert table.weighted_error is not None
        assert 0 < table.weighted_error < 0.9
    fresh = _model(tied=True)
    apply_plan(fresh, Plan.from_dict(json.loads(json.dumps(plan.to_dict()))))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(_IDS), model(_IDS))
    # Refined to the same table, it is neither larger nor worse.
    factors, table, ones = model.encoder.factorization, _model().encoder.weight, torch.ones(500)
    before, stored = factors.weighted_error(table, ones), factors.stored_bytes()
    refined = factors.refined(table, stored, ones, options)
    assert refined.stored_bytes() == stored
    assert refined.weighted_error(table, ones) <= before * 1.001 + 1e-6


@pytest.mark.parametrize("method", sorted(_SIZES))
def test_an_option_that_fixes_the_size_excludes_a_ratio(method: str) -> None:
    (name,) = METHODS[method].config().size_fields
    for given in ({**_SIZES[method], "ratio": 2}, {**_SIZES[method], "size": "10kB"}, {}):
        with pytest.raises(ValueError, match=rf"give exactly one of ratio, .* and {name}: ratio is "):
            compress(_model(), method, token_counts=_COUNTS, **given)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("low_rank", {"rank": 16}, r"'encoder' \(500, 16\) would take \d+ bytes by 'low_rank' .* the 32000 bytes"),
        ("low_rank", {"ratio": 3, "tie": "split"}, r"tie must be one of 'keep', 'untie', 'auto', it is 'split'"),
        ("tensor_train", {"max_rank": 4}, r"would take \d+ bytes by 'tensor_train'"),
    ],
)
def test_sizes_that_are_not_possible_change_nothing(method: str, given: dict[str, Any], message: str) -> None:
    model = _model()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        compress(model, method, **given)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("method", ["group_reduce", "low_rank"])
def test_untying_gives_each_role_factors_of_half_the_bytes(method: str, tmp_path: Path) -> None:
    model, fresh = _model(2000, tied=True), _model(2000, tied=True)
    table = model.encoder.weight.detach().clone()
    smallest = METHODS[method].factorization.smallest_bytes(2000, 16, 4, METHODS[method].config())
    size = max(2 * smallest, table.nbytes // 3)
    plan = compress(model, method, size=size, tie="untie", token_counts=falling_counts(2000))
    assert [table.modules for table in plan.tables] == [("encoder",), ("decoder",)]
    assert [table.untied for table in plan.tables] == ["encoder", "encoder"]
    assert plan.dense_bytes == table.nbytes
    assert all(entry.dense_bytes == table.nbytes // 2 and entry.stored_bytes <= size // 2 for entry in plan.tables)
    assert 0.7 * size < plan.stored_bytes <= size or plan.stored_bytes == 2 * smallest
    assert plan.ratio == pytest.approx(table.nbytes / plan.stored_bytes)
    one, other = model.encoder.factorization, model.decoder.factorization
    assert one is not other
    assert not {id(parameter) for parameter in one.parameters()} & {id(parameter) for parameter in other.parameters()}
    assert torch.equal(one.materialize(), other.materialize())
    # The same from the record and a state, and trained apart from files.
    read = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read == plan
    apply_plan(fresh, read)
    assert plan_of(fresh) == plan
    next(other.parameters()).data.mul_(1.5)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(_IDS), model(_IDS))
    save_compressed(model, tmp_path)
    assert load_compressed(tmp_path, fresh) == plan
    assert torch.equal(fresh(_IDS), model(_IDS))
    assert not torch.equal(fresh.encoder.factorization.materialize(), fresh.decoder.factorization.materialize())
    densify(fresh)
    assert fresh.encoder.weight is not fresh.decoder.weight
    torch.testing.assert_close(fresh(_IDS), model(_IDS), rtol=1e-4, atol=1e-4)
    assert plan_of(fresh) == Plan()


def test_the_whole_model_counts_an_untied_table_once() -> None:
    dense = sum(parameter.nbytes for parameter in _model(2000, 64, tied=True).parameters())
    for tie in ("keep", "untie", "auto"):
        model = _model(2000, 64, tied=True)
        plan = compress(model, "low_rank", ratio=4, tie=tie)
        found = model_bytes(model)
        assert found["dense_bytes"] == dense
        assert found["stored_bytes"] == dense - plan.dense_bytes + plan.stored_bytes
        assert 4 <= plan.ratio < 5.5


@pytest.mark.parametrize("tie", ["keep", "auto"])
def test_tied_tables_stay_so_unless_untying_has_the_lower_loss(tie: Any) -> None:
    # Rows weighted by frequency weigh the same in both roles: one set of twice the bytes is never worse.
    model = _model(2000, tied=True)
    plan = compress(model, "weighted_low_rank", ratio=3, tie=tie, token_counts=falling_counts(2000))
    assert [(table.modules, table.untied) for table in plan.tables] == [(("encoder", "decoder"), None)]
    assert model.encoder.factorization is model.decoder.factorization
    apart = _model(2000, tied=True)
    halves = compress(apart, "weighted_low_rank", ratio=3, tie="untie", token_counts=falling_counts(2000))
    assert all(half.weighted_error > plan.tables[0].weighted_error for half in halves.tables)


def test_untying_changes_nothing_where_nothing_is_tied() -> None:
    plan = compress(_model(2000), "low_rank", ratio=3, tie="untie")
    assert [(table.modules, table.untied) for table in plan.tables] == [(("encoder",), None), (("decoder",), None)]
    assert plan == compress(_model(2000), "low_rank", ratio=3)


def test_tables_with_several_readers_become_two() -> None:
    model = _model(2000, tied=True)
    model.more = nn.Embedding(2000, 16)
    model.more.weight = model.encoder.weight
    plan = compress(model, "low_rank", ratio=3, tie="untie")
    assert [table.modules for table in plan.tables] == [("encoder", "more"), ("decoder",)]
    assert model.encoder.factorization is model.more.factorization
    assert plan.ratio >= 3


def test_untying_at_a_ratio_that_cannot_be_reached_names_one_that_can() -> None:
    with pytest.raises(ValueError, match=r"cannot be stored in \d+ bytes \(60x\)") as raised:
        compress(_model(tied=True), "low_rank", ratio=60, tie="untie")
    reachable = float(re.findall(r"\(([0-9.]+)x[^)]*\); ask for less", str(raised.value))[0])
    assert compress(_model(tied=True), "low_rank", ratio=reachable, tie="untie").ratio >= reachable


@pytest.mark.parametrize("tie", ["keep", "untie"])
def test_bits_per_weight_are_those_of_all_weights(tie: Any) -> None:
    model = _model(2000, tied=True)
    # By steps of a rank, or of one for each of two tables.
    plan = compress(model, "low_rank", bits_per_weight=8, tie=tie)
    assert plan.bits_per_weight <= 8
    assert compress(_model(2000, tied=True), "low_rank", ratio=4, tie=tie) == plan
    assert plan.bits_per_weight == pytest.approx(8 * plan.stored_bytes / (2000 * 16))
    assert all(table.bits_per_weight == pytest.approx(32 / table.ratio) for table in plan.tables)


def test_the_default_method_and_configs() -> None:
    plan = compress(_model(2000), ratio=8, token_counts=falling_counts(2000))
    assert {table.method for table in plan.tables} == {"transform_coding"}
    config = TransformCodingConfig(bits=4)
    plans = [compress(_model(2000), config, ratio=8, token_counts=falling_counts(2000))]
    plans += [compress(_model(2000), "transform_coding", bits=4, ratio=8, token_counts=falling_counts(2000))]
    assert plans[0] == plans[1]
    assert plans[0].tables[0].options == {"bits": 4}
    with pytest.raises(ValueError, match="'groups'"):
        compress(_model(2000), config, ratio=8, groups=3)


@pytest.mark.parametrize("budget", [{}, {"ratio": 2, "size": 5}, {"ratio": 0.5}, {"bits_per_weight": 0}, {"size": "x"}])
def test_budgets_out_of_their_range(budget: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(budget)[-1] if budget else "exactly one"):
        Budget(**budget)


def test_a_ratio_may_be_written_with_an_x() -> None:
    config = GroupReduceConfig()
    assert Budget.of(config, ratio="6x") == Budget.of(config, ratio=6) == Budget.of(config, ratio=" 6.0 X")
    for name, value in (("ratio", "six"), ("ratio", "0.5x"), ("bits_per_weight", "4x")):
        with pytest.raises(ValueError, match=f"^{name} must be .* it is "):
            Budget.of(config, **{name: value})


@pytest.mark.parametrize("value", [1, 0.51, "5"])
def test_a_large_increase_needs_a_percent_sign(value: Any) -> None:
    with pytest.raises(ValueError, match=f"^max_perplexity_increase={value!r} .*'{value}%' for {value} percent"):
        Budget(max_perplexity_increase=value)
    assert Budget(max_perplexity_increase=f"{value}%").max_loss == pytest.approx(math.log1p(float(value) / 100))
