"""Speed of packed factors, both sides in turns: `pytest tests/benchmarks/test_packed.py -s --benchmark-only`.

The comparison of lookups needs torchao.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.methods.registry import LowRank

pytestmark = pytest.mark.timeout(1800)

VOCAB_SIZE, DIM, RANK = 50_304, 768, 192


def _factors(rank: int) -> LowRank:
    torch.manual_seed(0)
    factors = LowRank(VOCAB_SIZE, DIM, rank)
    with torch.no_grad():
        factors.coefficients.normal_(std=0.1)
        factors.basis.normal_(std=0.1)
    return factors


def _packed(rank: int, bits: int) -> Any:
    return _factors(rank).prepared(Quantization(bits)).converted()


def _seconds(run: Callable[[], Any], rounds: int) -> float:
    """Least time of several rounds, after one that warms up; of the processor, which others may share."""
    run()
    taken = []
    for _ in range(rounds):
        start = time.thread_time()
        run()
        taken.append(time.thread_time() - start)
    return min(taken)


def _in_turns(first: Callable[[], Any], second: Callable[[], Any], pairs: int, rounds: int) -> tuple[float, float]:
    """Seconds of both, those of the pair whose ratio is the median."""
    taken = [(_seconds(first, rounds), _seconds(second, rounds)) for _ in range(pairs)]
    return sorted(taken, key=lambda pair: pair[0] / pair[1])[pairs // 2]


@pytest.mark.parametrize(("bits", "least"), [(8, 3), (4, 3), (6, 1)])
@torch.no_grad()
def test_logits_of_one_state(benchmark, bits: int, least: float) -> None:
    floats, packed, hidden = _factors(RANK), _packed(RANK, bits), torch.randn(1, DIM)
    error = float((packed.logits(hidden).double() - hidden.double() @ packed.materialize().double().T).abs().max())
    slow, fast = _in_turns(lambda: floats.logits(hidden), lambda: packed.logits(hidden), 9, 20)
    benchmark.pedantic(lambda: packed.logits(hidden), rounds=5)
    benchmark.extra_info.update(ratio=slow / fast, error=error)
    sys.stdout.write(
        f"\nlogits of one state, {VOCAB_SIZE} x {DIM}, rank {RANK}: float32 factors {slow * 1e3:.2f} ms, {bits} bits "
        f"{fast * 1e3:.2f} ms, {slow / fast:.1f} times as fast, error {error:.0e} (one thread)\n"
    )
    assert error < 1e-4
    assert slow / fast >= least


@pytest.mark.parametrize(("ratio", "least"), [(64, 50), (16, 15)])
@torch.no_grad()
def test_lookup_against_torchao(benchmark, ratio: int, least: float) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    table = nn.Sequential(nn.Embedding(VOCAB_SIZE, DIM))
    config = quantization.IntxWeightOnlyConfig(torch.int4, granularity=quantization.PerGroup(32))
    quantization.quantize_(table, config, filter_fn=lambda module, _: isinstance(module, nn.Embedding))
    dense = VOCAB_SIZE * DIM * 4
    at_100 = _packed(100, 4).stored_bytes()
    # The largest rank that fits: groups make steps of what a rank takes.
    rank = next(
        rank
        for rank in range(int(101 * dense / ratio / at_100), 0, -1)
        if _packed(rank, 4).stored_bytes() <= dense / ratio
    )
    packed, ids = _packed(rank, 4), torch.randint(VOCAB_SIZE, (2048,), generator=torch.Generator().manual_seed(1))
    theirs, ours = _in_turns(lambda: table(ids), lambda: packed.rows(ids), 5, 3)
    benchmark.pedantic(lambda: packed.rows(ids), rounds=5)
    benchmark.extra_info.update(ratio=theirs / ours, rank=rank)
    sys.stdout.write(
        f"\nlookup of 2,048 ids, {VOCAB_SIZE} x {DIM} in int4: torchao {theirs * 1e3:.0f} ms, packed factors at "
        f"{ratio}x (rank {rank}) {ours * 1e3:.2f} ms, {theirs / ours:.0f} times as fast (one thread)\n"
    )
    assert theirs / ours >= least
