"""Weighted low rank against a dense float64 SVD and against TensorLy."""

from __future__ import annotations

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.tenalg import svd_interface
from torch import Tensor

from lightning_embcompress.methods.low_rank.solver import low_rank_in_metric, weighted_low_rank
from lightning_embcompress.methods.numerics.gram import project, row_weights
from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies
from toys import loss_metric

# Relative to the norm of the table: rounding of the Gram product and of the factors.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _table(vocab_size: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(vocab_size + dim)
    scales = torch.logspace(0, -1.5, dim, dtype=torch.float64)
    return (torch.randn(vocab_size, dim, generator=generator, dtype=torch.float64) * scales).to(dtype)


def _counts(vocab_size: int) -> Tensor:
    return (1000 / torch.arange(1, vocab_size + 1).double()).round()


@pytest.mark.parametrize("dtype", list(_TOLERANCE))
@pytest.mark.parametrize("rank", [0, 7, 16])
@pytest.mark.parametrize("scale", [None, 1.0, 1e-9])
def test_reaches_the_tail_of_the_singular_values(dtype: torch.dtype, rank: int, scale: float | None) -> None:
    """Eckart-Young: the singular values that are left out are the error of the best approximation, in any metric."""
    table, metric = _table(120, 16, dtype), loss_metric(120, 16)
    if scale is None:
        metric = Metric(torch.eye(16, dtype=torch.float64), metric.weights)
        coefficients, basis = weighted_low_rank(table, rank, metric.weights)
    else:
        metric = Metric(metric.matrix * scale, metric.weights)
        coefficients, basis = low_rank_in_metric(table, rank, metric)
    assert coefficients.dtype == basis.dtype == dtype
    assert coefficients.shape == (120, rank)
    torch.testing.assert_close(basis.double() @ basis.double().T, torch.eye(rank).double(), rtol=0, atol=0.02)
    singular_values = torch.linalg.svdvals(metric.weights.sqrt().unsqueeze(1) * table.double() @ metric.root)
    best = float(singular_values[rank:].square().sum().sqrt())
    lost = (2 * metric.loss(table.double(), coefficients.double() @ basis.double())) ** 0.5
    assert lost == pytest.approx(best, abs=_TOLERANCE[dtype] * float(singular_values.norm()))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(90, 10), (10, 10), (6, 14)])
def test_equals_tensorly(shape: tuple[int, int], weighted: bool) -> None:
    table = _table(*shape)
    weights = row_weights(_counts(shape[0]) if weighted else None, shape[0])
    root = weights.sqrt().unsqueeze(1)
    with tl.backend_context("pytorch", local_threadsafe=True):
        left, values, right = svd_interface(root * table, n_eigenvecs=3)
        expected = ((left * values) @ right) / root
    coefficients, basis = weighted_low_rank(table, 3, weights)
    torch.testing.assert_close(coefficients @ basis, expected, rtol=0, atol=1e-9)


def test_rows_that_never_occur_do_not_disturb_those_that_do() -> None:
    table, counts = _table(60, 10), _counts(60)
    counts[30:] = 0
    coefficients, basis = weighted_low_rank(table, 3, row_weights(counts, 60))
    alone = weighted_low_rank(table[:30], 3, row_weights(counts[:30], 30))
    seen = Metric(torch.eye(10), counts[:30])
    best = seen.loss(table[:30], alone[0] @ alone[1])
    assert seen.loss(table[:30], coefficients[:30] @ basis) == pytest.approx(best, rel=1e-5)


def test_rows_that_never_occur_get_the_directions_that_are_left() -> None:
    # The rows that occur span two directions; a third one is free for the others.
    table = torch.zeros(40, 6, dtype=torch.float64)
    table[:20, :2] = _table(20, 2)
    table[20:, 4] = torch.linspace(1, 2, 20, dtype=torch.float64)
    counts = torch.cat([torch.full((20,), 7.0), torch.zeros(20)])
    coefficients, basis = weighted_low_rank(table, 3, row_weights(counts, 40))
    torch.testing.assert_close(coefficients @ basis, table, rtol=0, atol=1e-6)


def test_projects_some_rows() -> None:
    table, basis = _table(20, 6), torch.eye(6, dtype=torch.float64)[:2]
    rows = torch.tensor([7, 0, 7])
    assert torch.equal(project(table, basis, rows), table[rows][:, :2])


def test_in_a_metric_that_sees_all_directions_alike_it_is_weighted_low_rank() -> None:
    table, weights = _table(60, 8), smoothed_frequencies(_counts(60))
    expected = weighted_low_rank(table, 3, weights)
    for matrix in (torch.eye(8), torch.zeros(8, 8), -torch.eye(8)):
        found = low_rank_in_metric(table, 3, Metric(matrix.double(), weights))
        torch.testing.assert_close(found[0] @ found[1], expected[0] @ expected[1], rtol=0, atol=1e-10)


def test_a_singular_metric_keeps_what_it_sees() -> None:
    table, metric = _table(100, 12), loss_metric(100, 12, rank=4)
    coefficients, basis = low_rank_in_metric(table, 4, metric)
    vectors = torch.linalg.eigh(metric.matrix).eigenvectors[:, -4:]
    change = (table - coefficients @ basis) @ vectors
    # Directions of no weight are floored, not free: they may pull a little.
    assert float(change.norm()) < 1e-2 * float((table @ vectors).norm())
    assert (coefficients @ basis).norm() < 2 * table.norm()


def test_zero_rows_and_short_tables_in_a_metric() -> None:
    table, metric = _table(30, 8), loss_metric(30, 8)
    table[5] = 0
    coefficients, basis = low_rank_in_metric(table, 4, metric)
    assert torch.equal((coefficients @ basis)[5], torch.zeros(8).double())
    assert torch.equal(low_rank_in_metric(torch.zeros(30, 8), 3, metric)[0], torch.zeros(30, 3))
    short = _table(5, 8)
    coefficients, basis = low_rank_in_metric(short, 5, Metric(metric.matrix, metric.weights[:5]))
    torch.testing.assert_close(coefficients @ basis, short, rtol=0, atol=1e-8)


@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=40)
def test_the_metric_never_loses_to_weights_alone(vocab_size: int, dim: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, min(vocab_size, dim)))
    table, metric = _table(vocab_size, dim), loss_metric(vocab_size, dim, seed=seed, condition=1000)
    coefficients, basis = low_rank_in_metric(table, rank, metric)
    plain = weighted_low_rank(table, rank, metric.weights)
    most = metric.loss(table, plain[0] @ plain[1])
    assert metric.loss(table, coefficients @ basis) <= most * (1 + 1e-9) + 1e-12 * metric.loss(table, 0 * table)
