"""The loss of a softmax, forward and backward: `pytest tests/benchmarks/test_loss.py -s --benchmark-only`.

All sides run in turn in one process; ratios are medians over the rounds. The factors are drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from made import drawn_ids, made_factors
from measure import THREADS, Side, in_turns
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.layers.full_softmax import head_softmax_loss
from lightning_embcompress.layers.fused_loss import fused_cross_entropy

pytestmark = pytest.mark.timeout(3600)

TOKENS = 1024


def side(head: nn.Module, loss: Callable[[Tensor], Tensor]) -> Side:
    hidden = torch.randn(TOKENS, head.in_features, requires_grad=True)
    leaves = [hidden, *(parameter for parameter in head.parameters() if parameter.requires_grad)]

    def run() -> None:
        loss(hidden).backward()

    read = 2 * sum(parameter.nbytes for parameter in head.parameters()) + hidden.nbytes
    # Of every logit, forward and backward.
    return Side(run, leaves, bytes=read, exponentials=2 * TOKENS * head.out_features)


def heads_and_targets(vocab_size: int, dim: int, ratio: float) -> tuple[nn.Linear, CompressedLinear, Tensor]:
    targets = drawn_ids(TOKENS, vocab_size, torch.Generator().manual_seed(0))
    factors = made_factors(vocab_size, dim, ratio)
    return nn.Linear(dim, vocab_size, bias=False), CompressedLinear(factors), targets


@pytest.mark.parametrize("threads", THREADS)
def test_one_billion_word(benchmark, threads: int) -> None:
    dense, compressed, targets = heads_and_targets(793_471, 1024, 6.6)
    sides = {
        name: side(head, lambda hidden, head=head: fused_cross_entropy(head, hidden, targets))
        for name, head in {"dense, the same tiles": dense, "compressed": compressed}.items()
    }
    found = benchmark.pedantic(partial(in_turns, sides, 3, threads), rounds=1)["compressed"]
    print(
        f"at least {found.bound_seconds:.1f} s of {found.seconds:.1f} s, of that {found.exponential_seconds:.1f} s for "
        f"{sides['compressed'].exponentials / 1e9:.2f} G exponentials"
    )
    assert found.ratio >= 3.5
    assert found.peak_bytes < 200e6


@pytest.mark.parametrize("threads", THREADS)
def test_dense_heads_against_torch(benchmark, threads: int) -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    dense, compressed, targets = heads_and_targets(50_257, 768, 4)
    options = nn.LinearCrossEntropyOptions() if hasattr(nn, "LinearCrossEntropyOptions") else None
    ours = {
        "fused_cross_entropy": lambda hidden: fused_cross_entropy(dense, hidden, targets),
        "head_softmax_loss": lambda hidden: head_softmax_loss(dense, hidden, targets)[0],
    }
    torchs = {"F.linear_cross_entropy": lambda hidden: F.linear_cross_entropy(hidden, dense.weight, targets)}
    if options is not None:
        torchs["F.linear_cross_entropy in chunks"] = lambda hidden: F.linear_cross_entropy(
            hidden, dense.weight, targets, options=options
        )
    sides = {name: side(dense, loss) for name, loss in (ours | torchs).items()}
    sides["compressed"] = side(compressed, lambda hidden: fused_cross_entropy(compressed, hidden, targets))
    found = benchmark.pedantic(partial(in_turns, sides, 5, threads), rounds=1)
    for name in torchs:
        other = found[name]
        better = [
            own for own in ours if found[own].seconds < other.seconds and found[own].peak_bytes <= other.peak_bytes
        ]
        print(f"{name}, {threads} threads: faster with no more memory: {', '.join(better) or 'none'}")
        assert better
