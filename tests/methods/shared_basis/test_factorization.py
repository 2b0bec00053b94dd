"""Blocks that share a basis: what is stored of a solution, and the options that lead to it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.methods.group_reduce.grouping import kmeans_groups
from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies
from lightning_embcompress.methods.registry import (
    BlockLowRank,
    GroupReduceConfig,
    SharedBasisBlocks,
    SharedBasisConfig,
    TransformCodingConfig,
)
from toys import falling_counts, normal

_VOCAB_SIZE, _DIM = 2000, 32


def _table(vocab_size: int = _VOCAB_SIZE, dim: int = _DIM, seed: int = 0) -> Tensor:
    rows = normal(vocab_size, dim, seed=seed) * torch.logspace(0, -1.5, dim)
    rows = rows * torch.linspace(2, 0.5, vocab_size).unsqueeze(1) + normal(1, dim, seed=seed + 1)
    return rows.float()


def _metric(vocab_size: int = _VOCAB_SIZE, dim: int = _DIM) -> Metric:
    states = normal(4 * dim, dim, seed=2) * torch.logspace(0, -1, dim)
    return Metric(states.T @ states / len(states), smoothed_frequencies(falling_counts(vocab_size)))


@pytest.mark.parametrize(("ratio", "dtype"), [(8, torch.float64), (24, torch.float32), (24, torch.bfloat16)])
def test_predicted_loss_of_codes_is_that_of_what_is_stored(ratio: float, dtype: torch.dtype) -> None:
    table, metric = _table().to(dtype), _metric()
    factors = SharedBasisBlocks.decompose(table, int(_table().nbytes / ratio), metric=metric)
    assert factors.is_coded
    assert factors.dtype == dtype
    assert factors.predicted_loss == pytest.approx(factors.loss_in(metric, table), rel=0.16)
    assert factors.stored_bytes() <= int(_table().nbytes / ratio)
    # What is kept free for the structure's text and for levels is little beside the rest.
    assert factors.stored_bytes() >= int(_table().nbytes / ratio) - 3500


@given(
    st.integers(1, 120),
    st.integers(1, 24),
    st.floats(0.3, 40),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([(1, 2, 3, 4, 5, 6, 8), (4,), ()]),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 3),
)
@settings(max_examples=50, deadline=None)
def test_budget_is_never_exceeded(
    vocab_size: int,
    dim: int,
    ratio: float,
    groups: int | None,
    widths: tuple[int, ...],
    dtype: torch.dtype,
    rounds: int,
) -> None:
    table, metric = _table(vocab_size, dim).to(dtype), _metric(vocab_size, dim)
    groups = None if groups is None else min(groups, vocab_size)
    least = SharedBasisBlocks.least_bytes(vocab_size, dim, dtype.itemsize, groups, widths)
    budget = least + int(table.nbytes / ratio)
    factors = SharedBasisBlocks.solve(table, budget, metric, groups, rounds, widths)
    assert factors.stored_bytes() <= budget
    assert factors.materialize().isfinite().all()
    smallest = SharedBasisBlocks.solve(table, least, metric, groups, 0, widths)
    assert smallest.stored_bytes() <= least
    with pytest.raises(ValueError, match=rf"^{least - 1} bytes do not hold a table of {vocab_size} x {dim} in"):
        SharedBasisBlocks.solve(table, least - 1, metric, groups, 0, widths)


def test_one_heavy_row_has_a_say_in_its_own_codes_only() -> None:
    # Nearly all of the weight: its block is small, and levels must fit the others.
    table, counts = _table(), torch.ones(_VOCAB_SIZE, dtype=torch.long)
    counts[7] = 10**7
    metric = Metric(_metric().matrix, smoothed_frequencies(counts))
    factors = SharedBasisBlocks.decompose(table, table.nbytes // 6, metric=metric)
    lost = (factors.materialize() - table).square().sum(dim=1) / table.square().sum(dim=1)
    assert float(lost[7]) < 1e-3
    assert float(lost.median()) < 0.1


def test_nothing_is_as_large_as_the_table() -> None:
    table, metric = _table(20_000, 64), _metric(20_000, 64)
    for widths in ((), (1, 2, 3, 4, 5, 6, 8)):
        factors = SharedBasisBlocks.solve(table, table.nbytes // 20, metric, None, 2, widths)
        kept = sum(tensor.nbytes for tensor in (*factors.parameters(), *factors.buffers()))
        # Codes are unpacked in memory, and rows have a place in the order of blocks.
        assert kept < table.nbytes / 2


def test_floats_lose_far_less_than_the_published_algorithm() -> None:
    table, counts, metric = _table(), falling_counts(_VOCAB_SIZE), _metric()
    budget = table.nbytes // 6

    def solve(metric: Metric | None, **options: Any) -> SharedBasisBlocks:
        return SharedBasisBlocks.decompose(table, budget, counts, SharedBasisConfig(**options), metric=metric)

    assert not solve(metric).is_coded
    assert len(solve(metric, groups=6).sizes) <= 6
    # Both ways to ask for the best number of groups are the same.
    automatic = [solve(metric, **options) for options in ({}, {"groups": "auto"})]
    assert torch.equal(automatic[0].materialize(), automatic[1].materialize())
    # Without a metric directions count the same.
    plain = solve(Metric(torch.eye(_DIM), smoothed_frequencies(counts)))
    assert torch.equal(solve(None).materialize(), plain.materialize())
    losses = []
    for groups, rounds in product((5, 10, 20), (0, 5)):
        config = GroupReduceConfig(groups=groups, refine_rounds=rounds)
        losses.append(BlockLowRank.decompose(table, budget, counts, config).loss_in(metric, table))
    assert automatic[0].loss_in(metric, table) < 0.6 * min(losses)


def test_grouping_by_kmeans() -> None:
    table, counts = _table(), falling_counts(_VOCAB_SIZE)
    config = GroupReduceConfig(groups=5, refine_rounds=0, grouping="kmeans")
    found = BlockLowRank.decompose(table, table.nbytes // 4, counts, config)
    wanted = kmeans_groups(counts, 5)
    assert torch.equal(found.block_of_row, wanted)
    assert found.sizes != [400] * 5


def test_one_width() -> None:
    table, metric = _table(), _metric()
    factors = SharedBasisBlocks.decompose(table, 20_000, None, TransformCodingConfig(bits=3), metric=metric)
    assert {bits for runs in factors.segments for bits, _ in runs} == {3}
    free = SharedBasisBlocks.decompose(table, 20_000, None, TransformCodingConfig(), metric=metric)
    assert free.loss_in(metric, table) < factors.loss_in(metric, table)


@pytest.mark.parametrize("codes", [False, True])
def test_refined_with_other_options_and_less_room(codes: bool) -> None:
    table, metric = _table(), _metric()
    config: Any = TransformCodingConfig(bits=6) if codes else SharedBasisConfig()
    factors = SharedBasisBlocks.solve(table, 40_000, metric, 8, 2, (6,) if codes else ())
    # Less room: what there is cannot stay.
    smaller = factors.refined(table, 20_000, None, config, metric=metric)
    assert smaller is not factors
    assert smaller.stored_bytes() <= 20_000
    # Hardly any: not even its blocks.
    least = SharedBasisBlocks.least_bytes(_VOCAB_SIZE, _DIM, 4, None, (6,) if codes else ())
    assert factors.refined(table, least, None, config, metric=metric).stored_bytes() <= least
    if codes:
        other = factors.refined(table, 40_000, None, TransformCodingConfig(bits=4), metric=metric)
        assert other.widths == [4]
    again = factors.refined(
        table + 0.001 * normal(*table.shape, seed=4, dtype=torch.float32), 40_000, None, config, metric=metric
    )
    assert again is factors
