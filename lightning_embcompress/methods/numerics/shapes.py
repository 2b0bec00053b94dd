"""Sizes of the modes that rows or columns of a table are folded to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import compute_dtype


@cache
def balanced_shape(size: int, num_modes: int) -> tuple[int, ...]:
    """Sizes of modes that are close to each other and whose product is `size`, or a little more.

    A prime or awkward number (50,257 = 29 · 1,733) has no balanced factors. So the modes may multiply to more, and what
    is beyond `size` is padding: up to a hundredth, where that balances them better.

    Args:
        size: What has to fit.
        num_modes: How many modes.

    Returns:
        The modes, the smallest first.

    Example:
        >>> balanced_shape(50257, 3), balanced_shape(768, 3), balanced_shape(7, 2)
        ((34, 37, 40), (8, 8, 12), (2, 4))
    """
    candidates = [modes for modes in _shapes(size, num_modes, 1) if modes[-1] <= 2 * modes[0] or modes[-1] <= 4]
    # The sum is lowest for equal modes.
    return min(candidates, key=lambda modes: (max(math.prod(modes), 1.01 * size), sum(modes), math.prod(modes)))


def _shapes(size: int, num_modes: int, smallest: int) -> list[tuple[int, ...]]:
    """Ascending modes, the last one just large enough."""
    if num_modes == 1:
        return [(max(size, smallest),)]
    most = math.ceil(size ** (1 / num_modes) + 1e-9)
    # Modes below half of the mean are too far from the largest to be chosen.
    least = max(smallest, most // 2)
    return [
        (first, *rest)
        for first in range(least, max(least, most) + 1)
        for rest in _shapes(-(-size // first), num_modes - 1, first)
    ]


def fold(weight: Tensor, vocab_shape: Sequence[int], dim_shape: Sequence[int]) -> Tensor:
    """A table as a tensor of the modes of its rows and columns, padded with zeros, in the dtype in which it is solved.

    Args:
        weight: `[vocab_size, dim]` table.
        vocab_shape: `I_1 … I_m`, with a product of at least `vocab_size`.
        dim_shape: `J_1 … J_k`, with a product of at least `dim`.

    Returns:
        `[I_1, …, I_m, J_1, …, J_k]` in float32, or float64 for float64.
    """
    padding = (0, math.prod(dim_shape) - weight.shape[1], 0, math.prod(vocab_shape) - weight.shape[0])
    padded = torch.nn.functional.pad(weight.to(compute_dtype(weight.dtype)), padding)
    return padded.reshape(*vocab_shape, *dim_shape)
