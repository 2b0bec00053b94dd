"""Row weights, weighted second moments and their eigenvectors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import (
    PackedSymmetric,
    add_gram,
    compute_dtype,
    gram_matrix,
    row_chunks,
    row_units,
    row_weights,
    run_of,
    top_eigenvectors,
    warm_eigenvectors,
)
from toys import normal


def _symmetric(values: Tensor, seed: int = 0) -> Tensor:
    vectors = torch.linalg.qr(normal(values.numel(), values.numel(), seed=seed)).Q
    return (vectors * values) @ vectors.T


def test_weights_are_proportional_to_counts_with_mean_one() -> None:
    weights = row_weights(torch.tensor([6, 1, 2]), 3)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, torch.tensor([2, 1 / 3, 2 / 3], dtype=torch.float64))


def test_weights_of_rows_that_never_occur() -> None:
    weights = row_weights(torch.tensor([0.0, 8.0, 2.0]), 3)
    assert float(weights[0] / weights[2]) == pytest.approx(1e-6)
    assert torch.equal(row_weights(torch.zeros(4), 4), torch.ones(4).double())
    assert torch.equal(row_weights(None, 4), torch.ones(4).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gram_matrix_equals_the_dense_product(dtype: torch.dtype) -> None:
    table, weights = normal(70, 9).to(dtype), normal(70, seed=1).exp()
    expected = table.double().T @ torch.diag(weights) @ table.double()
    gram = gram_matrix(table, weights)
    assert gram.dtype == torch.float64
    # The rows are the same rounded numbers on both sides.
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert (gram - gram.T).norm() <= tolerance * expected.norm()
    assert (gram - expected).norm() <= tolerance * expected.norm()
    rows = torch.tensor([3, 50, 51])
    part = table[rows].double().T @ torch.diag(weights[rows]) @ table[rows].double()
    assert (gram_matrix(table, weights, rows) - part).norm() <= tolerance * part.norm()
    assert gram_matrix(table, weights, rows[:0]).abs().max() == 0


def test_rows_are_added_and_taken_away() -> None:
    table, weights, rows = normal(40, 6), normal(40, seed=1).exp(), torch.tensor([3, 30, 31])
    total = gram_matrix(table, weights)
    add_gram(total, table, weights, rows, sign=-1)
    rest = torch.tensor([row for row in range(40) if row not in rows])
    torch.testing.assert_close(total, gram_matrix(table, weights, rest), rtol=0, atol=1e-12)
    add_gram(total, table, weights, rows)
    torch.testing.assert_close(total, gram_matrix(table, weights), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_packed_symmetric_matrices(dim: int) -> None:
    packed = PackedSymmetric(3, dim, torch.float64, torch.device("cpu"))
    matrices = [_symmetric(normal(dim, seed=seed), seed) for seed in range(3)]
    matrices = [(matrix + matrix.T) / 2 for matrix in matrices]
    for index, matrix in enumerate(matrices):
        packed[index] = matrix
    assert len(packed) == 3
    for index, matrix in enumerate(matrices):
        assert torch.equal(packed[index], matrix)
        assert packed.trace(index) == pytest.approx(float(matrix.trace()))


def test_narrow_dtypes_are_solved_in_float32() -> None:
    assert compute_dtype(torch.float64) == torch.float64
    assert {compute_dtype(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)} == {torch.float32}


@pytest.mark.parametrize(("num_rows", "dim"), [(0, 4), (1, 1), (5, 2**22), (2**21 + 1, 1)])
def test_chunks_cover_every_row_once(num_rows: int, dim: int) -> None:
    chunks = list(row_chunks(num_rows, dim))
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks)][: len(chunks)]
    assert (chunks[-1].stop if chunks else 0) == num_rows
    assert all(chunk.stop > chunk.start for chunk in chunks)


@pytest.mark.parametrize("rank", [0, 1, 4, 12])
def test_top_eigenvectors(rank: int) -> None:
    gram = _symmetric(torch.linspace(12, 1, 12, dtype=torch.float64))
    vectors = top_eigenvectors(gram, rank)
    assert vectors.shape == (rank, 12)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(rank).double(), rtol=0, atol=1e-12)
    values = torch.linspace(12, 1, 12, dtype=torch.float64)[:rank]
    torch.testing.assert_close(vectors @ gram, values.unsqueeze(1) * vectors, rtol=0, atol=1e-11)


def _captured(gram: Tensor, basis: Tensor) -> float:
    return float(((basis @ gram) * basis).sum() / gram.trace())


@pytest.mark.parametrize("old_rank", [0, 5, 10, 30])
def test_warm_start_comes_close_to_the_full_decomposition(old_rank: int) -> None:
    gram = _symmetric(torch.logspace(0, -3, 64, dtype=torch.float64))
    before = gram + 0.02 * gram.norm() * _symmetric(normal(64, seed=2).abs() / 64, seed=3)
    warm = warm_eigenvectors(gram, 10, top_eigenvectors(before, old_rank))
    assert warm.shape == (10, 64)
    torch.testing.assert_close(warm @ warm.T, torch.eye(10).double(), rtol=0, atol=1e-10)
    exact = _captured(gram, top_eigenvectors(gram, 10))
    assert exact * (1 - 1e-3 if old_rank >= 10 else 1 - 2e-2) <= _captured(gram, warm) <= exact + 1e-12


def test_warm_start_of_a_matrix_of_lower_rank_than_asked_for() -> None:
    rows = normal(3, 64)
    gram = rows.T @ rows
    warm = warm_eigenvectors(gram, 10, torch.eye(64).double()[:4])
    torch.testing.assert_close(warm @ warm.T, torch.eye(10).double(), rtol=0, atol=1e-10)
    assert _captured(gram, warm) == pytest.approx(1)
    zero = warm_eigenvectors(torch.zeros(64, 64), 10, torch.eye(64)[:4])
    torch.testing.assert_close(zero @ zero.T, torch.eye(10), rtol=0, atol=1e-5)


@given(num_rows=st.integers(0, 10**6), dim=st.integers(1, 5000))
@settings(deadline=None)
def test_row_units_are_the_chunks_in_few_runs(num_rows: int, dim: int) -> None:
    units = row_units(num_rows, dim)
    assert [chunk for chunks in units for chunk in chunks] == list(row_chunks(num_rows, dim))
    assert len(units) <= 64
    runs = [run_of(chunks) for chunks in units]
    assert all(one.stop == other.start for one, other in pairwise(runs))
    assert sum(run.stop - run.start for run in runs) == num_rows
    assert len({len(chunks) for chunks in units[:-1]}) <= 1


@pytest.mark.parametrize("dim", [63, 64, 65, 200, 600])
def test_gram_matrix_in_strips_is_symmetric_and_right(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(300, dim, generator=generator)
    weights = torch.rand(300, generator=generator).double()
    gram = gram_matrix(table, weights)
    torch.testing.assert_close(gram, gram.T, rtol=1e-5, atol=1e-4)
    exact = table.double().T @ (weights.unsqueeze(1) * table.double())
    torch.testing.assert_close(gram, exact, rtol=1e-5, atol=1e-4)
