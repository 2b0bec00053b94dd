"""The dense tables as they were before compression, kept in files that are mapped into memory."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_embcompress.utils.files import explaining_failure, replacing

_SUFFIX = ".safetensors"
_KEY = "weight"


def reference_file(folder: str | os.PathLike[str], table: str) -> Path:
    """Where the table of a name is kept."""
    return Path(folder) / f"{table}{_SUFFIX}"


def write_reference(folder: str | os.PathLike[str], table: str, weight: Tensor) -> None:
    """Keep a table; a file that was there is replaced in one step.

    Args:
        folder: Made if it is missing.
        table: Name of the table.
        weight: `[vocab_size, dim]`.

    Raises:
        OSError: If it cannot be written.
    """
    path = reference_file(folder, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    with explaining_failure(path), replacing(path) as temporary:
        save_file({_KEY: weight.detach().cpu().contiguous()}, temporary)


def open_reference(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Map the tables that `EmbeddingCompression(keep_reference=folder)` has kept: the teacher of a distillation.

    Nothing is read before it is used, and what is used can be dropped again by the system: tables larger than the
    memory are fine.

    Args:
        folder: The folder.

    Returns:
        Tables `[vocab_size, dim]` by their names.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If a file is damaged.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_reference(folder, "encoder", torch.eye(3))
        ...     open_reference(folder)["encoder"].sum()
        tensor(3.)
    """
    files = sorted(Path(folder).glob(f"*{_SUFFIX}"))
    if not files:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no reference tables: a callback with keep_reference writes them when it compresses"
        )
    tables = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tables[file.name.removesuffix(_SUFFIX)] = opened.get_tensor(_KEY)
        except SafetensorError as error:
            raise ValueError(f"the reference table {str(file)!r} is damaged: {error}") from error
    return tables
