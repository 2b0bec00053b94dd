"""Proportional ranks within a budget."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.methods.numerics.rank_allocation import (
    block_elements,
    full_rank,
    is_dense,
    proportional_ranks,
    smallest_elements,
)


@st.composite
def _problems(draw: st.DrawFn) -> tuple[list[float], list[int], int, int]:
    sizes = draw(st.lists(st.integers(0, 200), min_size=1, max_size=8).filter(any))
    frequency = st.floats(0, 1e9) | st.sampled_from([0.0, 1.0, 100.0])
    frequencies = [draw(frequency) if size else 0.0 for size in sizes]
    dim = draw(st.integers(1, 40))
    smallest, largest = smallest_elements(sizes, dim), sum(size * dim for size in sizes)
    return frequencies, sizes, dim, draw(st.integers(smallest, max(smallest, largest) + 10))


def _elements(sizes: list[int], ranks: list[int], dim: int) -> int:
    return sum(block_elements(size, rank, dim) for size, rank in zip(sizes, ranks, strict=True))


@given(_problems())
@settings(deadline=None, max_examples=300)
def test_ranks_fill_the_budget_and_keep_their_range(problem: tuple[list[float], list[int], int, int]) -> None:
    frequencies, sizes, dim, budget = problem
    ranks = proportional_ranks(frequencies, sizes, dim, budget)
    for size, rank in zip(sizes, ranks, strict=True):
        assert (1 if size else 0) <= rank <= full_rank(size, dim)
        # A block that costs as much as its rows is stored exactly.
        assert not is_dense(size, rank, dim) or rank == full_rank(size, dim)
    spent = _elements(sizes, ranks, dim)
    assert spent <= budget
    if any(rank < full_rank(size, dim) for size, rank in zip(sizes, ranks, strict=True)):
        # What is left over is less than one rank of the largest block.
        assert budget - spent < max(sizes) + dim


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=6), st.integers(5, 60), st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_more_frequent_blocks_of_equal_size_get_no_lower_rank(frequencies: list[int], size: int, part: float) -> None:
    dim, sizes = 24, [size] * len(frequencies)
    smallest = smallest_elements(sizes, dim)
    budget = smallest + int(part * (sum(sizes) * dim - smallest))
    ranks = proportional_ranks([float(f) for f in frequencies], sizes, dim, budget)
    in_order = [rank for _, rank in sorted(zip(frequencies, ranks, strict=True), key=lambda pair: (-pair[0], -pair[1]))]
    assert in_order == sorted(ranks, reverse=True)


def test_budget_below_rank_one() -> None:
    smallest = smallest_elements([50, 50], 10)
    assert proportional_ranks([2.0, 1.0], [50, 50], 10, smallest) == [1, 1]
    with pytest.raises(ValueError, match=r"119 elements do not cover rank 1 in each of 2 blocks, which takes 120"):
        proportional_ranks([2.0, 1.0], [50, 50], 10, smallest - 1)
