"""What all data modules share: splits, caches, loaders and the check of a checkpoint's vocabulary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch import Tensor

from lightning_embcompress.data.cache import default_cache_dir, require_datasets
from lightning_embcompress.data.loading import ResumableLoader
from lightning_embcompress.data.sources import Split, TextSource, text_files
from lightning_embcompress.data.text import find_files
from lightning_embcompress.data.tokenized import TokenizerVocabulary, Tokens
from lightning_embcompress.data.vocabulary import Vocabulary

_SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def check_least(least: int, **arguments: int | None) -> None:
    """Check arguments by their names; ``None`` is not checked.

    Raises:
        ValueError: If one is smaller.
    """
    for name, value in arguments.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: it must be at least {least}.")


class TextDataModule(LightningDataModule, ABC):
    """Text that is tokenized once, into a cache that training maps into memory.

    ``vocabulary``, ``vocab_size`` and ``token_counts`` can be used at any time: they prepare what they need.

    Args:
        batch_size: Per process; of what, the subclasses say.
        eval_batch_size: The same for validation and test; ``None`` for ``batch_size``.
        num_workers: How many processes read batches ahead; 0 reads in the training process.
        cache_dir: Where ids are kept; ``None`` for ``$XDG_CACHE_HOME/lightning_embcompress``, or
            ``~/.cache/lightning_embcompress``.

    Raises:
        ValueError: If an argument is out of range.
        MissingExtraError: If the package `datasets` is not installed.
    """

    vocabulary_options: str
    """The arguments that decide the vocabulary."""

    patterns: Mapping[Split, str | list[str] | None] = {}
    """Paths or glob patterns of the text files of every part of the corpus; ``None`` for no such part."""

    folder: Path | None = None
    """What relative patterns start from; the current directory if ``None``."""

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        """Check and keep the arguments."""
        super().__init__()
        require_datasets()  # said before anything else is done
        check_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_least(0, num_workers=num_workers)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._tokens: dict[Split, Tokens] = {}

    @property
    @abstractmethod
    def vocabulary(self) -> Vocabulary | TokenizerVocabulary:
        """The tokens and their ids."""

    def source(self, split: Split) -> TextSource | None:
        """Give the text of one part of the corpus, that of its files; ``None`` if it has no such part.

        Args:
            split: ``"train"``, ``"valid"`` or ``"test"``.

        Raises:
            FileNotFoundError: If a pattern matches no file.
            ValueError: If the files are all empty.
        """
        patterns = self.patterns.get(split)
        return None if patterns is None else text_files(find_files(patterns, f"{split}_files", self.folder))

    @abstractmethod
    def _tokenize(self, source: TextSource, split: Split) -> Tokens: ...

    @abstractmethod
    def _loader(self, tokens: Tokens, split: Split, rank: int, world_size: int) -> ResumableLoader[Any]: ...

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary, special ones included."""
        return len(self.vocabulary)

    @property
    def token_counts(self) -> Tensor:
        """How often each id occurs in the training text, int64 ``[vocab_size]``."""
        return self.tokens("train").counts.clone()

    def batch_size_of(self, split: Split) -> int:
        """Give the batch size of one part of the corpus."""
        return self.batch_size if split == "train" else self.eval_batch_size

    def tokens(self, split: Split) -> Tokens:
        """Give one part of the corpus as ids.

        Raises:
            ValueError: If there is no such part.
        """
        if split not in self._tokens:
            self._tokens[split] = self._tokenize(self._required(split), split)
        return self._tokens[split]

    def prepare_data(self) -> None:
        """Tokenize all parts that are not in the cache yet."""
        # Every missing file is reported before the first minute is spent on one that exists.
        for split in [split for split in _SPLITS if self.source(split) is not None]:
            self.tokens(split)

    def setup(self, stage: str | None = None) -> None:
        """Open what a stage needs.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"``, or ``None`` for all.

        Raises:
            ValueError: If the stage's part of the corpus does not exist.
        """
        for split in {"fit": _SPLITS[:2], "validate": _SPLITS[1:2], "test": _SPLITS[2:], None: _SPLITS}.get(stage, ()):
            if self.source(split) is not None or (stage, split) in (("validate", "valid"), ("test", "test")):
                self._open(split)

    def train_dataloader(self) -> ResumableLoader[Any]:
        """Give the training batches."""
        loader = self._open("train")
        loader.batches_per_epoch = self._batches_per_epoch
        return loader

    def val_dataloader(self) -> ResumableLoader[Any] | list[Any]:
        """Give the validation batches; an empty list, which Lightning passes over, if there is no validation text."""
        return [] if self.source("valid") is None else self._open("valid")

    def test_dataloader(self) -> ResumableLoader[Any]:
        """Give the test batches.

        Raises:
            ValueError: If there is no test text.
        """
        return self._open("test")

    def state_dict(self) -> dict[str, Any]:
        """Record in checkpoints which vocabulary the tables were trained with."""
        return {"vocab_size": self.vocab_size, "vocabulary_fingerprint": self.vocabulary.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint was trained with this vocabulary.

        Raises:
            ValueError: If it was trained with another one.
        """
        found = self.state_dict()
        expected = {key: state_dict.get(key) for key in found}
        if found != expected:
            size, mark = expected.values()
            raise ValueError(
                f"The checkpoint was trained with another vocabulary: it expects {size} tokens (fingerprint "
                f"{str(mark)[:12]}), but {self} has {self.vocab_size} ({self.vocabulary.fingerprint[:12]}). Use the "
                f"{self.vocabulary_options} of that training."
            )

    def _required(self, split: Split) -> TextSource:
        source = self.source(split)
        if source is None:
            raise ValueError(f"{type(self).__name__} has no {split} text: name it with {split}_files.")
        return source

    def _open(self, split: Split) -> ResumableLoader[Any]:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return self._loader(self.tokens(split), split, rank, world_size)

    def _batches_per_epoch(self) -> float:
        return float("inf") if self.trainer is None else self.trainer.num_training_batches
