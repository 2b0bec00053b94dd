"""A training step of one large embedding: `pytest tests/benchmarks/test_sparse_gradients.py -s --benchmark-only`.

Lookup, backward pass and step of the optimizer for 2,048 ids of 793,471, as ratios of interleaved rounds in one
process. With dense gradients the step of Adam goes through all rows, with sparse ones that of SparseAdam through those
of the batch.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, SparseAdam

from lightning_embcompress.layers.compressed import CompressedEmbedding
from lightning_embcompress.methods.group_reduce.factorization import BlockLowRank

pytestmark = pytest.mark.timeout(600)

VOCAB_SIZE, DIM, IDS, ROUNDS = 793_471, 64, 2_048, 7
RANKS = (64, 40, 28, 20, 16, 12, 10, 8, 7, 6, 5, 4, 4, 3, 3, 2, 2, 2, 1, 1)


def _compressed(sparse: bool, vocab_size: int = VOCAB_SIZE) -> CompressedEmbedding:
    """Frequency groups of equal size in the order of ids, with ranks that fall: about 5x smaller."""
    sizes = [len(part) for part in torch.arange(vocab_size).tensor_split(len(RANKS))]
    factors = BlockLowRank(vocab_size, DIM, sizes, RANKS)
    for parameter in factors.parameters():
        nn.init.normal_(parameter, std=0.1)
    return CompressedEmbedding(factors, sparse=sparse)


class _Step:
    """A step on ids of falling frequency, others each time."""

    def __init__(self, layer: CompressedEmbedding | nn.Embedding, make: Callable[..., Optimizer]) -> None:
        self.layer = layer
        self.optimizer = make(list(layer.parameters()), lr=1e-3)
        self.generator = torch.Generator().manual_seed(0)

    def _ids(self) -> Tensor:
        return (self.layer.num_embeddings ** torch.rand(IDS, generator=self.generator)).long() - 1

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.layer(self._ids()).square().sum().backward()
        self.optimizer.step()

    def seconds(self) -> float:
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


def test_step_costs_what_the_batch_touches(benchmark) -> None:
    steps = {
        "compressed, Adam": _Step(_compressed(sparse=False), Adam),
        "compressed, SparseAdam": _Step(_compressed(sparse=True), SparseAdam),
        "compressed, SparseAdam, a tenth of the words": _Step(_compressed(True, VOCAB_SIZE // 10), SparseAdam),
        "nn.Embedding, Adam": _Step(nn.Embedding(VOCAB_SIZE, DIM), Adam),
        "nn.Embedding, SparseAdam": _Step(nn.Embedding(VOCAB_SIZE, DIM, sparse=True), SparseAdam),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    # Optimizers make their state in the first step.
    for step in steps.values():
        step()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(step.seconds())
    own = times["compressed, SparseAdam"]
    benchmark.pedantic(steps["compressed, SparseAdam"], rounds=3)
    for name, of_step in times.items():
        ratio = statistics.median(other / mine for other, mine in zip(of_step, own, strict=True))
        benchmark.extra_info[name] = ratio
        sys.stdout.write(f"\n{name}: {1e3 * statistics.median(of_step):.1f} ms a step, {ratio:.1f} of the sparse one")
    sys.stdout.write(" (one thread)\n")
    assert benchmark.extra_info["compressed, Adam"] > 5
    assert benchmark.extra_info["nn.Embedding, Adam"] > 20
    # A tenth of the words, and of the numbers of a dense step, but hardly less work.
    assert benchmark.extra_info["compressed, SparseAdam, a tenth of the words"] > 0.4
