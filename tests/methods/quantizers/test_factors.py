"""Factors of every method in few bits: while they train, and packed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_embcompress.methods.quantizers.factors import FakeQuantizedFactor
from lightning_embcompress.methods.quantizers.integer_quantizer import from_codes, group_scales, to_codes
from lightning_embcompress.methods.quantizers.quantization import storage_of
from lightning_embcompress.methods.registry import (
    METHODS,
    BlockLowRank,
    Factorization,
    FullTable,
    LatentCodes,
    LowRank,
    Quantization,
    SharedBasisBlocks,
    check_spec,
    factorization_from_spec,
)
from lightning_embcompress.methods.shared_basis.factorization import plain_metric
from toys import factors_of, falling_table


def _table(vocab_size: int = 90, dim: int = 12, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return falling_table(vocab_size, dim, last=1.0, seed=seed).to(dtype)


@pytest.mark.parametrize("method", ["low_rank", "transform_coding"])
def test_ranges_can_be_frozen(method: str) -> None:
    with pytest.raises(ValueError, match="no ranges to freeze"):
        factors_of("low_rank").freeze_ranges()
    prepared = factors_of(method).prepared(Quantization(bits=4, group_size=16))
    dense = prepared.materialize()
    prepared.freeze_ranges()
    torch.testing.assert_close(prepared.materialize(), dense, rtol=1e-5, atol=1e-6)
    restored = factorization_from_spec(prepared.spec(), torch.float32)
    restored.load_state_dict(prepared.state_dict())
    assert torch.equal(restored.materialize(), prepared.materialize())
    if isinstance(prepared, LatentCodes):
        assert not prepared.log_scales.requires_grad
        return
    factor = next(module for module in prepared.modules() if isinstance(module, FakeQuantizedFactor))
    scales = factor.scales.clone()
    with torch.no_grad():
        factor.weight.mul_(3)
    assert torch.equal(factor.scales, scales)
    # What lies outside of the ranges then gets no gradient.
    factor.materialize().sum().backward()
    assert 0 < int((factor.weight.grad == 0).sum()) < factor.weight.numel()
    torch.testing.assert_close(prepared.converted().materialize(), prepared.materialize(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["low_rank", "group_reduce", "transform_coding"])
def test_balance_changes_factors_and_not_the_table(method: str) -> None:
    table = _table(200, 24) * torch.logspace(0, -2, 24)
    counts = (1000 / torch.arange(1, 201)).long()
    if method == "transform_coding":
        factors: Factorization[Any] = SharedBasisBlocks.solve(table, 9000, plain_metric(table, counts), None, 2, ())
    else:
        factors = METHODS[method].factorization.decompose(table, 9000, counts)
    dense = factors.materialize()
    plain = copy.deepcopy(factors)
    plain.balance = lambda: None  # type: ignore[method-assign]
    factors.balance()
    torch.testing.assert_close(factors.materialize(), dense, rtol=1e-4, atol=1e-5)
    errors = [
        float((some.prepared(Quantization(3, 16)).materialize() - dense).square().sum()) for some in (factors, plain)
    ]
    # Blocks of rank 1 have only their scales to move.
    assert errors[0] < (1.0 if method == "group_reduce" else 0.8) * errors[1]


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([16, 32, 64, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
)
@settings(deadline=None, max_examples=40)
def test_only_rows_that_are_asked_for_are_read(
    rows: int, columns: int, bits: int, group_size: int, dtype: torch.dtype, scale_dtype: Any
) -> None:
    weight = _table(rows, columns, dtype)
    weight[0] = 0
    of = Quantization(bits, group_size, scale_dtype)
    factor = FakeQuantizedFactor(nn.Parameter(weight.clone()), of)
    scales = group_scales(weight, bits, group_size, of.scales)
    expected = from_codes(to_codes(weight, scales, bits, group_size), scales, bits, group_size, dtype)
    place = torch.tensor([[rows - 1, 0], [rows // 2, rows - 1]])
    assert torch.equal(factor.materialize(), expected)
    assert torch.equal(factor.rows(place), expected[place])
    assert factor.rows(place[:0]).shape == (0, 2, columns)
    packed = factor.packed()
    assert torch.equal(packed.materialize(), expected)
    assert torch.equal(packed.rows(place), expected[place])
    assert packed.codes.nbytes == rows * -(-columns * bits // 8)
    assert packed.scales.nbytes == 2 * scales.numel()
    # Rows that are neither asked for nor share a scale with one that is may be anything.
    group_rows = max(1, group_size // columns)
    near = (torch.arange(rows) // group_rows) == (rows - 1) // group_rows
    with torch.no_grad():
        factor.weight[~near] = torch.nan
    assert torch.equal(factor.rows(torch.tensor([rows - 1])), expected[-1:])


def test_casts_leave_the_stored_bytes_as_they_are() -> None:
    packed = factors_of("low_rank").prepared(Quantization(4)).converted()
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    narrow = copy.deepcopy(packed).to(torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert narrow.rows(torch.tensor([1])).dtype == torch.bfloat16
    assert narrow.logits(_table(2, 16, torch.bfloat16)).dtype == torch.bfloat16
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert torch.equal(narrow.float().materialize(), packed.materialize())


def test_codes_change_as_their_numbers_are_trained() -> None:
    torch.manual_seed(0)
    table = _table(600, 24)
    coded = SharedBasisBlocks.decompose(table, table.nbytes // 12, (1000 / torch.arange(1, 601)).long())
    latent = LatentCodes.of(coded)
    torch.testing.assert_close(latent.materialize(), coded.materialize(), rtol=1e-4, atol=1e-5)
    back = latent.converted()
    # Of two levels that are the same but for rounding either is taken.
    torch.testing.assert_close(back.materialize(), coded.materialize(), rtol=0, atol=1e-6)
    target = table + 0.5 * _table(600, 24, seed=9)
    optimizer = torch.optim.Adam(latent.parameters(), 0.02)
    before = (latent.materialize() - target).square().mean()
    for _ in range(60):
        loss = (latent.rows(torch.arange(600)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = (latent.converted().materialize() - target).square().mean()
    assert after < 0.95 * before
    assert latent.converted().stored_bytes() == coded.stored_bytes()
    torch.testing.assert_close(latent.converted().materialize(), latent.materialize(), rtol=1e-4, atol=1e-4)


def test_mistakes_are_refused() -> None:
    factors, coded = factors_of("low_rank"), factors_of("transform_coding")
    with pytest.raises(ValueError, match="nothing to convert"):
        factors.converted()
    factors.prepared(Quantization(4))
    packed, latent = factors.converted(), coded.prepared(Quantization(4))
    for message, call in (
        ("prepared for quantization already", lambda: factors.prepared(Quantization(4))),
        ("packed already", lambda: packed.prepared(Quantization(4))),
        ("nothing to convert", packed.converted),
        ("widths of their own", lambda: coded.hold(Quantization(4), "packed")),
        ("prepared for training already", lambda: latent.prepared(Quantization(4))),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for name, value in (("bits", 9), ("bits", True), ("group_size", 8), ("scale_dtype", "float32"), ("ranges", "x")):
        with pytest.raises(ValueError, match=name):
            Quantization(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int9"):
        storage_of("int9")


@pytest.mark.parametrize("change", [None, {"state": "thawed"}, {"bits": "4"}, {"more": 1}, {"group_size": 2**40}])
def test_damaged_structures_are_refused(change: Any) -> None:
    record = None if change is None else {**Quantization().record("packed"), **change}
    spec = {**LowRank(90, 12, 3).structure(), "quantization": record}
    with pytest.raises(ValueError, match=r"quantization|bits|group_size"):
        check_spec(spec)


def test_a_full_table_is_quantized_as_it_is() -> None:
    table = nn.Parameter(_table(2000, 64))
    full = FullTable.of(table)
    assert next(full.parameters()) is table
    assert full.stored_bytes() == FullTable.smallest_bytes(2000, 64, 4)
    for bits in (8, 4, 3):
        packed = full.quantized(Quantization(bits, 32))
        scales = group_scales(table, bits, 32, torch.float16)
        codes = to_codes(table, scales, bits, 32)
        assert torch.equal(packed.materialize(), from_codes(codes, scales, bits, 32, torch.float32))
        assert packed.stored_bytes() < table.nbytes / (32 / (bits + 0.55))
    copied = FullTable.decompose(table, 0)
    assert torch.equal(copied.rows(torch.tensor([5])), table[5:6])
    copied.refined(2 * table, 0)
    assert torch.equal(copied.materialize(), 2 * table)


def test_blocks_without_components() -> None:
    table = _table(400, 16)
    counts = (4000 / torch.arange(1, 401)).long()
    factors = METHODS["shared_basis"].factorization.decompose(
        table, table.nbytes // 14, counts, METHODS["shared_basis"].config(groups=6)
    )
    assert 0 in factors.ranks
    for packed in (factors.quantized(Quantization(4)), copy.deepcopy(factors).prepared(Quantization(4)).converted()):
        dense = packed.materialize()
        assert torch.equal(packed.rows(torch.arange(400)), dense)
        torch.testing.assert_close(packed.logits(torch.eye(16)), dense.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dim", "group_size", "ranks"), [(16, 64, [2, 3]), (16, 64, [4, 2]), (128, 256, [1, 2])])
def test_rows_of_a_basis_that_share_a_scale(dim: int, group_size: int, ranks: list[int]) -> None:
    torch.manual_seed(0)
    factors = BlockLowRank(80, dim, [40, 40], ranks)
    with torch.no_grad():
        for parameter in factors.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    dense = factors.materialize()
    packed = factors.quantized(Quantization(8, group_size))
    assert torch.equal(factors.materialize(), dense)
    for block in (slice(0, 40), slice(40, 80)):
        assert (packed.materialize()[block] - dense[block]).norm() < 0.03 * dense[block].norm()


def test_copies_share_nothing_that_loading_writes() -> None:
    factors, other = factors_of("group_reduce"), factors_of("group_reduce")
    moved = other.state_dict()
    moved["packed_block_index"] = moved["packed_block_index"].flip(0)
    packed = factors.quantized(Quantization(8))
    dense, index = packed.materialize(), packed.packed_block_index.clone()
    factors.packed_block_index.zero_()
    assert torch.equal(packed.packed_block_index, index)
    assert torch.equal(packed.materialize(), dense)


@pytest.mark.parametrize("columns", [8, 0])
def test_learned_scales_get_the_same_gradient_by_rows_and_as_a_whole(columns: int) -> None:
    factor = FakeQuantizedFactor(nn.Parameter(_table(64, 8)[:, :columns]), Quantization(4, 64, ranges="learned"))
    assert isinstance(factor.scales, nn.Parameter)
    found = []
    # Also from no rows, as where no id of a block is in a batch.
    for read in (factor.materialize(), factor.rows(torch.arange(64)), factor.rows(torch.arange(0))):
        (gradient,) = torch.autograd.grad(read.square().sum(), factor.scales)
        found.append(gradient)
    torch.testing.assert_close(found[0], found[1])
    assert not found[2].any()
