import json
import multiprocessing
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.data import cache as cache_module
from lightning_embcompress.data import store
from lightning_embcompress.data.cache import TokenCache, count_words, tokenize_files
from lightning_embcompress.data.text import TextFormat
from lightning_embcompress.data.vocabulary import Vocabulary

LINES = ["the cat sat", "", "the dog", "a cat"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary(["the", "</S>", "cat", "<UNK>"])


def build(text: Path, vocabulary: Vocabulary) -> TokenCache:
    return tokenize_files([text], vocabulary, TextFormat(), text.parent / "cache")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "\u00e9", "rare", "<UNK>"])), min_size=1), st.booleans())
def test_ids_equal_a_plain_loop(lines: list[list[str]], first: bool) -> None:
    vocabulary = Vocabulary(["a", "b", "</S>", "\u00e9", "<UNK>"])
    expected = [word for line in lines for word in (*line, "</S>")]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "text")
        path.write_text("\n".join(map(" ".join, lines)) + "\n", encoding="utf-8")
        cache = tokenize_files([path], vocabulary, TextFormat(), Path(directory), first_token="</S>" if first else None)
        assert cache.ids().tolist() == [2] * first + vocabulary.encode(expected)
        assert cache.token_counts.tolist() == np.bincount(vocabulary.encode(expected), minlength=5).tolist()
        counts = count_words([path], TextFormat(), Path(directory), eos_token="</S>")
        assert counts == Counter(expected)
        assert count_words([path], TextFormat(), Path(directory), eos_token="</S>") == counts


def test_dtype_follows_vocabulary(text: Path) -> None:
    for size, dtype in ((65_536, "uint16"), (65_537, "int32")):
        words = ["<UNK>", "</S>", *map(str, range(size - 3)), "cat"]
        cache = build(text, Vocabulary(words))
        assert cache.dtype == dtype
        assert int(cache.ids().max()) == size - 1


def test_opening_again_does_no_work(text: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(text, vocabulary)
    monkeypatch.setattr(cache_module, "read_blocks", None)
    again = build(text, vocabulary)
    assert again.path == first.path
    assert again.ids().tolist() == first.ids().tolist()
    assert again.token_counts.tolist() == first.token_counts.tolist()
    assert not again.ids().flags.writeable


def cut_ids(cache: TokenCache) -> None:
    os.truncate(cache.path, cache.path.stat().st_size - 2)


def cut_counts(cache: TokenCache) -> None:
    os.truncate(cache.path.with_suffix(".counts.npy"), 100)


def lose_ids(cache: TokenCache) -> None:
    cache.path.unlink()


def cut_record(cache: TokenCache) -> None:
    os.truncate(cache.path.with_suffix(".json"), 50)


def lose_record(cache: TokenCache) -> None:
    cache.path.with_suffix(".json").unlink()
    cache.path.write_bytes(b"\xff" * cache.path.stat().st_size)


def older_format(cache: TokenCache) -> None:
    path = cache.path.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 0}))


@pytest.mark.parametrize("damage", [cut_ids, cut_counts, lose_ids, cut_record, lose_record, older_format])
def test_damaged_cache_is_made_again(text: Path, vocabulary: Vocabulary, damage: object) -> None:
    cache = build(text, vocabulary)
    expected = cache.ids().tolist()
    assert callable(damage)
    damage(cache)
    again = build(text, vocabulary)
    assert again.ids().tolist() == expected
    assert int(again.token_counts.sum()) == len(expected)


def test_a_killed_process_leaves_nothing_that_is_read(
    text: Path, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stop at every replacement of a file, as a kill would (no clean-up), and look at what the next process makes of it.
    expected = build(text, vocabulary).ids().tolist()
    real_replace = os.replace
    for survived in range(3):
        calls = 0

        def replace(source: Path, target: Path, survived: int = survived) -> None:
            nonlocal calls
            calls += 1
            if calls > survived:
                raise KeyboardInterrupt
            real_replace(source, target)

        text.touch()  # makes the cache stale
        os.utime(text, ns=(survived, survived))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            patch.setattr(store.CacheEntry, "discard", lambda self: None)
            with pytest.raises(KeyboardInterrupt):
                build(text, vocabulary)
        assert build(text, vocabulary).ids().tolist() == expected


def test_changed_source_is_tokenized_again(text: Path, vocabulary: Vocabulary) -> None:
    assert build(text, vocabulary).num_tokens == 11
    counts = count_words([text], TextFormat(), text.parent / "cache", eos_token="</S>")
    assert counts["cat"] == 2
    text.write_text("cat cat cat\n")
    assert build(text, vocabulary).ids().tolist() == [2, 2, 2, 1]
    assert count_words([text], TextFormat(), text.parent / "cache", eos_token="</S>") == {"cat": 3, "</S>": 1}


def test_settings_never_collide(text: Path, vocabulary: Vocabulary) -> None:
    directory = text.parent / "cache"
    other = Vocabulary(["</S>", "the", "cat", "<UNK>"])
    roles = Vocabulary(vocabulary.words, unk_token="the")
    caches = [
        tokenize_files([text], vocabulary, TextFormat(), directory),
        tokenize_files([text], other, TextFormat(), directory),
        tokenize_files([text], roles, TextFormat(), directory),
        tokenize_files([text], vocabulary, TextFormat("words"), directory),
        tokenize_files([text], vocabulary, TextFormat(lowercase=True), directory),
        tokenize_files([text], vocabulary, TextFormat(line_ends=False), directory),
        tokenize_files([text], vocabulary, TextFormat(), directory, first_token="</S>"),
    ]
    assert len({cache.path for cache in caches}) == len(caches)


def test_failure_leaves_no_files(text: Path, vocabulary: Vocabulary) -> None:
    directory = text.parent / "cache"
    with pytest.raises(ValueError, match=r"text.txt': only 11 tokens.*at least 40"):
        tokenize_files([text], vocabulary, TextFormat(), directory, min_tokens=40)
    with pytest.raises(ValueError, match="only 11 tokens"):
        count_words([text], TextFormat(), directory, eos_token="</S>", min_tokens=40)
    text.write_bytes(b"good\nb\xe9d\n")
    with pytest.raises(ValueError, match="byte 6"):
        build(text, vocabulary)
    assert [path for path in directory.iterdir() if path.suffix != ".lock"] == []


def test_unwritable_cache_dir(text: Path, vocabulary: Vocabulary) -> None:
    with pytest.raises(OSError, match="cache_dir=.*choose another cache_dir"):
        tokenize_files([text], vocabulary, TextFormat(), text / "below_a_file")


def _build_slowly(text: Path, builds: "multiprocessing.Queue[int]", result: "multiprocessing.Queue[list[int]]") -> None:
    real = cache_module.read_blocks  # type: ignore[attr-defined]

    def counted(path: Path) -> object:
        builds.put(os.getpid())
        return real(path, 64)

    cache_module.read_blocks = counted  # type: ignore[assignment,attr-defined]
    vocabulary = Vocabulary(["word0", "</S>", "<UNK>"])
    result.put(build(text, vocabulary).ids()[:2000].tolist())


def test_two_processes_build_one_cache(tmp_path: Path) -> None:
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
    assert builds.empty(), "both processes tokenized the text"


def test_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.default_cache_dir() == tmp_path / "lightning_embcompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert store.default_cache_dir() == tmp_path / ".cache" / "lightning_embcompress"
