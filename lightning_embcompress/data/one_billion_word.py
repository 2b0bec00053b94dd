"""The One Billion Word benchmark, from a directory in its own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_embcompress.data.sources import Split, TextSource
from lightning_embcompress.data.token_stream import TokenStreamDataModule

_TEST_FILES = "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050"


class OneBillionWord(TokenStreamDataModule):
    """The One Billion Word benchmark (Chelba et al., 2013): shuffled news sentences, one on each line.

    A sentence ``w1 ... wn`` is read as ``<S> w1 ... wn`` and predicted as ``w1 ... wn </S>``: every word and every
    ``</S>`` is a target, no ``<S>`` ever is, as in published perplexities, and no step is spent on predicting it. In
    the cache a sentence is ``w1 ... wn </S>``; inputs read ``<S>`` wherever ``</S>`` stands.

    The vocabulary of 793,471 words that published models use lists ``<S>`` but no ``</S>``: there ``<S>`` both begins
    and ends sentences. So does this class with a vocabulary file of that kind.

    Args:
        data_dir: The benchmark's directory, with ``training-monolingual.tokenized.shuffled`` and
            ``heldout-monolingual.tokenized.shuffled`` in it.
        train_files: Paths or glob patterns, relative to ``data_dir``.
        valid_files: The same; ``None`` for no validation. The default is the second held-out shard: published figures
            are for the first, which is better kept for the test.
        test_files: The same; ``None`` for ``news.en.heldout-00000-of-00050`` where it exists, else no test.
        vocabulary_file: One ``word`` or ``word count`` on each line, ids in the order of the file; looked for in
            ``data_dir``, then in the current directory. ``None`` counts the training text (the benchmark keeps words
            that occur three times: ``min_count=3``).
        begin_token: What is read before the first word of a sentence; ``None`` to read ``end_token`` there.
        end_token: What is predicted after the last word of a sentence.
        batch_size: Streams per process.
        sequence_length: Steps of a batch; 20 in Jozefowicz et al. (2016).
        options: The other arguments of :class:`~lightning_embcompress.data.TokenStreamDataModule`. The cache takes
            about 3.2 GB for the whole benchmark.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> data = OneBillionWord("1-billion-word-language-modeling-benchmark-r13output", min_count=3)
        >>> data.batch_size, data.sequence_length
        (128, 20)
    """

    # The first word of the corpus is a target like the first word of any other sentence.
    predict_first_token = True

    def __init__(
        self,
        data_dir: str | Path,
        train_files: str | list[str] = "training-monolingual.tokenized.shuffled/news.en-*",
        valid_files: str | list[str] | None = "heldout-monolingual.tokenized.shuffled/news.en.heldout-00001-of-00050",
        test_files: str | list[str] | None = None,
        vocabulary_file: str | Path | None = None,
        begin_token: str | None = "<S>",
        end_token: str = "</S>",
        batch_size: int = 128,
        sequence_length: int = 20,
        **options: Any,
    ) -> None:
        """Check and keep the arguments."""
        super().__init__(
            batch_size=batch_size, sequence_length=sequence_length, vocabulary_file=vocabulary_file, **options
        )
        self.eos_token = end_token
        self.bos_token = begin_token
        self.data_dir = self.folder = Path(data_dir).expanduser()
        if vocabulary_file is not None and (self.data_dir / vocabulary_file).is_file():
            self.vocabulary_file = self.data_dir / vocabulary_file
        if test_files is None and (self.data_dir / _TEST_FILES).is_file():
            test_files = _TEST_FILES
        self.patterns = {"train": train_files, "valid": valid_files, "test": test_files}

    def source(self, split: Split) -> TextSource | None:
        """Give the files of one part of the benchmark.

        Raises:
            FileNotFoundError: If ``data_dir`` does not exist, or a pattern matches no file in it.
            ValueError: If the files are all empty.
        """
        if not self.data_dir.is_dir():
            raise FileNotFoundError(
                f"data_dir={str(self.data_dir)!r} is not a directory: give the directory of the unpacked benchmark "
                f"(1-billion-word-language-modeling-benchmark-r13output)."
            )
        return super().source(split)
