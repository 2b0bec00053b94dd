"""Tucker through TensorLy: what it finds against TensorLy's own defaults, and ranks for a budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tucker as tensorly_tucker
from tensorly.tucker_tensor import tucker_to_tensor
from torch import Tensor

from lightning_embcompress.methods.tensorly.tucker_solver import (
    possible_ranks,
    proportional_ranks,
    tucker,
    tucker_elements,
)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _tensor(*shape: int) -> Tensor:
    """Distinct spectra in all modes."""
    tensor = _random(*shape)
    for mode, size in enumerate(shape):
        tensor = tensor * torch.logspace(0, -1, size, dtype=torch.float64).reshape(
            [-1 if other == mode else 1 for other in range(len(shape))]
        )
    return tensor


def _error(tensor: Tensor, core: Tensor, factors: list[Tensor]) -> float:
    with tl.backend_context("pytorch", local_threadsafe=True):
        return float((tensor - tucker_to_tensor((core, factors))).norm() / tensor.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("shape", "ranks"), [((12, 13, 8), (5, 6, 4)), ((9, 20), (3, 3)), ((5, 6, 4, 3), (2, 3, 2, 2))]
)
def test_is_as_good_as_tensorlys(dtype: torch.dtype, shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    tensor = _tensor(*shape).to(dtype)
    core, factors = tucker(tensor, ranks, max_iterations=50)
    with tl.backend_context("pytorch", local_threadsafe=True):
        expected = tensorly_tucker(tensor, list(ranks), n_iter_max=100)
    found, oracle = _error(tensor, core, factors), _error(tensor, expected.core, expected.factors)
    assert core.shape == ranks
    assert found == pytest.approx(oracle, abs=2e-3)
    for factor in factors:
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1], dtype=dtype), rtol=0, atol=1e-5)


def test_starts_from_the_higher_order_svd_and_improves_it() -> None:
    tensor = _tensor(12, 13, 8)
    errors = [_error(tensor, *tucker(tensor, [4, 4, 3], max_iterations=count)) for count in (0, 1, 5)]
    # De Lathauwer et al. 2000a: leading left singular vectors of the unfoldings.
    vectors = [torch.linalg.svd(tensor.movedim(m, 0).flatten(1)).U[:, :r] for m, r in enumerate([4, 4, 3])]
    core = torch.einsum("ijk,ia,jb,kc->abc", tensor, *vectors)
    assert errors[0] == pytest.approx(_error(tensor, core, vectors), rel=1e-9)
    assert errors[0] > errors[1] >= errors[2]


def test_goes_on_from_factors_that_are_not_orthonormal() -> None:
    tensor = _tensor(12, 13, 8)
    _, factors = tucker(tensor, [4, 4, 3], max_iterations=20)
    best = _error(tensor, *tucker(tensor, [4, 4, 3], max_iterations=20))
    start = [factor @ _random(factor.shape[1], factor.shape[1], seed=mode) for mode, factor in enumerate(factors)]
    before = [factor.clone() for factor in start]
    assert _error(tensor, *tucker(tensor, [4, 4, 3], start, max_iterations=1)) == pytest.approx(best, rel=1e-4)
    assert all(torch.equal(one, other) for one, other in zip(start, before, strict=True))


@pytest.mark.parametrize("max_iterations", [0, 1, 7, 60])
def test_progress_adds_up_and_nothing_global_changes(max_iterations: int) -> None:
    tensor, shares = _tensor(6, 7, 5), []
    backend = tl.get_backend()
    torch.manual_seed(1)
    np.random.seed(1)
    state, drawn, before = torch.get_rng_state(), np.random.RandomState(1).random_sample(2), tensor.clone()
    first = tucker(tensor, [2, 3, 2], max_iterations=max_iterations, advance=shares.append)
    assert sum(shares) == pytest.approx(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.random_sample(2), drawn)
    assert torch.equal(tensor, before)
    assert tl.get_backend() == backend
    again = tucker(tensor, [2, 3, 2], max_iterations=max_iterations)
    assert torch.equal(first[0], again[0])


@given(st.lists(st.integers(1, 7), min_size=2, max_size=4), st.data())
@settings(deadline=None, max_examples=40)
def test_any_shape_and_ranks(shape: list[int], data: st.DataObject) -> None:
    ranks = possible_ranks(shape, [data.draw(st.integers(1, size)) for size in shape])
    tensor = _random(*shape)
    core, factors = tucker(tensor, ranks)
    assert list(core.shape) == ranks
    assert [tuple(factor.shape) for factor in factors] == list(zip(shape, ranks, strict=True))
    error = _error(tensor, core, factors)
    # Orthonormal projections: what is kept and what is lost add up.
    assert error**2 == pytest.approx(1 - float(core.norm() / tensor.norm()) ** 2, abs=1e-9)
    if ranks == possible_ranks(shape, shape):
        assert error < 1e-7


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_ranks_fill_a_budget(shape: list[int], part: float) -> None:
    smallest = tucker_elements(shape, [1] * len(shape))
    most = tucker_elements(shape, possible_ranks(shape, shape))
    budget = smallest + int(part * (most - smallest))
    ranks = proportional_ranks(shape, lambda some: tucker_elements(shape, some) <= budget)
    assert tucker_elements(shape, ranks) <= budget
    assert ranks == possible_ranks(shape, ranks)
    if part == 1:
        assert ranks == possible_ranks(shape, shape)
    # One more of the finest steps would not fit.
    scale = max((rank + 0.5) / size for rank, size in zip(ranks, shape, strict=True)) + 1e-3
    larger = possible_ranks(shape, [scale * size for size in shape])
    assert larger == ranks or tucker_elements(shape, larger) > budget


def test_ranks_are_to_the_modes_as_one_number() -> None:
    ranks = proportional_ranks([178, 187, 256], lambda some: tucker_elements([178, 187, 256], some) <= 10**6)
    assert max(abs(rank - ranks[2] / 256 * size) for rank, size in zip(ranks, [178, 187, 256], strict=True)) <= 1
    assert 0.97 * 10**6 < tucker_elements([178, 187, 256], ranks) <= 10**6


def test_ranks_that_have_a_meaning() -> None:
    assert possible_ranks([4, 5, 6], [9, 9, 9]) == [4, 5, 6]
    assert possible_ranks([4, 5, 60], [4, 5, 60]) == [4, 5, 20]
    assert possible_ranks([7], [5]) == [1]
    assert possible_ranks([1, 1, 9], [1, 1, 9]) == [1, 1, 1]
    assert math.prod(possible_ranks([3, 3], [0, -2])) == 1
