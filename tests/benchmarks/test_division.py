"""GroupReduce divided over processes, on idle cores: `pytest tests/benchmarks/test_division.py -s --benchmark-only`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1800)

VOCAB_SIZE, DIM, ROUNDS = 200_000, 1024, 2
WORKER = Path(__file__).with_name("division.py")


def test_two_processes_are_half_as_fast_again_as_one(benchmark, torchrun: Callable[..., str], tmp_path: Path) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two processes need two cores")
    file = tmp_path / "times.json"
    benchmark.pedantic(lambda: torchrun(WORKER, VOCAB_SIZE, DIM, ROUNDS, file, timeout=1500), rounds=1)
    file.with_suffix(".table").unlink()
    measured = json.loads(file.read_text())
    one, both = min(measured["one"]), min(measured["all"])
    benchmark.extra_info.update(measured, speedup=one / both)
    rounds = ", ".join(f"{slow / fast:.2f}" for slow, fast in zip(measured["one"], measured["all"], strict=True))
    sys.stdout.write(
        f"\nGroupReduce of {VOCAB_SIZE} x {DIM} at 6.6x, one thread each: one process {one:.1f} s, two processes "
        f"{both:.1f} s, {one / both:.2f} times faster (rounds {rounds}; computing {min(measured['one_busy']):.1f} "
        f"and {min(measured['all_busy']):.1f} s); peak memory beyond the table, "
        f"{max(measured['memory']):.1%} of it with the factors\n"
    )
    assert one / both >= 1.5
    assert max(measured["memory"]) < 0.40
