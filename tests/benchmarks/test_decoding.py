"""A token from a state: `pytest tests/benchmarks/test_decoding.py -s --benchmark-only`.

All sides run in turn in one process; ratios are medians over the rounds. The factors are drawn at random.
"""

from __future__ import annotations

import pytest
import torch
from made import made_factors
from measure import THREADS, Side, in_turns
from torch import Tensor

from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.layers.serving import optimize_for_inference

pytestmark = pytest.mark.timeout(1800)


@torch.no_grad()
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("vocab_size", "dim", "ratio", "faster"), [(793_471, 1024, 6.6, 5.3), (50_257, 768, 4.0, 3.2)])
def test_a_token(benchmark, vocab_size: int, dim: int, ratio: float, faster: float, threads: int) -> None:
    table, state = torch.empty(vocab_size, dim).normal_(), torch.randn(1, dim)
    head, served = (CompressedLinear(made_factors(vocab_size, dim, ratio)) for _ in range(2))
    assert optimize_for_inference(served)
    size, dense = head.factorization.stored_bytes(), table.nbytes

    def sampled(logits: Tensor) -> Tensor:
        return torch.multinomial(logits.softmax(dim=-1), 1)

    ways = {
        "logits": {
            "dense": Side(lambda: state @ table.T, bytes=dense),
            "compressed": Side(lambda: head(state), bytes=size),
            "compressed, laid out": Side(lambda: served(state), bytes=size),
        },
        "best 10": {
            "dense": Side(lambda: (state @ table.T).topk(10), bytes=dense),
            "compressed, all logits": Side(lambda: served(state).topk(10), bytes=size),
            "compressed": Side(lambda: served.topk(state, 10), bytes=size),
        },
        "sample": {
            "dense": Side(lambda: sampled(state @ table.T), bytes=dense, exponentials=vocab_size),
            "compressed": Side(lambda: served.sample(state), bytes=size, exponentials=vocab_size),
        },
    }
    if vocab_size < 100_000:
        # The table itself is read faster too when it is laid out so, but a copy of a large one does not fit.
        columns = table.T.contiguous()
        ways["logits"]["dense, laid out"] = Side(lambda: state @ columns, bytes=dense)
    found = {}
    for what, sides in ways.items():
        print(f"\n{what} of one state, {vocab_size:,} x {dim:,} at {ratio}x", end="")
        found[what] = in_turns(sides, rounds=11, thread_count=threads)
    benchmark.pedantic(lambda: served(state), rounds=5)
    assert found["logits"]["compressed, laid out"].ratio >= faster
    assert torch.equal(served.topk(state, 10)[1], served(state).topk(10)[1])
