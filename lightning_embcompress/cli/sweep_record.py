"""The file in which a sweep keeps what it has found, so that it can go on where it was interrupted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from filelock import FileLock, Timeout

from lightning_embcompress.utils.files import explaining_failure, read_json, replacing

SWEEP_FILE = "sweep.json"
_FORMAT = "lightning-embcompress sweep"
_VERSION = 1


@dataclass(frozen=True)
class Point:
    """What one way to store the tables takes, and what it gives.

    Attributes:
        method: Name of the trial.
        asked_ratio: Dense bytes over stored bytes that were asked for; None for the dense model and for options that
            fix the size.
        ratio: Dense bytes over stored bytes of the tables, as stored, all metadata included.
        stored_bytes: Bytes of the tables; None if they cannot be stored so.
        model_ratio: Dense bytes over stored bytes of the whole model.
        perplexity: What was measured; None if nothing was, or it is not finite.
        seconds: How long the tables took to solve.
        note: Why there is no perplexity.
        predicted_loss: By how many nats the mean loss was expected to grow when the tables were solved; None where that
            is not known.
        loss: By how many nats it has grown: `log(perplexity / dense perplexity)`.
        pareto: Whether no other point has fewer bytes and no higher perplexity, or a lower perplexity and no more
            bytes.
        bands: Name of a band of token frequency to the perplexity of its targets; None for a band without any.
        bits_per_weight: Stored bits over numbers of the tables.
        asked_bits_per_weight: Those that were asked for; None where a ratio was.
        losses: Name of a text to the mean loss of every block of it, in nats.
    """

    method: str
    asked_ratio: float | None
    ratio: float | None = None
    stored_bytes: int | None = None
    model_ratio: float | None = None
    perplexity: float | None = None
    seconds: float | None = None
    note: str = ""
    predicted_loss: float | None = None
    loss: float | None = None
    pareto: bool = False
    bands: dict[str, float | None] = field(default_factory=dict)
    bits_per_weight: float | None = None
    asked_bits_per_weight: float | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)

    def change(self, dense: Point, text: str) -> tuple[float, float]:
        """Growth of the mean loss on a text against the dense model, and its standard error, in nats.

        Differences are paired: those of the blocks that both were measured on.

        Example:
            >>> dense, smaller = (Point("", None, losses={"news": losses}) for losses in ([2.0, 4.0], [2.5, 4.7]))
            >>> [round(value, 4) for value in smaller.change(dense, "news")]
            [0.6, 0.1]
        """
        pairs = zip(self.losses[text], dense.losses[text], strict=False)
        changes = [mine - base for mine, base in pairs]
        error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
        return fmean(changes), error

    @property
    def order(self) -> tuple[float, bool, float]:
        """Sorts the dense model first, then by ratio, the best perplexity first; what cannot be reached comes last."""
        asked = 0.0 if self.method == "dense" else self.asked_ratio or self.ratio or 0.0
        return asked, self.perplexity is None, self.perplexity or 0.0


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
    """

    def __init__(self, folder: Path, subject: Mapping[str, Any]) -> None:
        """Read what there is."""
        self.file = folder / SWEEP_FILE
        # As it comes back from JSON, which knows no tuples.
        self.subject: dict[str, Any] = json.loads(json.dumps(dict(subject)))
        self.points: dict[str, Point] = {}
        """By the keys of their trials."""
        if self.file.is_file():
            entries = self._read()
            try:
                self.points = {key: Point(**entry) for key, entry in entries.items()}
            except TypeError as error:
                raise ValueError(
                    f"{str(self.file)!r} is damaged: {error}; choose another folder, or remove it"
                ) from error
        else:
            self._write()

    def _read(self) -> dict[str, dict[str, Any]]:
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
        return points

    def add(self, key: str, point: Point) -> None:
        """Add a point, or replace it, and mark the Pareto front anew.

        Raises:
            OSError: If the file cannot be written; what was there before is as it was.
        """
        self.points = _marked({**self.points, key: point})
        self._write()

    def _write(self) -> None:
        entries = {key: asdict(point) for key, point in self.points.items()}
        record = {"format": _FORMAT, "version": _VERSION, "subject": self.subject, "points": entries}
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


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: none is better in one coordinate and at least as good in the other.

    Args:
        points: Two numbers each of which less is better, such as bytes and perplexity.

    Returns:
        One entry a point; equal points share the same.

    Example:
        >>> pareto_front([(100, 90.0), (25, 95.0), (25, 97.0), (50, 96.0)])
        [True, True, False, False]
    """
    front: set[tuple[float, float]] = set()
    lowest = math.inf
    for point in sorted(set(points)):
        if point[1] < lowest:
            front.add(point)
            lowest = point[1]
    return [point in front for point in points]


def _marked(points: Mapping[str, Point]) -> dict[str, Point]:
    """The same points, with the Pareto front of stored bytes and perplexity marked anew."""
    sizes = {
        key: (float(point.stored_bytes), point.perplexity)
        for key, point in points.items()
        if point.stored_bytes is not None and point.perplexity is not None
    }
    front = dict(zip(sizes, pareto_front(list(sizes.values())), strict=True))
    return {key: replace(point, pareto=front.get(key, False)) for key, point in points.items()}
