"""Tucker and CP of a folded table: what they store, against TensorLy's reconstruction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tensorly as tl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.cp_tensor import cp_to_tensor
from tensorly.tucker_tensor import tucker_to_tensor
from torch import Tensor

from lightning_embcompress.methods.registry import CP, CPConfig, Tucker, TuckerConfig
from lightning_embcompress.methods.tensorly import folding
from lightning_embcompress.methods.tensorly.cp_solver import largest_cp_rank
from lightning_embcompress.methods.tensorly.tucker_solver import possible_ranks

# Relative to the norms of what is multiplied.
_ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-2, torch.float16: 6e-3}


def _filled(factors: Tucker | CP, seed: int = 0) -> Tucker | CP:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return factors


def _reconstructed(factors: Tucker | CP) -> Tensor:
    """The whole table in float64 by TensorLy, unfolded, without the padding."""
    modes = [factor.detach().double() for factor in factors.factors]
    with tl.backend_context("pytorch", local_threadsafe=True):
        if isinstance(factors, Tucker):
            tensor = tucker_to_tensor((factors.core.detach().double(), modes))
        else:
            tensor = cp_to_tensor((None, modes))
    rows = math.prod(factors.vocab_shape)
    return tensor.reshape(rows, -1)[: factors.vocab_size, : factors.dim]


@st.composite
def _structures(draw: st.DrawFn) -> tuple[Tucker | CP, int]:
    """Any number of modes of any size, padding in both directions, any ranks, any dtype."""
    vocab_shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    dim_shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    vocab_size, dim = draw(st.integers(1, math.prod(vocab_shape))), draw(st.integers(1, math.prod(dim_shape)))
    shape, dtype = [*vocab_shape, *dim_shape], draw(st.sampled_from(list(_ROUNDING)))
    seed = draw(st.integers(0, 99))
    if draw(st.booleans()):
        rank = draw(st.integers(1, min(12, largest_cp_rank(shape))))
        return _filled(CP(vocab_size, dim, vocab_shape, dim_shape, rank, dtype), seed), seed
    ranks = possible_ranks(shape, [draw(st.integers(1, size)) for size in shape])
    return _filled(Tucker(vocab_size, dim, vocab_shape, dim_shape, ranks, dtype), seed), seed


@given(_structures())
@settings(deadline=None, max_examples=120)
def test_rows_and_logits_are_those_of_the_reconstruction(problem: tuple[Tucker | CP, int]) -> None:
    factors, seed = problem
    expected, rounding = _reconstructed(factors), _ROUNDING[factors.dtype]
    # A row may be far smaller than the products that it is a sum of.
    scale = math.prod(float(parameter.detach().double().norm()) for parameter in factors.parameters())
    assert (factors.materialize().double() - expected).norm() <= rounding * scale
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(factors.vocab_size, (9,), generator=generator)
    assert (factors.rows(ids).double() - expected[ids]).norm() <= 4 * rounding * scale
    # What graphs use, whose shapes do not depend on the ids.
    rows = factors._rows_of(ids, False, *factors.parameters())[:, : factors.dim]
    assert (rows.double() - expected[ids]).norm() <= 4 * rounding * scale
    # One state, and so many that rows are the cheaper way.
    for count in (1, 40):
        hidden = torch.randn(count, factors.dim, generator=generator, dtype=torch.float64).to(factors.dtype)
        logits = factors.logits(hidden)
        assert logits.shape == (count, factors.vocab_size)
        assert (logits.double() - hidden.double() @ expected.T).norm() <= rounding * scale * float(hidden.norm() + 1)


@given(_structures(), st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_gradients_are_those_of_the_dense_table(problem: tuple[Tucker | CP, int], count: int) -> None:
    factors, seed = problem
    factors = factors.double()
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, factors.dim, generator=generator, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(count, factors.vocab_size, generator=generator, dtype=torch.float64)
    inputs = [hidden, *factors.parameters()]
    found = torch.autograd.grad((factors.logits(hidden) * scores).sum(), inputs)
    table = factors.rows(torch.arange(factors.vocab_size))
    expected = torch.autograd.grad((hidden @ table.T * scores).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.norm() + 1))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("method", [CP, Tucker])
def test_logits_of_many_states_are_contracted_a_few_at_a_time(
    method: type[Tucker | CP], grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    factors = method.decompose(table, table.nbytes // 16)
    hidden = torch.randn(3, 7, 32)
    with torch.set_grad_enabled(grad):
        whole = factors.logits(hidden)
        monkeypatch.setattr(folding, "_STATES_ELEMENTS", 2 * factors._costs()[2])
        counts = []
        contracted = factors._contracted
        monkeypatch.setattr(
            factors, "_contracted", lambda states, *rest: counts.append(len(states)) or contracted(states, *rest)
        )
        pieces = factors.logits(hidden)
    assert counts == [2] * 10 + [1]
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


def test_lookup_computes_what_ids_share_once(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = _filled(Tucker(90, 8, [9, 10], [8], [4, 5, 6]))
    products = 0
    bmm = torch.Tensor.__matmul__

    def counted(one: Tensor, other: Tensor) -> Tensor:
        nonlocal products
        products += one.numel() * other.shape[-1]
        return bmm(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    ids = torch.arange(20, 30)
    factors.rows(ids)
    # One contraction of the core, then ten rows of it.
    assert products == 4 * 5 * 6 + 10 * 5 * 6 + 10 * 6 * 8
    products = 0
    factors.rows(ids.repeat(50))
    assert products == 4 * 5 * 6 + 10 * 5 * 6 + 10 * 6 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_shape": [3, 3]}, r"vocab_shape \[3, 3\] must be sizes of 1 or more with a product of at least 10"),
        ({"vocab_shape": []}, r"vocab_shape \[\] must be"),
        ({"dim_shape": [2, 0]}, r"dim_shape \[2, 0\] must be sizes of 1 or more with a product of at least 4"),
        ({"vocab_shape": "2, 5"}, r"'vocab_shape' must be a list of integers"),
        ({"dim_shape": None}, r"'dim_shape' must be a list of integers"),
    ],
)
@pytest.mark.parametrize("method", [CP, Tucker])
def test_structures_that_are_not_possible(method: type[Tucker | CP], change: dict[str, Any], message: str) -> None:
    size = {"rank": 3} if method is CP else {"ranks": [2, 2, 2]}
    spec = {"kind": method.kind, "vocab_size": 10, "dim": 4, "vocab_shape": [2, 5], "dim_shape": [4], **size}
    method.from_spec(spec, torch.float32)
    with pytest.raises(ValueError, match=message):
        method.from_spec({**spec, **change}, torch.float32)


@pytest.mark.parametrize("rank", [0, 9, None, "2", 1.5])
def test_ranks_of_cp_that_are_not_possible(rank: Any) -> None:
    spec = {"kind": "cp", "vocab_size": 10, "dim": 4, "vocab_shape": [2, 5], "dim_shape": [4], "rank": 8}
    CP.from_spec(spec, torch.float32)
    with pytest.raises(ValueError, match="rank"):
        CP.from_spec({**spec, "rank": rank}, torch.float32)


@pytest.mark.parametrize("ranks", [[2, 2], [2, 2, 5], [1, 2, 3], [0, 2, 2], [], "222", [2, 2, 2.0]])
def test_ranks_of_tucker_that_are_not_possible(ranks: Any) -> None:
    spec = {"kind": "tucker", "vocab_size": 10, "dim": 4, "vocab_shape": [2, 5], "dim_shape": [4], "ranks": [2, 4, 4]}
    Tucker.from_spec(spec, torch.float32)
    with pytest.raises(ValueError, match="ranks"):
        Tucker.from_spec({**spec, "ranks": ranks}, torch.float32)


@pytest.mark.parametrize("options", [TuckerConfig, CPConfig])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"vocab_shape": [3, 33]},
            r"vocab_shape \[3, 33\] has a product of 99: it must be at least the 100 rows of the",
        ),
        ({"dim_shape": [3, 5]}, r"dim_shape \[3, 5\] has a product of 15: it must be at least the 16 columns of the"),
        ({"vocab_shape": []}, r"vocab_shape must be sizes of 1 or more, it is \[\]"),
        ({"dim_shape": [4, -4]}, r"dim_shape must be sizes of 1 or more, it is \[4, -4\]"),
        ({"max_iterations": -1}, r"max_iterations must be \d or more, it is -1"),
    ],
)
def test_options_that_do_not_fit(options: Any, given: dict[str, Any], message: str) -> None:
    method = Tucker if options is TuckerConfig else CP
    with pytest.raises(ValueError, match=message):
        method.smallest_bytes(100, 16, 4, options(**given))


def test_options_of_size_that_are_out_of_their_range() -> None:
    with pytest.raises(ValueError, match=r"rank must be 1 or more, it is 0"):
        CPConfig(rank=0)
    with pytest.raises(ValueError, match=r"ranks must be 1 or more, they are \[\]"):
        TuckerConfig(ranks=[])


@pytest.mark.parametrize("method", [CP, Tucker])
def test_shapes_of_any_order_are_used(method: type[Tucker | CP]) -> None:
    table = torch.randn(97, 12, generator=torch.Generator().manual_seed(0))
    options = method.config_class(vocab_shape=[4, 5, 5], dim_shape=[3, 4])
    factors = method.decompose(table, table.nbytes // 2, options=options)
    assert factors.stored_bytes() <= table.nbytes // 2
    assert [factor.shape[0] for factor in factors.factors] == [4, 5, 5, 3, 4]
    error = factors.weighted_error(table, torch.ones(97))
    assert 0 < error < 0.9
    # Rows are those of their own ids, not of padding or neighbours.
    shuffled = torch.randn(97, 12)
    assert factors.weighted_error(shuffled, torch.ones(97)) > 1


def test_cp_of_a_table_of_zeros_can_be_trained() -> None:
    factors = CP.decompose(torch.zeros(100, 16), 100 * 16)
    assert factors.materialize().abs().max() == 0
    assert factors.refined(torch.zeros(100, 16), 100 * 16) is factors
    factors.logits(torch.ones(1, 16)).sum().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in factors.parameters())
    target = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    assert factors.refined(target, 100 * 16).weighted_error(target, torch.ones(100)) < 0.9


def test_tucker_of_a_table_of_zeros() -> None:
    factors = Tucker.decompose(torch.zeros(100, 16), 100 * 16)
    assert factors.materialize().abs().max() == 0
    assert all(parameter.isfinite().all() for parameter in factors.refined(torch.zeros(100, 16), 1600).parameters())
