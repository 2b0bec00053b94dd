"""Tensors in files: what is read is what was written, or an error that names the file."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_embcompress.utils.chunk_sums import CHUNK_BYTES, ChunkSums
from lightning_embcompress.utils.tensor_files import TensorFile
from toys import normal


@pytest.fixture
def table() -> torch.Tensor:
    return normal(5000, 24, dtype=torch.float32)


@pytest.fixture
def file(tmp_path: Path, table: torch.Tensor) -> Path:
    save_file({"table": table, "counts": torch.arange(5)}, tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_those_of_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    table = normal(3000, 10, dtype=dtype)
    save_file({"table": table, "nothing": torch.empty(0, 4)}, tmp_path / "one.safetensors")
    found = TensorFile(tmp_path / "one.safetensors")["table"]
    ids = torch.tensor([[7, 2999, 0], [7, 8, 1500]])
    assert torch.equal(found[ids], table[ids])
    assert torch.equal(found[10:2000], table[10:2000])
    assert torch.equal(found[2990:4000], table[2990:4000])
    assert torch.equal(found.read(), table)
    assert found[torch.empty(0, dtype=torch.long)].shape == (0, 10)
    assert found.file["nothing"].read().shape == (0, 4)


def test_array_of_numpy(tmp_path: Path) -> None:
    table = normal(300, 8, dtype=torch.float32)
    np.save(tmp_path / "one.npy", table.numpy())
    assert torch.equal(TensorFile(tmp_path / "one.npy")[""][torch.tensor([3, 299])], table[[3, 299]])
    np.save(tmp_path / "columns.npy", np.asfortranarray(table.numpy()))
    with pytest.raises(ValueError, match="column by column"):
        TensorFile(tmp_path / "columns.npy")


@given(st.lists(st.integers(0, 9_900), min_size=1, max_size=40), st.integers(0, 100))
def test_ranges_in_any_order(tmp_path_factory: pytest.TempPathFactory, starts: list[int], length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges.safetensors"
    content = torch.arange(10_000).to(torch.uint8)
    if not path.exists():
        save_file({"bytes": content}, path)
    found = TensorFile(path)
    begin = found.entries["bytes"].start
    lengths = torch.tensor([(length + place) % 100 for place in range(len(starts))])
    read, offsets = found.ranges(begin + torch.tensor(starts), lengths)
    for start, size, offset in zip(starts, lengths.tolist(), offsets.tolist(), strict=True):
        assert torch.equal(read[offset : offset + size], content[start : start + size])


def test_an_id_out_of_range(file: Path) -> None:
    with pytest.raises(IndexError, match="5000"):
        TensorFile(file)["table"][torch.tensor([1, 5000])]
    with pytest.raises(ValueError, match="'other'"):
        TensorFile(file)["other"]


def test_copies_read_the_same(file: Path, table: torch.Tensor) -> None:
    found = TensorFile(file, ChunkSums.of(file))["table"]
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(other[4990:], table[4990:])


def test_cut_short_before_it_is_opened(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match="one.safetensors"):
        TensorFile(file)
    os.truncate(file, 5)
    with pytest.raises(ValueError, match="one.safetensors"):
        TensorFile(file)


@pytest.mark.parametrize("change", ["cut", "altered"])
def test_changed_while_it_is_open(file: Path, change: str) -> None:
    found = TensorFile(file)["table"]
    found[:10]
    if change == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        with file.open("r+b") as opened:
            opened.seek(-3, os.SEEK_END)
            opened.write(b"abc")
    for read in (lambda: found[:10], lambda: found[torch.tensor([4999])]):
        with pytest.raises(ValueError, match="one.safetensors"):
            read()


def test_replaced_while_it_is_open(file: Path, table: torch.Tensor) -> None:
    """By another file that gets its name: what was opened stays what it was."""
    found = TensorFile(file)["table"]
    save_file({"table": -table}, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)
    assert torch.equal(found[100:200], table[100:200])


def test_sums_are_compared_at_the_first_read_of_a_chunk(file: Path, table: torch.Tensor) -> None:
    ChunkSums.of(file).save(file.with_name("one.safetensors.sums"))
    with file.open("r+b") as opened:
        opened.seek(-3, os.SEEK_END)
        opened.write(b"abc")
    sums = ChunkSums.load(file.with_name("one.safetensors.sums"))
    found = TensorFile(file, sums)["table"]
    assert file.stat().st_size > 2 * CHUNK_BYTES
    assert torch.equal(found[:100], table[:100])
    with pytest.raises(ValueError, match="one.safetensors"):
        found[4990:]


def test_sums_of_another_file(file: Path, tmp_path: Path) -> None:
    save_file({"table": torch.zeros(3, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="one.safetensors"):
        TensorFile(file, ChunkSums.of(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("content", [b"", b"x" * 7, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0null"])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="odd.safetensors"):
        TensorFile(path)


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}',
        '{"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}',
        '{"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}',
        '{"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}',
        '{"dtype": "F32", "shape": [99999999999], "data_offsets": [0, 399999999996]}',
    ],
)
def test_hostile_headers(tmp_path: Path, entry: str) -> None:
    header = f'{{"table": {entry}}}'.encode()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    with pytest.raises(ValueError, match="odd.safetensors"):
        TensorFile(tmp_path / "odd.safetensors")
