"""Text tokenized once by a tokenizer of transformers into a memory-mapped file of ids, with the counts of the ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from lightning_embcompress.data.cache import TokenCache
from lightning_embcompress.data.store import CacheEntry, describe_sources
from lightning_embcompress.data.text import read_blocks
from lightning_embcompress.utils.progress import progress_bar

Documents = Literal["files", "lines"]
"""What ends with ``eos_token``: every file, or every line that is not empty."""

_WHAT_IT_CAN_BE = (
    "a directory with tokenizer.json, or with vocab.json and merges.txt, or the name of a model on the Hugging Face hub"
)

# Long texts are tokenized in pieces of whole lines of about this size: all that a cut can change is whether the tokens
# on both sides of it merge, and a tokenizer that keeps the words it has seen slows down on longer ones.
PIECE_CHARACTERS = 1 << 16
"""How much of a long text is tokenized as one."""
# What a tokenizer gets in one call: a fast one works on the pieces in parallel.
_CALL_CHARACTERS = 1 << 21


class Piece(NamedTuple):
    """Some text of a source.

    Attributes:
        text: Whole lines.
        ends_document: Whether a document ends with it.
        amount: How much of the source's size it is.
    """

    text: str
    ends_document: bool
    amount: float


class TextSource(Protocol):
    """One part of a corpus."""

    @property
    def size(self) -> float:
        """How much there is, in the unit of :attr:`Piece.amount`."""

    def describe(self) -> list[dict[str, Any]]:
        """Record by what a change of the text is noticed, as plain JSON values."""

    def pieces(self, documents: Documents) -> Iterator[Piece]:
        """Read the text."""


class TextFileSource:
    """UTF-8 text files.

    Args:
        files: Read in this order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Keep the arguments."""
        self.files = list(files)

    @property
    def size(self) -> float:
        """How many bytes there are."""
        return float(sum(path.stat().st_size for path in self.files))

    def describe(self) -> list[dict[str, Any]]:
        """Record sizes and times of modification."""
        return describe_sources(self.files)

    def pieces(self, documents: Documents) -> Iterator[Piece]:
        """Read the text; an empty file is no document.

        Raises:
            ValueError: If a file is not UTF-8.
        """
        for path in self.files:
            held: tuple[str, int] | None = None
            for text, num_bytes in read_blocks(path, PIECE_CHARACTERS):
                if documents == "lines":
                    lines = [line for line in text.split("\n") if line.strip()]
                    yield from (Piece(line, True, num_bytes / len(lines)) for line in lines)
                    continue
                # Held back by one: the last piece of a file is known to be that only when there is no other.
                if held is not None:
                    yield Piece(held[0], False, held[1])
                held = text, num_bytes
            if held is not None:
                yield Piece(held[0], True, held[1])


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
            return _as_tokenizer(GPT2Tokenizer.from_pretrained(str(directory)))
        if not described and not any(file.endswith(".model") for file in found):
            # Not left to AutoTokenizer, which may give an empty tokenizer.
            raise ValueError(f"tokenizer={name!r} holds no tokenizer: give {_WHAT_IT_CAN_BE}.")
        name = str(directory)
    elif directory.is_file() or directory.is_absolute() or name.startswith((".", "~")):
        raise ValueError(f"tokenizer={name!r} is not a directory: give {_WHAT_IT_CAN_BE}.")
    try:
        return _as_tokenizer(AutoTokenizer.from_pretrained(name))
    except Exception as error:  # damaged files raise whatever their readers do
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"tokenizer={name!r} cannot be loaded: give {_WHAT_IT_CAN_BE}. What transformers says: {reason}"
        ) from error


def _as_tokenizer(loaded: Any) -> PreTrainedTokenizerBase:
    assert isinstance(loaded, PreTrainedTokenizerBase)
    return loaded


class TokenizerVocabulary:
    """The tokens of a tokenizer, as models and checkpoints know them.

    Args:
        tokenizer: Gives the tokens, added ones included.

    Attributes:
        fingerprint: Differs where any token has another id. Not where the tokenizer cuts text in another way: what
            stays true of a trained table is which row belongs to which token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the fingerprint."""
        self._size = len(tokenizer)
        tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        self.fingerprint = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()

    def __len__(self) -> int:
        """The number of tokens."""
        return self._size


def tokenize_source(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    eos_id: int,
    documents: Documents,
    cache_dir: Path,
    *,
    description: str = "Tokenizing",
) -> TokenCache:
    """Tokenize a text into a cache, or open the cache if it exists and is complete and up to date.

    Several processes may call this at once: one does the work, the others wait for it.

    Args:
        source: The text.
        tokenizer: Gives the ids; it adds no special tokens.
        eos_id: Id of the token at the end of each document.
        documents: What a document is.
        cache_dir: The folder of the cache.
        description: What the progress bar says.

    Raises:
        ValueError: If a file is not UTF-8, or there are fewer than two tokens.
        OSError: If the cache's folder cannot be written.
    """
    sources = source.describe()
    settings = {
        "sources": [{key: value for key, value in entry.items() if key != "mtime_ns"} for entry in sources],
        "tokenizer": _tokenizer_fingerprint(tokenizer),
        "eos_id": eos_id,
        "documents": documents,
    }
    entry = CacheEntry(cache_dir, "hf-tokens", settings, sources, (".ids", ".counts.npy"))
    with entry.locked():
        details = entry.read()
        if details is None:
            try:
                _write(entry, source, tokenizer, eos_id, documents, description)
            except BaseException:
                entry.discard()
                raise
            details = entry.read()
            assert details is not None
    counts = torch.from_numpy(np.load(entry.path(".counts.npy")))
    return TokenCache(entry.path(".ids"), str(details["dtype"]), int(details["num_tokens"]), counts)


def _write(
    entry: CacheEntry,
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    eos_id: int,
    documents: Documents,
    description: str,
) -> None:
    vocab_size = len(tokenizer)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
    counts = np.zeros(vocab_size, dtype=np.int64)
    with entry.temporary(".ids").open("wb") as output, progress_bar(description, total=source.size) as advance:
        for pieces in _calls(source.pieces(documents)):
            texts = [piece.text for piece in pieces]
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            parts = []
            for ids, piece in zip(encoded["input_ids"], pieces, strict=True):
                parts.append(np.array([*ids, eos_id] if piece.ends_document else ids, dtype=dtype))
            joined = np.concatenate(parts)
            joined.tofile(output)
            counts += np.bincount(joined, minlength=vocab_size)
            advance(sum(piece.amount for piece in pieces))
    num_tokens = int(counts.sum())
    if num_tokens < 2:
        raise ValueError(f"{description}: only {num_tokens} tokens, too few to predict any. Give more text.")
    with entry.temporary(".counts.npy").open("wb") as output:
        np.save(output, counts)
    entry.commit({"dtype": dtype.name, "num_tokens": num_tokens})


def _calls(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Gather as many pieces as the tokenizer gets in one call."""
    gathered: list[Piece] = []
    characters = 0
    for piece in pieces:
        gathered.append(piece)
        characters += len(piece.text)
        if characters >= _CALL_CHARACTERS:
            yield gathered
            gathered, characters = [], 0
    if gathered:
        yield gathered


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
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
