"""What compression left out of a table, kept on disk for refinement.

After compression every row lies in the span of its own block, so refining the factors alone would change nothing.
Refinement therefore aims at `T = Ŵ_now + R`: the table as training has moved it since, with the residual
`R = W − Ŵ` of its last decomposition put back.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_embcompress.factorizations import Factorization
from lightning_embcompress.solvers.gram import row_chunks


def write_residual(path: Path, target: Tensor, factorization: Factorization[Any]) -> None:
    """Write `R = T − Ŵ` in the table's dtype, chunk by chunk, under a temporary name that is then renamed."""
    _write(path, target, factorization, sign=-1)


def write_target(path: Path, residual: Tensor, factorization: Factorization[Any]) -> Tensor:
    """Write `T = Ŵ + R` and return it memory-mapped, `[vocab_size, dim]`."""
    _write(path, residual, factorization, sign=1)
    return open_table(path, factorization)


def open_table(path: Path, factorization: Factorization[Any]) -> Tensor:
    """Map a file that was written here into memory.

    Returns:
        `[vocab_size, dim]` in the dtype of the factors.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If its size is not that of the table.
    """
    shape, dtype = (factorization.vocab_size, factorization.dim), factorization.dtype
    size = shape[0] * shape[1] * dtype.itemsize
    if not path.is_file():
        raise FileNotFoundError(
            f"the residual {str(path)!r} is missing: it was written when the table was compressed, and refinement "
            "needs it. Put it back, or resume without refine_at_epochs"
        )
    if path.stat().st_size != size:
        raise ValueError(
            f"the residual {str(path)!r} is damaged: a table of {shape[0]} x {shape[1]} takes {size} bytes, the file "
            f"has {path.stat().st_size}"
        )
    return torch.from_file(str(path), size=shape[0] * shape[1], dtype=dtype).view(shape)


@torch.no_grad()
def _write(path: Path, base: Tensor, factorization: Factorization[Any], sign: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    device = factorization.device
    with temporary.open("wb") as file:
        for chunk in row_chunks(factorization.vocab_size, factorization.dim):
            rows = factorization.rows(torch.arange(chunk.start, chunk.stop, device=device))
            values = base[chunk].to(device).float() if rows.dtype.itemsize < 4 else base[chunk].to(device)
            values = (values + sign * rows).to(rows.dtype).cpu().contiguous()
            # By bytes: numpy has no bfloat16.
            file.write(values.view(torch.uint8).numpy().tobytes())
    os.replace(temporary, path)
