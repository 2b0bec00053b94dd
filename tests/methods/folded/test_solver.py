"""CP and Tucker through TensorLy: against direct implementations and TensorLy's own defaults."""

from __future__ import annotations

import math

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.cp_tensor import cp_to_tensor
from tensorly.decomposition import tucker as tensorly_tucker
from tensorly.tenalg import khatri_rao
from tensorly.tucker_tensor import tucker_to_tensor
from torch import Tensor

from lightning_embcompress.methods.folded.solver import cp, largest_cp_rank, possible_tucker_ranks, tucker
from toys import normal


def _tensor(*shape: int) -> Tensor:
    """Distinct spectra in all modes."""
    tensor = normal(*shape)
    for mode, size in enumerate(shape):
        spectrum = torch.logspace(0, -1, size, dtype=torch.float64)
        tensor = tensor * spectrum.reshape([-1 if other == mode else 1 for other in range(len(shape))])
    return tensor


def _error(tensor: Tensor, factors: list[Tensor], core: Tensor | None = None) -> float:
    with tl.backend_context("pytorch", local_threadsafe=True):
        found = cp_to_tensor((None, factors)) if core is None else tucker_to_tensor((core, factors))
        return float((tensor - found).norm() / tensor.norm())


def _alternating_least_squares(tensor: Tensor, factors: list[Tensor], rounds: int) -> list[Tensor]:
    """Kolda and Bader 2009, figure 3.3, with least squares solved as such."""
    factors = list(factors)
    for _ in range(rounds):
        for mode in range(tensor.dim()):
            with tl.backend_context("pytorch", local_threadsafe=True):
                others = khatri_rao(factors, skip_matrix=mode)
            unfolded = tensor.movedim(mode, 0).flatten(1)
            factors[mode] = torch.linalg.lstsq(others, unfolded.T).solution.T
    return factors


@pytest.mark.parametrize(("shape", "rank"), [((9, 10, 7), 4), ((12, 5), 3), ((4, 5, 3, 6), 5)])
def test_rounds_of_cp_are_those_of_alternating_least_squares(shape: tuple[int, ...], rank: int) -> None:
    tensor = normal(*shape)
    start = [normal(size, rank, seed=mode + 1) for mode, size in enumerate(shape)]
    before = [factor.clone() for factor in start]
    found = cp(tensor, rank, start, max_iterations=3)
    expected = _alternating_least_squares(tensor, start, 3)
    assert all(torch.equal(one, other) for one, other in zip(start, before, strict=True))
    assert _error(tensor, found) == pytest.approx(_error(tensor, expected), abs=1e-4)
    with tl.backend_context("pytorch", local_threadsafe=True):
        assert (cp_to_tensor((None, found)) - cp_to_tensor((None, expected))).norm() < 0.01 * tensor.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cp_finds_what_is_there(dtype: torch.dtype) -> None:
    factors = [normal(size, 3, seed=size, dtype=dtype) for size in (9, 10, 7)]
    tensor = torch.einsum("ir,jr,kr->ijk", *factors) * 1000
    solved = cp(tensor, 3, max_iterations=300)
    assert solved[0].dtype == dtype
    assert _error(tensor, solved) < 0.02
    # The scale of a component is shared out evenly.
    norms = torch.stack([factor.norm(dim=0) for factor in solved])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-4, atol=0)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.data())
@settings(deadline=None, max_examples=40)
def test_cp_of_any_shape_and_rank(shape: list[int], data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(30, largest_cp_rank(shape))))
    tensor = normal(*shape, dtype=torch.float32)
    factors = cp(tensor, rank)
    assert [tuple(factor.shape) for factor in factors] == [(size, rank) for size in shape]
    assert all(factor.isfinite().all() for factor in factors)
    assert _error(tensor, factors) <= 1.001


@pytest.mark.parametrize(
    ("shape", "ranks"), [((12, 13, 8), (5, 6, 4)), ((9, 20), (3, 3)), ((5, 6, 4, 3), (2, 3, 2, 2))]
)
def test_tucker_is_as_good_as_tensorlys(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    tensor = _tensor(*shape).float()
    core, factors = tucker(tensor, ranks, max_iterations=50)
    with tl.backend_context("pytorch", local_threadsafe=True):
        expected = tensorly_tucker(tensor, list(ranks), n_iter_max=100)
    assert core.shape == ranks
    assert _error(tensor, factors, core) == pytest.approx(_error(tensor, expected.factors, expected.core), abs=2e-3)
    for factor in factors:
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]), rtol=0, atol=1e-5)


def test_tucker_starts_from_the_higher_order_svd_and_improves_it() -> None:
    tensor = _tensor(12, 13, 8)
    errors = []
    for count in (0, 1, 5):
        core, factors = tucker(tensor, [4, 4, 3], max_iterations=count)
        errors.append(_error(tensor, factors, core))
    # De Lathauwer et al. 2000a: leading left singular vectors of the unfoldings.
    vectors = [torch.linalg.svd(tensor.movedim(m, 0).flatten(1)).U[:, :r] for m, r in enumerate([4, 4, 3])]
    core = torch.einsum("ijk,ia,jb,kc->abc", tensor, *vectors)
    assert errors[0] == pytest.approx(_error(tensor, vectors, core), rel=1e-9)
    assert errors[0] > errors[1] >= errors[2]


@given(st.lists(st.integers(1, 7), min_size=2, max_size=4), st.data())
@settings(deadline=None, max_examples=40)
def test_tucker_of_any_shape_and_ranks(shape: list[int], data: st.DataObject) -> None:
    ranks = possible_tucker_ranks(shape, [data.draw(st.integers(1, size)) for size in shape])
    tensor = normal(*shape)
    core, factors = tucker(tensor, ranks)
    assert list(core.shape) == ranks
    assert [tuple(factor.shape) for factor in factors] == list(zip(shape, ranks, strict=True))
    error = _error(tensor, factors, core)
    # Orthonormal projections: what is kept and what is lost add up.
    assert error**2 == pytest.approx(1 - float(core.norm() / tensor.norm()) ** 2, abs=1e-9)
    if ranks == possible_tucker_ranks(shape, shape):
        assert error < 1e-7


def test_ranks_of_tucker_that_have_a_meaning() -> None:
    assert possible_tucker_ranks([4, 5, 6], [9, 9, 9]) == [4, 5, 6]
    assert possible_tucker_ranks([4, 5, 60], [4, 5, 60]) == [4, 5, 20]
    assert possible_tucker_ranks([7], [5]) == [1]
    assert possible_tucker_ranks([1, 1, 9], [1, 1, 9]) == [1, 1, 1]
    assert math.prod(possible_tucker_ranks([3, 3], [0, -2])) == 1
