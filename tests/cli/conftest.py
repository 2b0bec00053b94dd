"""What the tests of the shell's commands share: small models in files, and the command itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from lightning_embcompress.cli import main as cli
from toys import gpt2_config, save_byte_tokenizer

VOCAB = 300
TEXT = "".join(f"{word} of the {other}, and {word}.\n" for word in "abcdefgh" for other in ("sea", "sun", "moon", "m"))


class Shell:
    """The command, in the folder of a test.

    Attributes:
        capsys: What it prints.
        vocab_size: Rows of the tables.
        sentences: Content of `text`.
    """

    vocab_size = VOCAB
    sentences = TEXT

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: object) -> int:
        return cli.main([str(word) for word in words])

    def printed(self) -> str:
        return self.capsys.readouterr().out

    def inspected(self, path: object) -> dict[str, Any]:
        self.printed()
        assert self("inspect", path, "--json") == 0
        report: dict[str, Any] = json.loads(self.printed())
        return report

    def error(self) -> str:
        """The only line that was printed."""
        error = self.capsys.readouterr().err
        assert error.startswith("embcompress: error: ")
        assert error.count("\n") == 1, error
        return error.removeprefix("embcompress: error: ").rstrip("\n")

    def refuses(self, *words: object, says: str, code: int = 1) -> None:
        """Run what is wrong: one line says so, and nothing is written."""
        before = self.files()
        self.printed()
        assert self(*words) == code
        assert says in self.error()
        assert self.files() == before

    @staticmethod
    def read(path: object) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(Path(str(path)).read_text())
        return content

    @staticmethod
    def files() -> set[str]:
        return {str(path) for path in Path().rglob("*") if path.parts[0] != "cache"}

    @staticmethod
    def config(**given: Any) -> GPT2Config:
        return gpt2_config(**{"vocab_size": VOCAB, **given})


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    """The command, in an empty folder of its own."""
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("EMBCOMPRESS_TRACEBACK", raising=False)
    # What a test itself loads is not what the command prints.
    logging.disable_progress_bar()
    yield Shell(capsys)
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied GPT-2 with its tokenizer, a licence and a file of nobody's."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(Shell.config()).save_pretrained(folder)
    save_byte_tokenizer(folder, TEXT, VOCAB)
    (folder / "LICENSE.txt").write_text("Do as you like.")
    (folder / "notes.md").write_text("Nothing that this package knows.")
    return folder


@pytest.fixture(scope="session")
def endless_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer, without a token for the end of a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder, TEXT, VOCAB, eos=False)
    return folder


@pytest.fixture
def text(shell: Shell) -> Path:
    """A text in the folder of the test."""
    path = Path("text.txt")
    path.write_text(TEXT)
    return path
