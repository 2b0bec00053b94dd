"""Text that is prepared once: datasets in memory-mapped files, made under a lock and checked when they are opened."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info

FORMAT_VERSION = 2
# Rows that are held in memory until they are written, each of about two million characters.
_ROWS_HELD = 16


class MissingExtraError(ImportError, ValueError):
    """A package is not installed; also a ValueError, because the value of an argument asks for it."""


def require_datasets() -> Any:
    """Import the package `datasets`, which nothing but text needs.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise MissingExtraError(
            "reading text needs the package `datasets`, which is not installed: "
            'pip install "lightning-embcompress[text]"'
        ) from None
    return datasets


def default_cache_dir() -> Path:
    """Where caches go by default: ``lightning_embcompress`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_embcompress"


def cached(
    kind: str,
    settings: Mapping[str, Any],
    sources: Sequence[Any],
    rows: Callable[[], Iterator[dict[str, Any]]],
    cache_dir: Path,
) -> Any:
    """Open a dataset of the cache, or make it if it is not there, damaged, or of other sources.

    Several processes may call this at once: one makes the dataset, the others wait for it.

    Args:
        kind: First part of the folder's name.
        settings: All that decides the content but the sources, plain JSON values; other settings are kept beside these.
        sources: What a change of the sources is noticed by; a dataset of other sources is replaced.
        rows: Gives the rows, with values of the same types in each.
        cache_dir: The folder of the cache.

    Returns:
        A `datasets.Dataset` that is mapped into memory.

    Raises:
        OSError: If the cache's folder cannot be written.
        MissingExtraError: If `datasets` is not installed.
    """
    datasets = require_datasets()
    folder = cache_dir / f"{kind}-{_digest([FORMAT_VERSION, settings])}"
    place = folder / _digest(sources)

    def read() -> Any:
        fingerprint = _digest([kind, settings, sources])
        return datasets.Dataset.from_generator(
            rows, cache_dir=str(place), fingerprint=fingerprint, writer_batch_size=_ROWS_HELD
        )

    with _locked(folder), _without_bars(datasets):
        # Written last by the package, when all rows are.
        if any(place.rglob("dataset_info.json")):
            try:
                found = read()
                if found.num_rows == found.info.splits["train"].num_examples:
                    return found
            except Exception:  # damaged files raise whatever their readers do
                pass
            rank_zero_info(f"{place} is damaged: making it again.")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            return read()
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
                raise error.__cause__ from None
            raise


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            lock.acquire(timeout=1)
        except Timeout:
            rank_zero_info(f"Another process is preparing {folder}: waiting for it.")
            lock.acquire()
    except OSError as error:
        raise OSError(
            f"cache_dir={str(folder.parent)!r} cannot be written ({error}): choose another cache_dir."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    """Silence the package's bars: it cannot know the length of a text, ours do."""
    were_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()
