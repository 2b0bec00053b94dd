"""GroupReduce at scale: `pytest tests/benchmarks -s --benchmark-only`, ratios of both sides of one run."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from measure import THREADS, PeakMemory, Side, in_turns, seconds, threads
from torch import Tensor, nn

from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.compression.tasks import plan
from lightning_embcompress.methods.registry import GroupReduceConfig

pytestmark = pytest.mark.timeout(1800)

VOCAB_SIZE, DIM = 100_000, 1024


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    with threads():
        yield


@pytest.fixture(scope="module")
def head() -> nn.Linear:
    """A table with a falling spectrum that differs between frequent and rare words, as trained tables have."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(DIM, VOCAB_SIZE, bias=False)
    spectrum = torch.linspace(1.0, 0.03, DIM)
    with torch.no_grad():
        for rows in layer.weight.split(VOCAB_SIZE // 10):
            rows.normal_(generator=generator).mul_(spectrum[torch.randperm(DIM, generator=generator)])
    return layer


@pytest.fixture(scope="module")
def counts() -> Tensor:
    return (1e7 / torch.arange(1, VOCAB_SIZE + 1)).long()


def test_compression_costs_at_most_20_gram_products(benchmark, head: nn.Linear, counts: Tensor) -> None:
    model = nn.Sequential(head)
    config = GroupReduceConfig(groups=20, refine_rounds=5)
    (task,) = plan(model, config, Budget(ratio=6.6), ["0"], token_counts=counts)
    weight = head.weight.detach()
    gram = seconds(lambda: weight.T @ weight)
    with PeakMemory() as memory:
        start = time.perf_counter()
        benchmark.pedantic(lambda: task.record(task.solve()), rounds=1)
        taken = time.perf_counter() - start
    ratio, share = taken / gram, memory.bytes / weight.nbytes
    benchmark.extra_info.update(gram_seconds=gram, gram_products=ratio, peak_memory_share=share)
    sys.stdout.write(
        f"\ncompress {VOCAB_SIZE} x {DIM}, 20 groups, 5 refinements: {taken:.1f} s = {ratio:.1f} Gram products of "
        f"{gram:.2f} s; peak memory beyond the table {share:.1%} of it ({torch.get_num_threads()} threads)\n"
    )
    assert ratio <= 20
    assert share < 0.40


@torch.no_grad()
@pytest.mark.parametrize("count", THREADS)
def test_logits_of_one_state_are_4_times_faster(benchmark, head: nn.Linear, counts: Tensor, count: int) -> None:
    model = nn.Sequential(nn.Linear(DIM, VOCAB_SIZE, bias=False))
    model[0].weight.copy_(head.weight)
    # Shuffled counts: blocks are scattered over the vocabulary, and logits have to be brought back to its order.
    shuffled = counts[torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(1))]
    compress(model, "group_reduce", ratio=6.6, token_counts=shuffled, groups=20, refine_rounds=0)
    hidden = torch.randn(1, DIM)
    sides = {"dense": Side(lambda: head(hidden)), "compressed": Side(lambda: model(hidden))}
    print(f"\nlogits of one state, {VOCAB_SIZE} x {DIM} at 6.6x", end="")
    assert benchmark.pedantic(lambda: in_turns(sides, 15, count), rounds=1)["compressed"].ratio >= 4
