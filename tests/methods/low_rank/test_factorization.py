"""Low rank of a whole table: its bytes, and the metric of the loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.methods.low_rank.solver import low_rank_in_metric
from lightning_embcompress.methods.registry import LowRank, LowRankConfig, WeightedLowRankConfig
from toys import falling_counts, falling_table, loss_metric


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


def test_rows_are_weighted_by_the_metric() -> None:
    table, metric = falling_table(100, 12), loss_metric(100, 12)
    expected = low_rank_in_metric(table, 4, metric)
    for counts in (None, torch.arange(100)):
        factors = LowRank.decompose(table, 10**6, counts, WeightedLowRankConfig(rank=4), metric=metric)
        assert torch.equal(factors.coefficients, expected[0])
        assert torch.equal(factors.basis, expected[1])


def test_the_plain_svd_knows_no_metric() -> None:
    table, counts, metric = falling_table(100, 12), falling_counts(100), loss_metric(100, 12)
    options = LowRankConfig(rank=3)
    plain = LowRank.decompose(table, 10**6, counts, options)
    found = LowRank.decompose(table, 10**6, counts, options, metric=metric)
    assert torch.equal(found.materialize(), plain.materialize())
    refined = found.refined(2 * table, 10**6, counts, options, metric=metric)
    assert torch.equal(refined.materialize(), plain.refined(2 * table, 10**6, counts, options).materialize())
