"""The solver of the loss against what it predicts, truncated SVDs, and what must hold whatever the table is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies
from lightning_embcompress.methods.numerics.rate_allocation import Overheads, allocate
from lightning_embcompress.methods.shared_basis.budget import BitBudget
from lightning_embcompress.methods.shared_basis.solver import SharedBasis, rate_curve, shared_basis
from toys import normal

_VOCAB_SIZE, _DIM = 600, 24
_WIDTHS = (1, 2, 3, 4, 5, 6, 8)


def _table(vocab_size: int = _VOCAB_SIZE, dim: int = _DIM, seed: int = 0) -> Tensor:
    """A falling spectrum around a mean; frequent rows are longer."""
    rows = normal(vocab_size, dim, seed=seed) * torch.logspace(0, -1.5, dim, dtype=torch.float64)
    return rows * torch.linspace(2, 0.5, vocab_size, dtype=torch.float64).unsqueeze(1) + normal(1, dim, seed=seed + 1)


def _metric(vocab_size: int = _VOCAB_SIZE, dim: int = _DIM) -> Metric:
    states = normal(4 * dim, dim, seed=2) * torch.logspace(0, -1, dim, dtype=torch.float64)
    counts = (1e5 / torch.arange(1, vocab_size + 1)).long()
    return Metric(states.T @ states / len(states), smoothed_frequencies(counts))


def _budget(ratio: float, coded: bool = False, vocab_size: int = _VOCAB_SIZE, dim: int = _DIM) -> BitBudget:
    bits = int(vocab_size * dim * 32 / ratio)
    if coded:
        return BitBudget(bits, _WIDTHS, False, Overheads(8, 8 * dim), 8 * dim, lambda count: vocab_size * 5)
    return BitBudget(bits, (32,), True, Overheads(0, 32 * dim), 32 * dim, lambda count: vocab_size * 5)


def _bits(solution: SharedBasis, budget: BitBudget) -> int:
    sizes = torch.bincount(solution.block_of_row)
    bits = int((sizes.unsqueeze(1) * solution.bits).sum()) + int((solution.bits > 0).sum()) * budget.overheads.column
    bits += solution.bits.shape[1] * budget.overheads.basis
    return bits + len(sizes) * budget.block + budget.index(len(sizes))


def _approximation(table: Tensor, solution: SharedBasis) -> Tensor:
    means = solution.means[solution.block_of_row]
    found = (table.double() - means) @ solution.projector
    bits = solution.bits[solution.block_of_row]
    if solution.levels:
        scales = solution.scales[solution.block_of_row].clamp(min=1e-300)
        rounded = torch.zeros_like(found)
        for width, levels in solution.levels.items():
            nearest = levels[((found / scales).unsqueeze(2) - levels).abs().argmin(dim=2)]
            rounded = torch.where(bits == width, nearest * scales, rounded)
        found = rounded
    return means + (found * (bits > 0)) @ solution.basis


@pytest.mark.parametrize(
    ("coded", "dtype"),
    [(False, torch.float64), (False, torch.bfloat16), (True, torch.float32), (True, torch.float16)],
)
def test_predicted_loss_is_that_of_the_metric(coded: bool, dtype: torch.dtype) -> None:
    table, metric = _table().to(dtype), _metric()
    budget = _budget(12 if coded else 4, coded)
    solution = shared_basis(table, metric, budget, groups=4)
    found = metric.loss(table.double(), _approximation(table, solution))
    rel = 0.1 if coded else 1e-6 if dtype == torch.float64 else 1e-3
    assert solution.loss == pytest.approx(found, rel=rel)
    assert _bits(solution, budget) <= budget.max_bits
    # No block is empty, every component is used, and widths do not rise.
    assert (torch.bincount(solution.block_of_row, minlength=len(solution.bits)) > 0).all()
    assert (solution.bits.diff(dim=1) <= 0).all()
    assert (solution.bits > 0).any(dim=0).all()
    torch.testing.assert_close(solution.basis.norm(dim=1), torch.ones(len(solution.basis), dtype=torch.float64))


def test_one_group_of_equal_weights_is_a_truncated_svd_around_the_mean() -> None:
    table = _table()
    metric = Metric(torch.eye(_DIM), torch.full((_VOCAB_SIZE,), 1 / _VOCAB_SIZE, dtype=torch.float64))
    solution = shared_basis(table, metric, _budget(4), groups=1, refine_rounds=3)
    left, values, right = torch.linalg.svd(table - table.mean(dim=0), full_matrices=False)
    rank = solution.bits.shape[1]
    assert 0 < rank < _DIM
    # As many components as there is room for.
    assert _bits(solution, _budget(4)) + 32 * (_VOCAB_SIZE + _DIM) > _budget(4).max_bits
    wanted = (left[:, :rank] * values[:rank]) @ right[:rank] + table.mean(dim=0)
    torch.testing.assert_close(_approximation(table, solution), wanted, rtol=0, atol=1e-8)
    assert solution.loss == pytest.approx(0.5 * float(values[rank:].square().sum()) / _VOCAB_SIZE)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("groups", [2, 8, None])
def test_refinement_never_makes_it_worse(groups: int | None, coded: bool) -> None:
    table, metric, budget = _table(), _metric(), _budget(8, coded)
    before = shared_basis(table, metric, budget, groups, refine_rounds=0)
    after = shared_basis(table, metric, budget, groups, refine_rounds=6)
    # Before and after the basis is turned.
    assert before.losses == after.losses[:2]
    assert before.losses[1] <= before.losses[0]
    assert groups == 2 or before.losses[1] < 0.99 * before.losses[0]
    assert after.loss <= before.loss
    if groups == 8:
        assert after.loss < 0.97 * before.loss
        assert not torch.equal(after.block_of_row, before.block_of_row)


@pytest.mark.parametrize("coded", [False, True])
def test_order_of_rows_does_not_matter(coded: bool) -> None:
    table, metric, budget = _table(), _metric(), _budget(8, coded)
    order = torch.randperm(_VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    first = shared_basis(table, metric, budget)
    second = shared_basis(table[order], Metric(metric.matrix, metric.weights[order]), budget)
    assert second.loss == pytest.approx(first.loss, rel=1e-6)
    assert torch.equal(second.block_of_row, first.block_of_row[order])
    assert torch.equal(second.bits, first.bits)


@pytest.mark.parametrize("coded", [False, True])
def test_more_bits_lose_less(coded: bool) -> None:
    table, metric = _table(), _metric()
    losses = []
    for ratio in torch.logspace(1.5, 0.6, 12).tolist():
        solution = shared_basis(table, metric, _budget(ratio, coded), refine_rounds=3)
        losses.append(metric.loss(table, _approximation(table, solution)))
    # In the end nearly nothing is lost, and that by the levels of what weighs the most.
    assert all(more <= 1.005 * less + 1e-4 * losses[0] for less, more in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 0.2 * losses[0]


def test_the_best_number_of_groups_is_at_least_as_good_as_any() -> None:
    table, metric, budget = _table(), _metric(), _budget(10)
    best = shared_basis(table, metric, budget, None, refine_rounds=0).loss
    # It is chosen before the basis is turned to what suits the blocks.
    assert all(best <= 1.03 * shared_basis(table, metric, budget, c, refine_rounds=0).loss for c in (1, 2, 4, 8, 16))


def test_everything_fits() -> None:
    table, metric = _table(), _metric()
    exact = shared_basis(table, metric, _budget(0.5), groups=2)
    assert exact.bits.shape == (2, _DIM)
    torch.testing.assert_close(_approximation(table, exact), table, rtol=0, atol=1e-9)
    coded = shared_basis(table, metric, _budget(0.5, coded=True), groups=2)
    assert coded.bits.unique().tolist() == [8]


def test_only_the_means_fit() -> None:
    table, metric = _table(), _metric()
    budget = _budget(1000)
    smallest = 2 * budget.block + budget.index(2)
    solution = shared_basis(table, metric, BitBudget(smallest, *_rest(budget)), groups=2)
    assert solution.bits.shape[1] == 0
    for block in range(2):
        rows = solution.block_of_row == block
        weights = metric.weights[rows] / metric.weights[rows].sum()
        torch.testing.assert_close(solution.means[block], weights @ table[rows])
    with pytest.raises(ValueError, match=r"means of 2 blocks of a table of 600 x 24 take \d+ bytes, and \d+ are left"):
        shared_basis(table, metric, BitBudget(smallest - 1, *_rest(budget)), groups=2)


def _rest(budget: BitBudget) -> tuple[Any, ...]:
    return budget.widths, budget.is_exact, budget.overheads, budget.block, budget.index


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(
    "table",
    [
        torch.zeros(40, 5),
        torch.ones(40, 5),
        torch.arange(5.0).repeat(40, 1),
        torch.cat([torch.zeros(20, 5), torch.full((20, 5), 1e4)]),
        normal(40, 5).float() * 1e-12,
        normal(40, 5)[:1].float(),
        normal(40, 1).float(),
    ],
    ids=["zeros", "ones", "duplicates", "two rows", "tiny", "one row", "one column"],
)
def test_odd_tables(table: Tensor, coded: bool) -> None:
    vocab_size, dim = table.shape
    metric = Metric(torch.eye(dim), smoothed_frequencies(torch.zeros(vocab_size)))
    budget = _budget(0.2, coded, vocab_size, dim)
    solution = shared_basis(table, metric, budget)
    found = _approximation(table, solution)
    assert found.isfinite().all()
    assert solution.loss < (1e-3 if coded else 1e-6) * float(table.double().square().mean()) + 1e-30
    torch.testing.assert_close(found, table.double(), rtol=0, atol=0.05 * float(table.abs().max()) + 1e-30)


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_units_of_the_metric_do_not_matter(scale: float) -> None:
    table, metric, budget = _table().float(), _metric(), _budget(8)
    first = shared_basis(table, metric, budget, groups=4)
    second = shared_basis(table, Metric(scale * metric.matrix, metric.weights), budget, groups=4)
    assert second.loss == pytest.approx(scale * first.loss, rel=1e-4)
    torch.testing.assert_close(second.scales, first.scales, rtol=1e-2, atol=1e-6)


def test_singular_metric_and_weights_of_zero() -> None:
    table = _table()
    states = normal(5, _DIM)
    weights = torch.arange(_VOCAB_SIZE).clamp(min=100).double() - 100
    metric = Metric(states.T @ states, weights / weights.sum())
    assert metric.floored == _DIM - 5
    solution = shared_basis(table, metric, _budget(6), groups=4)
    found = _approximation(table, solution)
    assert found.isfinite().all()
    assert metric.loss(table, found) == pytest.approx(solution.loss, rel=1e-6)
    # Rows that cost nothing are in no block of many components.
    kept = (solution.bits > 0).sum(dim=1)[solution.block_of_row]
    assert kept[:100].double().mean() < kept[100:].double().mean()


def test_curve_says_what_the_solver_finds_before_refinement() -> None:
    table, metric, budget = _table(), _metric(), _budget(8, coded=True)
    solution = shared_basis(table, metric, budget, groups=4, refine_rounds=0)
    [rates] = allocate([rate_curve(table, metric, budget, 4)], budget.left(4))
    assert rates.loss == pytest.approx(solution.losses[0])


def test_blocks_and_widths_that_are_kept() -> None:
    table, metric, budget = _table(), _metric(), _budget(8, coded=True)
    solution = shared_basis(table, metric, budget, groups=4)
    moved = table + 0.01 * normal(*table.shape, seed=9)
    kept = shared_basis(moved, metric, budget, 4, start=solution.block_of_row, keep=solution.bits)
    assert torch.equal(kept.block_of_row, solution.block_of_row)
    assert torch.equal(kept.bits, solution.bits)
    assert metric.loss(moved, _approximation(moved, kept)) < 1.2 * metric.loss(table, _approximation(table, solution))


def test_metric_of_another_table_is_refused() -> None:
    with pytest.raises(ValueError, match="the metric is of a table of 600 x 24, the table has 10 x 3"):
        shared_basis(torch.zeros(10, 3), _metric(), _budget(2))
