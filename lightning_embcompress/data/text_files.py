"""Any plain text as a corpus."""

from __future__ import annotations

from typing import Any, Literal

from lightning_embcompress.data.text import TextFormat
from lightning_embcompress.data.token_stream import TokenStreamDataModule


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
        options: The arguments of :class:`~lightning_embcompress.data.TokenStreamDataModule`.

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
        **options: Any,
    ) -> None:
        """Check and keep the arguments."""
        super().__init__(**options)
        self.eos_token = eos_token
        self.text_format = TextFormat(tokenizer=tokenizer, lowercase=lowercase, line_ends=eos_token is not None)
        self.patterns = {"train": train_files, "valid": valid_files, "test": test_files}
