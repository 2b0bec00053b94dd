"""`embcompress compress-table`: tables from file to file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_embcompress import load_compressed
from lightning_embcompress.methods.registry import FullTable
from toys import falling_counts, falling_table


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file({"model.words.weight": falling_table(700, 16)}, "one.safetensors")
    np.save("counts.npy", falling_counts(700).numpy())
    return tmp_path


def test_table_of_a_file(shell: Any, folder: Path) -> None:
    assert shell("compress-table", "one.safetensors", "out", "--bits_per_weight", 6, "--counts", "counts.npy") == 0
    printed = shell.printed()
    assert "model.words (700 x 16)" in printed
    assert "rows='mmap'" in printed
    table = load_compressed("out", rows="mmap").get_submodule("model.words")
    assert table(torch.tensor([699])).shape == (1, 16)


def test_options_of_the_method_and_several_tables(shell: Any, folder: Path) -> None:
    np.save("items.npy", falling_table(300, 8).numpy())
    words = ["compress-table", "one.safetensors:model.words.weight", "out", "--more", "items.npy", "--ratio", 3]
    words += ["--method", "group_reduce", "--groups", 3, "--names", "words", "items"]
    assert shell(*words) == 0
    found = load_compressed("out")
    assert found.get_submodule("words").factorization.provenance["options"]["groups"] == 3
    assert found.get_submodule("items").factorization.vocab_size == 300


def test_integers(shell: Any, folder: Path) -> None:
    assert shell("compress-table", "one.safetensors", "out", "--integers", 4, "--group_size", 16) == 0
    table = load_compressed("out").get_submodule("model.words").factorization
    assert isinstance(table, FullTable)
    assert table.quantization.bits == 4


def test_overwriting(shell: Any, folder: Path) -> None:
    assert shell("compress-table", "one.safetensors", "out", "--ratio", 3) == 0
    before = load_file("out/model.safetensors").keys()
    assert shell("compress-table", "one.safetensors", "out", "--integers", 4, "--overwrite") == 0
    assert load_file("out/model.safetensors").keys() != before


@pytest.mark.parametrize(
    ("words", "named", "code"),
    [
        ("absent.safetensors out --ratio 3", "absent.safetensors", 1),
        ("one.safetensors:other out --ratio 3", "'other'", 1),
        ("one.safetensors out", "bits_per_weight", 2),
        ("one.safetensors out --ratio 3 --integers 4", "--integers", 2),
        ("one.safetensors out --integers 4 --group_size 0", "group_size", 2),
        ("one.safetensors out --ratio 3 --counts counts.npy counts.npy", "--counts", 2),
        ("one.safetensors out --ratio 3 --more one.safetensors", "--names", 2),
        ("one.safetensors out --ratio 3 --method tensor_train", "tensor_train", 1),
        ("one.safetensors one.safetensors --ratio 3", "one.safetensors", 2),
        ("one.safetensors out --rato 3", "--ratio", 2),
    ],
)
def test_a_wrong_command_line(shell: Any, folder: Path, words: str, named: str, code: int) -> None:
    shell.refuses("compress-table", *words.split(), says=named, code=code)
    assert not Path("out").exists()
