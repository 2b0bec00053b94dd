"""Texts of the optional `datasets` package: from the Hugging Face hub, or from folders in its formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_embcompress.data.tokenized import PIECE_CHARACTERS, Documents, Piece


class MissingExtraError(ImportError, ValueError):
    """A package that is not installed; also a ValueError, because the value of an argument asks for it."""


def require_datasets() -> Any:
    """Import the `datasets` package.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise MissingExtraError(
            "dataset=... needs the package `datasets`, which is not installed: "
            'pip install "lightning-embcompress[datasets]", or give text files with train_files=...'
        ) from None
    return datasets


class DatasetSource:
    """One split of a dataset, a text in each row.

    Args:
        rows: The split, a `datasets.Dataset`.
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

    def describe(self) -> list[dict[str, Any]]:
        """Record the fingerprint that `datasets` gives to its content."""
        fingerprint = str(self.rows._fingerprint)
        return [{"name": self.name, "column": self.text_column, "rows": len(self.rows), "fingerprint": fingerprint}]

    def pieces(self, documents: Documents) -> Iterator[Piece]:
        """Read the text: rows are lines, the split is a file.

        Raises:
            ValueError: If a row is not text.
        """
        held: list[str] = []
        characters = amount = 0
        for number, row in enumerate(self.rows):
            text = row[self.text_column]
            if not isinstance(text, str):
                raise ValueError(f"row {number} of {self.name}: {self.text_column!r} is {text!r}, which is no text")
            if documents == "lines":
                if text.strip():
                    yield Piece(text, True, 1)
                continue
            held.append(text if text.endswith("\n") else text + "\n")
            characters, amount = characters + len(text), amount + 1
            if characters >= PIECE_CHARACTERS:
                yield Piece("".join(held), number + 1 == len(self.rows), amount)
                held, characters, amount = [], 0, 0
        if held:
            yield Piece("".join(held), True, amount)


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
        MissingExtraError: If the package is not installed.
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
