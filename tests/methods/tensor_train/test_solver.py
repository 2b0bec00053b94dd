"""Batched TT-SVD against TensorLy's, token by token, and the published sizes."""

from __future__ import annotations

import math

import pytest
import tensorly as tl
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train as tensorly_tensor_train
from tensorly.tt_tensor import tt_to_tensor
from torch import Tensor

from lightning_embcompress.methods.tensor_train.factorization import TensorTrain, TensorTrainConfig
from lightning_embcompress.methods.tensor_train.solver import (
    core_sizes,
    tensor_train,
    train_logits,
    train_ranks,
    train_rows,
)
from toys import normal

# Of what is compared, relative to the norm of a row.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
_TWOS = [2] * 10


def _of_tensorly(vectors: Tensor, shape: list[int], ranks: list[int]) -> Tensor:
    """Every row by itself: folded, decomposed and multiplied out by TensorLy."""
    count, length = vectors.shape
    rows = []
    with tl.backend_context("pytorch", local_threadsafe=True):
        for vector in vectors:
            # A last mode of size 1: TensorLy takes no train of a single core.
            folded = torch.nn.functional.pad(vector, (0, math.prod(shape) - length)).reshape([*shape, 1])
            rows.append(tt_to_tensor(tensorly_tensor_train(folded, [*ranks, 1])).flatten()[:length])
    return torch.stack(rows) if count else vectors


def _check_errors(vectors: Tensor, shape: list[int], max_rank: int) -> None:
    ranks = train_ranks(shape, max_rank)
    cores = tensor_train(vectors, shape, ranks)
    assert cores.dtype == vectors.dtype
    assert cores.shape == (len(vectors), sum(core_sizes(shape, ranks)))
    rows = train_rows(cores, shape, ranks, vectors.shape[1])
    expected = _of_tensorly(vectors, shape, ranks)
    norms = vectors.norm(dim=1)
    found, oracle = (vectors - rows).norm(dim=1), (vectors - expected).norm(dim=1)
    assert torch.all((found - oracle).abs() <= _TOLERANCE[vectors.dtype] * norms)


@st.composite
def _problems(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Any shape, with modes of size 1; any length that it holds; any rank; a seed."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    length = draw(st.integers(1, math.prod(shape)))
    return shape, length, draw(st.integers(1, 12)), draw(st.integers(0, 99))


@given(_problems(), st.sampled_from(list(_TOLERANCE)))
@example((_TWOS, 768, 1, 0), torch.float64)
@example((_TWOS, 768, 4, 0), torch.float32)
@example(([8, 8, 12], 768, 7, 0), torch.float32)
@settings(deadline=None, max_examples=60)
def test_errors_of_any_shape_are_those_of_tensorly(
    problem: tuple[list[int], int, int, int], dtype: torch.dtype
) -> None:
    shape, length, max_rank, seed = problem
    _check_errors(normal(3, length, seed=seed, dtype=dtype), shape, max_rank)


@given(_problems(), st.sampled_from(list(_TOLERANCE)))
@settings(deadline=None, max_examples=60)
def test_rows_and_logits_are_those_of_the_cores(problem: tuple[list[int], int, int, int], dtype: torch.dtype) -> None:
    shape, length, max_rank, seed = problem
    ranks = train_ranks(shape, max_rank)
    sizes = core_sizes(shape, ranks)
    cores = normal(4, sum(sizes), seed=seed, dtype=dtype)
    rows = train_rows(cores, shape, ranks, length)
    with tl.backend_context("pytorch", local_threadsafe=True):
        for row, entries in zip(rows, cores, strict=True):
            own: list[Tensor] = [
                piece.reshape(left, size, right)
                for piece, left, size, right in zip(torch.split(entries, sizes), ranks, shape, ranks[1:], strict=False)
            ]
            expected = tt_to_tensor(own).flatten()[:length]
            # A row may be far smaller than the products that it is a sum of.
            scale = math.prod(float(piece.norm()) for piece in own)
            assert (row - expected).norm() <= _TOLERANCE[dtype] * scale
    hidden = normal(3, length, seed=seed + 1, dtype=dtype)
    logits = train_logits(cores, hidden, shape, ranks)
    assert logits.shape == (3, 4)
    scale = float(hidden.norm()) * float(cores.norm()) ** len(shape)
    assert (logits - hidden @ rows.T).norm() <= _TOLERANCE[dtype] * scale


@pytest.mark.parametrize(
    ("max_rank", "floats", "ratio"),
    [(1, 20, 38.4), (2, 72, None), (3, 140, None), (4, 232, 3.31), (5, 320, None), (6, 424, None), (8, 680, None)],
)
def test_published_sizes(max_rank: int, floats: int, ratio: float | None) -> None:
    """Table 1 of arXiv 2307.00526: GPT-2's 768 columns, padded to 1,024 = 2¹⁰."""
    assert sum(core_sizes(_TWOS, train_ranks(_TWOS, max_rank))) == floats
    config = TensorTrainConfig(max_rank=max_rank)
    smallest = TensorTrain.smallest_bytes(3, 768, 4, config)
    factors = TensorTrain.decompose(normal(3, 768, dtype=torch.float32), smallest, config=config)
    assert factors.shape == _TWOS
    assert factors.cores.shape == (3, floats)
    assert factors.stored_bytes() == smallest
    if ratio is not None:
        assert round(768 / floats, 2) == ratio


def test_refining_keeps_the_signs_of_every_core() -> None:
    table = normal(30, 64, dtype=torch.float32)
    config = TensorTrainConfig(max_rank=3)
    budget = TensorTrain.smallest_bytes(30, 64, 4, config)
    factors = TensorTrain.decompose(table, budget, config=config)
    solved = factors.cores.detach().clone()
    # Signs of singular vectors of every token by itself, taken back by the next core.
    sizes = core_sizes(factors.shape, factors.ranks)
    signs = normal(30, sum(factors.ranks), seed=1, dtype=torch.float32).sign()
    flipped, start = [], 0
    before = torch.ones(30, 1)
    for mode, piece in enumerate(torch.split(solved, sizes, dim=1)):
        left, right = factors.ranks[mode : mode + 2]
        last = mode == len(sizes) - 1
        after = torch.ones(30, right) if last else signs[:, start : start + right]
        core = piece.reshape(30, left, factors.shape[mode], right)
        flipped.append((before[:, :, None, None] * core * after[:, None, None, :]).flatten(1))
        before, start = after, start + right
    dense = factors.materialize()
    factors.cores.data.copy_(torch.cat(flipped, dim=1))
    torch.testing.assert_close(factors.materialize(), dense, rtol=0, atol=1e-5)
    expected = factors.cores.detach().clone()
    assert (expected - solved).norm() > 0.5 * solved.norm()
    assert factors.refined(table, budget, config=config) is factors
    torch.testing.assert_close(factors.cores.detach(), expected, rtol=0, atol=1e-3)
