"""Where text comes from: files, or the rows of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from lightning_embcompress.data.cache import require_datasets
from lightning_embcompress.data.text import read_blocks

Split = Literal["train", "valid", "test"]
"""A part of a corpus."""

Documents = Literal["files", "lines"]
"""Every file is a document, or every line that is not empty. Rows are the lines of a dataset, splits its files."""


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
    def name(self) -> str:
        """What messages call it."""

    @property
    def size(self) -> float:
        """How much there is, in the unit of :attr:`Piece.amount`."""

    def describe(self) -> tuple[list[str], list[Any]]:
        """Say which text it is, and by what a change of it is noticed, as plain JSON values."""

    def pieces(self, documents: Documents, characters: int) -> Iterator[Piece]:
        """Read the text in pieces of about so many characters."""


class FileSource:
    """UTF-8 text files.

    Args:
        files: Read in this order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Keep the arguments."""
        self.files = list(files)
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        self.name = f"{str(files[0])!r}{others}"

    @property
    def size(self) -> float:
        """How many bytes there are."""
        return float(sum(path.stat().st_size for path in self.files))

    def describe(self) -> tuple[list[str], list[Any]]:
        """Give the paths, and sizes and times of modification."""
        states = [path.stat() for path in self.files]
        return [str(path) for path in self.files], [[state.st_size, state.st_mtime_ns] for state in states]

    def pieces(self, documents: Documents, characters: int) -> Iterator[Piece]:
        """Read the text; an empty file is no document.

        Raises:
            ValueError: If a file is not UTF-8.
        """
        for path in self.files:
            held: Piece | None = None
            for text, num_bytes in read_blocks(path, characters):
                if documents == "lines":
                    lines = [line for line in text.split("\n") if line.strip()]
                    yield from (Piece(line, True, num_bytes / len(lines)) for line in lines)
                    continue
                # Held back by one: that a piece is the last of its file shows when there is no other.
                if held is not None:
                    yield held
                held = Piece(text, False, num_bytes)
            if held is not None:
                yield held._replace(ends_document=True)


class DatasetSource:
    """Some rows of a dataset, a text in each.

    Args:
        rows: A `datasets.Dataset`.
        text_column: Where the text is.
        name: What messages call it.

    Raises:
        ValueError: If there is no such column.
    """

    def __init__(self, rows: Any, text_column: str, name: str) -> None:
        """Check and keep the arguments."""
        if text_column not in rows.column_names:
            raise ValueError(
                f"text_column={text_column!r} is not in {name}, which has the columns "
                f"{', '.join(map(repr, rows.column_names))}: name one of them"
            )
        self.rows = rows
        self.text_column = text_column
        self.name = name

    @property
    def size(self) -> float:
        """How many rows there are."""
        return float(len(self.rows))

    def describe(self) -> tuple[list[str], list[Any]]:
        """Give the name, and the fingerprint that `datasets` gives to the content."""
        return [self.name, self.text_column], [len(self.rows), str(self.rows._fingerprint)]

    def pieces(self, documents: Documents, characters: int) -> Iterator[Piece]:
        """Read the text.

        Raises:
            ValueError: If a row is not text.
        """
        held: list[str] = []
        length = 0
        for number, row in enumerate(self.rows):
            text = row[self.text_column]
            if not isinstance(text, str):
                raise ValueError(f"row {number} of {self.name}: {self.text_column!r} is {text!r}, which is no text")
            if documents == "lines":
                if text.strip():
                    yield Piece(text, True, 1)
                continue
            held.append(text if text.endswith("\n") else text + "\n")
            length += len(text)
            is_last = number + 1 == len(self.rows)
            if length >= characters or is_last:
                yield Piece("".join(held), is_last, len(held))
                held, length = [], 0


def load_splits(dataset: str, config: str | None) -> dict[str, Any]:
    """Load all splits of a dataset.

    Args:
        dataset: A folder that `Dataset.save_to_disk` has written, or whatever `datasets.load_dataset` reads: a folder
            of files, or a name on the Hugging Face hub.
        config: Which of its configurations, if it has several.

    Returns:
        The splits by name; a dataset without any is its own split ``train``.

    Raises:
        ValueError: If it cannot be loaded.
        MissingExtraError: If `datasets` is not installed.
    """
    package = require_datasets()
    directory = Path(dataset).expanduser()
    try:
        if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
            loaded = package.load_from_disk(str(directory))
        else:
            loaded = package.load_dataset(str(directory) if directory.exists() else dataset, config)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"dataset={dataset!r} with dataset_config={config!r} cannot be loaded. What datasets says: {reason}"
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
