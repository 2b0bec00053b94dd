"""Words of plain text as streams, for models that carry their state along."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_embcompress.data.loading import ResumableLoader, ResumableSampler, make_loader
from lightning_embcompress.data.module import TextDataModule, check_least
from lightning_embcompress.data.sources import Split, TextSource
from lightning_embcompress.data.text import TextFormat
from lightning_embcompress.data.tokenized import Tokens, tokenize_words
from lightning_embcompress.data.vocabulary import Vocabulary
from lightning_embcompress.data.windows import TokenWindows


class TokenStreamDataModule(TextDataModule):
    """Text as streams of token ids, cut into windows for a model that carries its state along.

    A batch is a pair of inputs and targets, int64 ``[batch_size, sequence_length]``; the target is the next token, and
    each batch continues the streams of the batch before it (:class:`~lightning_embcompress.data.windows.TokenWindows`).
    In distributed training every process has ``batch_size`` streams of its own.

    Subclasses say in :meth:`source` where the text is.

    Args:
        batch_size: How many streams are trained on in parallel, per process. As many less one of the last tokens are
            not used; with ``eval_batch_size=1`` every token is evaluated.
        sequence_length: How many steps a batch has.
        vocabulary_file: One ``word`` or ``word count`` on each line, ids in the order of the file; ``None`` to count
            the training text. With a file, ``min_count`` and ``max_vocab_size`` are not used.
        min_count: Counted vocabulary: words that occur less often become ``unk_token``.
        max_vocab_size: Counted vocabulary: at most this many words, special tokens included.
        unk_token: The word for words outside the vocabulary.
        options: ``eval_batch_size``, ``num_workers`` and ``cache_dir`` of
            :class:`~lightning_embcompress.data.module.TextDataModule`.

    Raises:
        ValueError: If an argument is out of range.
    """

    vocabulary_options = "vocabulary_file, training files, min_count and max_vocab_size"

    text_format = TextFormat()
    """How lines are cut into words."""

    eos_token: str | None = "</S>"
    """The word at the end of each line; ``None`` for none."""

    bos_token: str | None = None
    """The word that is read in place of ``eos_token`` before the first word of a line; ``None`` to read that."""

    predict_first_token = False
    """Whether the first word of the text is a target, too."""

    def __init__(
        self,
        batch_size: int = 20,
        sequence_length: int = 35,
        vocabulary_file: str | Path | None = None,
        min_count: int = 1,
        max_vocab_size: int | None = None,
        unk_token: str = "<UNK>",
        **options: Any,
    ) -> None:
        """Check and keep the arguments."""
        super().__init__(batch_size, **options)
        check_least(1, sequence_length=sequence_length, min_count=min_count, max_vocab_size=max_vocab_size)
        self.sequence_length = sequence_length
        self.vocabulary_file = vocabulary_file
        self.min_count = min_count
        self.max_vocab_size = max_vocab_size
        self.unk_token = unk_token
        self._words: dict[Split, Tokens] = {}

    def __str__(self) -> str:
        """Name the sizes. Lightning's own description would count and tokenize text, also within an error message."""
        return f"{type(self).__name__}(batch_size={self.batch_size}, sequence_length={self.sequence_length})"

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The words and their ids; read or counted at the first use."""
        special: dict[str, Any] = {
            "unk_token": self.unk_token,
            "eos_token": self.eos_token,
            "bos_token": self.bos_token,
        }
        if self.vocabulary_file is not None:
            return Vocabulary.from_file(Path(self.vocabulary_file).expanduser(), **special)
        counts = self._count_words("train").word_counts(self.eos_token)
        if self.bos_token is not None and self.bos_token != self.eos_token and self.eos_token is not None:
            counts[self.bos_token] = counts.get(self.bos_token, 0) + counts[self.eos_token]
        return Vocabulary.from_counts(counts, min_count=self.min_count, max_size=self.max_vocab_size, **special)

    @property
    def token_counts(self) -> Tensor:
        """How often each id occurs in the training text, int64 ``[vocab_size]``.

        A ``bos_token`` that is read in place of ``eos_token`` counts as often as that.
        """
        counts = super().token_counts
        if self._replace_inputs is not None:
            eos_id, bos_id = self._replace_inputs
            counts[bos_id] += counts[eos_id]
        return counts

    def _count_words(self, split: Split, source: TextSource | None = None) -> Tokens:
        if split not in self._words:
            source = source or self._required(split)
            found = tokenize_words(source, self.text_format, self.cache_dir, f"Reading {split} text")
            least = 2 * self.batch_size_of(split)
            if len(found.ids) + self.predict_first_token < least:
                raise ValueError(
                    f"{source.name}: only {len(found.ids)} tokens, but the batch size needs at least {least} (two for "
                    "each stream): give more text, or lower batch_size (eval_batch_size for held-out text)."
                )
            self._words[split] = found
        return self._words[split]

    def _tokenize(self, source: TextSource, split: Split) -> Tokens:
        return self._count_words(split, source).in_vocabulary(self.vocabulary, self.predict_first_token)

    def _loader(self, tokens: Tokens, split: Split, rank: int, world_size: int) -> ResumableLoader[Any]:
        windows = TokenWindows(
            tokens.ids,
            self.batch_size_of(split),
            self.sequence_length,
            replace_inputs=self._replace_inputs,
            rank=rank,
            world_size=world_size,
        )
        # Every process gets all of its windows: dealing them out would leave no process a stream without gaps.
        sampler = ResumableSampler(len(windows), "text, batch_size and sequence_length")
        return make_loader(windows, sampler, None, self.num_workers)

    @property
    def _replace_inputs(self) -> tuple[int, int] | None:
        eos_id, bos_id = self.vocabulary.eos_id, self.vocabulary.bos_id
        return None if eos_id is None or bos_id is None or eos_id == bos_id else (eos_id, bos_id)
