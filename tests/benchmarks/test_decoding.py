"""A token from a state: `pytest tests/benchmarks/test_decoding.py -s --benchmark-only`.

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
@pytest.mark.parametrize(("vocab_size", "dim", "ratio", "faster"), [(793_471, 1024, 6.6, 5.3), (50_257, 768, 4.0, 3.2)])
def test_a_token(benchmark, vocab_size: int, dim: int, ratio: float, faster: float, threads: int) -> None:
    # Other packages quantize a copy of the table, for which there may be no room beside a large one.
    bench = SpeedBench(
        vocab_size,
        dim,
        what=("logits", "topk", "sample"),
        threads=(threads,),
        rounds=11,
        peers=vocab_size < 100_000,
    )
    rows = benchmark.pedantic(lambda: speed_rows(bench, ratio), rounds=1)
    benchmark.extra_info.update({f"{what}, {name}": row for (what, name, _), row in rows.items()})
    logits = rows["logits", "compressed, laid out for inference", threads]
    # The table itself is read faster too when it is laid out so.
    alike = rows["logits", "dense torch, laid out for inference", threads]
    against = "no room for a copy" if "note" in alike else f"{alike['seconds'] / logits['seconds']:.2f} times"
    best = rows["topk", "compressed", threads]
    sys.stdout.write(
        f"\n{vocab_size:,} x {dim:,} at {ratio}x, {threads} threads: logits {logits['ratio']:.2f} times faster than "
        f"dense ({against} when that is laid out alike), best 10 {best['ratio']:.2f} times\n"
    )
    assert logits["ratio"] >= faster
    assert best["recall"] == 1
