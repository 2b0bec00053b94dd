"""Files that are computed once and kept: locked while they are made, checked whenever they are opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info

FORMAT_VERSION = 1


def default_cache_dir() -> Path:
    """Where caches go by default: ``lightning_embcompress`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_embcompress"


def describe_sources(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Record by what a change of the source files is noticed: size and time of modification."""
    described = []
    for path in files:
        status = path.stat()
        described.append({"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns})
    return described


@dataclass(frozen=True)
class CacheEntry:
    """A group of files with a JSON record that says what they were made from and how long they must be.

    The record is deleted first and written last, and each file appears under its final name at once
    (:func:`os.replace`), so that files without a fitting record are never read, whenever a process was killed.

    Args:
        directory: The folder of the cache.
        kind: The first part of the files' names.
        settings: Everything that determines the content, except what ``sources`` records; a hash of it is the second
            part of the names, so different settings never collide. Plain JSON values.
        sources: The state of the source files (:func:`describe_sources`).
        suffixes: The files of the entry.
    """

    directory: Path
    kind: str
    settings: Mapping[str, Any]
    sources: list[dict[str, Any]]
    suffixes: tuple[str, ...]

    @property
    def _expected(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "settings": dict(self.settings), "sources": self.sources}

    def path(self, suffix: str) -> Path:
        """The final path of one file."""
        text = json.dumps({"format_version": FORMAT_VERSION, **self.settings}, sort_keys=True)
        return self.directory / f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}{suffix}"

    def temporary(self, suffix: str) -> Path:
        """Where one file is written; the lock makes the name ours, and a killed process's remains are overwritten."""
        return self.path(f"{suffix}.tmp")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes away from this entry.

        Raises:
            OSError: If the cache's folder cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path(".lock"))
            try:
                lock.acquire(timeout=1)
            except Timeout:
                rank_zero_info(f"Another process is preparing {self.path('')}: waiting for it.")
                lock.acquire()
        except OSError as error:
            raise OSError(
                f"cache_dir={str(self.directory)!r} cannot be written ({error}): choose another cache_dir."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def read(self) -> dict[str, Any] | None:
        """Give the details of a complete, up-to-date entry; ``None`` if it has to be made (again)."""
        record_path = self.path(".json")
        if not record_path.exists():
            return None
        try:
            record = json.loads(record_path.read_text(encoding="utf-8"))
            valid = (
                {key: record[key] for key in self._expected} == self._expected
                and set(record["sizes"]) == set(self.suffixes)
                and all(self.path(suffix).stat().st_size == size for suffix, size in record["sizes"].items())
            )
            if valid:
                return dict(record["details"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # Whatever is wrong with it: the remedy is the same.
        rank_zero_info(f"{record_path} is incomplete or its source files have changed: making it again.")
        return None

    def commit(self, details: Mapping[str, Any]) -> None:
        """Give the temporary files their final names and write the record."""
        record_path = self.path(".json")
        record_path.unlink(missing_ok=True)
        sizes = {suffix: self.temporary(suffix).stat().st_size for suffix in self.suffixes}
        for suffix in self.suffixes:
            os.replace(self.temporary(suffix), self.path(suffix))
        text = json.dumps({**self._expected, "sizes": sizes, "details": dict(details)}, indent=1)
        temporary = self.temporary(".json")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, record_path)

    def discard(self) -> None:
        """Delete temporary files, after a failure."""
        for suffix in (*self.suffixes, ".json"):
            self.temporary(suffix).unlink(missing_ok=True)
