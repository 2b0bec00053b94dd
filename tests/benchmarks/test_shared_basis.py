"""Blocks of one basis at scale: `pytest tests/benchmarks/test_shared_basis.py -s --benchmark-only`, `-m full` for all.

Ratios of both sides of one run; the full size needs 5 GB of memory and of disk.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from made import fill_table, zipf_metric
from measure import PeakMemory, Side, in_turns, seconds

from lightning_embcompress.methods.registry import SharedBasisBlocks

pytestmark = pytest.mark.timeout(3600)

_WIDTHS = (1, 2, 3, 4, 5, 6, 8)
# What does not grow with the vocabulary weighs more in a small one.
_SIZES = [
    pytest.param(100_000, 10, 0.40, id="100k"),
    pytest.param(793_471, 6, 0.30, id="793k", marks=pytest.mark.full),
]


def _report(text: str) -> None:
    sys.stdout.write(f"\n{text} (one thread)\n")


@pytest.mark.parametrize("mapped", [False, True], ids=["in memory", "mapped file"])
@pytest.mark.parametrize(("vocab_size", "most", "share_of_memory"), _SIZES)
def test_20_groups_and_5_refinements_cost_a_few_gram_products(
    benchmark, vocab_size: int, most: float, share_of_memory: float, mapped: bool, tmp_path: Path
) -> None:
    dim = 1024
    if mapped:
        # Written through a mapping of its own, which is given back.
        fill_table(torch.from_file(str(tmp_path / "table"), True, vocab_size * dim).view(vocab_size, dim))
        table = torch.from_file(str(tmp_path / "table"), False, vocab_size * dim).view(vocab_size, dim)
    else:
        table = fill_table(torch.empty(vocab_size, dim))
    metric, _ = zipf_metric(vocab_size, dim)
    gram = seconds(lambda: table.T @ table, rounds=1)

    def solve() -> SharedBasisBlocks:
        return SharedBasisBlocks.solve(table, int(table.nbytes / 6.6), metric, 20, 5, ())

    with PeakMemory(mapped=False) as memory:
        start = time.perf_counter()
        found = benchmark.pedantic(solve, rounds=1)
        taken = time.perf_counter() - start
    ratio, share, beside = taken / gram, memory.bytes / table.nbytes, memory.bytes - found.stored_bytes()
    benchmark.extra_info.update(gram_seconds=gram, gram_products=ratio, peak_memory_share=share, beside=beside)
    _report(
        f"{vocab_size} x {dim}, 20 groups, 5 refinements: {taken:.1f} s = {ratio:.1f} Gram products of {gram:.2f} s; "
        f"peak memory {share:.1%} of the table, {beside / 1e9:.2f} GB beside the result"
    )
    assert found.stored_bytes() <= table.nbytes / 6.6
    assert ratio <= most
    assert share < share_of_memory
    assert beside < 2e9


def test_codes_of_the_best_groups_take_seconds(benchmark) -> None:
    table, metric = fill_table(torch.empty(33_278, 256)), zipf_metric(33_278, 256)[0]

    def solve() -> SharedBasisBlocks:
        return SharedBasisBlocks.solve(table, table.nbytes // 20, metric, None, 5, _WIDTHS)

    start = time.perf_counter()
    benchmark.pedantic(solve, rounds=1)
    taken = time.perf_counter() - start
    _report(f"codes of 33278 x 256 at 20x, the best of 1 to 32 groups, 5 refinements: {taken:.1f} s")
    assert taken < 10


@torch.no_grad()
def test_logits_of_one_state_from_codes(benchmark) -> None:
    vocab_size, dim = 50_257, 768
    table = fill_table(torch.empty(vocab_size, dim))
    found = SharedBasisBlocks.solve(table, table.nbytes // 16, zipf_metric(vocab_size, dim)[0], None, 1, _WIDTHS)
    hidden = torch.randn(1, dim)
    sides = {"dense": Side(lambda: hidden @ table.T), "codes": Side(lambda: found.logits(hidden))}
    print(f"\nlogits of one state, {vocab_size} x {dim} in codes at 16x", end="")
    timing = benchmark.pedantic(lambda: in_turns(sides, 5), rounds=1)["codes"]
    assert timing.ratio > 1 / 20
