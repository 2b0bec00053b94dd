"""Product quantization: what is stored, in how many bits, and how it is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.methods.product_quantization import factorization as product_quantization
from lightning_embcompress.methods.product_quantization.solver import subspace_sizes
from lightning_embcompress.methods.registry import ProductQuantization, ProductQuantizationConfig
from lightning_embcompress.methods.specs import TENSOR_HEADER_BYTES
from toys import falling_counts, falling_table, loss_metric


def _decomposed(table: Tensor, max_bytes: int | None = None, **given: Any) -> ProductQuantization:
    config = ProductQuantizationConfig(**given)
    if max_bytes is None:
        max_bytes = ProductQuantization.smallest_bytes(*table.shape, table.element_size(), config)
    return ProductQuantization.decompose(table, max_bytes, falling_counts(len(table), 1), config)


def _reconstructed(factors: ProductQuantization) -> Tensor:
    """Every column of a row from the codebook, by the definition."""
    sizes = torch.tensor(subspace_sizes(factors.dim, factors.subspaces))
    return torch.gather(factors.codebook, 0, factors.codes.long()[:, torch.repeat_interleave(sizes)])


@st.composite
def _structures(draw: st.DrawFn) -> tuple[ProductQuantization, int]:
    vocab_size, dim = draw(st.integers(1, 50)), draw(st.integers(1, 12))
    subspaces, centroids = draw(st.integers(1, dim)), draw(st.integers(1, vocab_size))
    rare_tokens = draw(st.integers(0, vocab_size))
    rare = draw(st.integers(1, centroids)) if rare_tokens else 0
    factors = ProductQuantization(vocab_size, dim, subspaces, centroids, rare, rare_tokens, torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    is_rare = torch.zeros(vocab_size, dtype=torch.bool)
    is_rare[torch.randperm(vocab_size, generator=generator)[:rare_tokens]] = True
    codes = torch.randint(centroids, (vocab_size, subspaces), generator=generator, dtype=torch.int16)
    codes[is_rare] = codes[is_rare] % max(rare, 1)
    factors._keep(codes, is_rare)
    factors.codebook.data.copy_(torch.randn(centroids, dim, generator=generator))
    return factors, draw(st.integers(1, 9))


@given(_structures())
@settings(deadline=None, max_examples=100)
def test_any_structure(problem: tuple[ProductQuantization, int]) -> None:
    factors, count = problem
    table = _reconstructed(factors)
    assert torch.equal(factors.materialize(), table)
    hidden = torch.randn(count, factors.dim, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(count, factors.vocab_size, dtype=torch.float64)
    logits = factors.logits(hidden)
    torch.testing.assert_close(logits, hidden @ table.T)
    ids = torch.randint(factors.vocab_size, (7,))
    inputs = [hidden, factors.codebook]
    found = torch.autograd.grad((logits * scores).sum() + factors.rows(ids).square().sum(), inputs)
    reference = ((hidden @ table.T) * scores).sum() + table[ids].square().sum()
    for one, other in zip(found, torch.autograd.grad(reference, inputs), strict=True):
        torch.testing.assert_close(one, other)
    # What is stored is enough, and takes as many bytes as were promised.
    spec = json.loads(json.dumps(factors.spec()))
    loaded = ProductQuantization.from_spec(spec, torch.float64)
    loaded.load_state_dict(factors.state_dict())
    assert torch.equal(loaded.codes, factors.codes)
    assert torch.equal(loaded.is_rare, factors.is_rare)
    assert int(loaded.is_rare.sum()) == factors.rare_tokens
    structure = (factors.subspaces, factors.centroids, factors.rare_centroids, factors.rare_tokens)
    promised = ProductQuantization.bytes_of(factors.vocab_size, factors.dim, 8, *structure)
    assert factors.stored_bytes() == promised


def test_both_ways_to_logits_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = _decomposed(falling_table(300, 8, last=1.0), subspaces=4, bits=4)
    made = []
    rows = factors._rows_between
    monkeypatch.setattr(factors, "_rows_between", lambda *given: made.append(given[0]) or rows(*given))
    monkeypatch.setattr(product_quantization, "_CODES", 200)
    for count in (32, 33):
        hidden = torch.randn(count, 8)
        torch.testing.assert_close(factors.logits(hidden), hidden @ factors.materialize().T, rtol=1e-5, atol=1e-5)
    assert made == [0, 75, 150, 225]


@pytest.mark.parametrize("bits", [1, 3, 8, 9])
def test_codes_take_their_bits_on_disk(bits: int) -> None:
    factors = _decomposed(falling_table(700, 6, last=1.0), subspaces=3, bits=bits)
    centroids = min(2**bits, 700)
    assert factors.codebook.shape == (centroids, 6)
    state = factors.state_dict()
    assert sorted(state) == ["codebook", "packed_codes"]
    assert state["packed_codes"].numel() == (700 * 3 * bits + 7) // 8
    assert factors.codes.dtype == (torch.uint8 if bits <= 8 else torch.int16)
    header = len(json.dumps(factors.spec(), separators=(",", ":"))) + 2 * TENSOR_HEADER_BYTES
    assert factors.stored_bytes() == centroids * 6 * 4 + (700 * 3 * bits + 7) // 8 + header


def test_as_many_subspaces_as_fit() -> None:
    table = falling_table(2000, 24, last=1.0)
    for ratio in (6, 9, 20):
        max_bytes = table.nbytes // ratio
        factors = _decomposed(table, max_bytes, bits=5)
        assert max_bytes - 2000 * 5 // 8 - 1 <= factors.stored_bytes() <= max_bytes
    assert _decomposed(table, table.nbytes, bits=5).subspaces == 24


def test_codebooks_take_at_most_half_of_the_bytes() -> None:
    table = falling_table(1000, 16, last=1.0)
    bits = [int(_decomposed(table, table.nbytes // ratio).centroids).bit_length() - 1 for ratio in (2, 3, 4, 8, 16, 32)]
    assert bits == [7, 7, 6, 5, 4, 3]
    # A large table has eight bits from the start.
    assert ProductQuantization.smallest_bytes(1000, 16, 4) < 1000
    assert list(ProductQuantizationConfig().widths) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert list(ProductQuantizationConfig(rare_bits=3).widths) == [8, 7, 6, 5, 4]
    assert list(ProductQuantizationConfig(subspaces=3).widths) == [8]
    assert list(ProductQuantizationConfig(bits=4).widths) == [4]


def test_no_more_centroids_than_tokens() -> None:
    table = falling_table(5, 6, last=1.0)
    factors = _decomposed(table, subspaces=2)
    assert factors.centroids == 5
    torch.testing.assert_close(factors.materialize(), table)
    assert _decomposed(falling_table(1, 3, last=1.0), subspaces=3).packed_codes.numel() == 0


def test_rare_tokens_have_shorter_codes() -> None:
    table = falling_table(1000, 16, last=1.0)
    plain = _decomposed(table, subspaces=8, bits=6)
    factors = _decomposed(table, subspaces=8, bits=6, rare_bits=3, rare_fraction=0.75)
    assert (factors.rare_tokens, factors.rare_centroids) == (750, 8)
    # The least frequent of the vocabulary.
    counts = falling_counts(1000, 1)
    assert counts[factors.is_rare].max() <= counts[~factors.is_rare].min()
    assert int(factors.codes[factors.is_rare].max()) < 8 < int(factors.codes[~factors.is_rare].max())
    assert plain.packed_codes.numel() == 6000
    assert factors.packed_codes.numel() == 1500
    assert factors.packed_rare_codes.numel() == 2250
    assert factors.packed_rare.numel() == 125
    # The frequent ones are as they were, or better.
    frequent = (~factors.is_rare).double()
    assert factors.weighted_error(table, frequent) < 1.1 * plain.weighted_error(table, frequent)
    assert factors.weighted_error(table, 1 - frequent) > plain.weighted_error(table, 1 - frequent)


def test_rare_tokens_make_room_for_more_subspaces() -> None:
    table = falling_table(1000, 32, last=1.0)
    plain, factors = (_decomposed(table, 8000, bits=4, **given) for given in ({}, {"rare_bits": 1}))
    assert factors.subspaces > plain.subspaces
    assert factors.stored_bytes() <= 8000


def test_refining_keeps_who_is_rare() -> None:
    table = falling_table(400, 8, last=1.0)
    factors = _decomposed(table, subspaces=4, bits=5, rare_bits=2)
    rare, packed = factors.is_rare, factors.packed_rare.clone()
    target = table + 0.3 * falling_table(400, 8, last=1.0).flip(0)
    before = factors.weighted_error(target, torch.ones(400))
    # By other counts others would be.
    refined = factors.refined(target, 10**6, falling_counts(400, 1).flip(0))
    assert refined is factors
    assert torch.equal(factors.is_rare, rare)
    assert torch.equal(factors.packed_rare, packed)
    assert factors.weighted_error(target, torch.ones(400)) < before


def test_tokens_without_counts_are_rare_from_the_end() -> None:
    config = ProductQuantizationConfig(subspaces=2, bits=3, rare_bits=1, rare_fraction=0.6)
    factors = ProductQuantization.decompose(falling_table(50, 4, last=1.0), 10**6, None, config)
    assert factors.is_rare.nonzero().flatten().tolist() == list(range(20, 50))


def test_damaged_codes_are_refused() -> None:
    factors = _decomposed(falling_table(100, 4, last=1.0), subspaces=2, bits=4, rare_bits=2)
    five = ProductQuantization(100, 4, 2, 5)
    state = five.state_dict()
    state["packed_codes"] = state["packed_codes"] | 0xFF
    before = five.codes.clone()
    with pytest.raises(RuntimeError, match=r"the codes packed_codes are damaged: there are 5 centroids by the plan"):
        five.load_state_dict(state)
    assert torch.equal(five.codes, before)
    state = factors.state_dict()
    with pytest.raises(RuntimeError, match=r"packed_rare is damaged: 90 tokens are rare by the plan"):
        ProductQuantization.from_spec(factors.spec(), torch.float32).load_state_dict(
            {**state, "packed_rare": ~state["packed_rare"]}
        )
    three = ProductQuantization(100, 4, 2, 5, 3, 90)
    state = three.state_dict()
    with pytest.raises(RuntimeError, match=r"the codes packed_rare_codes are damaged: there are 3 centroids"):
        three.load_state_dict({**state, "packed_rare_codes": state["packed_rare_codes"] | 0xFF})
    with pytest.raises(RuntimeError, match="size mismatch for packed_codes"):
        three.load_state_dict({**state, "packed_codes": state["packed_codes"][:-1]})


@pytest.mark.parametrize("rare_bits", [None, 2])
def test_rounds_in_the_metric_lower_the_loss(rare_bits: int | None) -> None:
    table, metric = falling_table(1000, 16, last=1.0), loss_metric(1000, 16)
    losses = []
    for rounds in (0, 1, 3):
        config = ProductQuantizationConfig(subspaces=4, bits=5, rare_bits=rare_bits, metric_rounds=rounds)
        shares: list[float] = []
        factors = ProductQuantization.decompose(table, 10**6, falling_counts(1000, 1), config, shares.append, metric)
        assert sum(shares) == pytest.approx(1)
        losses.append(metric.loss(table, factors.materialize()))
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] < losses[1]
