"""Text as ids: what is kept, when it is made again, and how it is read."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.data import cache, sources, tokenized
from lightning_embcompress.data.sources import text_files
from lightning_embcompress.data.text import TextFormat
from lightning_embcompress.data.tokenized import Tokens, tokenize_words
from lightning_embcompress.data.vocabulary import Vocabulary

TEXT = "the cat sat\n\nthe dog\na cat\n"
VOCABULARY = Vocabulary(["the", "</S>", "cat", "<UNK>"])
IDS = [0, 2, 3, 1, 1, 0, 3, 1, 3, 2, 1]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def build(text: Path, text_format: TextFormat | None = None) -> Tokens:
    return tokenize_words(text_files([text]), text_format or TextFormat(), text.parent / "cache", "Reading")


def ids_of(text: Path) -> list[int]:
    found: list[int] = build(text).in_vocabulary(VOCABULARY).ids[:].tolist()
    return found


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "\u00e9", "rare", "<UNK>"])), min_size=1), st.booleans())
def test_ids_and_counts_equal_a_plain_loop(lines: list[list[str]], first: bool) -> None:
    vocabulary = Vocabulary(["a", "b", "</S>", "\u00e9", "<UNK>"])
    words = [word for line in lines for word in (*line, "</S>")]
    expected = vocabulary.encode(words)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "text")
        path.write_text("\n".join(map(" ".join, lines)) + "\n", encoding="utf-8")
        numbered = build(path)
        tokens = numbered.in_vocabulary(vocabulary, starts_with_end=first)
        assert tokens.ids[:].tolist() == [2] * first + expected
        assert tokens.counts.tolist() == np.bincount(expected, minlength=5).tolist()
        assert numbered.word_counts("</S>") == Counter(words)


def test_ids_are_as_small_as_the_vocabulary_lets_them(text: Path) -> None:
    for size, dtype in ((65_536, np.uint16), (65_537, np.int32)):
        ids = build(text).in_vocabulary(Vocabulary(["<UNK>", "</S>", *map(str, range(size - 3)), "cat"])).ids[:]
        assert ids.dtype == dtype
        assert ids.max() == size - 1


def test_any_range_of_ids_across_pieces(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "CALL_CHARACTERS", 5)
    monkeypatch.setattr(cache, "_ROWS_HELD", 1)
    tokens = build(text).in_vocabulary(VOCABULARY, starts_with_end=True)
    expected = [1, *IDS]
    for ids in (tokens.ids, pickle.loads(pickle.dumps(tokens.ids))):
        assert len(ids) == len(expected)
        for start in range(len(expected) + 1):
            for stop in range(len(expected) + 2):
                assert ids[start:stop].tolist() == expected[start:stop]


def test_workers_get_no_ids(text: Path) -> None:
    text.write_text("word\n" * 20_000)
    assert len(pickle.dumps(build(text).ids)) < 5000


def test_opening_again_does_no_work(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ids_of(text)
    assert first == IDS
    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_blocks", None)
        assert ids_of(text) == first
    text.write_text("cat cat cat\n")
    assert ids_of(text) == [2, 2, 2, 1]
    assert len(list((text.parent / "cache").rglob("*.arrow"))) == 1, "the changed text replaces what was there"


def cut(file: Path, part: float = 2 / 3) -> None:
    os.truncate(file, int(file.stat().st_size * part))


@pytest.mark.parametrize("damage", [cut, partial(cut, part=0), Path.unlink])
@pytest.mark.parametrize("name", ["*.arrow", "dataset_info.json"])
def test_damage_is_noticed(text: Path, damage: Callable[[Path], None], name: str) -> None:
    ids_of(text)
    (file,) = (text.parent / "cache").rglob(name)
    damage(file)
    assert ids_of(text) == IDS


def test_rows_that_are_missing_are_noticed(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    monkeypatch.setattr(cache, "_ROWS_HELD", 1)
    ids_of(text)
    (file,) = (text.parent / "cache").rglob("*.arrow")
    with pa.OSFile(str(file), "rb") as opened:
        batches = list(pa.ipc.open_stream(opened))
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_stream(opened, batches[0].schema) as writer:
        writer.write_batch(batches[0])
    assert ids_of(text) == IDS


def test_an_interrupted_process_leaves_nothing_that_is_read(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        yield "the", 3
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_blocks", interrupted)
        # As if it were killed: nothing is cleaned up.
        patch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            ids_of(text)
    assert ids_of(text) == IDS


def test_other_settings_are_kept_beside_these(text: Path) -> None:
    formats = [TextFormat(), TextFormat("words"), TextFormat(lowercase=True), TextFormat(line_ends=False)]
    for text_format in formats:
        build(text, text_format)
    assert len(list((text.parent / "cache").rglob("*.arrow"))) == len(formats)


def test_errors_leave_no_files(text: Path, tmp_path: Path) -> None:
    text.write_bytes(b"good\nb\xe9d\n")
    with pytest.raises(ValueError, match=r"text.txt' is not UTF-8: byte 6"):
        build(text)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}
    with pytest.raises(OSError, match="cache_dir=.*choose another cache_dir"):
        tokenize_words(text_files([text]), TextFormat(), text / "below_a_file", "Reading")


def _build_slowly(text: Path, builds: multiprocessing.Queue[int], result: multiprocessing.Queue[list[int]]) -> None:
    real = sources.read_blocks

    def counted(path: Path, block_bytes: int) -> Any:
        builds.put(os.getpid())
        return real(path, 64)

    sources.read_blocks = counted  # type: ignore[assignment]
    result.put(build(text).ids[:2000].tolist())


def test_one_of_two_processes_does_the_work(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"word{number % 3} word0\n" for number in range(5000)))
    context: Any = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    builds, results = context.Queue(), context.Queue()
    processes = [context.Process(target=_build_slowly, args=(text, builds, results)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = (results.get(timeout=60) for _ in range(2))
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert first == second
    assert len(first) == 2000
    builds.get(timeout=10)
    assert builds.empty(), "both processes read the text"


def test_waiting_for_another_process(text: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ids_of(text) == IDS
    (lock_file,) = (text.parent / "cache").glob("*.lock")
    held = Event()

    def hold() -> None:
        with FileLock(lock_file):
            held.set()
            time.sleep(1.3)

    thread = Thread(target=hold)
    thread.start()
    held.wait(30)
    with caplog.at_level("INFO"):
        assert ids_of(text) == IDS
    thread.join()
    assert "Another process is preparing" in caplog.text


def test_nothing_but_text_needs_datasets() -> None:
    script = """
import sys

sys.modules.update(dict.fromkeys(["datasets", "pyarrow", "torchdata"]))  # as if they were not installed
import lightning_embcompress.callbacks, lightning_embcompress.cli.main, lightning_embcompress.modules
from lightning_embcompress import compress
from lightning_embcompress.data import TextFiles
from toys import LanguageModel

model = LanguageModel()
print(compress(model, "low_rank", ratio=2.0).tables[0].method)
try:
    TextFiles("text.txt")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280, check=True)
    assert done.stdout.startswith("low_rank")
    assert "lightning-embcompress[text]" in done.stdout


def test_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / "lightning_embcompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache.default_cache_dir() == tmp_path / ".cache" / "lightning_embcompress"
