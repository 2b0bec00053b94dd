"""How blocks that share a basis are laid out: their structure, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.numerics.rate_allocation import Overheads
from lightning_embcompress.methods.quantizers.packing import bit_width, packed_bytes
from lightning_embcompress.methods.quantizers.scalar_quantizer import nearest_level
from lightning_embcompress.methods.quantizers.trellis import WIDEST, WINDOWS, decode, encode, fits, widest
from lightning_embcompress.methods.shared_basis.budget import BitBudget
from lightning_embcompress.methods.shared_basis.level_fitting import num_levels
from lightning_embcompress.methods.specs import stored_bytes

KIND = "shared_basis_blocks"
# Scales are powers of two of a sixteenth: within 2 % of what they should be, codes being chosen by what they are.
SCALE_STEPS = 16
# Bits of a number of the basis of codes; there were 8 once. With fewer, codes lose more than their bytes are worth.
BASIS_BITS = 6


def structure(
    vocab_size: int,
    dim: int,
    rank: int,
    sizes: Sequence[int],
    segments: Sequence[Sequence[Sequence[int]]],
    is_coded: bool,
    window: int = 0,
    basis_bits: int = BASIS_BITS,
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
        **({"window": window} if window else {}),
        **({"basis_bits": basis_bits} if is_coded and basis_bits != 8 else {}),
    }


def bit_budget(
    vocab_size: int, dim: int, itemsize: int, max_bytes: int, widths: tuple[int, ...], window: int = 0
) -> tuple[BitBudget, int]:
    """What a solution may take, and the bytes that are there whatever it is.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
        itemsize: Bytes of a number of the table.
        max_bytes: Most bytes that may be stored.
        widths: Bits of a coefficient to choose from; none for floats.
        window: Bits of the windows of a trellis; 0 for none.

    Returns:
        The budget of what depends on the solution, and the bytes of the rest.
    """
    # Of codes with room to say that they are packed row by row, whether they are or not: they stay the same.
    spec = structure(vocab_size, dim, dim, [], [], bool(widths), window) | ({"by_rows": True} if widths else {})
    # What a block adds to the structure, as text, and to the last bytes of its segments.
    said = len(str(vocab_size)) + 4 + len(f"[{-8},{dim}],") * max(1, len(widths))
    if widths:
        # With what the last byte of the basis has left.
        fixed = stored_bytes((sum(2**bits for bits in widths) + widest(window)) * itemsize + itemsize + 1, 9, spec)
        row = 8 * (dim + itemsize)
        block = row + 8 * said + 7 * len(widths)
        overheads = Overheads(8, BASIS_BITS * dim + 8 * itemsize)
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
        as_stored if widths else lambda means: means,
        window,
    )
    return budget, fixed


def integer_codes(values: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Round rows to integers of some bits: codes, of which the middle one stands for 0, and the scale of each row.

    Args:
        values: `[rows, columns]`.
        bits: At most 8.

    Returns:
        `[rows, columns]` uint8 and `[rows]` in the dtype of the values: see `from_integers`.
    """
    largest = (1 << (bits - 1)) - 1
    scales = values.abs().amax(dim=1) / largest
    levels = values / scales.clamp(min=torch.finfo(values.dtype).tiny).unsqueeze(1)
    return (levels.round().clamp(-largest, largest) + largest + 1).to(torch.uint8), scales


def from_integers(codes: Tensor, scales: Tensor, bits: int = 8) -> Tensor:
    """The rows that codes stand for, in the dtype of the scales."""
    values: Tensor = (codes.to(scales.dtype) - (1 << (bits - 1))) * scales.unsqueeze(1)
    return values


def as_stored(values: Tensor, bits: int = 8) -> Tensor:
    """What rows are once they were rounded to integers of some bits."""
    return from_integers(*integer_codes(values, bits), bits)


def checked_segments(
    dim: int, rank: int, blocks: int, segments: Sequence[Sequence[Sequence[int]]], is_coded: bool, window: int = 0
) -> tuple[list[list[tuple[int, int]]], list[int], list[int]]:
    """Check which components the blocks keep, and in how many bits.

    Args:
        dim: Columns of the table.
        rank: Rows of the basis.
        blocks: Number of blocks.
        segments: For every block, runs `[bits, components]` of the components that it keeps.
        is_coded: Whether they are codes.
        window: Bits of the windows of a trellis; 0 for none.

    Returns:
        The segments, the components of every block, and the widths that there are.

    Raises:
        ValueError: If they are not possible.
    """
    runs_of_blocks = [[(int(bits), int(count)) for bits, count in runs] for runs in segments]
    ranks = [sum(count for _, count in runs) for runs in runs_of_blocks]
    used = {bits for runs in runs_of_blocks for bits, _ in runs}
    if len(runs_of_blocks) != blocks or not 0 <= rank <= dim or max(ranks) != rank:
        raise ValueError(
            f"there must be segments for each of {blocks} blocks, the most of {rank} components, and at most {dim}"
        )
    offered = {*range(1, 9), *range(-WIDEST, 0)} if is_coded else {0}
    if not used <= offered or any(n < 1 for r in runs_of_blocks for _, n in r):
        raise ValueError(
            f"the segments of a block must be [bits, components], bits 1 to 8 of codes, -1 to -{WIDEST} of codes of a "
            "trellis, 0 of floats"
        )
    if window and (window not in WINDOWS or not is_coded):
        raise ValueError(f"the windows of a trellis must have {WINDOWS[0]} to {WINDOWS[-1]} bits, not {window}")
    for runs in runs_of_blocks:
        own, is_last = trellis_bits(runs), [bits < 0 for bits, _ in runs]
        if own and (is_last != sorted(is_last) or not fits(own, window)):
            raise ValueError(
                f"segments of a trellis must be the last of a block, of at most {widest(window)} bits, and fill a "
                f"window of {window}, not {runs}"
            )
    return runs_of_blocks, ranks, sorted(used - {0})


