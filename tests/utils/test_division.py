from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.methods.numerics.gram import gram_matrix, row_chunks, row_units, run_of
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
)


@pytest.mark.parametrize("inside", [True, False])
def test_one_process_computes_all_units_in_their_order(inside: bool) -> None:
    results = torch.zeros(5)
    units: list[int] = []
    shares: list[float] = []

    def compute(unit: int) -> None:
        units.append(unit)
        results[unit] = unit

    def run() -> None:
        deal([[part] for part in results], [1, 5, 2, 0, 2], compute, shares.append)

    if inside:
        with divided():
            run()
    else:
        run()
    assert units == [0, 1, 2, 3, 4]
    assert shares == [0.1, 0.5, 0.2, 0.0, 0.2]
    assert count_processes() == 1


def test_work_without_units_or_costs_is_done_all_the_same() -> None:
    shares: list[float] = []
    deal([], [], lambda _: pytest.fail("there is no unit"), shares.append)
    assert shares == [1.0]
    deal([[torch.zeros(1)]] * 2, [0, 0], lambda _: None, shares.append)
    assert shares == [1.0, 0.5, 0.5]


def test_lists_get_all_units_at_once() -> None:
    called: list[Sequence[int]] = []
    deal_lists([[torch.zeros(1)]] * 3, [1, 2, 3], called.append)
    assert [list(units) for units in called] == [[0, 1, 2]]


def test_one_process_agrees_with_itself() -> None:
    value = torch.tensor([1.5])
    agree(value)
    assert value.item() == 1.5


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
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda group: backends)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    assert group_device(None, torch.device(wanted)) == torch.device(device)


@given(num_rows=st.integers(0, 10**6), dim=st.integers(1, 5000))
@settings(deadline=None)
def test_row_units_are_the_chunks_in_few_runs(num_rows: int, dim: int) -> None:
    units = row_units(num_rows, dim)
    assert [chunk for chunks in units for chunk in chunks] == list(row_chunks(num_rows, dim))
    assert len(units) <= 64
    runs = [run_of(chunks) for chunks in units]
    assert all(one.stop == other.start for one, other in pairwise(runs))
    assert sum(run.stop - run.start for run in runs) == num_rows
    assert len({len(chunks) for chunks in units[:-1]}) <= 1


@pytest.mark.parametrize("dim", [63, 64, 65, 200, 600])
def test_gram_matrix_in_strips_is_symmetric_and_right(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(300, dim, generator=generator)
    weights = torch.rand(300, generator=generator).double()
    gram = gram_matrix(table, weights)
    torch.testing.assert_close(gram, gram.T, rtol=1e-5, atol=1e-4)
    exact = table.double().T @ (weights.unsqueeze(1) * table.double())
    torch.testing.assert_close(gram, exact, rtol=1e-5, atol=1e-4)
