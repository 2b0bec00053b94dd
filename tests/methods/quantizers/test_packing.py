"""Packing of small integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.methods.quantizers import packing
from lightning_embcompress.methods.quantizers.packing import bit_width, pack_bits, packed_bytes, unpack_bits


@given(st.integers(0, 31).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=50))))
@settings(deadline=None, max_examples=200)
def test_round_trip(problem: tuple[int, list[int]]) -> None:
    bits, numbers = problem
    values = torch.tensor(numbers, dtype=torch.long)
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(len(numbers), bits)
    assert unpack_bits(packed, bits, len(numbers)).tolist() == numbers
    # The same bits as one long integer, lowest first.
    whole = sum(number << (bits * place) for place, number in enumerate(numbers))
    assert int.from_bytes(bytes(packed.tolist()), "little") == whole


@pytest.mark.parametrize(("num_values", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (20, 5), (32, 5), (33, 6)])
def test_bit_width(num_values: int, bits: int) -> None:
    assert bit_width(num_values) == bits


@pytest.mark.parametrize("bits", [1, 5, 8, 11])
def test_packing_in_pieces(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(2**bits, (185,), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    whole = pack_bits(codes, bits)
    monkeypatch.setattr(packing, "_PIECE", 16)
    assert torch.equal(pack_bits(codes, bits), whole)
    assert torch.equal(unpack_bits(whole, bits, 185, torch.int16), codes)