def trellis_bits(runs: Sequence[tuple[int, int]]) -> list[int]:
    """Bits of every component of a block that is coded by a trellis: the last ones."""
    return [-bits for bits, count in runs if bits < 0 for _ in range(count)]


def table_size(bits: int) -> int:
    """Levels that codes of a byte choose from: as many as there are, or the numbers of a trellis."""
    return 2**bits if bits > 0 else 256


def level_tables(levels: Tensor, widths: Sequence[int]) -> dict[int, Tensor]:
    """Levels of every width, of those that stand one after the other."""
    return dict(zip(widths, torch.split(levels, [table_size(bits) for bits in widths]), strict=True)) if widths else {}


def level_values(levels: Tensor, widths: Sequence[int]) -> Tensor:
    """Levels of every width, one after the other, of what is kept of them: of a trellis the unit of its numbers."""
    if not any(bits < 0 for bits in widths):
        return levels
    parts = zip(torch.split(levels, [num_levels(bits) for bits in widths]), widths, strict=True)
    numbers = torch.arange(-128, 128, dtype=levels.dtype, device=levels.device)
    return torch.cat([part if bits > 0 else part * numbers for part, bits in parts])


def unit_of(levels: Tensor) -> Tensor:
    """What a number of a trellis stands for, of its 256 levels."""
    return levels[129]


def from_windows(codes: Tensor, runs: Sequence[tuple[int, int]], window: int) -> Tensor:
    """`[rows, components]` codes as they are stored, as codes of levels: those of a trellis are read in its windows."""
    bits = trellis_bits(runs)
    if not bits:
        return codes
    first = codes.shape[1] - len(bits)
    numbers = decode(codes[:, first:], bits, window) + 128
    return torch.cat([codes[:, :first], numbers.to(codes.dtype)], dim=1)


def nearest_codes(
    values: Tensor,
    runs: Sequence[tuple[int, int]],
    tables: Mapping[int, Tensor],
    costs: Tensor,
    window: int,
) -> Tensor:
    """Codes of the nearest levels, those of a trellis of least cost, `[rows, components]` int64, as they are stored.

    Args:
        values: `[rows, components]` coefficients of a block in units of their scales.
        runs: The segments of the block.
        tables: Levels of every width.
        costs: `[components]` what a squared error of a component costs.
        window: Bits of the windows of a trellis.
    """
    parts = torch.split(values, [count for _, count in runs], dim=1) if runs else []
    pairs = list(zip(parts, runs, strict=True))
    codes = [nearest_level(part.contiguous(), tables[bits]) for part, (bits, _) in pairs if bits > 0]
    targets = [part / _nonzero(unit_of(tables[bits])) for part, (bits, _) in pairs if bits < 0]
    if targets:
        bits = trellis_bits(runs)
        codes.append(encode(torch.cat(targets, dim=1), bits, costs[-len(bits) :], window).long())
    return torch.cat([values.new_empty(len(values), 0, dtype=torch.long), *codes], dim=1)


def _nonzero(unit: Tensor) -> Tensor:
    """A unit of either sign, as training leaves it, to divide by; where it is nothing, all codes are as good."""
    tiny = torch.finfo(unit.dtype).tiny
    return torch.where(unit.abs() < tiny, tiny, unit)


def projectors(
    basis: Tensor, metric: Metric, kept: int, dtype: torch.dtype, device: torch.device
) -> Callable[[int], Tensor]:
    """Coefficients of least loss in the first rows of a basis that storing it has changed.

    They are `M Bᵀ (B M Bᵀ)⁻¹`; of the Cholesky factor the first rows and columns are that of the first rows of `B`.

    Args:
        basis: `[rank, dim]`.
        metric: What an error costs.
        kept: How many of them are kept: those of all blocks can be larger than the table.
        dtype: Of what is returned.
        device: Of what is returned.

    Returns:
        Called with a number of rows, `[dim, rank]` of these.
    """
    seen = basis.double().cpu() @ metric.root
    lengths = seen.norm(dim=1, keepdim=True).clamp(min=1e-300)
    seen /= lengths
    # Rows that rounding has made the same leave nothing to choose between them.
    moment = seen @ seen.T + 1e-12 * torch.eye(len(seen), dtype=torch.float64)
    inverse = torch.linalg.inv(torch.linalg.cholesky(moment))
    turned = metric.root @ (seen.T @ inverse.T)

    @lru_cache(maxsize=kept)
    def projector(rank: int) -> Tensor:
        projected: Tensor = turned[:, :rank] @ (inverse[:rank, :rank] / lengths[:rank].T)
        return projected.to(device, dtype)

    return projector


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
