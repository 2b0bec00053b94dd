"""Tensor-train matrices against TensorLy's, and against their definition."""

from __future__ import annotations

import math

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train_matrix
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_embcompress.methods.registry import TensorTrainMatrix, TensorTrainMatrixConfig
from lightning_embcompress.methods.tensor_train_matrix.solver import (
    balanced_shape,
    contracted_logits,
    contraction_cost,
    decompose_table,
    matrix_ranks,
    rows_of_distinct_ids,
    rows_of_ids,
    rows_of_range,
    table_cost,
)


@given(size=st.integers(1, 10**6), num_modes=st.integers(1, 5))
@settings(deadline=None, max_examples=200)
def test_shapes_hold_any_size_and_are_balanced(size: int, num_modes: int) -> None:
    shape = balanced_shape(size, num_modes)
    assert len(shape) == num_modes
    assert list(shape) == sorted(shape)
    assert math.prod(shape) >= size
    assert shape[-1] <= 2 * shape[0] or shape[-1] <= 4 or num_modes == 1
    if size > 5000 and num_modes <= 3:
        assert math.prod(shape) <= 1.02 * size


@pytest.mark.parametrize("size", [50_257, 33_278, 793_471, 10_007, 104_729])
def test_primes_and_awkward_vocabularies_are_hardly_padded(size: int) -> None:
    assert math.prod(balanced_shape(size, 3)) <= 1.01 * size


def _table(vocab_size: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab_size, dim, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("max_rank", [1, 3, 7, 100])
@pytest.mark.parametrize(
    ("vocab_shape", "dim_shape"),
    [((3, 4, 5), (2, 2, 3)), ((7, 9), (4, 3)), ((60,), (12,)), ((2, 2, 4, 4), (1, 2, 3, 2))],
)
def test_decomposition_is_tensorlys(vocab_shape: tuple[int, ...], dim_shape: tuple[int, ...], max_rank: int) -> None:
    table = _table(math.prod(vocab_shape), math.prod(dim_shape))
    ranks = matrix_ranks(vocab_shape, dim_shape, max_rank)
    cores = decompose_table(table, vocab_shape, dim_shape, ranks)
    assert [tuple(core.shape) for core in cores] == list(zip(ranks, vocab_shape, dim_shape, ranks[1:], strict=False))
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        theirs = tensor_train_matrix(table.reshape(*vocab_shape, *dim_shape), list(ranks)).to_matrix()
    ours = rows_of_range(cores, 0, vocab_shape[0])
    # Another basis of an eigenspace gives another approximation, never a worse one: the errors are compared too.
    assert float((table - ours).norm()) == pytest.approx(float((table - theirs).norm()), rel=1e-6, abs=1e-9)
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=0, atol=1e-6)


