"""Work that is divided over processes, as one process sees it; several are tested by `distributed`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.utils.division import (
    agree,
    count_processes,
    deal,
    deal_lists,
    divided,
    failing_together,
    group_device,
    owners_of,
    raise_together,
    sum_over_processes,
)


@pytest.mark.parametrize("context", [divided, nullcontext])
def test_one_process_computes_all_units_in_their_order(context: Any) -> None:
    results, units, shares = torch.zeros(5), [], []

    def compute(unit: int) -> None:
        units.append(unit)
        results[unit] = unit

    with context():
        deal([[part] for part in results], [1, 5, 2, 0, 2], compute, shares.append)
    assert units == results.tolist() == [0, 1, 2, 3, 4]
    assert shares == [0.1, 0.5, 0.2, 0.0, 0.2]
    assert count_processes() == 1


def test_work_without_units_or_costs_and_lists_of_units() -> None:
    shares: list[float] = []
    deal([], [], lambda _: pytest.fail("there is no unit"), shares.append)
    deal([[torch.zeros(1)]] * 2, [0, 0], lambda _: None, shares.append)
    assert shares == [1.0, 0.5, 0.5]
    called: list[Sequence[int]] = []
    deal_lists([[torch.zeros(1)]] * 3, [1, 2, 3], called.append)
    assert [list(units) for units in called] == [[0, 1, 2]]
    agree(value := torch.tensor([1.5]))
    assert value.item() == 1.5
    # A sum of one process is a copy.
    summed = sum_over_processes(value)
    assert torch.equal(summed, value)
    assert summed.data_ptr() != value.data_ptr()


@given(costs=st.lists(st.floats(0, 100), max_size=60), processes=st.integers(1, 9))
@settings(deadline=None)
def test_no_process_has_more_than_its_share_and_one_unit(costs: list[float], processes: int) -> None:
    owners = owners_of(costs, processes)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(processes)]
    assert set(owners) <= set(range(processes))
    assert max(loads) <= sum(costs) / processes + max(costs, default=0) + 1e-9


def test_costly_units_come_first() -> None:
    assert owners_of([1, 1, 1, 1, 4], 2) == [1, 1, 1, 1, 0]
    assert owners_of([3, 3, 2, 2, 2], 2) == [0, 1, 0, 1, 0]
    assert owners_of([1], 4) == [0]


@pytest.mark.parametrize("wrapped", [divided, failing_together])
def test_errors_of_one_process_stay_what_they_are(wrapped) -> None:
    with pytest.raises(KeyError, match="here"), wrapped():
        raise KeyError("here")
    with pytest.raises(KeyError, match="here"):
        raise_together(KeyError("here"))
    raise_together(None)


@pytest.mark.parametrize(
    ("backends", "wanted", "device"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
        ("cpu:gloo,cuda:gloo", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo", "cuda:1", "cpu"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cpu", "cuda:3"),
    ],
)
def test_tensors_go_through_a_device_that_the_group_knows(
    monkeypatch: pytest.MonkeyPatch, backends: str, wanted: str, device: str
) -> None:
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: backends)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    assert group_device(torch.device(wanted)) == torch.device(device)
