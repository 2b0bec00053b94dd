"""What compression left out of a table, kept on disk for refinement.

After compression every row lies in the span of its own block, so refining the factors alone would change nothing.
Refinement therefore aims at `T = Ŵ_now + R`: the table as training has moved it since, with the residual
`R = W − Ŵ` of its last decomposition put back.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.registry import Factorization
from lightning_embcompress.utils.files import explaining_failure, replacing


def write_residual(path: Path, target: Tensor, factorization: Factorization[Any]) -> int:
    """Write `R = T − Ŵ` in the table's dtype, chunk by chunk; a file that was there is replaced in one step.

    Returns:
        The checksum by which `open_table` knows the file again.
    """
    return _write(path, target, factorization, sign=-1)


def write_target(path: Path, residual: Tensor, factorization: Factorization[Any]) -> None:
    """Write `T = Ŵ + R`, as `write_residual` writes."""
    _write(path, residual, factorization, sign=1)


def open_table(
    paths: Path | Sequence[Path], factorization: Factorization[Any], checksums: Sequence[int] | None = None
) -> Tensor:
    """Map a file that was written here into memory.

    Args:
        paths: The file, or where it may be, see `find_table`.
        factorization: Of the table it belongs to.
        checksums: What `write_residual` returned, on one machine or another; None to compare the size only.

    Returns:
        `[vocab_size, dim]` in the dtype of the factors.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If its size is not that of the table, or its checksum another.
    """
    path = find_table([paths] if isinstance(paths, Path) else paths, factorization, checksums)
    shape = (factorization.vocab_size, factorization.dim)
    return torch.from_file(str(path), size=shape[0] * shape[1], dtype=factorization.dtype).view(shape)


def find_table(
    paths: Sequence[Path], factorization: Factorization[Any], checksums: Sequence[int] | None = None
) -> Path:
    """Find the first place that has a file that was written here, as `open_table` does."""
    shape, dtype = (factorization.vocab_size, factorization.dim), factorization.dtype
    size = shape[0] * shape[1] * dtype.itemsize
    # A number alone: of older checkpoints.
    known = [checksums] if isinstance(checksums, int) else checksums
    problems = []
    for path in paths:
        if not path.is_file():
            continue
        if path.stat().st_size != size:
            problems.append(
                f"the residual {str(path)!r} is damaged: a table of {shape[0]} x {shape[1]} takes {size} bytes, the "
                f"file has {path.stat().st_size}"
            )
        elif known is not None and _checksum(path) not in known:
            problems.append(
                f"the residual {str(path)!r} is not the one that was written for this checkpoint: it is damaged, or "
                "another run wrote to the same folder. Put it back, or resume without refine_at_epochs"
            )
        else:
            return path
    if problems:
        raise ValueError(problems[0])
    raise FileNotFoundError(
        f"the residual {str(paths[0])!r} is missing: it was written when the table was compressed, and refinement "
        "needs it. Put it back, or resume without refine_at_epochs"
    )


def places_of(path: Path, checkpoint: str | None) -> list[Path]:
    """Where a residual may be: where it was written or, if its folder was moved, in a folder around the checkpoint.

    A run that was resumed has checkpoints in `lightning_logs/version_1/checkpoints` that need what was written to
    `lightning_logs/version_0/residuals`.

    Args:
        path: Where it was written, in a folder of its own in `residuals` of the run's folder.
        checkpoint: What training was resumed from, somewhere in the run's folder.
    """
    folders = list(Path(checkpoint).absolute().parents)[:4] if checkpoint else []
    ends = [Path(*path.parts[-count:]) for count in (3, 4, 5)]
    return list(dict.fromkeys([path, *(folder / end for end in ends for folder in folders)]))


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            value = zlib.crc32(chunk, value)
    return value


@torch.no_grad()
def _write(path: Path, base: Tensor, factorization: Factorization[Any], sign: int) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    device = factorization.device
    checksum = 0
    with explaining_failure(path), replacing(path) as temporary, temporary.open("wb") as file:
        for chunk in row_chunks(factorization.vocab_size, factorization.dim):
            rows = factorization.rows(torch.arange(chunk.start, chunk.stop, device=device))
            values = base[chunk].to(device).float() if rows.dtype.itemsize < 4 else base[chunk].to(device)
            values = (values + sign * rows).to(rows.dtype).cpu().contiguous()
            # By bytes: numpy has no bfloat16.
            data = values.view(torch.uint8).numpy().tobytes()
            checksum = zlib.crc32(data, checksum)
            file.write(data)
    return checksum
