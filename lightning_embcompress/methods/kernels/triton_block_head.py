"""The kernel of `block_head` in Triton.

Without Triton the module can be imported, and has no kernel in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_embcompress.methods.kernels.choice import TRITON_IS_INSTALLED, current_device_of

# Rows and columns that a program multiplies at a time, where rows are laid out one after the other, and columns.
TILES = {False: (32, 64), True: (128, 16)}
# Of a product of matrices.
LEAST_STATES = 16

if TRITON_IS_INSTALLED:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from triton import language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

    _jit: Callable[[Callable[..., Any]], Any] = triton.jit

    @_jit
    def multiply_blocks(
        states: tl.tensor,
        shift: tl.tensor,
        out: tl.tensor,
        table: tl.tensor,
        programs: tl.tensor,
        count: tl.tensor,
        state_stride: tl.tensor,
        shift_stride: tl.tensor,
        out_stride: tl.tensor,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        STATES: tl.constexpr,
        BY_COLUMN: tl.constexpr,
        SHIFTED: tl.constexpr,
    ) -> None:
        """Logits of all states by some rows of a block.

        `table` has for every block its address, rows, columns, stride, first column of the states and first logit;
        `programs` which block and which rows of it are whose.
        """
        program = tl.program_id(0)
        block = tl.load(programs + 2 * program)
        row = tl.load(programs + 2 * program + 1) + tl.arange(0, ROWS)
        entry = table + 6 * block
        factor = tl.load(entry).to(tl.pointer_type(out.dtype.element_ty))
        size = tl.load(entry + 1)
        rank = tl.load(entry + 2)
        stride = tl.load(entry + 3)
        first = tl.load(entry + 4)
        place = tl.load(entry + 5)
        inside = row < size
        state = tl.arange(0, STATES)
        # Of one state the sums over columns are left to the end; of more, products of matrices.
        one = tl.zeros([ROWS, COLUMNS], tl.float32)
        several = tl.zeros([ROWS, STATES], tl.float32)
        for start in range(0, rank, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            known = column < rank
            if BY_COLUMN:
                pointers = factor + (row[:, None] + column[None, :] * stride)
            else:
                pointers = factor + (row[:, None] * stride + column[None, :])
            read = tl.load(pointers, mask=inside[:, None] & known[None, :], other=0.0)
            if STATES == 1:
                own = tl.load(states + first + column, mask=known, other=0.0)
                one += read.to(tl.float32) * own.to(tl.float32)[None, :]
            else:
                own = tl.load(
                    states + (first + column[:, None] + state[None, :] * state_stride),
                    mask=known[:, None] & (state < count)[None, :],
                    other=0.0,
                )
                several = tl.dot(read, own, several, input_precision="ieee")
        found = tl.sum(one, axis=1)[:, None] if STATES == 1 else several
        if SHIFTED:
            added = tl.load(shift + state * shift_stride + block, mask=state < count, other=0.0)
            found += added.to(tl.float32)[None, :]
        tl.store(
            out + (place + row[:, None] + state[None, :] * out_stride),
            found.to(out.dtype.element_ty),
            mask=inside[:, None] & (state < count)[None, :],
        )


def block_products(
    states: Tensor, blocks: tuple[tuple[int, ...], ...], by_column: bool, shift: Tensor | None, out: Tensor
) -> None:
    """Write the products of `[N, columns]` states with all blocks, see `block_head.block_products`.

    Args:
        states: From 1 to 16 of them.
        blocks: Address, rows, columns, stride and first column of the states of every block.
        by_column: Whether columns, not rows, are laid out one after the other.
        shift: `[N, blocks]`.
        out: `[N, Σ rows]`.
    """
    rows, columns = TILES[by_column]
    table, programs = _tables(blocks, rows, out.device)
    if not len(programs):
        return
    states = states.contiguous()
    added = states if shift is None else shift.contiguous()
    with current_device_of(out):
        multiply_blocks[(len(programs),)](
            states,
            added,
            out,
            table,
            programs,
            len(states),
            states.stride(0),
            added.stride(0),
            out.stride(0),
            rows,
            columns,
            1 if len(states) == 1 else LEAST_STATES,
            by_column,
            shift is not None,
        )


# By addresses, which stay while a model is served; nothing is wrong with a table of factors that are gone.
@lru_cache(maxsize=256)
def _tables(blocks: tuple[tuple[int, ...], ...], rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    sizes = [block[1] for block in blocks]
    places = accumulate(sizes, initial=0)
    table = torch.tensor([(*block, place) for block, place in zip(blocks, places, strict=False)], dtype=torch.int64)
    counts = torch.tensor([-(-size // rows) for size in sizes])
    block = torch.arange(len(sizes)).repeat_interleave(counts)
    program = torch.arange(len(block)) - (counts.cumsum(0) - counts)[block]
    return table.to(device), torch.stack([block, program * rows], dim=1).to(device)
