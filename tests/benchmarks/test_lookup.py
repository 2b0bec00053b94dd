"""Rows of ids, with and without gradients: `pytest tests/benchmarks/test_lookup.py -s --benchmark-only`.

All sides run in turn in one process; ratios are medians over the rounds. The factors are drawn at random.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lightning_embcompress.bench.speed import SpeedBench

sys.path.insert(0, str(Path(__file__).parent))
from measure import speed_rows  # noqa: E402

pytestmark = pytest.mark.timeout(1800)

THREADS = [count for count in (1, 2) if count <= (os.cpu_count() or 1)]


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("draw", ["zipf", "uniform"])
def test_rows_take_at_most_3_times_their_products(benchmark, draw: str, threads: int) -> None:
    bench = SpeedBench(50_257, 768, what=("lookup", "lookup_backward"), draw=draw, threads=(threads,), rounds=21)
    rows = benchmark.pedantic(lambda: speed_rows(bench, 4), rounds=1)
    benchmark.extra_info.update({f"{what}, {name}": row for (what, name, _), row in rows.items()})
    for what in bench.what:
        row = rows[what, "compressed", threads]
        sys.stdout.write(
            f"\n{what} of 2,048 ids, {draw}, {threads} threads: {row['seconds'] * 1e3:.1f} ms, "
            f"{row['times_bound']:.1f} times what {row['flops'] / 1e9:.2f} G operations take at least\n"
        )
    assert all(rows[what, "compressed", threads]["times_bound"] <= 3 for what in bench.what)
