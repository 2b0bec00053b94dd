"""Text files as streams of words: which files, and how their lines are cut."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LINE_END = "\0"
"""What stands for the end of a line among the tokens of a block: no text tokenizes to it by itself."""

_WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_BLOCK_BYTES = 1 << 21


@dataclass(frozen=True)
class TextFormat:
    """How lines of text become tokens.

    Args:
        tokenizer: ``"whitespace"`` for text that is tokenized already: words are what stands between white space.
            ``"words"`` for plain text: runs of letters, digits and underscores, with apostrophes inside kept
            (``don't``), and every other visible character as a token of its own.
        lowercase: Whether text is lower-cased first.
        line_ends: Whether the end of each line, empty lines included, is a token (:data:`LINE_END`).

    Example:
        >>> TextFormat(tokenizer="words", line_ends=False).tokens("Don't (ever) stop.")
        ["Don't", '(', 'ever', ')', 'stop', '.']
    """

    tokenizer: Literal["whitespace", "words"] = "whitespace"
    lowercase: bool = False
    line_ends: bool = True

    def __post_init__(self) -> None:
        """Check the name of the tokenizer, for callers that no type checker saw."""
        if self.tokenizer not in ("whitespace", "words"):
            raise ValueError(f"tokenizer={self.tokenizer!r} is not known: use 'whitespace' or 'words'.")

    def tokens(self, block: str) -> list[str]:
        """Cut whole lines of text into tokens."""
        if self.lowercase:
            block = block.lower()
        # Cutting a block of many lines at once is several times faster than line by line.
        block = block.replace(LINE_END, " ").replace("\n", f" {LINE_END} " if self.line_ends else " ")
        return block.split() if self.tokenizer == "whitespace" else _WORDS.findall(block)


def read_blocks(path: Path, block_bytes: int = _BLOCK_BYTES) -> Iterator[tuple[str, int]]:
    """Read a file a few megabytes at a time, whole lines each, so that no file has to fit in memory.

    Args:
        path: UTF-8 text; a byte-order mark at its start is dropped.
        block_bytes: About how much is read at once.

    Yields:
        The text, always ending in a line feed, and the number of bytes it came from.

    Raises:
        ValueError: If the file is not UTF-8; the message has the byte's position.
    """
    position = 0
    with path.open("rb") as file:
        # A line can only be cut in two at the end of a read: readline completes it.
        while data := file.read(block_bytes) + file.readline():
            try:
                text = data.decode("utf-8-sig" if position == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{str(path)!r} is not UTF-8: byte {position + error.start} cannot be read ({error.reason}). "
                    f"Convert the file to UTF-8."
                ) from None
            position += len(data)
            yield (text if text.endswith("\n") else text + "\n"), len(data)


def find_files(patterns: str | Sequence[str], argument: str, directory: Path | None = None) -> list[Path]:
    """Find the files that paths or glob patterns name.

    Args:
        patterns: A path or pattern, or several of them; ``~`` is the home directory.
        argument: The name of the argument they come from, for messages.
        directory: What relative patterns start from; the current directory if ``None``.

    Returns:
        Absolute paths, each once: in the order of the patterns, sorted by name within a pattern.

    Raises:
        FileNotFoundError: If a pattern matches no file.
        ValueError: If there is no pattern, or the files hold nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError(f"{argument} is an empty list: name at least one file or pattern.")
    found: dict[Path, None] = {}
    for pattern in patterns:
        # An absolute pattern replaces the directory: that is how os.path.join is defined.
        full = os.path.join(directory or Path.cwd(), os.path.expanduser(pattern))
        matches = sorted(match for match in glob.glob(full, recursive=True) if os.path.isfile(match))
        if not matches and os.path.isfile(full):  # a name with brackets in it, meant literally
            matches = [full]
        if not matches:
            raise FileNotFoundError(
                f"{argument}={pattern!r} matches no file (looked for {full!r}): check the directory and the pattern."
            )
        found.update((Path(match).resolve(), None) for match in matches)
    if not any(path.stat().st_size for path in found):
        raise ValueError(f"{argument}={patterns!r}: every file it names is empty. Give files with text.")
    return list(found)
