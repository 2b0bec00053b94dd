"""Where text comes from: files, or the rows of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

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


@dataclass(frozen=True)
class TextSource:
    """One part of a corpus.

    Attributes:
        name: What messages call it.
        identity: Which text it is.
        state: By what a change of the text is noticed, as plain JSON values.
        size: How much there is, in the unit of :attr:`Piece.amount`.
        pieces: Reads it, called with what a document is and about how many characters a piece has.
    """

    name: str
    identity: list[str]
    state: list[Any]
    size: float
    pieces: Callable[[Documents, int], Iterator[Piece]]


def text_files(files: Sequence[Path]) -> TextSource:
    """Read UTF-8 text files in this order; an empty one is no document.

    Sizes and times of modification tell whether they have changed.
    """

    def pieces(documents: Documents, characters: int) -> Iterator[Piece]:
        for path in files:
            left = path.stat().st_size
            for text, num_bytes in read_blocks(path, characters):
                left -= num_bytes
                if documents == "files":
                    yield Piece(text, left == 0, num_bytes)
                else:
                    lines = [line for line in text.split("\n") if line.strip()]
                    yield from (Piece(line, True, num_bytes / len(lines)) for line in lines)

    others = f" and {len(files) - 1} more" if len(files) > 1 else ""
    states = [path.stat() for path in files]
    return TextSource(
        f"{str(files[0])!r}{others}",
        [str(path) for path in files],
        [[state.st_size, state.st_mtime_ns] for state in states],
        sum(state.st_size for state in states),
        pieces,
    )


def dataset_rows(rows: Any, text_column: str, name: str) -> TextSource:
    """Read a text from each row of a dataset, whose fingerprint tells whether it has changed.

    Args:
        rows: A `datasets.Dataset`.
        text_column: Where the text is.
        name: What messages call it.

    Raises:
        ValueError: If there is no such column; while reading, if a row is not text.
    """
    if text_column not in rows.column_names:
        raise ValueError(
            f"text_column={text_column!r} is not in {name}, which has the columns "
            f"{', '.join(map(repr, rows.column_names))}: name one of them"
        )

    def pieces(documents: Documents, characters: int) -> Iterator[Piece]:
        held: list[str] = []
        length = 0
        for number, row in enumerate(rows):
            text = row[text_column]
            if not isinstance(text, str):
                raise ValueError(f"row {number} of {name}: {text_column!r} is {text!r}, which is no text")
            if documents == "lines":
                if text.strip():
                    yield Piece(text, True, 1)
                continue
            held.append(text if text.endswith("\n") else text + "\n")
            length += len(text)
            is_last = number + 1 == len(rows)
            if length >= characters or is_last:
                yield Piece("".join(held), is_last, len(held))
                held, length = [], 0

    return TextSource(name, [name, text_column, str(rows._fingerprint)], [], len(rows), pieces)


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
