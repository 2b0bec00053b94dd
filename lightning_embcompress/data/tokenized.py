"""Text as token ids, tokenized once, with the counts of the ids."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from lightning_embcompress.data.cache import cached
from lightning_embcompress.data.sources import Documents, Piece, TextSource
from lightning_embcompress.data.text import LINE_END, TextFormat
from lightning_embcompress.data.vocabulary import Vocabulary
from lightning_embcompress.utils.progress import progress_bar

Ids = NDArray[np.integer[Any]]

_WHAT_IT_CAN_BE = (
    "a directory with tokenizer.json, or with vocab.json and merges.txt, or the name of a model on the Hugging Face hub"
)

# What is tokenized in one call: a fast tokenizer works on the pieces in parallel.
CALL_CHARACTERS = 1 << 21
# Long texts are tokenized in pieces of whole lines of about this size: all that a cut can change is whether the tokens
# on both sides of it merge, and a tokenizer that keeps the words it has seen slows down on longer ones.
PIECE_CHARACTERS = 1 << 16


class TokenStream:
    """The ids of a text as one array, of which only what is used gets read from disk.

    Args:
        rows: A `datasets.Dataset` with the ids as its column ``ids``, a list in each row.
        new_ids: Ids to give in place of those, `[vocab_size]`; ``None`` to give them as they are.
        first: Ids that come before those of the rows.
    """

    def __init__(self, rows: Any, new_ids: Ids | None = None, first: tuple[int, ...] = ()) -> None:
        """Map the rows into memory."""
        self.rows, self.new_ids, self.first = rows, new_ids, first
        chunks = [chunk.flatten().to_numpy() for chunk in rows.data.column("ids").chunks]
        chunks.insert(0, np.array(first, dtype=chunks[0].dtype))
        self._chunks: list[Ids] = [chunk for chunk in chunks if len(chunk)] or chunks[:1]
        self._starts = [0, *accumulate(map(len, self._chunks))]

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the file's name to worker processes instead of the ids."""
        return type(self), (self.rows, self.new_ids, self.first)

    def __len__(self) -> int:
        """The number of ids."""
        return self._starts[-1]

    def __getitem__(self, part: slice) -> Ids:
        """Give the ids of a range."""
        start, stop, _ = part.indices(len(self))
        first, last = bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop)
        chunks = zip(self._chunks[first:last], self._starts[first:last], strict=True)
        pieces = [chunk[max(start - begin, 0) : stop - begin] for chunk, begin in chunks]
        ids = np.concatenate(pieces or [self._chunks[0][:0]])
        return ids if self.new_ids is None else self.new_ids[ids]


@dataclass(frozen=True)
class Tokens:
    """A tokenized text.

    Args:
        ids: The whole of it.
        counts: How often each id occurs, int64 `[vocab_size]`.
        words: The words by id, if they were numbered as they came.
    """

    ids: TokenStream
    counts: Tensor
    words: list[str]

    @classmethod
    def of(cls, rows: Any) -> Tokens:
        """Open a text of the cache."""
        words = "\n".join(filter(None, rows["words"]))
        counts = torch.from_numpy(np.array(rows[-1]["counts"], dtype=np.int64))
        return cls(TokenStream(rows), counts, words.split("\n") if words else [])

    def word_counts(self, eos_token: str | None) -> dict[str, int]:
        """Count the words, and ends of lines as `eos_token`."""
        counts = dict(zip(self.words, self.counts.tolist(), strict=True))
        ends = counts.pop(LINE_END, 0)
        if eos_token is not None and ends:
            counts[eos_token] = counts.get(eos_token, 0) + ends
        return counts

    def in_vocabulary(self, vocabulary: Vocabulary, starts_with_end: bool = False) -> Tokens:
        """Number the words as a vocabulary does, ends of lines as its ``eos_token``.

        Args:
            vocabulary: Gives the ids.
            starts_with_end: Whether an end of a line stands before the text, so that its first word is predicted, too.
                It is not counted.
        """
        ids = vocabulary.ids if vocabulary.eos_id is None else {**vocabulary.ids, LINE_END: vocabulary.eos_id}
        unk_id = vocabulary.unk_id
        dtype = np.uint16 if len(vocabulary) <= 1 << 16 else np.int32
        new_ids: Ids = np.array([ids.get(word, unk_id) for word in self.words], dtype=dtype)
        counts = torch.zeros(len(vocabulary), dtype=torch.int64)
        counts.index_add_(0, torch.from_numpy(new_ids.astype(np.int64)), self.counts)
        first = (self.words.index(LINE_END),) if starts_with_end else ()
        return Tokens(TokenStream(self.ids.rows, new_ids, first), counts, [])


def tokenize_words(source: TextSource, text_format: TextFormat, cache_dir: Path, description: str) -> Tokens:
    """Cut a text into words and number them as they come, or open what is in the cache.

    One pass serves every vocabulary: words get the ids of one by :meth:`Tokens.in_vocabulary`.

    Args:
        source: The text.
        text_format: How lines are cut into words.
        cache_dir: The folder of the cache.
        description: What the progress bar says.

    Raises:
        ValueError: If a file is not UTF-8.
        OSError: If the cache's folder cannot be written.
    """

    def parts() -> Iterator[tuple[Ids, list[str]]]:
        numbers: defaultdict[str, int] = defaultdict()
        numbers.default_factory = numbers.__len__
        with progress_bar(description, total=source.size) as advance:
            for piece in source.pieces("files", CALL_CHARACTERS):
                words, known = text_format.tokens(piece.text), len(numbers)
                ids = np.fromiter(map(numbers.__getitem__, words), dtype=np.int32, count=len(words))
                yield ids, list(islice(numbers, known, None))
                advance(piece.amount)

    settings = {"source": source.identity, "format": asdict(text_format)}
    return Tokens.of(cached("words", settings, source.state, lambda: _rows(parts(), np.int32), cache_dir))


