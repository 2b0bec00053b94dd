"""Matrices of bytes by components: what is kept, and products of few and of many states with it."""

from __future__ import annotations

import pytest
import torch

from lightning_embcompress.methods.quantizers import byte_tiles
from lightning_embcompress.methods.quantizers.byte_tiles import ByteTiles, TileShape

# One tile, several, a last one that is filled up, and no rows, components, or lower bytes.
SHAPES = [(1, 1, 0), (5, 3, 3), (256, 4, 1), (257, 9, 0), (1500, 40, 7), (0, 4, 2), (30, 0, 0)]


def _tiles(rows: int, components: int, lower: int) -> tuple[ByteTiles, torch.Tensor]:
    numbers = torch.randint(-128, 128, (rows, components), dtype=torch.int16) * 256
    numbers[:, :lower] = torch.randint(-(2**15), 2**15 - 128, (rows, lower), dtype=torch.int16)
    tiles = ByteTiles.empty(TileShape(rows, components, lower))
    tiles.write(slice(0, rows), numbers)
    return tiles, numbers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("states", [1, 3, 9])
@pytest.mark.parametrize("bags", [False, True])
def test_products_against_float64(
    shape: tuple[int, int, int], states: int, bags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_tiles, "has_bags", lambda: bags)
    tiles, numbers = _tiles(*shape)
    hidden, shift = torch.randn(states, shape[1]), torch.randn(states, 1)
    expected = hidden.double() @ (numbers.double() / 256).T + shift.double()
    found = tiles.product(hidden, shift)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4 * (1 + shape[1]))
    # Any run of rows, written into columns of something larger.
    for start, stop in ((0, shape[0]), (shape[0] // 3, shape[0] // 2), (shape[0] - shape[0] // 4, shape[0])):
        out = torch.full((states, stop - start + 2), 7.0)
        tiles.product(hidden, shift, start, out[:, 1:-1])
        torch.testing.assert_close(out[:, 1:-1].double(), expected[:, start:stop], rtol=0, atol=2e-4 * (1 + shape[1]))
        assert bool((out[:, [0, -1]] == 7).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_read_back_wherever_they_begin(shape: tuple[int, int, int]) -> None:
    tiles, numbers = _tiles(*shape)
    assert tiles.data.nbytes == tiles.shape.nbytes
    for rows in (slice(0, shape[0]), slice(shape[0] // 3, shape[0] // 2), slice(shape[0], shape[0])):
        assert torch.equal(tiles.read(rows), numbers[rows])
    # Written in pieces, the same.
    again = ByteTiles.empty(tiles.shape)
    for start in range(0, shape[0], 100):
        again.write(slice(start, min(start + 100, shape[0])), numbers[start : start + 100])
    assert torch.equal(again.data, tiles.data)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_in_bfloat16_round_states_alone(shape: tuple[int, int, int]) -> None:
    tiles, numbers = _tiles(*shape)
    hidden, shift = torch.randn(9, shape[1]).bfloat16(), torch.randn(9, 1).bfloat16()
    exact = hidden.double() @ (numbers.double() / 256).T
    found = tiles.product(hidden, shift)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact + shift.double(), rtol=0.02, atol=0.01 * (1 + shape[1]))
