"""Tensor trains at the size of GPT-2: `pytest tests/benchmarks/test_tensor_train.py -s --benchmark-only`."""

from __future__ import annotations

import sys
import time

import pytest
import tensorly
import torch
from measure import PeakMemory, seconds
from tensorly.decomposition import tensor_train
from torch import Tensor
from torch.nn import functional as F

from lightning_embcompress.methods.registry import (
    TensorTrain,
    TensorTrainConfig,
    TensorTrainMatrix,
    TensorTrainMatrixConfig,
)

pytestmark = pytest.mark.timeout(1800)

VOCAB_SIZE, DIM = 50_257, 768


@pytest.fixture(scope="module")
def table() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(VOCAB_SIZE, DIM, generator=generator) * torch.logspace(0, -1, DIM)


@pytest.fixture(scope="module")
def trains(table: Tensor) -> TensorTrain:
    return TensorTrain.decompose(table, table.nbytes, config=TensorTrainConfig(max_rank=4))


@pytest.fixture(scope="module")
def matrix() -> TensorTrainMatrix:
    shapes = TensorTrainMatrixConfig(max_rank=128).shapes_for(VOCAB_SIZE, DIM)
    factors = TensorTrainMatrix(VOCAB_SIZE, DIM, *shapes, [1, 128, 128, 1])
    factors.initialize(0.02)
    return factors


def test_tensor_gpt_is_15_times_faster_than_a_loop_over_tokens(benchmark, table: Tensor) -> None:
    config = TensorTrainConfig(max_rank=4)

    def ours() -> TensorTrain:
        return TensorTrain.decompose(table, table.nbytes, config=config)

    with PeakMemory() as memory:
        factors = ours()
    taken = seconds(ours, 2)
    padded = F.pad(table, (0, 1024 - DIM)).reshape(VOCAB_SIZE, *[2] * 10)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        start = time.perf_counter()
        looped = [tensor_train(token, [1, *factors.ranks[1:-1], 1]) for token in padded]
        loop = time.perf_counter() - start
        sample = range(0, VOCAB_SIZE, 500)
        theirs = torch.stack([tensorly.tt_to_tensor(looped[token]).reshape(-1)[:DIM] for token in sample])
    benchmark.pedantic(ours, rounds=1)
    chosen = torch.tensor(list(sample))
    errors = [(rows - table[chosen]).norm() / table[chosen].norm() for rows in (factors.rows(chosen), theirs)]
    benchmark.extra_info.update(seconds=taken, loop_seconds=loop, memory_share=memory.bytes / table.nbytes)
    sys.stdout.write(
        f"\nTensorGPT of {VOCAB_SIZE} x {DIM}, 2^10, rank 4: {taken:.2f} s; tensorly token by token {loop:.1f} s, "
        f"{loop / taken:.1f} times as long; errors {errors[0]:.6f} and {errors[1]:.6f}; peak memory beyond the table "
        f"{memory.bytes / table.nbytes:.2f} of it ({torch.get_num_threads()} thread)\n"
    )
    assert loop / taken >= 15
    assert memory.bytes < 3 * table.nbytes
    assert abs(errors[0] - errors[1]) < 1e-5


def test_tt_matrix_lookup_is_20_times_faster_than_tensorly_torch(benchmark, matrix: TensorTrainMatrix) -> None:
    tltorch = pytest.importorskip("tltorch", reason="the other side is tensorly-torch: pip install tensorly-torch")
    padded = 1
    for size in matrix.vocab_shape:
        padded *= size
    theirs = tltorch.FactorizedEmbedding(
        padded,
        DIM,
        auto_tensorize=False,
        tensorized_num_embeddings=tuple(matrix.vocab_shape),
        tensorized_embedding_dim=tuple(matrix.dim_shape),
        factorization="blocktt",
        rank=tuple(matrix.ranks),
    )
    with torch.no_grad():
        for own, other in zip(matrix.cores, theirs.weight.factors, strict=True):
            other.copy_(own)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(VOCAB_SIZE, generator=generator)[:2048]
    with torch.no_grad():
        torch.testing.assert_close(matrix.rows(ids), theirs(ids), rtol=1e-3, atol=1e-5)
        others = seconds(lambda: theirs(ids), 3)
        ours = seconds(lambda: matrix.rows(ids), 20)
        times = {
            count: seconds(lambda count=count: matrix.rows(ids[torch.arange(2048) % count])) for count in (16, 256)
        }
    benchmark.pedantic(lambda: matrix.rows(ids), rounds=5)
    shared = ", ".join(f"{count} are distinct {taken * 1e3:.1f} ms" for count, taken in times.items())
    both = [seconds(lambda layer=layer: layer(ids).sum().backward(), 2) for layer in (matrix.rows, theirs)]
    sys.stdout.write(
        f"\nTT-matrix lookup of 2048 distinct ids of {VOCAB_SIZE} x {DIM}, {VOCAB_SIZE * DIM / _entries(matrix):.1f}x, "
        f"rank 128: {ours * 1e3:.1f} ms, tensorly-torch {others * 1e3:.0f} ms, {others / ours:.1f} times as long; "
        f"2048 ids of which {shared}; forward and backward {both[0] * 1e3:.0f} ms, tensorly-torch {both[1] * 1e3:.0f} "
        f"ms ({torch.get_num_threads()} thread)\n"
    )
    assert others / ours >= 20
    assert times[16] < times[256] < ours


def _entries(factors: TensorTrainMatrix) -> int:
    return sum(core.numel() for core in factors.cores)


def test_tt_matrix_never_builds_the_table(benchmark, matrix: TensorTrainMatrix) -> None:
    table_bytes = VOCAB_SIZE * DIM * 4
    shares = {}
    for states in (1, 64):
        hidden = torch.randn(states, DIM)
        with torch.no_grad(), PeakMemory() as memory:
            matrix.logits(hidden)
        shares[states] = (memory.bytes - states * VOCAB_SIZE * 4) / table_bytes
    ids = torch.arange(2048)
    with torch.no_grad(), PeakMemory() as memory:
        benchmark.pedantic(lambda: matrix.rows(ids), rounds=1)
    sys.stdout.write(
        f"\nTT-matrix of {VOCAB_SIZE} x {DIM}, rank 128, peak memory beyond the logits as a share of the table: "
        f"{', '.join(f'{share:.1%} for {states} states' for states, share in shares.items())}; lookup of 2048 ids "
        f"{memory.bytes / table_bytes:.1%}\n"
    )
    assert max(shares.values()) < 0.5


@torch.no_grad()
def test_cost_of_logits_beside_the_dense_head(
    benchmark, table: Tensor, trains: TensorTrain, matrix: TensorTrainMatrix
) -> None:
    lines = []
    for states in (1, 64, 512):
        hidden = torch.randn(states, DIM)
        dense = seconds(lambda hidden=hidden: hidden @ table.T)
        costs = [seconds(lambda hidden=hidden, factors=factors: factors.logits(hidden)) for factors in (trains, matrix)]
        lines.append(
            f"{states} states: dense {dense * 1e3:.1f} ms, TensorGPT rank 4 {costs[0] / dense:.1f} times that, "
            f"TT-matrix rank 128 {costs[1] / dense:.1f} times"
        )
    benchmark.pedantic(lambda: trains.logits(torch.randn(1, DIM)), rounds=3)
    sys.stdout.write(f"\nlogits of {VOCAB_SIZE} x {DIM} ({torch.get_num_threads()} thread)\n" + "\n".join(lines) + "\n")