def tokenize_subwords(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    eos_id: int | None,
    documents: Documents,
    cache_dir: Path,
    description: str,
) -> Tokens:
    """Tokenize a text by a tokenizer of transformers, or open what is in the cache.

    Args:
        source: The text.
        tokenizer: Gives the ids; it adds no special tokens.
        eos_id: Id of the token at the end of each document; ``None`` for none.
        documents: What a document is.
        cache_dir: The folder of the cache.
        description: What the progress bar says.

    Raises:
        ValueError: If a file is not UTF-8, or there are fewer than two tokens.
        OSError: If the cache's folder cannot be written.
    """
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    end = [] if eos_id is None else [eos_id]

    def parts() -> Iterator[tuple[Ids, list[str]]]:
        with progress_bar(description, total=source.size) as advance:
            for pieces in _calls(source.pieces(documents, PIECE_CHARACTERS)):
                texts = [piece.text for piece in pieces]
                encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
                ids: list[int] = []
                for found, piece in zip(encoded["input_ids"], pieces, strict=True):
                    ids += [*found, *end] if piece.ends_document else found
                yield np.array(ids, dtype=dtype), []
                advance(sum(piece.amount for piece in pieces))

    settings = {"source": source.identity, "tokenizer": _rules(tokenizer), "eos_id": eos_id, "documents": documents}
    rows = cached("subwords", settings, source.state, lambda: _rows(parts(), dtype, len(tokenizer)), cache_dir)
    tokens = Tokens.of(rows)
    if len(tokens.ids) < 2:
        raise ValueError(f"{description}: only {len(tokens.ids)} tokens, too few to predict any. Give more text.")
    return tokens


def _rows(parts: Iterable[tuple[Ids, list[str]]], dtype: Any, vocab_size: int = 0) -> Iterator[dict[str, Any]]:
    """Give the rows of the cache: ids and the words that are new among them, and at last the counts."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for ids, words in parts:
        found = np.bincount(ids, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
        yield {"ids": ids, "words": "\n".join(words), "counts": counts[:0]}
    yield {"ids": np.array([], dtype=dtype), "words": "", "counts": counts}


def _calls(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Gather as many pieces as the tokenizer gets in one call."""
    gathered: list[Piece] = []
    characters = 0
    for piece in pieces:
        gathered.append(piece)
        characters += len(piece.text)
        if characters >= CALL_CHARACTERS:
            yield gathered
            gathered, characters = [], 0
    if gathered:
        yield gathered


def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash all that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # Without its rules at hand, every loading from another place or version counts as another tokenizer.
        rules: Any = [type(tokenizer).__name__, repr(sorted(tokenizer.init_kwargs.items(), key=str))]
    else:
        rules = json.loads(backend.to_str())
        # What the last call has asked for, not what the tokenizer is.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    tokens = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([rules, tokens], sort_keys=True).encode()).hexdigest()


class TokenizerVocabulary:
    """The tokens of a tokenizer, as models and checkpoints know them.

    Args:
        tokenizer: Gives the tokens, added ones included.
        limit: Of their number; None for none.

    Attributes:
        fingerprint: Differs where any token has another id. Not where the tokenizer cuts text in another way: what
            stays true of a trained table is which row belongs to which token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> None:
        """Take the fingerprint."""
        self._size = len(tokenizer) if limit is None else min(limit, len(tokenizer))
        tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        self.fingerprint = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()

    def __len__(self) -> int:
        """The number of tokens."""
        return self._size


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by what a person calls it.

    Args:
        name: A directory with `tokenizer.json`, or with whatever `AutoTokenizer` reads, or with nothing but GPT-2's
            `vocab.json` and `merges.txt`; or a name on the Hugging Face hub.

    Raises:
        ValueError: If there is no such tokenizer, or the directory holds none.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        found = {path.name for path in directory.iterdir()}
        described = found & {"tokenizer.json", "tokenizer_config.json", "config.json"}
        if not described and {"vocab.json", "merges.txt"} <= found:
            # AutoTokenizer asks a configuration for the class, and there is none.
            gpt2: PreTrainedTokenizerBase = GPT2Tokenizer.from_pretrained(str(directory))
            return gpt2
        if not described and not any(file.endswith(".model") for file in found):
            # Not left to AutoTokenizer, which may give an empty tokenizer.
            raise ValueError(f"tokenizer={name!r} holds no tokenizer: give {_WHAT_IT_CAN_BE}.")
        name = str(directory)
    elif directory.is_file() or directory.is_absolute() or name.startswith((".", "~")):
        raise ValueError(f"tokenizer={name!r} is not a directory: give {_WHAT_IT_CAN_BE}.")
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
        return loaded
    except Exception as error:  # damaged files raise whatever their readers do
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"tokenizer={name!r} cannot be loaded: give {_WHAT_IT_CAN_BE}. What transformers says: {reason}"
        ) from error
