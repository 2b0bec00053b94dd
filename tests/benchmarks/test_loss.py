"""The loss of a softmax, forward and backward: `pytest tests/benchmarks/test_loss.py -s --benchmark-only`.

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

pytestmark = pytest.mark.timeout(3600)

THREADS = [count for count in (1, 2) if count <= (os.cpu_count() or 1)]
FUSED = "fused_cross_entropy"


@pytest.mark.parametrize("threads", THREADS)
def test_one_billion_word(benchmark, threads: int) -> None:
    bench = SpeedBench(793_471, 1024, what=("loss",), threads=(threads,), rounds=3, peers=False)
    rows = benchmark.pedantic(lambda: speed_rows(bench, 6.6, lambda name: name.endswith(FUSED)), rounds=1)
    compressed, dense = (rows["loss", f"{name}, {FUSED}", threads] for name in ("compressed", "dense"))
    benchmark.extra_info.update(compressed=compressed, dense=dense)
    sys.stdout.write(
        f"\nloss of 1,024 tokens, {threads} threads: {compressed['ratio']:.2f} times faster than dense with the same "
        f"tiles, {compressed['peak_bytes'] / 1e6:.0f} MB beyond parameters and gradients; at least "
        f"{compressed['bound_seconds']:.1f} s of {compressed['seconds']:.1f} s, of that "
        f"{compressed['bound']['exponentials']:.1f} s for {compressed['exponentials'] / 1e9:.2f} G exponentials\n"
    )
    assert compressed["ratio"] >= 3.5
    assert compressed["peak_bytes"] < 200e6


@pytest.mark.parametrize("threads", THREADS)
def test_dense_heads_against_torch(benchmark, threads: int) -> None:
    bench = SpeedBench(50_257, 768, what=("loss",), threads=(threads,), rounds=5)
    rows = benchmark.pedantic(lambda: speed_rows(bench, 4), rounds=1)
    found = {name: row for (_, name, _), row in rows.items()}
    benchmark.extra_info.update(found)
    others = [name for name in found if "linear_cross_entropy" in name]
    if not others:
        pytest.skip("this torch has no linear_cross_entropy")
    for name in others:
        other = found[name]
        better = [
            ours
            for ours in ("dense, fused_cross_entropy", "dense, head_softmax_loss")
            if found[ours]["seconds"] < other["seconds"] and found[ours]["peak_bytes"] <= other["peak_bytes"]
        ]
        sys.stdout.write(f"\n{name}, {threads} threads: faster with no more memory: {', '.join(better) or 'none'}\n")
        assert better
