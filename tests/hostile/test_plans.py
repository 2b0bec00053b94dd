"""Plans that are damaged or made to do harm: refused with one error, quickly, without allocating memory."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_embcompress.compression.plan import Plan, apply_plan, plan_of
from lightning_embcompress.methods.registry import METHODS

_METHODS = sorted(METHODS)


def _read_and_apply(hostile: Any, record: Any) -> None:
    """Read a plan and give a model its structure; if either is refused the model is as it was."""
    model = hostile.Model()
    with hostile.harmless():
        with hostile.unchanged_if_refused(model):
            plan = Plan.from_dict(record)
            apply_plan(model, plan)
        wanted, there = ({table.modules: table.spec for table in some.tables} for some in (plan, plan_of(model)))
        assert there == wanted


# No divisor of the number of changes: each is made in some place.
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("method", _METHODS)
def test_plans_with_one_hostile_value(method: str, every: int, hostile: Any) -> None:
    assert every == 1 or (len(hostile.values) + 2) % every
    record = hostile.record(method)
    _read_and_apply(hostile, record)
    places = [place for place in hostile.places(record) if place[:2] != ("tables", 0)]
    changes = [
        (place, change)
        for place in places
        for change in (hostile.remove, hostile.double, *map(hostile.to, hostile.values))
    ]
    for place, change in changes[::every]:
        _read_and_apply(hostile, hostile.changed(record, place, change))


def test_any_json(hostile: Any, examples: settings) -> None:
    kinds = sorted({method.factorization.kind for method in METHODS.values()})

    @examples
    @given(hostile.json, st.booleans(), st.sampled_from(kinds))
    def run(record: Any, as_spec: bool, kind: str) -> None:
        if as_spec and isinstance(record, dict):
            spec = {"vocab_size": hostile.vocab_size, "dim": hostile.dim, **record, "kind": kind}
            entry = {"modules": ["encoder"], "method": kind, "options": {}, "spec": spec, "dtype": "float32"}
            record = {"version": 2, "tables": [{**entry, "stored_bytes": 9, "weighted_error": None, "untied": None}]}
        _read_and_apply(hostile, record)

    run()


def test_mutated_plans(hostile: Any, examples: settings) -> None:
    """Valid plans with a few parts changed."""
    values = st.one_of(st.sampled_from(hostile.values), hostile.numbers, st.lists(hostile.numbers, max_size=5))
    changes = st.one_of(st.sampled_from([hostile.remove, hostile.double]), values.map(hostile.to))

    @examples
    @given(st.data())
    def run(data: Any) -> None:
        record = hostile.record(data.draw(st.sampled_from(_METHODS)))
        for _ in range(data.draw(st.integers(1, 4))):
            record = hostile.changed(record, data.draw(st.sampled_from(hostile.places(record))), data.draw(changes))
            if not isinstance(record, dict):
                break
        _read_and_apply(hostile, record)

    run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": {"rank": -1}}, r"'rank' must be an integer from 0 up, it is -1"),
        ({"spec": {"rank": 10**12}}, r"rank must be from 0 to min\(vocab_size, dim\) = 8, it is 1000000000000"),
        ({"spec": {"rank": True}}, r"'rank' must be an integer from 0 up, it is True"),
        ({"spec": {"rank": 2.0}}, r"'rank' must be an integer from 0 up, it is 2.0"),
        ({"spec": {"rank": float("nan")}}, r"'rank' must be an integer from 0 up, it is nan"),
        ({"spec": {"rank": [[2]]}}, r"'rank' must be an integer from 0 up, it is \[\[2\]\]"),
        ({"spec": {"rank": 8}}, r"low_rank for a table of 120 x 8 would take more memory than the table itself"),
        ({"spec": {"vocab_size": 10**12}}, r"the plan's table 'encoder' is 1000000000000 x 8, the model's is 120 x 8"),
        ({"spec": {"dim": 10**12}}, r"the plan's table 'encoder' is 120 x 1000000000000, the model's is 120 x 8"),
        ({"spec": {"more": 1}}, r"must have the entries kind, vocab_size, dim, rank, .*\['more'\]"),
        ({"spec": {"kind": "os.system"}}, r"unknown kind of factorization 'os.system'; known are"),
        ({"spec": {"kind": ["low_rank"]}}, r"unknown kind of factorization \['low_rank'\]"),
        ({"method": "magic"}, r"unknown method 'magic' of table 'encoder' in the compression plan: known are cp, "),
        ({"method": 3}, r"unknown method 3 of table 'encoder'"),
        ({"method": "tucker"}, r"method 'tucker' of table 'encoder' .* stores tables as 'tucker', not as 'low_rank'"),
        ({"dtype": "int8"}, r"unknown dtype 'int8' of table 'encoder'"),
        ({"dtype": ["float32"]}, r"unknown dtype \['float32'\]"),
        ({"modules": ["encoder", "encoder"]}, r"names module 'encoder' twice"),
        ({"modules": ["decoder"]}, r"names module 'decoder' twice"),
        ({"modules": "encoder"}, r"'modules' of the compression plan must be a list of paths, it is 'encoder'"),
        ({"modules": []}, r"'modules' of the compression plan must be a list of paths, it is \[\]"),
        ({"modules": [3]}, r"'modules' of the compression plan must be a list of paths, it is \[3\]"),
        ({"modules": ["x" * 10**6]}, r"the plan compresses module 'x.*no embedding or projection there"),
        ({"options": {"rank": float("nan")}}, r"'options' of table 'encoder' .* must be plain values by names"),
        ({"options": {"a": [[[[[[[[[1]]]]]]]]]}}, r"'options' of table 'encoder' .* must be plain values by names"),
        ({"options": {"a": [1] * 20_000}}, r"'options' of table 'encoder' .* must be plain values by names"),
        ({"options": {3: 1}}, r"'options' of table 'encoder' .* must be plain values by names"),
        ({"weighted_error": "0.1"}, r"'weighted_error' of table 'encoder' .*it is '0.1'"),
        ({"weighted_error": float("inf")}, r"'weighted_error' of table 'encoder' .*it is inf"),
        ({"weighted_error": True}, r"'weighted_error' of table 'encoder' .*it is True"),
        ({"stored_bytes": -1}, r"'stored_bytes' of table 'encoder' .*it is -1"),
        ({"stored_bytes": 1.5}, r"'stored_bytes' of table 'encoder' .*it is 1.5"),
        ({"untied": 3}, r"'untied' of table 'encoder' .*it is 3"),
        ({"more": 1}, r"must have the keys"),
    ],
)
def test_tables_are_refused_by_name(change: dict[str, Any], message: str, hostile: Any) -> None:
    record = hostile.record("low_rank")
    entry = record["tables"][0]
    entry |= {**change, "spec": entry["spec"] | change.get("spec", {})}
    model = hostile.Model()
    with hostile.NoLargeTensors(), pytest.raises(ValueError, match=message) as refused:
        apply_plan(model, Plan.from_dict(record))
    assert len(str(refused.value)) < 1000
    assert type(model.encoder) is nn.Embedding
