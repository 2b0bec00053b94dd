"""A text in the layout of the One Billion Word benchmark that is made of numbered words, for trying its recipe out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lightning_embcompress.bench.made_tables import drawn_ids
from lightning_embcompress.utils.files import staged

VOCABULARY_FILE = "1b_word_vocab.txt"
"""As the vocabulary is called that published models use: `<S>`, which begins and ends sentences, and no `</S>`."""

# Words of a sentence of the benchmark, on average.
_SENTENCE = 25
_SPECIAL = ("<S>", "<UNK>")
_HELD_OUT = "heldout-monolingual.tokenized.shuffled/news.en.heldout-{:05d}-of-00050"
_TRAIN = "training-monolingual.tokenized.shuffled/news.en-{:05d}-of-00100"
# One in so many sentences of the training text is in each held-out shard, but at least those of a batch.
_HELD_OUT_PART, _HELD_OUT_LEAST = 50, 400
# Sentences that are drawn at once.
_AT_ONCE = 10_000


def make_corpus(
    folder: Path, vocab_size: int, tokens: int, seed: int = 0, advance: Callable[[float], None] = lambda _: None
) -> None:
    """Write shards and a vocabulary as :class:`~lightning_embcompress.data.OneBillionWord` reads them.

    Words are drawn by Zipf's law, one independent of the other: a model can learn how frequent they are and nothing
    else. They are written in the order of their frequency, the most frequent first, as sampled softmax needs it.

    Args:
        folder: Where; it is made, and must not exist or be empty.
        vocab_size: Words, `<S>` and `<UNK>` among them.
        tokens: Of the training text, about; words that are not drawn are in the vocabulary all the same.
        seed: Of the text.
        advance: Called with shares of the work that add up to 1.

    Raises:
        ValueError: If there are too few words or tokens, there is something in the folder, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as temporary:
        ...     make_corpus(Path(temporary, "text"), vocab_size=100, tokens=1000)
        ...     sorted(path.name for path in Path(temporary, "text").iterdir())[0]
        '1b_word_vocab.txt'
    """
    if vocab_size <= len(_SPECIAL):
        raise ValueError(f"vocab_size must be above {len(_SPECIAL)}, for {' and '.join(_SPECIAL)}, it is {vocab_size}")
    if tokens < _SENTENCE:
        raise ValueError(f"tokens must be at least {_SENTENCE}, a sentence, they are {tokens}")
    # Of a link, the folder that it leads to.
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists and is not an empty folder: choose another")
    generator = torch.Generator().manual_seed(seed)
    words = [f"w{index}" for index in range(vocab_size - len(_SPECIAL))]
    sentences = -(-tokens // (_SENTENCE + 1))
    held_out = max(_HELD_OUT_LEAST, sentences // _HELD_OUT_PART)
    shards = {_TRAIN.format(1): sentences, _HELD_OUT.format(0): held_out, _HELD_OUT.format(1): held_out}
    with staged(folder, directory=True) as temporary:
        (temporary / VOCABULARY_FILE).write_text("\n".join([*_SPECIAL, *words]) + "\n", encoding="utf-8", newline="\n")
        for name, count in shards.items():
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8", newline="\n") as file:
                for start in range(0, count, _AT_ONCE):
                    lines = min(_AT_ONCE, count - start)
                    ids = drawn_ids(lines * _SENTENCE, len(words), generator).view(lines, _SENTENCE)
                    file.writelines(" ".join(words[index] for index in line) + "\n" for line in ids.tolist())
                    advance(lines / sum(shards.values()))
