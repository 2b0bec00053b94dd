"""Rows of ids, with and without gradients: `pytest tests/benchmarks/test_lookup.py -s --benchmark-only`.

All sides run in turn in one process; ratios are medians over the rounds. The factors are drawn at random.
"""

from __future__ import annotations

import pytest
import torch
from made import drawn_ids, made_factors
from measure import THREADS, Side, in_turns
from torch import Tensor, nn

from lightning_embcompress.layers.compressed import CompressedEmbedding

pytestmark = pytest.mark.timeout(1800)

VOCAB_SIZE, DIM, IDS = 50_257, 768, 2048


def forward(layer: nn.Module, ids: Tensor, moved: int) -> Side:
    def run() -> Tensor:
        with torch.no_grad():
            return layer(ids)

    return Side(run, bytes=moved)


def backward(layer: nn.Module, ids: Tensor, moved: int) -> Side:
    gradient = torch.randn(IDS, DIM)
    return Side(lambda: layer(ids).backward(gradient), list(layer.parameters()), bytes=2 * moved)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("draw", ["zipf", "uniform"])
@pytest.mark.parametrize("way", [forward, backward])
def test_rows_take_at_most_3_times_their_products(benchmark, way, draw: str, threads: int) -> None:
    ids = drawn_ids(IDS, VOCAB_SIZE, torch.Generator().manual_seed(0), draw == "zipf")
    factors = made_factors(VOCAB_SIZE, DIM, 4)
    # Distinct rows as they are stored, and all as they come.
    share, rows = len(ids.unique()) / VOCAB_SIZE, IDS * DIM * 4
    table_bytes = {"dense": VOCAB_SIZE * DIM * 4, "compressed": factors.stored_bytes()}
    layers = {"dense": nn.Embedding(VOCAB_SIZE, DIM), "compressed": CompressedEmbedding(factors)}
    sides = {name: way(layers[name], ids, int(size * share) + rows) for name, size in table_bytes.items()}
    print(f"\n{way.__name__} of {IDS} ids, {draw}", end="")
    found = benchmark.pedantic(lambda: in_turns(sides, 21, threads), rounds=1)["compressed"]
    assert found.seconds <= 3 * found.bound_seconds
