"""Tables compressed from file to file: what comes of it is what comes of a table in memory, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_embcompress import load_compressed, plan_of
from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.integrations.table_files import TableSource, compress_tables, find_table
from lightning_embcompress.methods.numerics import gram
from lightning_embcompress.methods.registry import FullTable, Quantization, get_config, get_method
from lightning_embcompress.methods.shared_basis.factorization import SharedBasisBlocks
from toys import falling_counts, falling_table

VOCAB_SIZE, DIM = 2500, 24
BITS = Budget(bits_per_weight=4)
METHODS: dict[str, Any] = {
    "transform_coding": get_config("transform_coding", groups=4),
    "trellis": get_config("transform_coding", groups=2, codes="trellis", effort=6),
    "shared_basis": get_config("shared_basis"),
    "group_reduce": get_config("group_reduce", groups=4),
    "integers": Quantization(bits=4, group_size=32),
    "integers of several rows": Quantization(bits=3, group_size=100),
}


@pytest.fixture(autouse=True)
def many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_CHUNK_ELEMENTS", 1500)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(
        {"embedding.weight": falling_table(VOCAB_SIZE, DIM), "steps": torch.arange(3)}, tmp_path / "one.safetensors"
    )
    return tmp_path


def source(folder: Path, name: str = "embedding") -> TableSource:
    return TableSource(name, find_table(str(folder / "one.safetensors"))[1], falling_counts(VOCAB_SIZE, seed=1))


def in_memory(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    table = falling_table(VOCAB_SIZE, DIM).to(dtype)
    if isinstance(config, Quantization):
        return FullTable.of(nn.Parameter(table)).quantized(config)
    most = VOCAB_SIZE * DIM * 4 // 8
    return get_method(config.method).factorization.decompose(table, most, falling_counts(VOCAB_SIZE, seed=1), config)


def numbers(table: Any) -> dict[str, torch.Tensor]:
    """What a table holds, codes as they are and not as they are packed."""
    state = dict(table.state_dict())
    if isinstance(table, SharedBasisBlocks) and table.is_coded:
        del state["packed_codes"]
        state |= {f"codes.{block}": codes for block, codes in enumerate(table._block_codes())}
    return state


@pytest.mark.parametrize("name", METHODS)
def test_it_is_what_is_found_in_memory(folder: Path, name: str) -> None:
    config = METHODS[name]
    plan = compress_tables([source(folder)], folder / "out", config, None if "integers" in name else BITS)
    expected, layer = in_memory(config), load_compressed(folder / "out").get_submodule("embedding")
    found = numbers(layer.factorization)
    assert found.keys() == numbers(expected).keys()
    assert all(torch.equal(found[one], tensor) for one, tensor in numbers(expected).items())
    assert plan_of(nn.ModuleDict({"embedding": layer})).tables[0].spec == plan.tables[0].spec
    assert layer.factorization.stored_bytes() == plan.tables[0].stored_bytes
    if "integers" not in name:
        assert plan.tables[0].stored_bytes <= VOCAB_SIZE * DIM * 4 // 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_tables(folder: Path, dtype: torch.dtype) -> None:
    save_file({"embedding.weight": falling_table(VOCAB_SIZE, DIM).to(dtype)}, folder / "one.safetensors")
    compress_tables([source(folder)], folder / "out", METHODS["transform_coding"], BITS)
    found = numbers(load_compressed(folder / "out").get_submodule("embedding").factorization)
    expected = numbers(in_memory(METHODS["transform_coding"], dtype))
    assert all(torch.equal(found[one], tensor) for one, tensor in expected.items())


def test_rows_from_disk_and_into_a_model(folder: Path) -> None:
    compress_tables([source(folder)], folder / "out", METHODS["transform_coding"], BITS)
    ids = torch.randint(0, VOCAB_SIZE, (3, 50))
    expected = load_compressed(folder / "out").get_submodule("embedding")(ids)
    torch.testing.assert_close(load_compressed(folder / "out", rows="mmap").get_submodule("embedding")(ids), expected)
    for rows in ("memory", "mmap"):
        model = nn.ModuleDict({"embedding": nn.Embedding(VOCAB_SIZE, DIM), "other": nn.Linear(DIM, 3)})
        before = model["other"].weight.clone()
        load_compressed(folder / "out", model, rows=rows)
        torch.testing.assert_close(model["embedding"](ids), expected)
        assert torch.equal(model["other"].weight, before)
    with pytest.raises(ValueError, match="embedding"):
        load_compressed(folder / "out", nn.ModuleDict({"embedding": nn.Embedding(VOCAB_SIZE + 1, DIM)}))


def test_several_tables_are_files_of_one_model(folder: Path) -> None:
    np.save(folder / "items.npy", falling_table(900, 8, seed=3).numpy())
    items = TableSource("items", find_table(str(folder / "items.npy"))[1])
    plan = compress_tables([source(folder), items], folder / "out", METHODS["transform_coding"], BITS)
    assert [table.name for table in plan.tables] == ["embedding", "items"]
    loaded = load_compressed(folder / "out", rows="mmap")
    assert loaded.get_submodule("items")(torch.tensor([899])).shape == (1, 8)
    assert load_compressed(folder / "out").get_submodule("embedding").factorization.vocab_size == VOCAB_SIZE


def test_shards_and_directories_of_models(folder: Path) -> None:
    table = falling_table(VOCAB_SIZE, DIM)
    (folder / "model").mkdir()
    save_file({"a.weight": torch.zeros(2, 2)}, folder / "model" / "model-1.safetensors")
    save_file({"b.weight": table}, folder / "model" / "model-2.safetensors")
    shards = {"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(shards))
    for said in ("model:b.weight", "model/model.safetensors.index.json:b.weight"):
        name, found = find_table(f"{folder}/{said}")
        assert name == "b.weight"
        assert torch.equal(found[5:9], table[5:9])
    for said, named in (("model", "a.weight"), ("model:c.weight", "c.weight"), ("nothing.safetensors:a", "nothing")):
        with pytest.raises((ValueError, FileNotFoundError), match=named):
            find_table(f"{folder}/{said}")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", METHODS)
def test_it_goes_on_where_it_was(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the middle of a window, after some were noted."""
    from lightning_embcompress.integrations import table_files

    config, budget = METHODS[name], None if "integers" in name else BITS
    monkeypatch.setattr(table_files, "_SECONDS_BETWEEN_NOTES", -1.0)
    kind = type(in_memory(config))
    filling, filled = kind.filling, []

    def interrupted(self: Any, problem: Any) -> Any:
        fill = filling(self, problem)

        def fill_some(window: slice) -> None:
            fill(window)
            filled.append(window)
            if len(filled) == 3:
                raise Killed

        return fill_some

    monkeypatch.setattr(kind, "filling", interrupted)
    with pytest.raises(Killed):
        compress_tables([source(folder)], folder / "out", config, budget)
    assert not (folder / "out").exists()
    monkeypatch.setattr(kind, "outline", lambda *_: pytest.fail("it was solved once more"))
    compress_tables([source(folder)], folder / "out", config, budget)
    # Two windows were noted: the third was filled again, and no other.
    assert filled[3] == filled[2]
    found = numbers(load_compressed(folder / "out").get_submodule("embedding").factorization)
    assert all(torch.equal(found[one], tensor) for one, tensor in numbers(in_memory(config)).items())
    assert not list(folder.glob(".*"))


