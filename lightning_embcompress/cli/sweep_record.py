"""The file in which a sweep keeps what it has found, so that it can go on where it was interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_embcompress.utils.files import explaining_failure, read_json, replacing

SWEEP_FILE = "sweep.json"
_FORMAT = "lightning-embcompress sweep"
_VERSION = 1


def can_hold_sweep(folder: Path) -> bool:
    """Whether a folder is free for a sweep, or has one: what a sweep has left that was killed at its start counts not.

    Example:
        >>> can_hold_sweep(Path("a folder that does not exist"))
        True
    """
    if not folder.is_dir() or (folder / SWEEP_FILE).is_file():
        return not folder.is_file()
    return all(path.name.startswith(".") for path in folder.iterdir())


class SweepRecord:
    """The points of a sweep in `sweep.json`, which is replaced in one step whenever one is added.

    Args:
        folder: Where it is, or is to be; must exist.
        subject: What the points are of, as JSON: the model and the data, in a few checksums by their names.

    Raises:
        ValueError: If there is one of another subject, or one that is damaged or of a newer version.
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SweepRecord(Path(folder), {"text": "a1"}).write({"dense": {"perplexity": 90.0}})
        ...     SweepRecord(Path(folder), {"text": "a1"}).points
        {'dense': {'perplexity': 90.0}}
    """

    def __init__(self, folder: Path, subject: Mapping[str, Any]) -> None:
        """Read what there is."""
        self.file = folder / SWEEP_FILE
        # As it comes back from JSON, which knows no tuples.
        self.subject: dict[str, Any] = json.loads(json.dumps(dict(subject)))
        self.points: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            self._read()
        else:
            self.write({})

    def _read(self) -> None:
        name, remedy = repr(str(self.file)), "choose another folder, or remove this one"
        record = read_json(self.file)
        if record.get("format") != _FORMAT or not isinstance(record.get("version"), int):
            raise ValueError(f"{name} is not of a sweep: {remedy}")
        if record["version"] > _VERSION:
            raise ValueError(
                f"{name} has version {record['version']}, this package reads versions up to {_VERSION}: upgrade "
                f"lightning-embcompress, or {remedy}"
            )
        subject, points = record.get("subject"), record.get("points")
        if not isinstance(subject, dict) or not isinstance(points, dict):
            raise ValueError(f"{name} is damaged: it lacks 'subject' or 'points'; {remedy}")
        keys = [*self.subject, *(key for key in subject if key not in self.subject)]
        missing = object()
        if other := [key for key in keys if subject.get(key, missing) != self.subject.get(key, missing)]:
            raise ValueError(
                f"{name} is a sweep of something else (different: {', '.join(other)}), and points of two do not belong "
                "into one: choose another folder, or give the model and the options that it was begun with"
            )
        self.points = points

    def write(self, points: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the points.

        Args:
            points: All there are, by the keys of their trials; values that are not finite become null, because JSON has
                no infinity.

        Raises:
            OSError: If it cannot be written; what was there before is as it was.
        """
        self.points = {key: _finite(dict(point)) for key, point in points.items()}
        record = {"format": _FORMAT, "version": _VERSION, "subject": self.subject, "points": self.points}
        with explaining_failure(self.file), replacing(self.file) as temporary:
            temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder, which is made if it is missing.

    Raises:
        ValueError: If there is one in it.
        OSError: If the folder cannot be made or written.
    """
    with explaining_failure(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The system gives the lock back when a process ends, however it ends: the file that stays means nothing.
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another sweep is writing into {str(folder)!r}: wait for its end, or choose another folder"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
