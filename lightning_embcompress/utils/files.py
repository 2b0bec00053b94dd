"""Files that are replaced in one step: whatever happens while one is written, the one before is whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# A writer touches its file all the time: one that was not touched for so long is not being written.
_ABANDONED_SECONDS = 3600
_HASH_LENGTH = 16
# What the writers of torch and safetensors say instead of raising an OSError.
_WRITERS = re.compile("PytorchStreamWriter|iostream error|inline_container|I/O error")


@contextmanager
def replacing(path: str | os.PathLike[str], directory: bool = False) -> Iterator[Path]:
    """Write a file or a directory under a temporary name beside it, and give it its name when it is whole and on disk.

    If the block raises, what was written is removed and what was there stays as it was. If the process is killed, the
    temporary file or directory is left over, and removed when the same one is written the next time.

    Args:
        path: The place; its folder must exist.
        directory: Whether a directory is written, which replaces the one that is there with all its files.

    Yields:
        Where to write: a directory that has been made, or a file that has not.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name, "note.txt")
        >>> with replacing(file) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> file.read_text(), len(list(file.parent.iterdir()))
        ('whole', 1)
        >>> folder.cleanup()
    """
    # Absolute: `out/` and `.` have no usable name of their own.
    target = Path(path).absolute()
    temporary = _temporary(target)
    _remove_dead(target.parent.glob(f"{_prefix(target)}*.tmp"))
    try:
        if directory:
            temporary.mkdir()
        yield temporary
        # On the disk before it has the name: after a power cut the name must not stand for an empty file.
        synchronize(temporary)
        put_in_place(target, temporary)
        synchronize(target.parent)
    finally:
        _remove(temporary)


def put_in_place(target: Path, temporary: Path) -> None:
    """Give a file or a directory that is whole its name, in the place of what has it.

    Args:
        target: The name.
        temporary: What is to have it, beside it.
    """
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(temporary, target)
        return
    # A directory that is not empty cannot be replaced in one step.
    old = temporary.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        ValueError: If it does not; the message names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} is damaged: it is no mapping")
    return content


def synchronize(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Args:
        path: The file or the folder.
    """
    is_folder = os.path.isdir(path)
    # Windows waits for files that are open for writing only.
    flags = os.O_RDONLY if is_folder or os.name == "posix" else os.O_RDWR
    # Not every system opens folders, nor every file system waits for one.
    with contextlib.suppress(*([OSError] if is_folder else [])):
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def explaining_failure(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say which file could not be written and what has become of the one before, whoever writes it.

    Args:
        path: The file.

    Raises:
        OSError: If the block cannot write, such as to a full disk.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Others are not of the disk, but of values that cannot be written.
        if not isinstance(error, OSError) and not _WRITERS.search(f"{error} {error.__context__}"):
            raise
        folder, said = Path(path).parent, " ".join(str(error).split())[:200]
        before = "what was there before is as it was" if Path(path).exists() else "nothing was left there"
        room = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free there: " if folder.is_dir() else ""
        message = f"{str(path)!r} could not be written, and {before}: {said}. {room}make room, or save elsewhere"
        number = getattr(error, "errno", None)
        raise (OSError(message) if number is None else OSError(number, message)) from error


def _temporary(target: Path) -> Path:
    # Not the name itself: programs look for parts of names ("last", "ckpt_"), and it may be as long as a name can be.
    return target.with_name(f"{_prefix(target)}{_host()}.{os.getpid()}.tmp")


def _prefix(target: Path) -> str:
    return f".{hashlib.sha256(target.name.encode('utf-8', 'surrogateescape')).hexdigest()[:_HASH_LENGTH]}."


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:64] or "localhost"


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes have left in the folders of a folder.

    Args:
        folder: It need not exist.
    """
    _remove_dead(folder.glob(f"*/.{'[0-9a-f]' * _HASH_LENGTH}.*.tmp"))


def _remove_dead(files: Iterable[Path]) -> None:
    for file in files:
        # After the hash: a host, and the process that writes.
        host, _, process = file.name.removesuffix(".tmp")[_HASH_LENGTH + 2 :].rpartition(".")
        with contextlib.suppress(OSError, ValueError):
            own = host == _host()
            if (own and not _runs(int(process))) or time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                _remove(file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    if process == os.getpid():
        # Of an earlier process of the same number, as the first one of every container has.
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
