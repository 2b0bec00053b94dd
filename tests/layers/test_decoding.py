"""Decoding from tiles of the logits, against all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.methods.registry import LowRank
from toys import compressed_head, draw_blocks

VOCAB_SIZE, DIM = 300, 16


def _hidden(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def _check_topk(head: CompressedLinear, hidden: Tensor, k: int) -> None:
    with torch.no_grad():
        logits = head(hidden)
    found = head.topk(hidden, k)
    expected = logits.topk(k)
    torch.testing.assert_close(found.logits, expected.values)
    # The same logits: tokens that are equal up to rounding may stand for one another.
    torch.testing.assert_close(logits.gather(-1, found.ids), expected.values)
    assert all(len(set(row)) == k for row in found.ids.view(-1, k).tolist())


@settings(max_examples=60)
@given(st.data())
def test_the_best_of_random_blocks(data: st.DataObject) -> None:
    factors = draw_blocks(data.draw)
    for parameter in factors.parameters():
        # Rows of zeros, and equal ones.
        if data.draw(st.booleans()) and len(parameter):
            parameter.detach()[len(parameter) // 2 :] = data.draw(st.sampled_from([0.0, 1.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    head = CompressedLinear(factors, nn.Parameter(torch.randn(factors.vocab_size, generator=generator)))
    hidden = torch.randn(data.draw(st.integers(1, 6)), factors.dim, generator=generator)
    _check_topk(head, hidden, data.draw(st.integers(1, factors.vocab_size)))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["hidden", "factor", "bias"])
def test_the_best_among_what_is_no_number(number: float, place: str) -> None:
    head, hidden = compressed_head("low_rank", VOCAB_SIZE), _hidden(2)
    with torch.no_grad():
        if place == "hidden":
            hidden[0, 3] = number
        elif place == "factor":
            head.factorization.get_parameter("coefficients")[5] = number
        else:
            assert head.bias is not None
            head.bias[5] = number
        expected = head(hidden).topk(4)
    torch.testing.assert_close(head.topk(hidden, 4).logits, expected.values, equal_nan=True)


@pytest.mark.parametrize("method", ["group_reduce", "product_quantization"])
def test_no_graph_is_built(method: str) -> None:
    head = compressed_head(method, VOCAB_SIZE)
    with torch.inference_mode():
        # Autograd would refuse to keep it.
        hidden = _hidden(6).clone()
    ids = torch.arange(6)
    logits = head(_hidden(6)).detach()
    torch.testing.assert_close(head.topk(hidden, 3).logits, logits.topk(3).values)
    torch.testing.assert_close(head.log_prob(hidden, ids), logits.log_softmax(dim=1).diag())
    assert head.sample(hidden, top_k=3).shape == (6,)


def test_bans_by_bias() -> None:
    head, hidden = compressed_head("group_reduce", VOCAB_SIZE), _hidden(2)
    assert head.bias is not None
    with torch.no_grad():
        head.bias.fill_(-torch.inf)[7] = 0.0
    assert head.topk(hidden, 3).ids[:, 0].tolist() == [7, 7]
    assert head.sample(hidden, top_k=3).tolist() == [7, 7]
    assert head.sample(hidden, top_p=0.9).tolist() == [7, 7]
    assert head.log_prob(hidden, torch.tensor([7, 8])).tolist() == [0.0, -torch.inf]


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_no_samples_of_what_is_no_number(options: dict[str, Any]) -> None:
    hidden = _hidden(3)
    hidden[1, 0] = torch.nan
    with pytest.raises(ValueError, match="state 1"):
        compressed_head("low_rank", VOCAB_SIZE).sample(hidden, **options)


def test_the_lowest_temperatures_draw_the_best() -> None:
    head, hidden = compressed_head("low_rank", VOCAB_SIZE), _hidden(6)
    assert torch.equal(head.sample(hidden, temperature=1e-37), head(hidden).argmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_kept_whatever_the_default_is(dtype: torch.dtype) -> None:
    head = compressed_head("group_reduce", VOCAB_SIZE, DIM, dtype)
    before = torch.get_default_dtype()
    for states, default in ((1, torch.float32), (9, torch.float32), (1, torch.float64), (1, torch.bfloat16)):
        expected = head(_hidden(states, dtype=dtype)).topk(5).values.detach()
        torch.set_default_dtype(default)
        try:
            found = head.topk(_hidden(states, dtype=dtype), 5)
        finally:
            torch.set_default_dtype(before)
        torch.testing.assert_close(found.logits, expected)


def test_log_prob() -> None:
    head, hidden = compressed_head("group_reduce", VOCAB_SIZE), _hidden(3, 4)
    expected = head(hidden).log_softmax(dim=-1).detach()
    ids = torch.randint(VOCAB_SIZE, (3, 4, 5))
    torch.testing.assert_close(head.log_prob(hidden, ids), expected.gather(2, ids))
    torch.testing.assert_close(head.log_prob(hidden, ids[..., 0]), expected.gather(2, ids[..., :1]).squeeze(2))
    torch.testing.assert_close(head.log_prob(hidden[0, 0], ids[0, 0]), expected[0, 0, ids[0, 0]])
    assert head.log_prob(hidden[:0], ids[:0]).shape == (0, 4, 5)
    assert head.log_prob(hidden, ids[..., :0]).shape == (3, 4, 0)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.5, "temperature": 2.0}],
    ids=str,
)
def test_samples_are_of_the_distribution(options: dict[str, Any]) -> None:
    head = compressed_head("group_reduce", VOCAB_SIZE)
    hidden = _hidden(1)
    scores = head(hidden).detach() / options.get("temperature", 1.0)
    if "top_k" in options:
        scores = transformers.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = transformers.TopPLogitsWarper(options["top_p"])(None, scores)
    chances = scores.softmax(dim=1)[0].double()
    draws = 20_000
    ids = head.sample(hidden.expand(draws, DIM), generator=torch.Generator().manual_seed(0), **options)
    assert ids.shape == (draws,)
    found = torch.bincount(ids, minlength=VOCAB_SIZE).double()
    assert not found[chances == 0].any()
    # Pearson's statistic, of as many degrees of freedom as there are tokens with a chance; rare ones are put together.
    often = chances * draws >= 5
    expected = torch.cat([chances[often], chances[~often].sum().view(1)]) * draws
    seen = torch.cat([found[often], found[~often].sum().view(1)])
    statistic = float(((seen - expected).square() / expected.clamp(min=1)).sum())
    degrees = int(often.sum())
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 5


def test_large_vocabularies_are_drawn_from_in_runs() -> None:
    table = torch.zeros(5000, 2)
    table[4321] = 1
    head = CompressedLinear(LowRank.decompose(table, table.nbytes))
    hidden = torch.full((2000, 2), 5.0)
    ids = head.sample(hidden, generator=torch.Generator().manual_seed(0))
    share = float((ids == 4321).double().mean())
    expected = float(head(hidden[:1]).softmax(dim=1)[0, 4321])
    assert abs(share - expected) < 5 * (expected * (1 - expected) / 2000) ** 0.5
    assert ids.ge(0).logical_and(ids.lt(5000)).all()
    assert torch.equal(ids, head.sample(hidden, generator=torch.Generator().manual_seed(0)))
    assert head.sample(hidden[:0]).shape == (0,)
    assert head.sample(hidden.view(40, 50, 2)).shape == (40, 50)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda head: head.topk(_hidden(1), 0), "k must .* 0"),
        (lambda head: head.topk(_hidden(1), 301), "301"),
        (lambda head: head.topk(torch.zeros(4, 8), 3), r"16 .*\(4, 8\)"),
        (lambda head: head.sample(_hidden(1), temperature=0.0), "temperature"),
        (lambda head: head.sample(_hidden(1), top_p=0.0), "top_p"),
        (lambda head: head.sample(_hidden(1), top_k=0), "top_k"),
        (lambda head: head.sample(torch.zeros(4, 8)), "16"),
        (lambda head: head.log_prob(torch.zeros(4, 8), torch.zeros(4, dtype=torch.long)), "16"),
        (lambda head: head.log_prob(_hidden(2), torch.zeros(3, dtype=torch.long)), r"ids of shape \(2,\)"),
        (lambda head: head.log_prob(_hidden(1), torch.tensor([300])), "ids must .* 299"),
    ],
)
def test_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(compressed_head("low_rank", VOCAB_SIZE))
