"""CP through TensorLy: against a direct implementation of alternating least squares, and TensorLy's reconstruction."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.cp_tensor import cp_to_tensor
from torch import Tensor

from lightning_embcompress.methods.tensorly.cp_solver import cp, cp_coefficients, cp_logits, khatri_rao, largest_cp_rank


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _error(tensor: Tensor, factors: list[Tensor]) -> float:
    with tl.backend_context("pytorch", local_threadsafe=True):
        return float((tensor - cp_to_tensor((None, factors))).norm() / tensor.norm())


def _alternating_least_squares(tensor: Tensor, factors: list[Tensor], rounds: int) -> list[Tensor]:
    """Kolda and Bader 2009, figure 3.3, with least squares solved as such."""
    factors = list(factors)
    for _ in range(rounds):
        for mode in range(tensor.dim()):
            others = khatri_rao([factor for other, factor in enumerate(factors) if other != mode])
            unfolded = tensor.movedim(mode, 0).flatten(1)
            factors[mode] = torch.linalg.lstsq(others, unfolded.T).solution.T
    return factors


@pytest.mark.parametrize(("shape", "rank"), [((9, 10, 7), 4), ((12, 5), 3), ((4, 5, 3, 6), 5)])
def test_rounds_are_those_of_alternating_least_squares(shape: tuple[int, ...], rank: int) -> None:
    tensor = _random(*shape)
    start = [_random(size, rank, seed=mode + 1) for mode, size in enumerate(shape)]
    before = [factor.clone() for factor in start]
    found = cp(tensor, rank, start, max_iterations=3)
    expected = _alternating_least_squares(tensor, start, 3)
    assert all(torch.equal(one, other) for one, other in zip(start, before, strict=True))
    assert _error(tensor, found) == pytest.approx(_error(tensor, expected), abs=1e-4)
    difference = khatri_rao(found).sum(1) - khatri_rao(expected).sum(1)
    assert difference.norm() < 0.01 * tensor.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 3])
def test_finds_what_is_there(dtype: torch.dtype, rank: int) -> None:
    factors = [_random(size, rank, seed=size, dtype=dtype) for size in (9, 10, 7)]
    tensor = torch.einsum("ir,jr,kr->ijk", *factors) * 1000
    solved = cp(tensor, rank, max_iterations=300)
    assert solved[0].dtype == dtype
    assert _error(tensor, solved) < 0.02
    # The scale of a component is shared out evenly.
    norms = torch.stack([factor.norm(dim=0) for factor in solved])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-4, atol=0)


def test_more_rounds_and_components_lower_the_error() -> None:
    tensor = _random(14, 15, 8)
    errors = [_error(tensor, cp(tensor, rank)) for rank in (2, 8, 30, 70)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5
    rounds = [_error(tensor, cp(tensor, 20, max_iterations=count)) for count in (1, 4, 15)]
    assert rounds == sorted(rounds, reverse=True)


def test_goes_on_from_what_there_is() -> None:
    tensor = _random(14, 15, 8)
    first = cp(tensor, 20, max_iterations=10)
    more = cp(tensor, 20, first, max_iterations=10)
    assert _error(tensor, more) < _error(tensor, first)
    # Components keep their places and their signs.
    for one, other in zip(first, more, strict=True):
        assert torch.all((one * other).sum(dim=0) > 0)


@pytest.mark.parametrize("max_iterations", [1, 5, 400])
def test_progress_adds_up_and_nothing_global_changes(max_iterations: int) -> None:
    tensor, shares = _random(6, 7, 5), []
    torch.manual_seed(1)
    np.random.seed(1)
    state, drawn, before = torch.get_rng_state(), np.random.RandomState(1).random_sample(2), tensor.clone()
    first = cp(tensor, 3, max_iterations=max_iterations, advance=shares.append)
    assert sum(shares) == pytest.approx(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.random_sample(2), drawn)
    assert torch.equal(tensor, before)
    assert tl.get_backend() == "numpy"
    assert all(torch.equal(*pair) for pair in zip(first, cp(tensor, 3, max_iterations=max_iterations), strict=True))


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.data())
@settings(deadline=None, max_examples=40)
def test_any_shape_and_rank(shape: list[int], data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(30, largest_cp_rank(shape))))
    tensor = _random(*shape, dtype=torch.float32)
    factors = cp(tensor, rank)
    assert [tuple(factor.shape) for factor in factors] == [(size, rank) for size in shape]
    assert all(factor.isfinite().all() for factor in factors)
    assert _error(tensor, factors) <= 1.001


@pytest.mark.parametrize("start", [None, [torch.ones(4, 2), torch.ones(3, 2)]])
def test_a_tensor_of_zeros(start: list[Tensor] | None) -> None:
    factors = cp(torch.zeros(4, 3), 2, start)
    assert factors[-1].abs().max() == 0
    assert factors[0].abs().max() > 0


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 7))
@settings(deadline=None, max_examples=40)
def test_products_are_those_of_the_reconstruction(shape: list[int], rank: int) -> None:
    factors = [_random(size, rank, seed=mode) for mode, size in enumerate(shape)]
    product = khatri_rao(factors)
    reduced = _random(3, rank, seed=9)
    for state, row in zip(reduced, cp_logits(factors, reduced), strict=True):
        with tl.backend_context("pytorch", local_threadsafe=True):
            torch.testing.assert_close(row, cp_to_tensor((state, factors)).flatten(), rtol=1e-10, atol=1e-10)
    ids = torch.arange(len(product))
    digits = torch.unravel_index(ids, shape)
    torch.testing.assert_close(cp_coefficients(factors, digits), product)
