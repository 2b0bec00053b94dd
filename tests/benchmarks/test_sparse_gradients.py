"""A training step of one large embedding: `pytest tests/benchmarks/test_sparse_gradients.py -s --benchmark-only`.

Lookup, backward pass and step of the optimizer for 2,048 ids of 793,471, as ratios of interleaved rounds in one
process. With dense gradients the step of Adam goes through all rows, with sparse ones that of SparseAdam through those
of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from measure import Side, in_turns
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


def test_step_costs_what_the_batch_touches(benchmark) -> None:
    steps = {
        "compressed, Adam": _Step(_compressed(sparse=False), Adam),
        "compressed, SparseAdam": _Step(_compressed(sparse=True), SparseAdam),
        "compressed, SparseAdam, a tenth of the words": _Step(_compressed(True, VOCAB_SIZE // 10), SparseAdam),
        "nn.Embedding, Adam": _Step(nn.Embedding(VOCAB_SIZE, DIM), Adam),
        "nn.Embedding, SparseAdam": _Step(nn.Embedding(VOCAB_SIZE, DIM, sparse=True), SparseAdam),
    }
    # Optimizers make their state in the first step.
    found = benchmark.pedantic(lambda: in_turns({name: Side(step) for name, step in steps.items()}, ROUNDS), rounds=1)
    own = found["compressed, SparseAdam"].seconds
    assert found["compressed, Adam"].seconds > 5 * own
    assert found["nn.Embedding, Adam"].seconds > 20 * own
    # A tenth of the words, and of the numbers of a dense step, but hardly less work.
    assert found["compressed, SparseAdam, a tenth of the words"].seconds > 0.4 * own