def test_padding_changes_nothing_at_full_rank() -> None:
    table = _table(53, 7)
    cores = decompose_table(table, (4, 4, 4), (2, 2, 2), matrix_ranks((4, 4, 4), (2, 2, 2), 1000))
    torch.testing.assert_close(rows_of_range(cores, 0, 4)[:53, :7], table)


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_every_way_of_reading_is_the_definition(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    vocab_shape = data.draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    dim_shape = data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    ranks = [1, *data.draw(st.lists(st.integers(1, 4), min_size=count - 1, max_size=count - 1)), 1]
    cores = [
        _table(left * rows, columns * right, seed=data.draw(st.integers(0, 9))).reshape(left, rows, columns, right)
        for left, rows, columns, right in zip(ranks, vocab_shape, dim_shape, ranks[1:], strict=False)
    ]
    vocab_size = math.prod(vocab_shape)
    expected = torch.stack([_row(cores, index) for index in range(vocab_size)])
    start = data.draw(st.integers(0, vocab_shape[0] - 1))
    step = vocab_size // vocab_shape[0]
    torch.testing.assert_close(rows_of_range(cores, start, vocab_shape[0]), expected[start * step :])
    ids = torch.tensor(data.draw(st.lists(st.integers(0, vocab_size - 1), max_size=12)), dtype=torch.long)
    torch.testing.assert_close(rows_of_ids(cores, ids), expected[ids])
    torch.testing.assert_close(rows_of_distinct_ids(cores, ids.unique()), expected[ids.unique()])
    hidden = _table(3, math.prod(dim_shape), seed=11)
    torch.testing.assert_close(contracted_logits(cores, hidden), hidden @ expected.T)


def _row(cores: list[Tensor], index: int) -> Tensor:
    """`G_1[i_1] · … · G_N[i_N]`, digit by digit from the last one."""
    row = torch.ones(1, 1, dtype=torch.float64)
    for core in reversed(cores):
        index, digit = divmod(index, core.shape[1])
        row = torch.einsum("ajb,bk->ajk", core[:, digit], row).flatten(1)
    return row[0]


def test_costs_count_multiplications() -> None:
    cores = [torch.zeros(1, 3, 2, 4), torch.zeros(4, 5, 3, 1)]
    # States: 2 columns left, rank 1 right, 3 columns, 5 rows, 4 ranks; then 2 columns, 4 ranks, 3 rows, 5 rows behind.
    assert contraction_cost(cores) == 2 * 3 * 5 * 4 + 2 * 4 * 3 * 5
    # The 3 · 2 products of the first core with all of the second.
    assert table_cost(cores) == 6 * (4 * 5 * 3)


def test_cost_of_a_lookup_follows_the_distinct_ids() -> None:
    factors = TensorTrainMatrix(1000, 8, [10, 10, 10], [2, 2, 2], [1, 6, 6, 1])
    factors.initialize(1.0)
    multiplied = []
    for ids in (torch.arange(4).repeat(500), torch.arange(400).repeat(5)):
        with FlopCounterMode(display=False) as counter:
            factors.rows(ids)
        multiplied.append(counter.get_total_flops())
    assert multiplied[0] < multiplied[1] / 20


def test_ids_in_the_padding_are_refused() -> None:
    factors = TensorTrainMatrix(997, 7, [10, 10, 10], [2, 2, 2], [1, 2, 2, 1])
    for bad in (997, 999, 1000, -1):
        with pytest.raises(IndexError, match="ids must be from 0 to 996"):
            factors.rows(torch.tensor([5, bad]))


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("max_rank", [4, 16])
def test_random_cores_give_the_table_the_variance_it_had(std: float, max_rank: int) -> None:
    table = std * _table(4000, 64, torch.float32)
    options = TensorTrainMatrixConfig(max_rank=max_rank, init="random")
    torch.manual_seed(0)
    factors = TensorTrainMatrix.decompose(table, table.nbytes, options=options)
    assert float(factors.materialize().std()) == pytest.approx(std, rel=0.25)
    assert all(abs(float(core.mean())) < 0.2 * float(core.std()) + 1e-6 for core in factors.cores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rank": 0}, "max_rank must be 1 or more, it is 0"),
        ({"vocab_shape": [3, 0]}, "vocab_shape must be sizes of 1 or more"),
        ({"vocab_shape": [3, 4], "dim_shape": [2, 2, 2]}, "must have as many sizes"),
        ({"init": "zero"}, "init must be 'decompose' or 'random', it is 'zero'"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorTrainMatrixConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_shape": [10, 9]}, r"vocab_shape \[10, 9\] has a product of 90: it must be at least the 100 rows"),
        ({"dim_shape": [2, 2, 1]}, r"dim_shape \[2, 2, 1\] has a product of 4: it must be at least the 8 columns"),
        ({"max_rank": 1000}, "max_rank must be at most .* for the shapes .*, it is 1000"),
    ],
)
def test_shapes_and_ranks_that_do_not_fit_the_table(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorTrainMatrix.smallest_bytes(100, 8, 4, TensorTrainMatrixConfig(**options))  # type: ignore[arg-type]
