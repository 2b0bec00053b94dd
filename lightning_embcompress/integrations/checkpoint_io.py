"""Lightning's checkpoints as files: written so that the one before is never lost, and read so that no code runs."""

from __future__ import annotations

import errno
import inspect
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from typing_extensions import override

from lightning_embcompress.utils.files import explaining_failure, replacing

# What strategies that save every shard by itself put into the directory for all that is no weight.
_SHARDED_FILE = "meta.pt"
_CHUNK_BYTES = 2**22


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own way of writing and reading checkpoints, except that local files are replaced in one step.

    Lightning puts a checkpoint together in memory, writes it to the system's folder of temporary files and moves it
    from there. Between two file systems that is a copy over the checkpoint before, which a full disk or a kill leaves
    cut short. Here it is written beside the checkpoint, without a second copy in memory, and renamed. Files are checked
    for damage before they are read, and only tensors and plain values are read.

    Example:
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False, enable_checkpointing=False)
        >>> type(trainer.strategy.checkpoint_io).__name__
        'AtomicCheckpointIO'
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What to write.
            path: A file, whose folder is made if it is missing, or a URL, which is left to Lightning.
            storage_options: None: there are none for files.

        Raises:
            OSError: If it cannot be written, such as to a full disk. What was there before is as it was.
            TypeError: If storage options are given.
        """
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = _local(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with explaining_failure(file), replacing(file) as temporary:
            torch.save(checkpoint, temporary)

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: A file or a URL.
            map_location: Where its tensors go, as for `torch.load`.
            weights_only: False to load objects too, which can run code. None and True load tensors and plain values.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged, or holds more than is loaded.
        """
        if not _is_local(path):
            # Older versions of Lightning have no such parameter, and newer ones load objects if it is None.
            known = "weights_only" in inspect.signature(TorchCheckpointIO.load_checkpoint).parameters
            chosen = {"weights_only": weights_only is not False} if known else {}
            remote: dict[str, Any] = super().load_checkpoint(path, map_location, **chosen)
            return remote
        check_whole_file(path)
        with readable(path):
            checkpoint = torch.load(_local(path), map_location=map_location, weights_only=weights_only)
        if not isinstance(checkpoint, dict):
            raise ValueError(f"{str(path)!r} is no checkpoint: it holds a {type(checkpoint).__name__}")
        return checkpoint


def use_atomic_checkpoints(trainer: Trainer) -> bool:
    """Let a Trainer write its checkpoints by `AtomicCheckpointIO`, unless it was told to write them otherwise.

    Plug-ins that wrap another one, such as `AsyncCheckpointIO`, stay, and wrap this one. Strategies that save every
    shard by itself write their files without it.

    Args:
        trainer: The Trainer.

    Returns:
        Whether it does now.
    """
    strategy = trainer.strategy
    # A wrapper that was given none has Lightning's own from here on.
    writer = strategy.checkpoint_io
    wrapper: _WrappingCheckpointIO | None = None
    while isinstance(writer, _WrappingCheckpointIO) and writer.checkpoint_io is not None:
        wrapper, writer = writer, writer.checkpoint_io
    # Exactly this class: what was made of it was chosen by somebody.
    if type(writer) is TorchCheckpointIO:
        writer = AtomicCheckpointIO()
        if wrapper is None:
            strategy.checkpoint_io = writer
        else:
            # The property sets it only where there is none yet.
            wrapper._checkpoint_io = writer
    return isinstance(writer, AtomicCheckpointIO)


def check_checkpoint_file(path: str | os.PathLike[str]) -> Path | None:
    """Refuse what is no whole checkpoint, by a look at its end, before anything is built for it.

    Args:
        path: A file or a directory of Lightning's Trainer. A URL is left to Lightning.

    Returns:
        The file that holds the checkpoint, in a directory all of it but the weights; None for a URL.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is cut short or is something else.
    """
    if not _is_local(path):
        return None
    file = _local(path)
    if file.is_dir():
        if not (file / _SHARDED_FILE).is_file():
            raise ValueError(
                f"{str(path)!r} is a directory, but not a checkpoint of a sharded model: it has no {_SHARDED_FILE}"
            )
        return file / _SHARDED_FILE
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    # `torch.save` writes a zip archive, whose directory stands at the end: a truncated file has none.
    with readable(file):
        is_archive = zipfile.is_zipfile(file)
    if not is_archive:
        raise ValueError(
            f"{str(path)!r} is not a whole checkpoint: it was cut short or is another kind of file "
            f"({file.stat().st_size} bytes). Resume from an earlier one"
        )
    return file


def check_whole_file(path: str | os.PathLike[str]) -> None:
    """Read a checkpoint from beginning to end and compare it with its checksums, as torch does not.

    Takes a third of a second a gigabyte, if the file is in memory. Files that torch wrote without checksums
    (`torch.serialization.set_crc32_options(False)`) are compared as far as they have any.

    Args:
        path: A file or a directory of Lightning's Trainer, of which the part is read that holds no weights. A URL is
            left to Lightning.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is damaged.
    """
    if (file := check_checkpoint_file(path)) is None:
        return
    with readable(file), zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        # Torch does not compress: what is larger than its file would fill the memory.
        if sum(record.file_size for record in records) > file.stat().st_size:
            raise zipfile.BadZipFile("its records are larger than the file")
        for record in records:
            # Torch writes 0 where it was told to compute none.
            if record.CRC:
                with archive.open(record) as stream:
                    # `zipfile` compares the checksum at the end.
                    while stream.read(_CHUNK_BYTES):
                        pass


def read_mapped(path: str | os.PathLike[str], weights_only: bool = True) -> Any:
    """Read a checkpoint without its tensors, which are mapped into memory.

    Args:
        path: A file, a directory of a sharded model, or a URL, whose tensors are on the meta device.
        weights_only: False to load objects too, which can run code.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is no whole checkpoint, or holds more than is loaded.
    """
    if (file := check_checkpoint_file(path)) is None:
        with readable(path), get_filesystem(str(path)).open(str(path), "rb") as stream:
            return torch.load(stream, map_location="meta", weights_only=weights_only)
    with readable(file):
        return torch.load(file, map_location="cpu", weights_only=weights_only, mmap=True)


def _is_local(path: str | os.PathLike[str]) -> bool:
    return "://" not in str(path) or str(path).startswith("file://")


def _local(path: str | os.PathLike[str]) -> Path:
    return Path(str(path).removeprefix("file://"))


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say what is wrong with a file, whatever a damaged one makes of its reader."""
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        # Only what damage makes of it, a place before the beginning of the file, is no matter of the disk.
        if error.errno != errno.EINVAL:
            raise
        raise _damaged(path, error) from error
    except pickle.UnpicklingError as error:
        said = " ".join(str(error).split())
        # Two ways in which torch names what it does not load.
        found = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", said)
        if not found:
            raise _damaged(path, error) from error
        raise ValueError(
            f"{str(path)!r} holds more than tensors and plain values ({found[1] or found[2]}), which can run code when "
            "it is loaded: nothing was loaded. If you trust where it comes from, load it with weights_only=False (in "
            "the shell with --trust_source), or set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 for versions of Lightning that "
            "have no such argument"
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike[str], error: Exception) -> ValueError:
    said = " ".join(str(error).split())[:200]
    return ValueError(
        f"{str(path)!r} is damaged and cannot be read as a checkpoint ({type(error).__name__}: {said}). Copy it again, "
        "or take an earlier one"
    )
