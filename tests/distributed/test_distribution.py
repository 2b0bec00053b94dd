"""Tables solved by several processes: the factors are those that one process finds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_embcompress.compression.solution import solve
from lightning_embcompress.methods.numerics import gram
from lightning_embcompress.methods.tensor_train import factorization as tensor_train

WORKERS = Path(__file__).parent / "workers"
sys.path.insert(0, str(WORKERS))
from cases import CASES, MORE_CASES, compared, small_units, solve_all, table, tasks  # noqa: E402


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    before = gram._CHUNK_ELEMENTS, tensor_train._CHUNK_TOKENS
    small_units()
    yield
    gram._CHUNK_ELEMENTS, tensor_train._CHUNK_TOKENS = before


@pytest.fixture(scope="module")
def alone(small: None) -> dict[str, list[dict[str, Any]]]:
    return solve_all(CASES)


def _assert_same(found: dict[str, list[dict[str, Any]]], expected: dict[str, list[dict[str, Any]]]) -> None:
    assert list(found) == list(expected)
    for name, tables in expected.items():
        for one, other in zip(found[name], tables, strict=True):
            assert {key: one[key] for key in one if key != "state"} == {
                key: other[key] for key in other if key != "state"
            }, name
            assert list(one["state"]) == list(other["state"])
            for key, tensor in other["state"].items():
                assert tensor.dtype == one["state"][key].dtype
                assert torch.equal(tensor, one["state"][key]), (name, key)


@pytest.mark.distributed
@pytest.mark.slow
def test_any_number_of_processes_finds_the_same(
    alone: dict[str, Any], torchrun: Callable[..., str], tmp_path: Path
) -> None:
    torchrun(WORKERS / "solve.py", tmp_path, "sample", processes=3, timeout=120)
    for rank in range(3):
        _assert_same(torch.load(tmp_path / f"{rank}.pt"), alone)


def test_cases_refine_in_place_and_not(alone: dict[str, Any]) -> None:
    refined = {name: tables[1]["in_place"] for name, tables in alone.items() if name not in ("cp", "loss")}
    assert refined == {
        "group_reduce": False,
        "group_reduce in place": True,
        "transform_coding": True,
        "trellis": True,
        "weighted_low_rank": True,
        "tensor_train": True,
        "product_quantization": True,
    }
    assert all(factors["trains"] == [True] * len(factors["trains"]) for factors in alone["cp"])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_all_methods_and_dtypes(small: None, torchrun: Callable[..., str], tmp_path: Path, processes: int) -> None:
    torchrun(WORKERS / "solve.py", tmp_path, "all", processes=processes)
    expected = solve_all({**CASES, **MORE_CASES})
    for rank in range(processes):
        _assert_same(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.distributed
@pytest.mark.slow
def test_an_error_in_one_process_ends_all(torchrun: Callable[..., str]) -> None:
    said = torchrun(WORKERS / "fail.py", processes=2, timeout=60, fails=True)
    assert "ArithmeticError: the decomposition did not converge" in said
    assert "another process has failed, so this one cannot go on: process 1: ArithmeticError" in said


@pytest.mark.parametrize("method", ["group_reduce", "cp"])
def test_one_process_solves_as_a_task_does(method: str) -> None:
    wanted = tasks(table(200, 24), table(100, 24, 1), method=method, ratio=2)
    for task, factors in zip(wanted, solve(wanted, together=True).factors, strict=True):
        expected = task.solve()
        task.record(expected)
        assert factors.provenance == expected.provenance
        assert compared(factors)["trains"] == compared(expected)["trains"]
        for name, tensor in expected.state_dict().items():
            assert torch.equal(tensor, factors.state_dict()[name])
