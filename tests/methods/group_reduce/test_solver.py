"""GroupReduce against plain SVDs of its groups, and what must hold whatever the table is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_embcompress.methods.group_reduce.solver import (
    BlockSolution,
    _choose_moves,
    _Moments,
    equal_frequency_groups,
    group_reduce,
)
from lightning_embcompress.methods.numerics.gram import gram_matrix, row_weights
from toys import normal


def _table(vocab_size: int, dim: int, seed: int = 0) -> Tensor:
    return normal(vocab_size, dim, seed=seed) * torch.logspace(0, -1.5, dim, dtype=torch.float64)


def _zipf(vocab_size: int) -> Tensor:
    """Distinct counts, the most frequent token first."""
    return (1e7 / torch.arange(1, vocab_size + 1).double()).round()


def _dense(table: Tensor, solution: BlockSolution) -> Tensor:
    out = torch.empty_like(table)
    for block, basis in enumerate(solution.bases):
        rows = solution.block_of_row == block
        out[rows] = table[rows] if basis is None else table[rows] @ basis.T @ basis
    return out


def _error(table: Tensor, solution: BlockSolution, weights: Tensor) -> float:
    lost = (_dense(table, solution) - table).double().square().sum(1) @ weights
    return float(lost / (table.double().square().sum(1) @ weights))


def _clusters(clusters: int, size: int, dim: int, rank: int) -> tuple[Tensor, Tensor]:
    """Rows of every cluster in a subspace of its own, shuffled, and the cluster of every row."""
    rows = torch.cat([normal(size, rank, seed=c) @ normal(rank, dim, seed=100 + c) for c in range(clusters)])
    truth = torch.arange(clusters).repeat_interleave(size)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(7))
    return rows[order] + 1e-3 * normal(len(rows), dim, seed=9), truth[order]


def test_groups_by_frequency_are_of_equal_size() -> None:
    groups = equal_frequency_groups(torch.tensor([1.0, 9.0, 5.0, 5.0, 0.5, 7.0, 2.0]), 3)
    assert groups.tolist() == [2, 0, 0, 1, 2, 0, 1]
    assert equal_frequency_groups(torch.ones(4), 4).tolist() == [0, 1, 2, 3]


def _plain_group_reduce(table: Tensor, counts: Tensor, ranks: list[int]) -> Tensor:
    """The published algorithm before refinement, by the SVD of every group, for counts in any order."""
    order = sorted(range(len(counts)), key=lambda row: -float(counts[row]))
    out = torch.zeros_like(table)
    start = 0
    for index, rank in enumerate(ranks):
        size = len(order) // len(ranks) + (index < len(order) % len(ranks))
        rows = order[start : start + size]
        start += size
        root = counts[rows].sqrt().unsqueeze(1)
        left, values, right = torch.linalg.svd(root * table[rows], full_matrices=False)
        out[rows] = ((left[:, :rank] * values[:rank]) @ right[:rank]) / root
    return out


@pytest.mark.parametrize(("vocab_size", "groups"), [(200, 1), (203, 5), (30, 7)])
def test_without_refinement_it_is_an_svd_a_group(vocab_size: int, groups: int) -> None:
    table = _table(vocab_size, 10)
    counts = _zipf(vocab_size)[torch.randperm(vocab_size, generator=torch.Generator().manual_seed(3))]
    budget = vocab_size * 10 // 3 + 10 * groups
    solution = group_reduce(table, row_weights(counts, vocab_size), budget, groups, refine_rounds=0)
    expected = _plain_group_reduce(table, counts, solution.ranks)
    torch.testing.assert_close(_dense(table, solution), expected, rtol=0, atol=1e-6)
    lost = (expected - table).square().sum(1) @ counts / (table.square().sum(1) @ counts)
    assert solution.errors == pytest.approx([float(lost)], rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [2, 6])
def test_refinement_never_makes_it_worse(seed: int, ratio: int) -> None:
    table, weights = _table(600, 16, seed), row_weights(_zipf(600), 600)
    budget = 600 * 16 // ratio
    before = group_reduce(table, weights, budget, groups=4, refine_rounds=0)
    after = group_reduce(table, weights, budget, groups=4, refine_rounds=6, move_fraction=0.3)
    assert _error(table, after, weights) <= _error(table, before, weights) * (1 + 1e-9)
    assert after.errors[0] == pytest.approx(before.errors[0], rel=1e-9)
    # What is returned is the best of the rounds, and the errors reported are the true ones.
    assert _error(table, after, weights) <= min(after.errors) * (1 + 1e-9)


def test_some_rounds_do_get_worse_and_are_not_kept() -> None:
    """The published rule lets a block of full rank swallow the others: keeping the best round is not idle."""
    table, weights = _table(600, 16), row_weights(_zipf(600), 600)
    solution = group_reduce(table, weights, 600 * 16 // 3, groups=4, refine_rounds=6, move_fraction=0.3)
    assert max(solution.errors) > 1.05 * min(solution.errors)


def test_refinement_finds_planted_clusters() -> None:
    table, truth = _clusters(clusters=3, size=200, dim=24, rank=4)
    weights = torch.ones(600).double()
    # Start from groups of which a third of the rows is wrong.
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(600, generator=generator) < 0.33
    start = torch.where(wrong, torch.randint(3, (600,), generator=generator), truth)
    budget = 3 * 4 * (200 + 24)
    fixed = group_reduce(table, weights, budget, 3, refine_rounds=0, start=start)
    found = group_reduce(table, weights, budget, 3, refine_rounds=40, move_fraction=0.3, start=start)
    assert _error(table, found, weights) < 0.25 * _error(table, fixed, weights)
    # Half of the wrong third, and more, has found home.
    right = [(blocks == truth).double().mean() for blocks in (start, found.block_of_row)]
    assert right[0] < 0.8
    assert right[1] > 0.9


def test_donors_keep_as_many_rows_as_their_rank() -> None:
    # Every row of block 0 and 1 lies in the span of block 2: all of them want to go there.
    table = torch.cat([normal(30, 2), normal(30, 2, seed=1), normal(40, 2, seed=2)])
    table = torch.nn.functional.pad(table, (0, 6)) + 1e-3 * normal(100, 8, seed=3)
    blocks = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([30, 30, 40]))
    bases: list[Tensor | None] = [torch.eye(8).double()[2:6], torch.eye(8).double()[4:7], torch.eye(8).double()[:2]]
    moves = _choose_moves(table, torch.ones(100).double(), blocks, [4, 3, 2], bases, move_fraction=1.0)
    assert moves is not None
    rows, destinations = moves
    assert set(destinations.tolist()) == {2}
    assert torch.bincount(blocks[rows], minlength=3).tolist() == [26, 27, 0]


def test_moves_are_those_of_the_lowest_error_at_their_destination() -> None:
    table = torch.nn.functional.pad(normal(100, 2), (0, 6)) + 0.1 * normal(100, 8, seed=3)
    blocks = torch.arange(2).repeat_interleave(50)
    bases: list[Tensor | None] = [torch.eye(8).double()[4:6], torch.eye(8).double()[:2]]
    moves = _choose_moves(table, torch.ones(100).double(), blocks, [2, 2], bases, move_fraction=0.2)
    assert moves is not None
    error = {
        block: (table - table @ basis.T @ basis).square().sum(1)
        for block, basis in enumerate(bases)
        if basis is not None
    }
    candidates = sorted(
        (row for row in range(100) if error[1 - int(blocks[row])][row] < error[int(blocks[row])][row]),
        key=lambda row: float(error[1 - int(blocks[row])][row]),
    )
    assert sorted(moves[0].tolist()) == sorted(candidates[: round(0.2 * len(candidates))])


def test_rounds_stop_when_few_words_would_move() -> None:
    table, truth = _clusters(clusters=2, size=100, dim=16, rank=3)
    wrong_start = truth.clone()
    wrong_start[:5] = 1 - truth[:5]
    weights = torch.ones(200).double()
    solution = group_reduce(table, weights, 2 * 3 * 116, 2, refine_rounds=9, move_fraction=1.0, start=wrong_start)
    assert len(solution.errors) == 1


def test_order_of_the_rows_does_not_matter() -> None:
    table, counts = _table(400, 12), _zipf(400)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    straight = group_reduce(table, row_weights(counts, 400), 1600, 4, 4, 0.3)
    shuffled = group_reduce(table[order], row_weights(counts[order], 400), 1600, 4, 4, 0.3)
    assert torch.equal(straight.block_of_row[order], shuffled.block_of_row)
    torch.testing.assert_close(_dense(table, straight)[order], _dense(table[order], shuffled), rtol=0, atol=1e-7)


def test_moments_stay_those_of_the_rows_when_rows_come_and_go() -> None:
    """A very frequent word that visits a block of rare ones leaves nothing behind when it goes."""
    table = _table(200, 8).float()
    counts = torch.cat([torch.full((100,), 1e7), torch.zeros(100)])
    counts[0] = 1
    weights = row_weights(counts, 200)
    blocks = torch.arange(2).repeat_interleave(100)
    moments = _Moments(table, weights, blocks, 2)
    visit = blocks.clone()
    visit[:10] = 1
    moments.update(visit)
    moments.update(blocks)
    for block in range(2):
        exact = gram_matrix(table, weights, (blocks == block).nonzero().squeeze(1))
        assert (moments.grams[block].double() - exact).norm() < 1e-3 * exact.norm()
