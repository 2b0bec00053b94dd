"""Tensor-train matrices against TensorLy's, and from scratch."""

from __future__ import annotations

import math

import pytest
import tensorly
import torch
from tensorly.decomposition import tensor_train_matrix
from tensorly.tt_matrix import tt_matrix_to_matrix
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_embcompress.methods.registry import TensorTrainMatrix, TensorTrainMatrixConfig
from lightning_embcompress.methods.tensor_train_matrix.solver import aligned_cores, matrix_ranks, tt_matrix


def _table(vocab_size: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(vocab_size, dim, generator=generator, dtype=torch.float64)


def _matrix(cores: list[Tensor]) -> Tensor:
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return tt_matrix_to_matrix(cores)


@pytest.mark.parametrize("max_rank", [1, 7, 100])
@pytest.mark.parametrize(
    ("vocab_shape", "dim_shape"),
    [((3, 4, 5), (2, 2, 3)), ((7, 9), (4, 3)), ((60,), (12,)), ((2, 2, 4, 4), (1, 2, 3, 2))],
)
def test_decomposition_is_tensorlys(vocab_shape: tuple[int, ...], dim_shape: tuple[int, ...], max_rank: int) -> None:
    table = _table(math.prod(vocab_shape), math.prod(dim_shape))
    folded = table.reshape(*vocab_shape, *dim_shape)
    ranks = matrix_ranks(vocab_shape, dim_shape, max_rank)
    cores = tt_matrix(folded, ranks)
    assert [tuple(core.shape) for core in cores] == list(zip(ranks, vocab_shape, dim_shape, ranks[1:], strict=False))
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        theirs = tensor_train_matrix(folded, list(ranks)).to_matrix().reshape(table.shape)
    ours = _matrix(cores)
    # Another basis of an eigenspace gives another approximation, never a worse one: the errors are compared too.
    assert float((table - ours).norm()) == pytest.approx(float((table - theirs).norm()), rel=1e-6, abs=1e-9)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_cores_are_turned_towards_others_and_stay_the_same_table() -> None:
    folded = _table(60, 12).reshape(3, 4, 5, 2, 2, 3)
    cores = tt_matrix(folded, [1, 4, 4, 1])
    # The same train with other bases of its bonds.
    turns = [torch.linalg.qr(_table(4, 4)).Q, torch.linalg.qr(_table(4, 4).T).Q]
    others = [cores[0] @ turns[0], torch.einsum("qr,rijs->qijs", turns[0].T, cores[1]) @ turns[1]]
    others.append(torch.einsum("qr,rijs->qijs", turns[1].T, cores[2]))
    for one, other in zip(aligned_cores(cores, others), others, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(_matrix(aligned_cores(cores, others)), _matrix(cores))


def test_cost_of_a_lookup_follows_the_distinct_ids() -> None:
    factors = TensorTrainMatrix(1000, 8, [10, 10, 10], [2, 2, 2], [1, 6, 6, 1])
    factors.initialize(1.0)
    multiplied = []
    for ids in (torch.arange(0, 1000, 250).repeat(500), torch.arange(400).repeat(5)):
        with FlopCounterMode(display=False) as counter:
            factors.rows(ids)
        multiplied.append(counter.get_total_flops())
    assert multiplied[0] < multiplied[1] / 10


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("max_rank", [4, 16])
def test_random_cores_give_the_table_the_variance_it_had(std: float, max_rank: int) -> None:
    table = (std * _table(4000, 64)).float()
    torch.manual_seed(0)
    config = TensorTrainMatrixConfig(max_rank=max_rank, init="random")
    factors = TensorTrainMatrix.decompose(table, table.nbytes, config=config)
    assert float(factors.materialize().std()) == pytest.approx(std, rel=0.25)
    assert all(abs(float(core.mean())) < 0.2 * float(core.std()) + 1e-6 for core in factors.cores)
