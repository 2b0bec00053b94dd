"""Tables that are folded and stored as a network of factors, against TensorLy's reconstruction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tensorly as tl
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensorly.cp_tensor import cp_to_tensor
from tensorly.tt_matrix import tt_matrix_to_tensor
from tensorly.tucker_tensor import tucker_to_tensor
from torch import Tensor

from lightning_embcompress.methods import folding
from lightning_embcompress.methods.folded.solver import largest_cp_rank, possible_tucker_ranks
from lightning_embcompress.methods.folding import FoldedTable
from lightning_embcompress.methods.numerics.shapes import balanced_shape
from lightning_embcompress.methods.registry import CP, TensorTrainMatrix, Tucker
from lightning_embcompress.methods.tensor_train_matrix.solver import matrix_ranks

_KINDS = [CP, Tucker, TensorTrainMatrix]
# Relative to the norms of what is multiplied.
_ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-2, torch.float16: 6e-3}


def _reconstructed(factors: FoldedTable[Any]) -> Tensor:
    """The whole table in float64 by TensorLy, without the padding."""
    own = [parameter.detach().double() for parameter in factors.parameters()]
    with tl.backend_context("pytorch", local_threadsafe=True):
        if isinstance(factors, Tucker):
            tensor = tucker_to_tensor((own[0], own[1:]))
        else:
            tensor = cp_to_tensor((None, own)) if isinstance(factors, CP) else tt_matrix_to_tensor(own)
    return tensor.reshape(math.prod(factors.vocab_shape), -1)[: factors.vocab_size, : factors.dim]


@st.composite
def _structures(draw: st.DrawFn) -> tuple[FoldedTable[Any], int]:
    """Any number of modes of any size, padding in both directions, any ranks, any dtype."""
    kind = draw(st.sampled_from(_KINDS))
    vocab_shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    # A TT-matrix has as many of both.
    least, most = (len(vocab_shape), len(vocab_shape)) if kind is TensorTrainMatrix else (1, 2)
    dim_shape = draw(st.lists(st.integers(1, 5), min_size=least, max_size=most))
    vocab_size, dim = draw(st.integers(1, math.prod(vocab_shape))), draw(st.integers(1, math.prod(dim_shape)))
    shape = [*vocab_shape, *dim_shape]
    ranks: Any
    if kind is CP:
        ranks = draw(st.integers(1, min(12, largest_cp_rank(shape))))
    elif kind is Tucker:
        ranks = possible_tucker_ranks(shape, [draw(st.integers(1, size)) for size in shape])
    else:
        most = max(matrix_ranks(vocab_shape, dim_shape, vocab_size * dim))
        ranks = matrix_ranks(vocab_shape, dim_shape, draw(st.integers(1, most)))
    factors = kind(vocab_size, dim, vocab_shape, dim_shape, ranks, draw(st.sampled_from(list(_ROUNDING))))
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return factors, seed


@given(_structures())
@settings(deadline=None, max_examples=120)
def test_rows_and_logits_are_those_of_the_reconstruction(problem: tuple[FoldedTable[Any], int]) -> None:
    factors, seed = problem
    expected = _reconstructed(factors)
    # A row may be far smaller than the products that it is a sum of.
    scale = math.prod(float(parameter.detach().double().norm()) for parameter in factors.parameters())
    close = 4 * _ROUNDING[factors.dtype] * scale
    assert (factors.materialize().double() - expected).norm() <= close
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(factors.vocab_size, (9,), generator=generator)
    assert (factors.rows(ids).double() - expected[ids]).norm() <= close
    # What graphs use, whose shapes do not depend on the ids, and what ids without neighbours use.
    assert (factors._gathered_rows(ids, *factors.parameters()).double() - expected[ids]).norm() <= close
    assert (
        factors._scattered_rows(ids.unique(), *factors.parameters()).double() - expected[ids.unique()]
    ).norm() <= close
    # One state, and so many that rows are the cheaper way.
    for count in (1, 40):
        hidden = torch.randn(count, factors.dim, generator=generator, dtype=torch.float64).to(factors.dtype)
        logits = factors.logits(hidden)
        assert logits.shape == (count, factors.vocab_size)
        assert (logits.double() - hidden.double() @ expected.T).norm() <= close * float(hidden.norm() + 1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [CP, Tucker])
def test_logits_of_many_states_are_contracted_a_few_at_a_time(
    kind: type[FoldedTable[Any]], grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    factors = kind.decompose(table, table.nbytes // 16)
    hidden = torch.randn(3, 7, 32)
    with torch.set_grad_enabled(grad):
        whole = factors.logits(hidden)
        monkeypatch.setattr(folding, "_STATES_ELEMENTS", 2 * factors._costs[2])
        counts = []
        contracted = factors._contracted
        monkeypatch.setattr(
            factors, "_contracted", lambda states, *rest: counts.append(len(states)) or contracted(states, *rest)
        )
        pieces = factors.logits(hidden)
    assert counts == [2] * 10 + [1]
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


def test_costs_count_multiplications() -> None:
    cores = TensorTrainMatrix(15, 6, [3, 5], [2, 3], [1, 4, 1])
    # The 3 · 2 products of the first core with all of the second. States: 2 columns left, rank 1 right, 3 columns, 5
    # rows, 4 ranks; then 2 columns, 4 ranks, 3 rows, 5 rows behind, which are the most numbers on the way.
    assert cores._costs == (6 * (4 * 5 * 3), 2 * 3 * 5 * 4 + 2 * 4 * 3 * 5, 2 * 5 * 4)
    # Columns, core and vocabulary in turn, whatever their order.
    tucker = Tucker(90, 8, [9, 10], [8], [4, 5, 6])
    assert tucker._costs[1] == 8 * 6 + 6 * 4 * 5 + 4 * 5 * 10 + 4 * 10 * 9


@pytest.mark.parametrize("kind", _KINDS)
def test_neighbours_share_what_their_first_digits_have_to_do(
    kind: type[FoldedTable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    factors = kind.decompose(table, table.nbytes // 2)
    last = factors.vocab_shape[-1]
    read, heads = factors._read, []
    monkeypatch.setattr(factors, "_read", lambda digits, own: heads.append(len(digits[0])) or read(digits, own))
    ids = torch.arange(2 * last, 4 * last)
    torch.testing.assert_close(
        factors.rows(ids.repeat(3)), factors._gathered_rows(ids, *factors.parameters()).repeat(3, 1)
    )
    assert heads == [2, 2 * last]


@pytest.mark.parametrize(
    ("kind", "dim_shape"), [(CP, [3, 4]), (Tucker, [3, 4]), (TensorTrainMatrix, [3, 2, 2])], ids=lambda part: str(part)
)
def test_shapes_that_are_given_are_used(kind: type[FoldedTable[Any]], dim_shape: list[int]) -> None:
    table = torch.randn(97, 12, generator=torch.Generator().manual_seed(0))
    config = kind.config_class(vocab_shape=[4, 5, 5], dim_shape=dim_shape)
    factors = kind.decompose(table, table.nbytes // 2, config=config)
    assert factors.stored_bytes() <= table.nbytes // 2
    assert (factors.vocab_shape, factors.dim_shape) == ([4, 5, 5], dim_shape)
    assert 0 < factors.weighted_error(table, torch.ones(97)) < 0.9
    # Rows are those of their own ids, not of padding or neighbours.
    assert factors.weighted_error(torch.randn(97, 12), torch.ones(97)) > 1


def test_cp_of_a_table_of_zeros_can_be_trained() -> None:
    factors = CP.decompose(torch.zeros(100, 16), 100 * 16)
    assert factors.materialize().abs().max() == 0
    assert factors.refined(torch.zeros(100, 16), 100 * 16) is factors
    factors.logits(torch.ones(1, 16)).sum().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in factors.parameters())
    target = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    assert factors.refined(target, 100 * 16).weighted_error(target, torch.ones(100)) < 0.9


def test_ranks_of_tucker_are_to_the_modes_as_one_number() -> None:
    ranks = Tucker.decompose(torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)), 40_000).ranks
    shape = [*balanced_shape(1000, 2), 64]
    assert max(abs(rank - ranks[2] / 64 * size) for rank, size in zip(ranks, shape, strict=True)) <= 1


@given(size=st.integers(1, 10**6), num_modes=st.integers(1, 5))
@example(size=50_257, num_modes=3)
@example(size=793_471, num_modes=3)
@example(size=104_729, num_modes=3)
@settings(deadline=None, max_examples=200)
def test_balanced_shapes_hold_any_size(size: int, num_modes: int) -> None:
    shape = balanced_shape(size, num_modes)
    assert len(shape) == num_modes
    assert list(shape) == sorted(shape)
    assert math.prod(shape) >= size
    assert shape[-1] <= 2 * shape[0] or shape[-1] <= 4 or num_modes == 1
    if size > 5000 and num_modes <= 3:
        assert math.prod(shape) <= (1.01 if size > 33_000 else 1.02) * size
