"""Tables whose rows stay in a file read as those in memory."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lightning_embcompress.methods.on_disk.block_places import BlockPlaces
from lightning_embcompress.methods.on_disk.row_cache import RowCache
from lightning_embcompress.methods.on_disk.table import RowsOnDisk
from lightning_embcompress.methods.quantizers.packing import bit_width, pack_bits
from lightning_embcompress.methods.registry import (
    FullTable,
    Quantization,
    factorization_from_spec,
    get_config,
    get_method,
)
from lightning_embcompress.utils.chunk_sums import ChunkSums
from lightning_embcompress.utils.tensor_files import TensorFile
from toys import draw_blocks, falling_counts, falling_table, normal

VOCAB_SIZE, DIM = 3000, 24
METHODS: dict[str, dict[str, Any]] = {
    "transform_coding": {"groups": 5},
    "trellis": {"codes": "trellis", "effort": 6, "groups": 3},
    "one block": {"groups": 1},
    "shared_basis": {},
    "group_reduce": {"groups": 4},
    "low_rank": {},
    "integers": {},
}


def in_memory(name: str, dtype: torch.dtype = torch.float32, packed: bool = False) -> Any:
    table, counts = falling_table(VOCAB_SIZE, DIM).to(dtype), falling_counts(VOCAB_SIZE, seed=1)
    if name == "integers":
        return FullTable.of(nn.Parameter(table)).quantized(Quantization(bits=3, group_size=100))
    method = "transform_coding" if name in ("trellis", "one block") else name
    config = get_config(method, **METHODS[name])
    found = get_method(method).factorization.decompose(table, int(VOCAB_SIZE * DIM * 3.5 / 8), counts, config)
    return found.quantized(Quantization(bits=6, group_size=16)) if packed else found


def from_disk(table: Any, folder: Path, cache_bytes: int = 2**14, dtype: torch.dtype | None = None) -> RowsOnDisk:
    path = folder / "table.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in table.state_dict().items()}, path)
    file = TensorFile(path, ChunkSums.of(path))
    empty = factorization_from_spec(table.spec(), dtype or table.dtype, torch.device("meta"))
    empty.keep_padding(table.padding_ids, table.padding_rows)
    return RowsOnDisk(empty, {name: file[name] for name in file.entries}, cache_bytes)


def some_ids(seed: int = 0) -> torch.Tensor:
    return (torch.rand(4, 90, generator=torch.Generator().manual_seed(seed)) ** 3 * VOCAB_SIZE).long()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_rows_are_those_in_memory(tmp_path: Path, name: str, packed: bool) -> None:
    table = in_memory(name, packed=packed and name in ("shared_basis", "group_reduce", "low_rank"))
    disk = from_disk(table, tmp_path)
    for seed in range(6):
        torch.testing.assert_close(disk.rows(some_ids(seed)), table.rows(some_ids(seed)).detach())
    assert 0 < disk.cache.hit_rate < 1
    torch.testing.assert_close(disk.materialize(), table.materialize())
    hidden = normal(3, DIM, dtype=torch.float32)
    torch.testing.assert_close(disk.logits(hidden), table.logits(hidden).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_saved_and_counted_as_the_table(tmp_path: Path, name: str) -> None:
    table = in_memory(name)
    disk = from_disk(table, tmp_path)
    state, expected = disk.state_dict(prefix="a."), table.state_dict(prefix="a.")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert (disk.spec(), disk.stored_bytes(), disk.num_values) == (table.spec(), table.stored_bytes(), table.num_values)
    assert disk.is_packed == table.is_packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["transform_coding", "group_reduce", "integers"])
def test_other_dtypes_and_casts(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    table = in_memory(name, dtype)
    disk, ids = from_disk(table, tmp_path), some_ids()
    torch.testing.assert_close(disk.rows(ids), table.rows(ids).detach())
    table.float(), disk.float()
    assert disk.rows(ids).dtype == torch.float32
    torch.testing.assert_close(disk.rows(ids), table.rows(ids).detach(), atol=1e-6, rtol=1e-5)


def test_copies(tmp_path: Path) -> None:
    disk, ids = from_disk(in_memory("transform_coding"), tmp_path), some_ids()
    for other in (copy.deepcopy(disk), pickle.loads(pickle.dumps(disk))):
        torch.testing.assert_close(other.rows(ids), disk.rows(ids))
        assert other.cache is not disk.cache


def test_constant_rows(tmp_path: Path) -> None:
    table = in_memory("group_reduce")
    table.keep_padding([3, 5], normal(2, DIM, dtype=torch.float32))
    disk, ids = from_disk(table, tmp_path), torch.tensor([[2, 3], [5, 5]])
    torch.testing.assert_close(disk.read(ids), table.read(ids).detach())


def test_ids_out_of_range_and_none(tmp_path: Path) -> None:
    disk = from_disk(in_memory("transform_coding"), tmp_path)
    for ids in ([-1], [VOCAB_SIZE], [1, VOCAB_SIZE + 7]):
        with pytest.raises(IndexError, match=str(VOCAB_SIZE)):
            disk.rows(torch.tensor(ids))
    assert disk.rows(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, DIM)


def test_nothing_but_rows_is_read(tmp_path: Path) -> None:
    disk = from_disk(in_memory("transform_coding"), tmp_path)
    assert not any(tensor.numel() >= VOCAB_SIZE for tensor in (*disk.parameters(), *disk.buffers()))


def test_it_does_not_train(tmp_path: Path) -> None:
    disk = from_disk(in_memory("shared_basis"), tmp_path)
    assert not disk.rows(some_ids()).requires_grad
    with pytest.raises(ValueError, match="rows='memory'"):
        disk.prepared(Quantization(bits=4))


def test_a_method_without_rows(tmp_path: Path) -> None:
    method = get_method("tensor_train")
    smallest = method.factorization.smallest_bytes(VOCAB_SIZE, DIM, 4)
    table = method.factorization.decompose(falling_table(VOCAB_SIZE, DIM), 2 * smallest)
    with pytest.raises(ValueError, match=type(table).__name__):
        from_disk(table, tmp_path)


@given(st.data())
@settings(deadline=None)
def test_places_are_those_of_the_index(data: st.DataObject) -> None:
    factors = draw_blocks(data.draw, most=400)
    places = BlockPlaces(factors.packed_block_index, factors.sizes)
    assert torch.equal(places.of(torch.arange(factors.vocab_size)), factors.position)


def test_places_of_many_rows_and_blocks() -> None:
    blocks = torch.randint(0, 300, (2**13,), generator=torch.Generator().manual_seed(0))
    sizes = torch.bincount(blocks, minlength=300).tolist()
    places = BlockPlaces(pack_bits(blocks, bit_width(300)), sizes)
    position = torch.empty(len(blocks), dtype=torch.long)
    position[torch.argsort(blocks, stable=True)] = torch.arange(len(blocks))
    assert torch.equal(places.of(torch.arange(len(blocks))), position)
    with pytest.raises(ValueError, match="block index"):
        BlockPlaces(pack_bits(blocks, bit_width(300)), sizes[::-1])


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), min_size=1, max_size=12), st.integers(0, 8))
def test_cache_forgets_what_was_asked_for_longest_ago(batches: list[list[int]], capacity: int) -> None:
    cache = RowCache(lambda ids: torch.stack([ids, 2 * ids], dim=1).float(), capacity)
    for batch in batches:
        ids = torch.tensor(batch, dtype=torch.long)
        assert torch.equal(cache.rows(ids), torch.stack([ids, 2 * ids], dim=1).float())
        assert len(cache._slots) <= capacity
        if len(set(batch)) <= capacity:
            assert set(batch) <= set(cache._slots)
    assert len(set(cache._slots.values())) == len(cache._slots)


def test_prefetched_rows_are_found(tmp_path: Path) -> None:
    disk, ids = from_disk(in_memory("transform_coding"), tmp_path, cache_bytes=2**20), some_ids()
    disk.cache.prefetch(ids).result()
    disk.rows(ids)
    assert disk.cache.hit_rate == 1.0
