"""Low rank of a whole table: its bytes, and the metric of the loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.methods.low_rank.solver import low_rank_in_metric
from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies
from lightning_embcompress.methods.registry import LowRank, LowRankConfig, WeightedLowRankConfig


def _problem(vocab_size: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Metric]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(vocab_size, dim, generator=generator, dtype=torch.float64).to(dtype)
    counts = (1000 / torch.arange(1, vocab_size + 1)).long()
    mixed = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, dim)
    return table, counts, Metric(mixed @ mixed.T, smoothed_frequencies(counts))


@given(st.integers(1, 300), st.integers(1, 120), st.sampled_from([2, 4, 8]), st.data())
@settings(deadline=None, max_examples=60)
def test_bytes_are_exact(vocab_size: int, dim: int, itemsize: int, data: st.DataObject) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    rank = data.draw(st.integers(1, min(vocab_size, dim)))
    smallest = LowRank.smallest_bytes(vocab_size, dim, itemsize, WeightedLowRankConfig(rank=rank))
    assert smallest == LowRank(vocab_size, dim, rank, dtype).stored_bytes()
    # A budget of exactly these bytes has this rank, one byte less has not.
    table = torch.zeros(vocab_size, dim, dtype=dtype)
    assert LowRank.decompose(table, smallest).rank == rank
    if rank > 1:
        assert LowRank.decompose(table, smallest - 1).rank == rank - 1
    else:
        with pytest.raises(ValueError, match=f"{smallest - 1} bytes do not hold .* allow at least {smallest}"):
            LowRank.decompose(table, smallest - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_metric_lowers_the_loss(dtype: torch.dtype) -> None:
    table, counts, metric = _problem(300, 24, dtype)
    size = table.nbytes // 3
    losses = []
    for given_metric in (None, metric):
        factors = LowRank.decompose(table, size, counts, metric=given_metric)
        assert factors.dtype == dtype
        assert factors.stored_bytes() <= size
        losses.append(metric.loss(table, factors.materialize()))
    assert losses[1] < 0.8 * losses[0]


def test_rows_are_weighted_by_the_metric() -> None:
    table, _, metric = _problem(100, 12)
    expected = low_rank_in_metric(table, 4, metric)
    for counts in (None, torch.arange(100)):
        factors = LowRank.decompose(table, 10**6, counts, WeightedLowRankConfig(rank=4), metric=metric)
        assert torch.equal(factors.coefficients, expected[0])
        assert torch.equal(factors.basis, expected[1])


def test_the_plain_svd_knows_no_metric() -> None:
    table, counts, metric = _problem(100, 12)
    options = LowRankConfig(rank=3)
    plain = LowRank.decompose(table, 10**6, counts, options)
    found = LowRank.decompose(table, 10**6, counts, options, metric=metric)
    assert torch.equal(found.materialize(), plain.materialize())
    refined = found.refined(2 * table, 10**6, counts, options, metric=metric)
    assert torch.equal(refined.materialize(), plain.refined(2 * table, 10**6, counts, options).materialize())


def test_refining_in_the_metric() -> None:
    table, counts, metric = _problem(200, 16)
    factors = LowRank.decompose(table, 10**6, counts, WeightedLowRankConfig(rank=5), metric=metric)
    basis, before = factors.basis, factors.basis.detach().clone()
    target = table + 0.01 * _problem(200, 16)[0].flip(0)
    refined = factors.refined(target, 10**6, counts, WeightedLowRankConfig(rank=5), metric=metric)
    assert refined is factors
    assert refined.basis is basis
    fresh = LowRank.decompose(target, 10**6, counts, WeightedLowRankConfig(rank=5), metric=metric)
    torch.testing.assert_close(refined.materialize(), fresh.materialize(), rtol=0, atol=1e-4)
    # Turned towards what was there: coefficients keep their meaning.
    assert (refined.basis - before).norm() < 0.1 * before.norm()
