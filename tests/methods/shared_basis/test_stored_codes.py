"""Codes as they are read: rows of all blocks at once, and logits by products of bytes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.methods.quantizers.byte_tiles import ByteTiles
from lightning_embcompress.methods.registry import SharedBasisBlocks, TransformCodingConfig
from lightning_embcompress.methods.shared_basis.level_bytes import ByteLevels
from toys import falling_counts, normal


def _coded(
    vocab_size: int, dim: int, mean_bits: float, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
):
    """Codes of a table whose first components are the largest, of so many bits a weight."""
    rows = normal(vocab_size, dim, seed=seed) * torch.logspace(0.5, -1.5, dim) + normal(1, dim, seed=seed + 1)
    rows = (rows * torch.linspace(2, 0.5, vocab_size).unsqueeze(1)).to(dtype)
    max_bytes = int(vocab_size * dim * mean_bits / 8) + 3000
    config = TransformCodingConfig(**options)
    return SharedBasisBlocks.decompose(rows, max_bytes, falling_counts(vocab_size), config)


def _table(coded: SharedBasisBlocks) -> Tensor:
    """The whole table by blocks, in float64."""
    frame = coded._frame()
    parts = []
    for block, codes in enumerate(coded._block_codes()):
        values = (
            coded._level_values().double()[(codes.int() + frame.offsets[block]).long()] * frame.scales[block].double()
        )
        parts.append(values @ frame.basis[: codes.shape[1]].double() + frame.means[block].double())
    return torch.cat(parts)[coded.position].detach()


@given(
    st.integers(1, 90),
    st.integers(1, 20),
    st.sampled_from([0.0, 1.0, 3.0, 7.0]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_rows_and_logits_of_any_shape(
    vocab_size: int, dim: int, bits: float, groups: int | None, dtype: torch.dtype, is_laid_out: bool
) -> None:
    groups = None if groups is None else min(groups, vocab_size)
    coded = _coded(vocab_size, dim, bits, dtype=dtype, groups=groups)
    table = _table(coded)
    assert coded.lay_out() == bool(coded.rank) if is_laid_out else True
    ids, states = torch.randint(vocab_size, (2, 3)), torch.randn(2, dim).to(dtype)
    # Levels that stay apart by more than two steps lose at most half a step of their byte.
    size = float(table.abs().max()) + 1e-6
    tolerance = (0.02 if is_laid_out else 0.0) + 8 * torch.finfo(dtype).eps
    with torch.no_grad():
        rows, logits = coded.rows(ids), coded.logits(states)
    assert rows.shape == (2, 3, dim)
    assert rows.dtype == logits.dtype == dtype
    torch.testing.assert_close(rows.double(), table[ids], rtol=0, atol=tolerance * size)
    torch.testing.assert_close(logits.double(), states.double() @ table.T, rtol=0, atol=dim * tolerance * size)


@pytest.mark.parametrize("bits", [None, 8, 3])
def test_few_states_are_multiplied_from_bytes_as_accurately_as_in_floats(bits: int | None) -> None:
    coded = _coded(9000, 64, 4.0, bits=bits)
    table, states = _table(coded), torch.randn(3, 64)
    with torch.no_grad():
        logits, pieces = coded.logits(states), coded._coded_products(states)
        floats = torch.cat([torch.cat(coded._code_products(*one[:3]), -1) + one[3] for one in pieces], -1)
    exact = states.double() @ table.T
    errors = [float((found.double() - exact).abs().max()) for found in (logits, floats[:, coded.position])]
    assert 0 < errors[0] < 3e-4 * float(exact.abs().max())
    assert errors[0] != errors[1]
    # What is kept is made anew when levels change.
    with torch.no_grad():
        coded.levels.mul_(1.5)
        scaled = states.double() @ _table(coded).T
        atol = 3e-4 * float(scaled.abs().max())
        torch.testing.assert_close(coded.logits(states).double(), scaled, rtol=0, atol=atol)


def test_bytes_take_the_place_of_codes_until_a_gradient_is_wanted() -> None:
    coded = _coded(6000, 64, 3.0)
    before, states, ids = copy.deepcopy(coded), torch.randn(40, 64), torch.tensor([0, 17, 5999, 17])
    kept = {name: tensor.clone() for name, tensor in coded.state_dict().items()}
    assert coded.lay_out()
    assert not coded.codes.numel()
    assert not coded.packed_codes.numel()
    assert coded.level_bytes.nbytes <= 6000 * 192
    with torch.no_grad():
        logits = coded.logits(states)
        assert float((logits - before.logits(states)).abs().max()) < 0.02 * float(logits.abs().max())
        torch.testing.assert_close(torch.cat([coded.logits(one) for one in states.split(1)]), logits, rtol=0, atol=0.01)
        tiles = coded.tiles(states, 700)
        parts = [tile.logits(*(tiles.shared[place] for place in tile.reads)) for tile in tiles.tiles]
        torch.testing.assert_close(torch.cat(parts, 1)[:, coded.position], logits)
    assert coded.stored_bytes() == before.stored_bytes()
    for other in (coded, copy.deepcopy(coded), _pickled(coded)):
        torch.testing.assert_close(dict(other.state_dict()), kept, rtol=0, atol=0)
    # Loading, moving to another dtype and training go on.
    coded.load_state_dict(kept)
    assert coded.codes.numel()
    coded.lay_out()
    torch.testing.assert_close(coded.to(torch.float64).materialize().float(), before.materialize())
    coded.float().lay_out()
    for one in (coded, before):
        (one.logits(states).logsumexp(-1).sum() + one.rows(ids).square().sum()).backward()
    torch.testing.assert_close(coded.levels.grad, before.levels.grad)
    assert coded.codes.numel()


def _pickled(coded: SharedBasisBlocks) -> SharedBasisBlocks:
    file = io.BytesIO()
    torch.save(coded, file)
    file.seek(0)
    loaded: SharedBasisBlocks = torch.load(file, weights_only=False)
    return loaded


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.booleans(), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_bytes_are_read_back_as_codes(widths: list[int], exact: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = {bits: torch.randn(2**bits, generator=generator).sort().values for bits in set(widths)}
    runs = [(bits, 1 + seed) for bits in widths]
    codes = [torch.randint(2**bits, (9, count), generator=generator, dtype=torch.uint8) for bits, count in runs]
    levels = ByteLevels.of(tables, exact)
    tiles = ByteTiles.empty(levels.shape(9, runs))
    levels.encode(torch.cat(codes, 1), runs, tiles)
    decoded = levels.decode(tiles, runs).split([count for _, count in runs], 1)
    for found, own, (bits, _) in zip(decoded, codes, runs, strict=True):
        # Levels that no byte tells apart may be taken for each other.
        torch.testing.assert_close(tables[bits][found.int()], tables[bits][own.int()], rtol=0, atol=2e-4)


@pytest.mark.parametrize("bits", [8, 5, 6])
def test_bits_of_the_basis(bits: int) -> None:
    coded = _coded(300, 17, 3.0)
    shape = (coded.vocab_size, coded.dim, coded.rank, coded.sizes, coded.segments, True)
    other = SharedBasisBlocks(*shape, basis_bits=bits)
    other._index(coded.block_of_row)
    frame = coded._frame()
    other.store(coded._block_codes(), frame.basis, frame.means, torch.cat(frame.scales))
    other.levels.data.copy_(coded.levels)
    # What was written before there was a choice says nothing of it, and has 8.
    assert other.spec().get("basis_bits", 8) == bits
    loaded = SharedBasisBlocks.from_spec(other.spec(), torch.float32)
    loaded.load_state_dict(other.state_dict())
    assert torch.equal(loaded.materialize(), other.materialize())
    lengths = frame.basis.abs().amax(dim=1, keepdim=True)
    assert float(((other._frame().basis - frame.basis) / lengths).abs().max()) <= 0.51 / (2 ** (bits - 1) - 1)
    saved = other.rank * other.dim * (8 - bits) // 8
    assert sum(one.nbytes for one in other.state_dict().values()) == pytest.approx(
        sum(one.nbytes for one in coded.state_dict().values()) + coded.rank * coded.dim * 2 // 8 - saved, abs=2
    )
