"""What all data modules of plain text share: vocabulary, cache and windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from torch import Tensor

from lightning_embcompress.data.cache import TokenCache, count_words, tokenize_files
from lightning_embcompress.data.store import default_cache_dir
from lightning_embcompress.data.text import TextFormat
from lightning_embcompress.data.vocabulary import Vocabulary, read_vocabulary_file
from lightning_embcompress.data.windows import TokenWindows, WindowLoader, make_loader

Split = Literal["train", "valid", "test"]
_SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class TokenStreamDataModule(LightningDataModule, ABC):
    """Text files as streams of token ids, cut into windows for a model that carries its state along.

    A batch is a pair of inputs and targets, int64 ``[batch_size, sequence_length]``; the target is the next token, and
    each batch continues the streams of the batch before it (:class:`~lightning_embcompress.data.windows.TokenWindows`).
    In distributed training every process has ``batch_size`` streams of its own.

    The text is tokenized once, into a cache that training maps into memory. ``vocabulary``, ``vocab_size`` and
    ``token_counts`` can be used at any time: they prepare what they need. Subclasses say in :meth:`files` where the
    text is.

    Args:
        batch_size: How many streams are trained on in parallel, per process.
        eval_batch_size: The same for validation and test; ``None`` for ``batch_size``. Up to
            ``eval_batch_size - 1`` of the last tokens are not evaluated; with 1 every token is.
        sequence_length: How many steps a batch has.
        num_workers: How many processes read batches ahead; 0 reads in the training process.
        cache_dir: Where ids are kept; ``None`` for ``$XDG_CACHE_HOME/lightning_embcompress``, or
            ``~/.cache/lightning_embcompress``.
        vocabulary_file: One ``word`` or ``word count`` on each line, ids in the order of the file; ``None`` to count
            the training text. With a file, ``min_count`` and ``max_vocab_size`` are not used.
        min_count: Counted vocabulary: words that occur less often become ``unk_token``.
        max_vocab_size: Counted vocabulary: at most this many words, special tokens included.
        unk_token: The word for words outside the vocabulary.
        eos_token: The word at the end of each line; ``None`` for none.
        bos_token: The word that is read in place of ``eos_token`` before the first word of a line; ``None`` to read
            ``eos_token`` there.
        text_format: How lines are cut into words.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        batch_size: int = 20,
        eval_batch_size: int | None = None,
        sequence_length: int = 35,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
        vocabulary_file: str | Path | None = None,
        min_count: int = 1,
        max_vocab_size: int | None = None,
        unk_token: str = "<UNK>",
        eos_token: str | None = "</S>",
        bos_token: str | None = None,
        text_format: TextFormat | None = None,
    ) -> None:
        """Check and keep the arguments."""
        super().__init__()
        at_least_one = {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "sequence_length": sequence_length,
            "min_count": min_count,
            "max_vocab_size": max_vocab_size,
        }
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1.")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: it must be 0 or more.")
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.sequence_length = sequence_length
        self.num_workers = num_workers
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self.vocabulary_file = vocabulary_file
        self.min_count = min_count
        self.max_vocab_size = max_vocab_size
        self.unk_token = unk_token
        self.eos_token = eos_token
        self.bos_token = bos_token
        self.text_format = text_format or TextFormat(line_ends=eos_token is not None)
        self.predict_first_token = False
        self._vocabulary: Vocabulary | None = None
        self._caches: dict[Split, TokenCache] = {}
        self._windows: dict[Split, TokenWindows] = {}

    def __str__(self) -> str:
        """Name the sizes. Lightning's own description would count and tokenize text, also within an error message."""
        return f"{type(self).__name__}(batch_size={self.batch_size}, sequence_length={self.sequence_length})"

    @abstractmethod
    def files(self, split: Split) -> list[Path]:
        """Give the files of one part of the corpus; none if it has no such part.

        Args:
            split: ``"train"``, ``"valid"`` or ``"test"``.

        Raises:
            FileNotFoundError: If a pattern matches no file.
            ValueError: If the files are all empty.
        """

    @property
    def vocabulary(self) -> Vocabulary:
        """The words and their ids; read or counted at the first use."""
        if self._vocabulary is None:
            self._vocabulary = self._build_vocabulary()
        return self._vocabulary

    @property
    def vocab_size(self) -> int:
        """The number of words in the vocabulary, special tokens included."""
        return len(self.vocabulary)

    @property
    def token_counts(self) -> Tensor:
        """How often each id occurs in the training text, int64 ``[vocab_size]``.

        A ``bos_token`` that is read in place of ``eos_token`` counts as often as that.
        """
        counts = self._cache("train").token_counts.clone()
        if self._replace_inputs is not None:
            eos_id, bos_id = self._replace_inputs
            counts[bos_id] += counts[eos_id]
        return counts

    def prepare_data(self) -> None:
        """Build the vocabulary and the caches of all parts, where they do not exist yet."""
        # Every missing file is reported before the first minute is spent on one that exists.
        present = [split for split in _SPLITS if self.files(split)]
        for split in present:
            self._cache(split)

    def setup(self, stage: str | None = None) -> None:
        """Open the caches that a stage needs.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"``, or ``None`` for all.

        Raises:
            ValueError: If a part is too short for its batch size, or the stage's part of the corpus does not exist.
        """
        needed: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "valid"),
            "validate": ("valid",),
            "test": ("test",),
            None: _SPLITS,
        }
        for split in needed.get(stage, ()):
            if self.files(split) or (stage, split) in (("validate", "valid"), ("test", "test")):
                self._open(split)

    def train_dataloader(self) -> WindowLoader:
        """Give the training windows."""
        loader = make_loader(self._open("train"), self.num_workers)
        loader.batches_per_epoch = self._batches_per_epoch
        return loader

    def val_dataloader(self) -> WindowLoader | list[Any]:
        """Give the validation windows; an empty list, which Lightning passes over, if there is no validation text."""
        return make_loader(self._open("valid"), self.num_workers) if self.files("valid") else []

    def test_dataloader(self) -> WindowLoader:
        """Give the test windows.

        Raises:
            ValueError: If there is no test text.
        """
        return make_loader(self._open("test"), self.num_workers)

    def state_dict(self) -> dict[str, Any]:
        """Record in checkpoints which vocabulary the tables were trained with."""
        return {"vocab_size": self.vocab_size, "vocabulary_fingerprint": self.vocabulary.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint was trained with this vocabulary.

        Raises:
            ValueError: If it was trained with another one.
        """
        found = {"vocab_size": self.vocab_size, "vocabulary_fingerprint": self.vocabulary.fingerprint}
        expected = {key: state_dict.get(key) for key in found}
        if found != expected:
            source = f"vocabulary_file={str(self.vocabulary_file)!r}" if self.vocabulary_file else "the counted words"
            raise ValueError(
                f"The checkpoint was trained with another vocabulary: it expects {expected['vocab_size']} words "
                f"(fingerprint {str(expected['vocabulary_fingerprint'])[:12]}), but {type(self).__name__} has "
                f"{found['vocab_size']} ({str(found['vocabulary_fingerprint'])[:12]}) from {source}. Use the "
                f"vocabulary_file, training files, min_count and max_vocab_size of that training."
            )

    def _build_vocabulary(self) -> Vocabulary:
        if self.vocabulary_file is not None:
            return self._vocabulary_from_file(self._find_vocabulary_file(self.vocabulary_file))
        files = self._required_files("train")
        counts = count_words(
            files, self.text_format, self.cache_dir, eos_token=self.eos_token, min_tokens=2 * self.batch_size
        )
        if self.bos_token is not None and self.bos_token != self.eos_token and self.eos_token is not None:
            counts[self.bos_token] = counts.get(self.bos_token, 0) + counts[self.eos_token]
        return Vocabulary.from_counts(
            counts,
            min_count=self.min_count,
            max_size=self.max_vocab_size,
            unk_token=self.unk_token,
            eos_token=self.eos_token,
            bos_token=self.bos_token,
        )

    def _find_vocabulary_file(self, path: str | Path) -> Path:
        return Path(path).expanduser()

    def _vocabulary_from_file(self, path: Path) -> Vocabulary:
        words, counts = read_vocabulary_file(path)
        try:
            return Vocabulary(
                words, counts, unk_token=self.unk_token, eos_token=self.eos_token, bos_token=self.bos_token
            )
        except ValueError as error:
            raise ValueError(f"vocabulary_file={str(path)!r}: {error}") from None

    def _required_files(self, split: Split) -> list[Path]:
        files = self.files(split)
        if not files:
            raise ValueError(f"{type(self).__name__} has no {split} text: name its files with {split}_files.")
        return files

    def _streams(self, split: Split) -> int:
        return self.batch_size if split == "train" else self.eval_batch_size

    def _cache(self, split: Split) -> TokenCache:
        if split not in self._caches:
            files = self._required_files(split)
            self._caches[split] = tokenize_files(
                files,
                self.vocabulary,
                self.text_format,
                self.cache_dir,
                first_token=self.vocabulary.eos_token if self.predict_first_token else None,
                min_tokens=2 * self._streams(split),
                description=f"Tokenizing {split} text",
            )
        return self._caches[split]

    def _open(self, split: Split) -> TokenWindows:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        windows = self._windows.get(split)
        # A data module may be used by one trainer after another, with other numbers of processes.
        if windows is None or windows.num_streams != self._streams(split) * world_size:
            windows = self._windows[split] = TokenWindows(
                self._cache(split).ids(),
                self._streams(split),
                self.sequence_length,
                replace_inputs=self._replace_inputs,
                rank=rank,
                world_size=world_size,
            )
        return windows

    @property
    def _replace_inputs(self) -> tuple[int, int] | None:
        eos_id, bos_id = self.vocabulary.eos_id, self.vocabulary.bos_id
        return None if eos_id is None or bos_id is None or eos_id == bos_id else (eos_id, bos_id)

    def _batches_per_epoch(self) -> float:
        return float("inf") if self.trainer is None else self.trainer.num_training_batches
