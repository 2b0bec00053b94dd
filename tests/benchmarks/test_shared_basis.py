"""Blocks of one basis at scale: `pytest tests/benchmarks/test_shared_basis.py -s --benchmark-only`, `-m full` for all.

Ratios of both sides of one run; the full size needs 5 GB of memory and of disk.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

import pytest
import torch
from made import fill_table, zipf_metric
from measure import THREADS, PeakMemory, Side, in_turns, seconds

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


@pytest.mark.parametrize("thread_count", THREADS)
@torch.no_grad()
def test_serving_codes_of_3_bits(benchmark, thread_count: int) -> None:
    vocab_size, dim = 49_152, 576
    table = fill_table(torch.empty(vocab_size, dim))
    kept = SharedBasisBlocks.solve(table, vocab_size * dim * 3 // 8, zipf_metric(vocab_size, dim)[0], 32, 1, _WIDTHS)
    laid_out, half = copy.deepcopy(kept), table.bfloat16()
    assert laid_out.lay_out()
    resident = sum(buffer.nbytes for buffer in laid_out.buffers()) * 8 / table.numel()
    _report(f"{vocab_size} x {dim} at 3 bits a weight, laid out {resident:.1f}, {thread_count} threads")
    ratios = {}
    for number in (1, 64):
        hidden = torch.randn(number, dim)
        narrow = hidden.bfloat16()
        sides = {
            f"logits of {number}, float32": Side(lambda h=hidden: h @ table.T),
            "bfloat16": Side(lambda h=narrow: h @ half.T),
            "codes": Side(lambda h=hidden: kept.logits(h)),
            "codes, laid out": Side(lambda h=hidden: laid_out.logits(h)),
        }
        found = in_turns(sides, 9, thread_count)
        ratios[number] = found["codes, laid out"].ratio
    for number in (1, 512):
        ids = torch.randint(vocab_size, (number,))
        in_turns({f"rows of {number}": Side(lambda i=ids: laid_out.rows(i))}, 9, thread_count)
    benchmark.pedantic(lambda: laid_out.logits(hidden), rounds=1)
    assert resident <= 9
    assert ratios[1] >= 2
    assert ratios[64] >= 0.9