def test_other_arguments_begin_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedBasisBlocks, "filling", lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        compress_tables([source(folder)], folder / "out", METHODS["transform_coding"], BITS)
    monkeypatch.undo()
    plan = compress_tables([source(folder)], folder / "out", METHODS["transform_coding"], Budget(bits_per_weight=3))
    assert plan.tables[0].bits_per_weight <= 3


@pytest.mark.slow
def test_killed_while_writing(folder: Path) -> None:
    save_file({"embedding.weight": falling_table(200_000, 16)}, folder / "one.safetensors")
    command = [sys.executable, "-m", "lightning_embcompress", "compress-table", str(folder / "one.safetensors")]
    command += [str(folder / "out"), "--bits_per_weight", "3", "--groups", "4", "--refine_rounds", "0"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        journal = folder / ".out.unfinished" / "journal.json"
        deadline = time.monotonic() + 60
        while not journal.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not (folder / "out").exists()
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "Going on with embedding" in result.stderr
    with_one_go = folder / "other"
    subprocess.run([*command[:5], str(with_one_go), *command[6:]], check=True, capture_output=True)
    one, other = (load_file(path / "model.safetensors") for path in (folder / "out", with_one_go))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_nothing_is_written_for_bad_input(folder: Path) -> None:
    table = falling_table(VOCAB_SIZE, DIM)
    table[7, 3] = torch.nan
    save_file({"bad": table}, folder / "bad.safetensors")
    bad = TableSource("bad", find_table(str(folder / "bad.safetensors"))[1])
    few = TableSource("few", find_table(str(folder / "one.safetensors:embedding.weight"))[1], torch.ones(3))
    wrong = [
        (bad, METHODS["transform_coding"], BITS, "7"),
        (few, METHODS["transform_coding"], BITS, "few"),
        (source(folder), get_config("tensor_train"), BITS, "tensor_train"),
        (source(folder), METHODS["transform_coding"], Budget(bits_per_weight=0.001), "bytes"),
    ]
    for one, config, budget, named in wrong:
        with pytest.raises(ValueError, match=named):
            compress_tables([one], folder / "out", config, budget)
        assert not (folder / "out").exists()


def test_two_processes_do_not_write_the_same(folder: Path) -> None:
    import fcntl

    (folder / ".out.unfinished").mkdir()
    with open(folder / ".out.unfinished" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="out"):
            compress_tables([source(folder)], folder / "out", METHODS["transform_coding"], BITS)


def test_an_altered_file_is_refused(folder: Path) -> None:
    compress_tables([source(folder)], folder / "out", METHODS["transform_coding"], BITS)
    file = folder / "out" / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-5, os.SEEK_END)
        opened.write(b"abcde")
    with pytest.raises(ValueError, match="model.safetensors"):
        load_compressed(folder / "out")
    with pytest.raises(ValueError, match="model.safetensors"):
        load_compressed(folder / "out", rows="mmap").get_submodule("embedding")(torch.arange(VOCAB_SIZE))
    os.truncate(file, 5000)
    with pytest.raises(ValueError, match="model.safetensors"):
        load_compressed(folder / "out", rows="mmap")
