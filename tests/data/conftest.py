"""Data modules of words and of subwords over the same small corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_embcompress.data import HuggingFaceText, TextFiles
from lightning_embcompress.data.module import TextDataModule
from toys import save_byte_tokenizer

Make = Callable[..., TextDataModule]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level BPE of a few merges."""
    path = tmp_path_factory.mktemp("tokenizers") / "bpe"
    save_byte_tokenizer(path, "the cat sat on a mat and saw that this was not what it had been told")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with `train-0.txt`, `train-1.txt`, `valid.txt` and `test.txt`."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for name, lines in (("train-0", 35), ("train-1", 25), ("valid", 20), ("test", 20)):
        text = [f"w{number % 7} w{number % 3} {name.split('-')[0]} ." for number in range(lines)]
        (directory / f"{name}.txt").write_text("\n".join(text) + "\n")
    return directory


@pytest.fixture
def words(corpus: Path) -> Make:
    """Make a data module of words: 300 training tokens of 11 words, in 15 batches."""

    def make(**options: Any) -> TextFiles:
        sizes = {"batch_size": 4, "sequence_length": 5, "cache_dir": corpus.parent / "cache"}
        return TextFiles(**{**_files(corpus), **sizes, **options})

    return make


@pytest.fixture
def subwords(corpus: Path, tokenizer: Path) -> Make:
    """Make a data module of subwords, in shuffled blocks."""

    def make(**options: Any) -> HuggingFaceText:
        sizes = {"block_size": 17, "batch_size": 3, "cache_dir": corpus.parent / "cache"}
        return HuggingFaceText(**{"tokenizer": str(tokenizer), **_files(corpus), **sizes, **options})

    return make


@pytest.fixture(params=["words", "subwords"])
def make(request: pytest.FixtureRequest) -> Make:
    """Make a data module of either kind."""
    found: Make = request.getfixturevalue(request.param)
    return found


def _files(corpus: Path) -> dict[str, str]:
    return {f"{split}_files": str(corpus / f"{split}*.txt") for split in ("train", "valid", "test")}
