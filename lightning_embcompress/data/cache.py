"""Text tokenized once into a memory-mapped file of ids, with the counts of the ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_embcompress.data.store import CacheEntry, describe_sources
from lightning_embcompress.data.text import LINE_END, TextFormat, read_blocks
from lightning_embcompress.data.vocabulary import Vocabulary
from lightning_embcompress.utils.progress import progress_bar


@dataclass(frozen=True)
class TokenCache:
    """The ids of a text, on disk.

    Args:
        path: The file of ids.
        dtype: ``uint16`` where the vocabulary fits, else ``int32``.
        num_tokens: How many ids it holds.
        token_counts: How often each id occurs in the text, int64 ``[vocab_size]``; a ``first_token`` put before the
            text is not counted.
    """

    path: Path
    dtype: str
    num_tokens: int
    token_counts: Tensor

    def ids(self) -> NDArray[np.integer[Any]]:
        """Map the ids ``[num_tokens]`` into memory, read only: only what is used gets read from disk."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.num_tokens,))


class _Ids(dict[str, int]):
    """Ids by word, with the unknown word's id for all others; faster in ``map`` than ``dict.get`` with a default."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary.ids)
        self.unk_id = vocabulary.unk_id
        if vocabulary.eos_id is not None:
            self[LINE_END] = vocabulary.eos_id

    def __missing__(self, word: str) -> int:
        return self.unk_id


def tokenize_files(
    files: Sequence[Path],
    vocabulary: Vocabulary,
    text_format: TextFormat,
    cache_dir: Path,
    *,
    first_token: str | None = None,
    min_tokens: int = 1,
    description: str = "Tokenizing",
) -> TokenCache:
    """Tokenize text files into a cache, or open the cache if it exists and is complete and up to date.

    Several processes may call this at once: one does the work, the others wait for it.

    Args:
        files: UTF-8 text, taken in this order.
        vocabulary: Gives the ids; ends of lines become its ``eos_token``.
        text_format: How lines are cut into words.
        cache_dir: The folder of the cache.
        first_token: A word to put before the text, so that the text's own first word is predicted, too.
        min_tokens: Fewer tokens are an error, and no cache is left behind.
        description: What the progress bar says.

    Raises:
        ValueError: If a file is not UTF-8, or there are fewer than ``min_tokens`` tokens.
        OSError: If the cache's folder cannot be written.
    """
    settings = {
        "files": [str(path) for path in files],
        "format": asdict(text_format),
        "vocabulary": vocabulary.fingerprint,
        # The same words in other roles give other ids to line ends and unknown words.
        "special_ids": [vocabulary.unk_id, vocabulary.eos_id],
        "first_token": first_token,
    }
    entry = CacheEntry(cache_dir, "tokens", settings, describe_sources(files), (".ids", ".counts.npy"))
    with entry.locked():
        cache = _open_tokens(entry, len(vocabulary))
        if cache is None:
            try:
                _write_tokens(entry, files, vocabulary, text_format, first_token, min_tokens, description)
            except BaseException:
                entry.discard()
                raise
            cache = _open_tokens(entry, len(vocabulary))
            assert cache is not None
    _check_length(cache.num_tokens, min_tokens, files)
    return cache


def _check_length(num_tokens: int, min_tokens: int, files: Sequence[Path]) -> None:
    if num_tokens < min_tokens:
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise ValueError(
            f"{str(files[0])!r}{others}: only {num_tokens} tokens, but the batch size needs at least {min_tokens} "
            f"(two for each stream): give more text, or lower batch_size (eval_batch_size for held-out text)."
        )


def _write_tokens(
    entry: CacheEntry,
    files: Sequence[Path],
    vocabulary: Vocabulary,
    text_format: TextFormat,
    first_token: str | None,
    min_tokens: int,
    description: str,
) -> None:
    dtype = np.dtype(np.uint16 if len(vocabulary) <= 1 << 16 else np.int32)
    to_id = _Ids(vocabulary).__getitem__
    counts = np.zeros(len(vocabulary), dtype=np.int64)
    num_tokens = 0
    with (
        entry.temporary(".ids").open("wb") as output,
        progress_bar(description, total=sum(path.stat().st_size for path in files)) as advance,
    ):
        if first_token is not None:
            np.array([to_id(first_token)], dtype=dtype).tofile(output)
            num_tokens = 1
        for path in files:
            for text, num_bytes in read_blocks(path):
                words = text_format.tokens(text)
                ids = np.fromiter(map(to_id, words), dtype=dtype, count=len(words))
                ids.tofile(output)
                counts += np.bincount(ids, minlength=len(vocabulary))
                num_tokens += len(ids)
                advance(num_bytes)
    _check_length(num_tokens, min_tokens, files)
    with entry.temporary(".counts.npy").open("wb") as output:
        np.save(output, counts)
    entry.commit({"dtype": dtype.name, "num_tokens": num_tokens})


def _open_tokens(entry: CacheEntry, vocab_size: int) -> TokenCache | None:
    details = entry.read()
    if details is None:
        return None
    dtype, num_tokens = str(details["dtype"]), int(details["num_tokens"])
    counts = np.load(entry.path(".counts.npy"))
    if entry.path(".ids").stat().st_size != num_tokens * np.dtype(dtype).itemsize or counts.shape != (vocab_size,):
        return None
    return TokenCache(entry.path(".ids"), dtype, num_tokens, torch.from_numpy(counts))


def count_words(
    files: Sequence[Path],
    text_format: TextFormat,
    cache_dir: Path,
    *,
    eos_token: str | None,
    min_tokens: int = 1,
    description: str = "Counting words",
) -> dict[str, int]:
    """Count the words of text files, or read the counts from the cache; one pass serves every minimum count.

    Args:
        files: UTF-8 text.
        text_format: How lines are cut into words.
        cache_dir: The folder of the cache.
        eos_token: The word that ends of lines count as.
        min_tokens: Fewer tokens are an error, and no cache is left behind.
        description: What the progress bar says.

    Returns:
        The counts by word, in the order in which the words first occur.

    Raises:
        ValueError: If a file is not UTF-8, or there are fewer than ``min_tokens`` tokens.
        OSError: If the cache's folder cannot be written.
    """
    settings = {"files": [str(path) for path in files], "format": asdict(text_format)}
    entry = CacheEntry(cache_dir, "words", settings, describe_sources(files), (".txt",))
    with entry.locked():
        if entry.read() is None:
            try:
                _write_counts(entry, files, text_format, min_tokens, description)
            except BaseException:
                entry.discard()
                raise
        lines = entry.path(".txt").read_bytes().decode().split("\n")[:-1]
    counts: dict[str, int] = {}
    for line in lines:
        word, _, count = line.rpartition(" ")
        counts[word] = int(count)
    _check_length(sum(counts.values()), min_tokens, files)
    if LINE_END in counts:
        ends = counts.pop(LINE_END)
        if eos_token is not None:
            counts[eos_token] = counts.get(eos_token, 0) + ends
    return counts


def _write_counts(
    entry: CacheEntry, files: Sequence[Path], text_format: TextFormat, min_tokens: int, description: str
) -> None:
    counts: Counter[str] = Counter()
    with progress_bar(description, total=sum(path.stat().st_size for path in files)) as advance:
        for path in files:
            for text, num_bytes in read_blocks(path):
                counts.update(text_format.tokens(text))
                advance(num_bytes)
    _check_length(counts.total(), min_tokens, files)
    with entry.temporary(".txt").open("w", encoding="utf-8", newline="\n") as output:
        output.writelines(f"{word} {count}\n" for word, count in counts.items())
    entry.commit({"num_words": len(counts)})
