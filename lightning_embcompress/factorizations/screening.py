r"""Products of a few states with a factor in integers of 8 bits, and how far they may be off: to find the largest fast.

With :math:`\hat u_i` for a row :math:`u_i` in 8 bits, the Cauchy-Schwarz inequality bounds the error of a product,
:math:`|h \cdot u_i - h \cdot \hat u_i| \le \|h\| \, \|u_i - \hat u_i\|`. So rows whose rounded product lies further
below the largest than the bounds of both are not among the largest, and only the others are multiplied as they are.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_embcompress.factorizations.repacked_product import Repacked, can_repack, repacked_product
from lightning_embcompress.solvers.gram import row_chunks

# Of a row's norm, what products in float32 may be off beside.
_ROUNDING = 1e-5
# Rows and columns of a factor that are compared to see whether it has changed.
_SEEN_ROWS, _SEEN_COLUMNS = 64, 4


class Screen(NamedTuple):
    """A factor in 8 bits.

    Attributes:
        version: Of the factor, from which it was made.
        seen: Some of its numbers, as writing to `factor.data`, or a step of a fused optimizer, is in no version.
        integers: Its rows, each with a scale; None if they have no columns.
        errors: `[n]` float32, the norm of what every row lost, and of what products may lose beside.
    """

    version: tuple[int, int]
    seen: Tensor
    integers: Repacked | None
    errors: Tensor

    def products(self, states: Tensor) -> Tensor:
        """`[m, n]` float32 products with `[m, columns]` states, each off by at most the state's norm times `errors`."""
        if self.integers is None:
            return self.errors.new_zeros(len(states), len(self.errors))
        return repacked_product(states, self.integers)


_kept: MutableMapping[Tensor, Screen] = WeakTensorKeyDictionary()


def can_screen(factor: Tensor) -> bool:
    """Whether there are fast products of bytes for it, whose bounds hold for those in its own dtype.

    Not for what is computed anew for every call, and not for tensors of `torch.inference_mode`, whose changes nobody
    counts.
    """
    is_kept = isinstance(factor, nn.Parameter) and not factor.is_inference()
    return is_kept and factor.device.type == "cpu" and factor.dtype == torch.float32 and can_repack()


@torch.no_grad()
def screen_of(factor: Tensor) -> Screen:
    """The 8-bit form of a factor, a quarter of its bytes in float32: made once, and again when the factor has changed.

    It is kept as long as the factor is, and is part of no module, file or copy.
    """
    version = factor._version, factor.data_ptr()
    known = _kept.get(factor)
    if known is not None and known.version == version and torch.equal(known.seen, _seen(factor)):
        return known
    with torch.inference_mode(mode=False):
        integers = torch.empty_like(factor, dtype=torch.int8, memory_format=torch.contiguous_format)
        scales, errors = (factor.new_empty(len(factor)) for _ in range(2))
        for chunk in row_chunks(*factor.shape):
            rows = factor.detach()[chunk].float()
            scales[chunk] = rows.abs().amax(dim=1) / 127 if rows.numel() else 0.0
            rounded = (rows / scales[chunk].clamp(min=1e-30).unsqueeze(1)).round_()
            integers[chunk] = rounded.to(torch.int8)
            lost = (rounded.mul_(scales[chunk].unsqueeze(1)) - rows).norm(dim=1)
            errors[chunk] = lost + _ROUNDING * rows.norm(dim=1)
        has_columns = factor.numel() > 0
        packed = Repacked((), [torch.ops.onednn.qlinear_prepack(integers, None)], [scales]) if has_columns else None
        seen = _seen(factor).clone()
    made = Screen(version, seen, packed, errors)
    _kept[factor] = made
    return made


def forget_screen(factor: Tensor) -> None:
    """Give the memory of its 8-bit form back, if there is one."""
    _kept.pop(factor, None)


def _seen(factor: Tensor) -> Tensor:
    rows, columns = factor.shape
    return factor.detach()[:: max(1, rows // _SEEN_ROWS), :: max(1, columns // _SEEN_COLUMNS)]
