"""The kernels of `online_softmax` in Triton: every logit is read once, and what is computed of it stays in registers.

Without Triton the module can be imported, and has nothing in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_embcompress.methods.kernels.choice import TRITON_IS_INSTALLED, current_device_of

if TRITON_IS_INSTALLED:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from triton import language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

    _jit: Callable[[Callable[..., Any]], Any] = triton.jit

    # Logits that a program has in registers, and those that it adds up: many enough for its start to cost little, few
    # enough for a single state to keep a whole GPU busy.
    BLOCK = 2048
    SPAN = 16384

    @_jit
    def partial_log_sum_exp(
        logits: tl.tensor,
        partial: tl.tensor,
        sums: tl.tensor,
        columns: tl.tensor,
        row_stride: tl.tensor,
        column_stride: tl.tensor,
        SPAN: tl.constexpr,
        BLOCK: tl.constexpr,
        ADDS: tl.constexpr,
    ) -> None:
        """The logarithm of the sum of exponentials over a span of a row, and if `ADDS` the sum of the logits."""
        # Of many tokens and a large vocabulary there are more logits than 2^31.
        place = tl.program_id(0).to(tl.int64)
        parts = tl.cdiv(columns, SPAN)
        row, first = place // parts, place % parts * SPAN
        most = -float("inf")
        mass = 0.0
        added = 0.0
        for start in range(0, tl.minimum(SPAN, columns - first), BLOCK):
            column = first + start + tl.arange(0, BLOCK)
            inside = column < columns
            read = tl.load(logits + row * row_stride + column * column_stride, mask=inside, other=-float("inf"))
            z = read.to(tl.float32)
            above = tl.maximum(most, tl.max(z, axis=0))
            # As in torch: infinities are not subtracted from one another.
            base = tl.where(tl.abs(above) == float("inf"), 0.0, above)
            mass = mass * tl.exp(most - base) + tl.sum(tl.exp(z - base), axis=0)
            most = above
            if ADDS:
                added += tl.sum(tl.where(inside, z, 0.0), axis=0)
        base = tl.where(tl.abs(most) == float("inf"), 0.0, most)
        tl.store(partial + place, tl.log(mass) + base)
        if ADDS:
            tl.store(sums + place, added)

    @_jit
    def gradient(
        logits: tl.tensor,
        normalizer: tl.tensor,
        scale: tl.tensor,
        target: tl.tensor,
        at_target: tl.tensor,
        uniform: tl.tensor,
        columns: tl.tensor,
        row_stride: tl.tensor,
        column_stride: tl.tensor,
        BLOCK: tl.constexpr,
    ) -> None:
        """The gradient at a part of a row of logits, in place."""
        place = tl.program_id(0).to(tl.int64)
        parts = tl.cdiv(columns, BLOCK)
        row = place // parts
        column = place % parts * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        pointers = logits + row * row_stride + column * column_stride
        z = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        value = tl.exp(z - tl.load(normalizer + row)) - uniform
        value = tl.where(column == tl.load(target + row), value - at_target, value) * tl.load(scale + row)
        tl.store(pointers, value.to(logits.dtype.element_ty), mask=inside)


def add_log_sum_exp(normalizer: Tensor, logits: Tensor, total: Tensor | None = None) -> None:
    """See `online_softmax.add_log_sum_exp`; the normalizers are float32."""
    tokens, size = logits.shape
    parts = -(-size // SPAN)
    if not tokens or not size:
        return
    partial = normalizer.new_empty(tokens, parts)
    sums = partial if total is None else torch.empty_like(partial)
    with current_device_of(logits):
        partial_log_sum_exp[(tokens * parts,)](
            logits, partial, sums, size, *logits.stride(), SPAN, BLOCK, total is not None
        )
    torch.logaddexp(normalizer, partial.logsumexp(dim=1), out=normalizer)
    if total is not None:
        total += sums.sum(dim=1)


def softmax_gradient(
    logits: Tensor,
    normalizer: Tensor,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    at_target: float = 1.0,
    uniform: float = 0.0,
) -> None:
    """See `online_softmax.softmax_gradient`; normalizers and scales are float32."""
    tokens, size = logits.shape
    parts = -(-size // BLOCK)
    if not tokens or not size:
        return
    target = columns.new_full((tokens,), -1)
    target[rows] = columns
    with current_device_of(logits):
        gradient[(tokens * parts,)](
            logits,
            normalizer.contiguous(),
            scale.contiguous(),
            target,
            float(at_target),
            float(uniform),
            size,
            *logits.stride(),
            BLOCK,
        )
