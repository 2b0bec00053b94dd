"""The words of a corpus and their ids."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

# Lines of a vocabulary file: counts are of no use, but tell that a line is what it should be.
_ALONE = re.compile(r"[ \t]*([^ \t\r]+)[ \t\r]*")
_WITH_COUNT = re.compile(r"[ \t]*([^ \t\r]+)[ \t]+[0-9]+[ \t\r]*")


class Vocabulary:
    """An ordered list of words; the id of a word is its place in the list.

    Args:
        words: The words, by id.
        unk_token: The word that stands for every word outside the vocabulary; it must be one of ``words``.
        eos_token: The word that ends a line or sentence; ``None`` if there is none.
        bos_token: The word that is read before the first word of a sentence; ``None`` if there is none.

    Raises:
        ValueError: If ``words`` is empty, holds a word twice or lacks a special token.

    Example:
        >>> vocabulary = Vocabulary(["the", "</S>", "<UNK>"])
        >>> vocabulary.encode(["the", "aardvark", "</S>"])
        [0, 2, 1]
        >>> len(vocabulary), vocabulary.unk_id
        (3, 2)
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        unk_token: str = "<UNK>",
        eos_token: str | None = "</S>",
        bos_token: str | None = None,
    ) -> None:
        """Check and keep the arguments."""
        if not words:
            raise ValueError("The vocabulary has no words: it needs at least its unknown-word token.")
        self.words = list(words)
        self.ids = {word: index for index, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            repeated = next(word for index, word in enumerate(self.words) if self.ids[word] != index)
            raise ValueError(f"The vocabulary holds the word {repeated!r} more than once: keep one of them.")
        for argument, token in (("unk_token", unk_token), ("eos_token", eos_token), ("bos_token", bos_token)):
            if token is not None and token not in self.ids:
                raise ValueError(
                    f"The vocabulary has no {token!r} ({argument}): add it, or name the token that is used instead "
                    f"with {argument}."
                )
        self.unk_token = unk_token
        self.eos_token = eos_token
        self.bos_token = bos_token

    def __len__(self) -> int:
        """The number of words."""
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        """Whether the word has an id of its own."""
        return word in self.ids

    @property
    def unk_id(self) -> int:
        """The id of every word outside the vocabulary."""
        return self.ids[self.unk_token]

    @property
    def eos_id(self) -> int | None:
        """The id of the end of a line or sentence, or ``None``."""
        return None if self.eos_token is None else self.ids[self.eos_token]

    @property
    def bos_id(self) -> int | None:
        """The id that is read before the first word of a sentence, or ``None``."""
        return None if self.bos_token is None else self.ids[self.bos_token]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the words in their order, in hexadecimal: equal exactly if all ids mean the same words."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def encode(self, words: Iterable[str]) -> list[int]:
        """Give the id of each word, ``unk_id`` for those outside the vocabulary."""
        unk = self.unk_id
        return [self.ids.get(word, unk) for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Give the word of each id.

        Raises:
            IndexError: If an id is not in ``[0, vocab_size)``.
        """
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < len(self):
            raise IndexError(f"Ids from {min(ids)} to {max(ids)} are outside the vocabulary of {len(self)} words.")
        return [self.words[index] for index in ids]

    @classmethod
    def from_counts(
        cls,
        counts: Mapping[str, int],
        *,
        min_count: int = 1,
        max_size: int | None = None,
        unk_token: str = "<UNK>",
        eos_token: str | None = "</S>",
        bos_token: str | None = None,
    ) -> Vocabulary:
        """Keep the frequent words of a corpus, ordered by falling count and then alphabetically.

        The special tokens are kept whatever their counts, and added with count zero where the corpus lacks them: held
        out text may need ``unk_token`` even if training text does not. Words that are left out count as ``unk_token``.

        Args:
            counts: How often each word occurs.
            min_count: Words that occur less often are left out.
            max_size: At most this many words, special tokens included; ``None`` for no limit.
            unk_token: See the class.
            eos_token: See the class.
            bos_token: See the class.

        Raises:
            ValueError: If ``min_count`` is below one or ``max_size`` leaves no room for a word.

        Example:
            >>> Vocabulary.from_counts({"a": 3, "b": 1, "c": 1, "</S>": 2}, min_count=2).words
            ['a', '</S>', '<UNK>']
        """
        special = dict.fromkeys(token for token in (unk_token, eos_token, bos_token) if token is not None)
        if min_count < 1:
            raise ValueError(f"min_count={min_count} keeps words that never occur: use 1 or more.")
        if max_size is not None and max_size <= len(special):
            raise ValueError(
                f"max_vocab_size={max_size} leaves no room for words beside {', '.join(special)}: use more, or null."
            )
        kept = [word for word, count in counts.items() if count >= min_count and word not in special]
        kept.sort(key=lambda word: (-counts[word], word))
        if max_size is not None:
            del kept[max_size - len(special) :]
        totals = {word: counts.get(word, 0) for word in (*kept, *special)}
        totals[unk_token] += sum(counts.values()) - sum(totals.values())
        words = sorted(totals, key=lambda word: (-totals[word], word))
        return cls(words, unk_token=unk_token, eos_token=eos_token, bos_token=bos_token)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        unk_token: str = "<UNK>",
        eos_token: str | None = "</S>",
        bos_token: str | None = None,
    ) -> Vocabulary:
        """Read a vocabulary file: a word on each line, or a word and its count; ids follow the order of the file.

        Nothing is added: the ids of a file are what trained tables were made with, and one more word would shift or
        lengthen them. A file without ``unk_token`` or ``eos_token`` is therefore an error; only where it has a
        ``bos_token`` and no ``eos_token``, the one both begins and ends sentences.

        Args:
            path: UTF-8 text. The first line decides whether the lines hold counts.
            unk_token: See the class.
            eos_token: See the class.
            bos_token: See the class.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not UTF-8, is empty, a line is malformed or repeated (the message names it), or a
                special token is missing.
        """
        words = _read_words(Path(path))
        if bos_token in words and eos_token not in words:
            eos_token = bos_token
        try:
            return cls(words, unk_token=unk_token, eos_token=eos_token, bos_token=bos_token)
        except ValueError as error:
            raise ValueError(f"vocabulary_file={str(path)!r}: {error}") from None


def _read_words(path: Path) -> list[str]:
    where = f"vocabulary_file={str(path)!r}"
    if not path.is_file():
        raise FileNotFoundError(f"{where} is not a file: give the path of a file with one word on each line.")
    try:
        # Only "\n" ends a line: str.splitlines would also break at rare characters that words may contain.
        lines = path.read_bytes().decode("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}): convert it to UTF-8.") from None
    if lines == [""]:
        raise ValueError(f"{where} is empty: it needs one word on each line.")
    first_line: dict[str, int] = {}
    has_counts = _WITH_COUNT.fullmatch(lines[0]) is not None
    for number, line in enumerate(lines, start=1):
        match = (_WITH_COUNT if has_counts else _ALONE).fullmatch(line)
        if match is None:
            expected = "a word and its count" if has_counts else "one word"
            raise ValueError(f"{where}, line {number}: expected {expected}, found {line.strip()!r}.")
        word = match[1]
        if word in first_line:
            raise ValueError(f"{where}, line {number}: the word {word!r} is already on line {first_line[word]}.")
        first_line[word] = number
    return list(first_line)
