"""Solve tables in several processes; every one saves what it got. Arguments: folder, which cases."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import CASES, MORE_CASES, small_units, solve_all, table, tasks

from lightning_embcompress.compression.solution import solve
from lightning_embcompress.methods.registry import CP, LowRank
from lightning_embcompress.utils.division import deal, divided, failing_together, raise_together, sum_over_processes


def check_what_is_said(rank: int, processes: int) -> None:
    total = sum_over_processes(torch.tensor([2**40 + rank, 1]))
    assert total.tolist() == [processes * 2**40 + sum(range(processes)), processes]

    # Whatever fails in one process is raised in all of them, and they go on together.
    expected = pytest.raises(ValueError, match="no space") if rank == 1 else said_by_process_1("ValueError: no space")
    with expected:
        raise_together(ValueError("no space") if rank == 1 else None)
    with pytest.raises(OSError, match=f"disk {rank}"), failing_together():
        raise OSError(f"disk {rank}")
    raise_together(None)


def said_by_process_1(text: str):
    return pytest.raises(RuntimeError, match=f"another process has failed.*process 1: {text}")


def check_errors(rank: int) -> None:
    numbers = torch.zeros(8)

    def unit_fails(unit: int) -> None:
        if rank == 1:
            raise KeyError("unit")

    def one_unit(unit: int) -> None:
        numbers[unit] = unit

    parts = [[numbers[unit : unit + 1]] for unit in range(8)]
    shares: list[float] = []
    with divided():
        deal(parts, [1.0] * 8, one_unit, shares.append)
    assert numbers.tolist() == list(range(8))
    assert sum(shares) == pytest.approx(1)
    with pytest.raises(KeyError) if rank == 1 else said_by_process_1("KeyError: 'unit'"), divided():
        deal(parts, [1.0] * 8, unit_fails)
    # An error before, between and after pieces of divided work.
    for when in range(3):
        expected = pytest.raises(KeyboardInterrupt) if rank == 1 else said_by_process_1("KeyboardInterrupt")
        with expected, divided():
            for step in range(3):
                if rank == 1 and step == when:
                    raise KeyboardInterrupt
                if step < 2:
                    deal(parts, [1.0] * 8, one_unit)

    # Solvers that fail in one process: one that divides its work, and one that does not.
    for method, factorization in (("weighted_low_rank", LowRank), ("cp", CP)):
        wanted = tasks(table(100, 24), method=method, ratio=2) * 2
        whole = factorization.decompose

        def fails(*_: object) -> None:
            raise MemoryError("no memory")

        if rank == 1:
            factorization.decompose = fails
        with pytest.raises(MemoryError) if rank == 1 else said_by_process_1("MemoryError: no memory"):
            solve(wanted, together=True)
        factorization.decompose = whole
        assert len(solve(wanted, together=True).factors) == 2


if __name__ == "__main__":
    folder, chosen = Path(sys.argv[1]), {"sample": CASES, "all": {**CASES, **MORE_CASES}}[sys.argv[2]]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, processes = dist.get_rank(), dist.get_world_size()
    small_units()
    torch.save(solve_all(chosen), folder / f"{rank}.pt")
    if processes > 1:
        check_what_is_said(rank, processes)
        check_errors(rank)
