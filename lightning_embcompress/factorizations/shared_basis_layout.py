"""How blocks that share a basis are laid out: their structure, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_embcompress.factorizations.base import stored_bytes
from lightning_embcompress.factorizations.packing import bit_width, packed_bytes
from lightning_embcompress.solvers.rate_allocation import Overheads
from lightning_embcompress.solvers.shared_basis import BitBudget

KIND = "shared_basis_blocks"


def structure(
    vocab_size: int,
    dim: int,
    rank: int,
    sizes: Sequence[int],
    segments: Sequence[Sequence[Sequence[int]]],
    is_coded: bool,
) -> dict[str, Any]:
    """The structure of `SharedBasisBlocks`, as JSON; arguments as there."""
    return {
        "kind": KIND,
        "vocab_size": vocab_size,
        "dim": dim,
        "rank": rank,
        "sizes": list(sizes),
        "segments": [[list(run) for run in runs] for runs in segments],
        "is_coded": is_coded,
    }


def bit_budget(
    vocab_size: int, dim: int, itemsize: int, max_bytes: int, widths: tuple[int, ...]
) -> tuple[BitBudget, int]:
    """What a solution may take, and the bytes that are there whatever it is.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        itemsize: Bytes of a number of the table.
        max_bytes: Most bytes that may be stored.
        widths: Bits of a coefficient to choose from; none for floats.

    Returns:
        The budget of what depends on the solution, and the bytes of the rest.
    """
    spec = structure(vocab_size, dim, dim, [], [], False)
    # What a block adds to the structure, as text, and to the last bytes of its segments.
    said = len(str(vocab_size)) + 4 + len(f"[{8},{dim}],") * max(1, len(widths))
    if widths:
        fixed = stored_bytes(sum(2**bits for bits in widths) * itemsize + itemsize, 9, spec)
        row = 8 * (dim + itemsize)
        block = row + 8 * said + 7 * len(widths)
        overheads = Overheads(8, row)
    else:
        # A tensor of its own in the file for the coefficients of each block.
        fixed = stored_bytes(0, 3, spec)
        block = 8 * (dim * itemsize + said + (stored_bytes(0, 1, {}) - stored_bytes(0, 0, {})))
        overheads = Overheads(0, 8 * dim * itemsize)
    budget = BitBudget(
        8 * (max_bytes - fixed),
        widths or (8 * itemsize,),
        not widths,
        overheads,
        block,
        lambda count: 8 * packed_bytes(vocab_size, bit_width(count)),
        _as_stored if widths else lambda means: means,
    )
    return budget, fixed


def byte_codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to 8 bits: codes, of which 128 stands for 0, and the scale of each row.

    Args:
        values: `[rows, columns]`.

    Returns:
        `[rows, columns]` uint8 and `[rows]` in the dtype of the values: a value is `(code - 128) * scale`.
    """
    scales = values.abs().amax(dim=1) / 127
    levels = values / scales.clamp(min=torch.finfo(values.dtype).tiny).unsqueeze(1)
    return (levels.round().clamp(-127, 127) + 128).to(torch.uint8), scales


def _as_stored(values: Tensor) -> Tensor:
    codes, scales = byte_codes(values)
    return (codes.to(values) - 128) * scales.unsqueeze(1)


def segments_of(bits: list[int], is_coded: bool) -> list[list[int]]:
    """Runs of equal widths, without the dropped components at the end.

    Args:
        bits: Bits of every component of a block, 0 where it is dropped.
        is_coded: Whether they are codes; the bits of floats are said as 0.

    Example:
        >>> segments_of([6, 6, 3, 0], is_coded=True)
        [[6, 2], [3, 1]]
    """
    runs: list[list[int]] = []
    for width in bits:
        if not width:
            break
        name = width if is_coded else 0
        if runs and runs[-1][0] == name:
            runs[-1][1] += 1
        else:
            runs.append([name, 1])
    return runs
