"""Any plain text as a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning_embcompress.data.text import TextFormat, find_files
from lightning_embcompress.data.token_stream import Split, TokenStreamDataModule


class TextFiles(TokenStreamDataModule):
    """Plain text files, each split a list of paths or glob patterns.

    Args:
        train_files: Paths or glob patterns; ``~`` is the home directory. They are read in the order given, sorted by
            name within a pattern.
        valid_files: The same for validation; ``None`` for none.
        test_files: The same for the test; ``None`` for none.
        lowercase: Whether text is lower-cased.
        tokenizer: ``"whitespace"`` for text that is tokenized already (WikiText, Penn Treebank). ``"words"`` for raw
            text: runs of letters, digits and underscores, with apostrophes inside kept (``don't``), and every other
            visible character as a token of its own.
        eos_token: The token at the end of each line, empty lines included; ``null`` for none, as for text whose lines
            are only there to fit a page.
        unk_token: The token for words outside the vocabulary.
        batch_size: See :class:`~lightning_embcompress.data.TokenStreamDataModule`, as for all arguments below.
        eval_batch_size: Streams in validation and test.
        sequence_length: Steps of a batch.
        num_workers: Processes that read ahead.
        cache_dir: Where ids are kept.
        vocabulary_file: A list of words, in the order of their ids; ``None`` counts the training text.
        min_count: Counted vocabulary: the least count.
        max_vocab_size: Counted vocabulary: the largest size.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        WikiText, which marks unknown words itself and has ``<eos>`` at each line's end by convention:

        >>> data = TextFiles("wiki.train.tokens", "wiki.valid.tokens", eos_token="<eos>", unk_token="<unk>")
        >>> data.text_format.tokens("= Valkyria =")
        ['=', 'Valkyria', '=']
    """

    def __init__(
        self,
        train_files: str | list[str],
        valid_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        lowercase: bool = False,
        tokenizer: Literal["whitespace", "words"] = "whitespace",
        eos_token: str | None = "</S>",
        unk_token: str = "<UNK>",
        batch_size: int = 20,
        eval_batch_size: int | None = None,
        sequence_length: int = 35,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
        vocabulary_file: str | Path | None = None,
        min_count: int = 1,
        max_vocab_size: int | None = None,
    ) -> None:
        """Check and keep the arguments."""
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            sequence_length=sequence_length,
            num_workers=num_workers,
            cache_dir=cache_dir,
            vocabulary_file=vocabulary_file,
            min_count=min_count,
            max_vocab_size=max_vocab_size,
            unk_token=unk_token,
            eos_token=eos_token,
            text_format=TextFormat(tokenizer=tokenizer, lowercase=lowercase, line_ends=eos_token is not None),
        )
        self.train_files = train_files
        self.valid_files = valid_files
        self.test_files = test_files

    def files(self, split: Split) -> list[Path]:
        """Give the files of one part of the corpus; none if it has no such part.

        Args:
            split: ``"train"``, ``"valid"`` or ``"test"``.

        Raises:
            FileNotFoundError: If a pattern matches no file.
            ValueError: If the files are all empty.
        """
        patterns = {"train": self.train_files, "valid": self.valid_files, "test": self.test_files}[split]
        return [] if patterns is None else find_files(patterns, f"{split}_files")
