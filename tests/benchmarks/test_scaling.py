"""Times as the vocabulary grows, all sizes in turn: `pytest tests/benchmarks/test_scaling.py -s --benchmark-only`."""

from __future__ import annotations

import numpy
import pytest
import torch
from made import drawn_ids, made_factors
from measure import Side, in_turns

from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.layers.fused_loss import fused_cross_entropy

pytestmark = pytest.mark.timeout(3600)

# The smallest takes 124 MB, more than a cache holds: one that stays in it would be read too fast to compare with.
DIM, TOKENS, SIZES = 1024, 1024, (200_000, 400_000, 800_000)


@pytest.mark.parametrize("what", ["logits", "loss"])
def test_time_grows_no_faster_than_stored_bytes(benchmark, what: str) -> None:
    heads = {f"{size:,} words": CompressedLinear(made_factors(size, DIM, 6.6)) for size in SIZES}
    hidden = torch.randn(TOKENS, DIM, requires_grad=True)

    def side(head: CompressedLinear) -> Side:
        targets = drawn_ids(TOKENS, head.out_features, torch.Generator().manual_seed(0))
        if what == "loss":
            return Side(lambda: fused_cross_entropy(head, hidden, targets).backward(), [hidden, *head.parameters()])
        state = hidden[:1].detach()
        return Side(torch.no_grad()(lambda: head(state)))

    # On one thread only the time of this process counts.
    found = benchmark.pedantic(lambda: in_turns({n: side(head) for n, head in heads.items()}, 5), rounds=1)
    stored = [head.factorization.stored_bytes() for head in heads.values()]
    exponent = numpy.polyfit(numpy.log(stored), numpy.log([timing.seconds for timing in found.values()]), 1)[0]
    print(f"{what}: time grows as stored bytes to the power of {exponent:.2f}")
    assert exponent < 1.05
