"""Blocks of one basis at scale: `pytest tests/benchmarks/test_shared_basis.py -s --benchmark-only`, `-m full` for all.

Ratios of both sides of one run; the full size needs 5 GB of memory and of disk.
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from made import fill_table, zipf_metric
from measure import THREADS, PeakMemory, Side, in_turns, seconds

from lightning_embcompress import optimize_for_inference
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.methods.registry import SharedBasisBlocks

pytestmark = pytest.mark.timeout(3600)

_WIDTHS = (1, 2, 3, 4, 5, 6, 8)
# What does not grow with the vocabulary weighs more in a small one.
_SIZES = [
    pytest.param(100_000, 12, 0.60, id="100k"),
    pytest.param(793_471, 9, 0.30, id="793k", marks=pytest.mark.full),
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


def _codes_of_3_bits(vocab_size: int, dim: int, window: int = 0) -> SharedBasisBlocks:
    """Random codes in 32 blocks of unequal sizes, with widths like those of a trained table at 3 bits a weight.

    With windows those of up to 5 bits are of a trellis.
    """
    generator = torch.Generator().manual_seed(0)
    ends = torch.randperm(vocab_size - 1, generator=generator)[:31].sort().values + 1
    sizes = torch.cat([ends, torch.tensor([vocab_size])]).diff(prepend=torch.zeros(1, dtype=torch.long))
    # Frequent words have more components of many bits.
    first = [[[8, many], [6, 4], [5, 15], [4, 60], [3, 230]] for many in [dim // 10] + [1] * 31]
    segments = [[*runs, [2, dim - sum(count for _, count in runs)]] for runs in first]
    signed = [[[-bits if window and bits <= 5 else bits, n] for bits, n in runs] for runs in segments]
    coded = SharedBasisBlocks(vocab_size, dim, dim, sizes.tolist(), signed, True, window=window)
    codes = [
        torch.cat([torch.randint(2**bits, (size, n), generator=generator, dtype=torch.uint8) for bits, n in runs], 1)
        for size, runs in zip(sizes.tolist(), segments, strict=True)
    ]
    with torch.no_grad():
        coded.levels.copy_(
            torch.cat(
                [torch.linspace(-3, 3, 2**bits).sinh() / 3 if bits > 0 else torch.ones(1) / 30 for bits in coded.widths]
            )
        )
        basis, means = torch.randn(dim, dim) / dim**0.5, torch.randn(32, dim)
        coded.store(codes, basis, means, 0.1 + torch.rand(sum(coded.ranks)))
        blocks = torch.arange(32).repeat_interleave(sizes)
        coded._index(blocks[torch.randperm(vocab_size, generator=generator)])
    return coded


@pytest.mark.parametrize("thread_count", THREADS)
@pytest.mark.parametrize(("vocab_size", "dim"), [(49_152, 576), pytest.param(262_144, 640, marks=pytest.mark.full)])
@torch.no_grad()
def test_serving_codes_of_3_bits(benchmark, vocab_size: int, dim: int, thread_count: int) -> None:
    kept, table = _codes_of_3_bits(vocab_size, dim), fill_table(torch.empty(vocab_size, dim))
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
        if number == 1:
            assert found["codes, laid out"].seconds <= found["bfloat16"].seconds
    for number in (1, 512):
        ids = torch.randint(vocab_size, (number,))
        in_turns({f"rows of {number}": Side(lambda i=ids: laid_out.rows(i))}, 9, thread_count)
    benchmark.pedantic(lambda: laid_out.logits(hidden), rounds=1)
    assert resident <= 9
    assert ratios[1] >= 2
    assert ratios[64] >= 0.9


@pytest.mark.parametrize("thread_count", THREADS)
@torch.no_grad()
def test_serving_codes_of_a_trellis(benchmark, thread_count: int) -> None:
    fixed, trellis = _codes_of_3_bits(49_152, 576), _codes_of_3_bits(49_152, 576, window=12)
    assert fixed.lay_out()
    assert trellis.lay_out()
    for number, most in ((1, 1.05), (64, 1.05)):
        hidden = torch.randn(number, 576)
        sides = {
            f"logits of {number}, fixed widths": Side(lambda h=hidden: fixed.logits(h)),
            "trellis": Side(lambda h=hidden: trellis.logits(h)),
        }
        assert in_turns(sides, 9, thread_count)["trellis"].ratio >= 1 / most
    for number in (1, 512):
        ids = torch.randint(49_152, (number,))
        sides = {
            f"rows of {number}, fixed widths": Side(lambda i=ids: fixed.rows(i)),
            "trellis": Side(lambda i=ids: trellis.rows(i)),
        }
        assert in_turns(sides, 9, thread_count)["trellis"].ratio >= 1 / 1.5
    benchmark.pedantic(lambda: trellis.logits(hidden), rounds=1)


@pytest.mark.parametrize("thread_count", THREADS)
@torch.no_grad()
def test_generating_from_codes_of_3_bits(benchmark, thread_count: int) -> None:
    transformers = pytest.importorskip("transformers")
    # SmolLM2-135M's shape.
    config = transformers.LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    dense = transformers.LlamaForCausalLM(config).eval()
    small, ids = copy.deepcopy(dense), torch.randint(49_152, (1, 32))
    coded = _codes_of_3_bits(49_152, 576)
    small.set_input_embeddings(CompressedEmbedding(coded))
    small.lm_head = CompressedLinear(coded)

    def generate(model: Any) -> Any:
        return model.generate(ids, max_new_tokens=64, do_sample=False)

    def ratio(name: str) -> float:
        sides = {"64 tokens, dense": Side(lambda: generate(dense)), name: Side(lambda: generate(small))}
        return in_turns(sides, 2, thread_count)[name].ratio

    ratios = [ratio("codes")]
    assert optimize_for_inference(small) == 1
    ratios.append(ratio("codes, laid out"))
    benchmark.pedantic(lambda: generate(small), rounds=1)
    assert min(ratios) >= 1
