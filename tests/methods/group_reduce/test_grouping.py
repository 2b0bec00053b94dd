"""K-means of numbers against all ways of cutting them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.methods.group_reduce.grouping import kmeans_groups


def _cost(values: Tensor, group: Tensor) -> float:
    """Sum of squares about the means of groups."""
    return sum(float((part - part.mean()).square().sum()) for part in (values[group == one] for one in group.unique()))


def _least_cost(values: Tensor, groups: int) -> float:
    """Of all cuts of the sorted numbers."""
    ordered = values.sort().values
    costs = []
    for cuts in itertools.combinations(range(1, values.numel()), groups - 1):
        parts = ordered.tensor_split(cuts)
        costs.append(sum(float((part - part.mean()).square().sum()) for part in parts))
    return min(costs)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.data())
@settings(deadline=None, max_examples=100)
def test_the_best_cut_is_found(numbers: list[int], data: st.DataObject) -> None:
    counts = torch.tensor(numbers)
    groups = data.draw(st.integers(1, len(numbers)))
    group = kmeans_groups(counts, groups)
    values = counts.double().log()
    assert _cost(values, group) == pytest.approx(_least_cost(values, groups), rel=1e-9, abs=1e-9)


@given(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 10**9)), min_size=1, max_size=60), st.data())
@settings(deadline=None, max_examples=100)
def test_groups_are_ranges_of_counts(numbers: list[int], data: st.DataObject) -> None:
    counts = torch.tensor(numbers)
    groups = data.draw(st.integers(1, len(numbers)))
    group = kmeans_groups(counts, groups)
    assert group.dtype == torch.int64
    assert group.unique().tolist() == list(range(groups))
    # The most frequent first, and equal ones together where they can be.
    ordered = group[torch.argsort(counts, descending=True, stable=True)]
    assert torch.equal(ordered, ordered.sort().values)
    if len(set(numbers)) >= groups:
        assert len(set(zip(numbers, group.tolist(), strict=True))) == len(set(numbers))
    # Neither the order of the rows nor the unit of the counts matters.
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    if len(set(numbers)) >= groups:
        assert torch.equal(kmeans_groups(counts[order], groups), group[order])


def test_words_that_never_occur_are_together() -> None:
    assert kmeans_groups(torch.tensor([1000, 900, 30, 20, 2, 1]), 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert kmeans_groups(torch.tensor([0, 1000, 30, 0, 0, 1]), 2)[[0, 3, 4]].tolist() == [1, 1, 1]
    assert kmeans_groups(torch.zeros(5), 2).tolist() == [0, 0, 0, 1, 1]


def test_equal_counts_are_cut_only_where_they_must_be() -> None:
    counts = torch.tensor([3, 3, 3, 3, 3, 3, 9, 1, 1, 1])
    assert kmeans_groups(counts, 4).tolist() == [1, 1, 1, 2, 2, 2, 0, 3, 3, 3]
    assert kmeans_groups(counts, 10).tolist() == [1, 2, 3, 4, 5, 6, 0, 7, 8, 9]


def test_a_large_vocabulary_is_grouped_like_a_small_one() -> None:
    # As many different counts as take the search through all its steps.
    counts = (1e7 / torch.arange(1, 20_001).double()).long()
    group = kmeans_groups(counts, 6)
    values = counts.double().log()
    found = _cost(values, group)
    ends = torch.bincount(group).cumsum(0)[:-1]
    for index in range(5):
        for shift in (-30, -1, 1, 30):
            cuts = ends.clone()
            cuts[index] += shift
            other = torch.bucketize(torch.arange(20_000), cuts, right=True)
            assert _cost(values, other) > found * (1 - 1e-12)


@pytest.mark.parametrize("groups", [0, 4])
def test_impossible_numbers_of_groups(groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups must be from 1 to the 3 rows of the table, it is {groups}"):
        kmeans_groups(torch.tensor([1, 2, 3]), groups)
