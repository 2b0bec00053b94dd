"""The logits of a few states by all blocks of a table at once.

Of one state the product with a block is over before the next one is launched: of twenty blocks most of the time goes
into launches. In Triton one launch multiplies all blocks, wherever in memory they are, and writes into one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_embcompress.methods.kernels.choice import takes_triton

MOST_STATES = 16
"""Of more states a product with a block keeps a GPU busy by itself."""


class Block(NamedTuple):
    """A block of rows, and the states that it is multiplied with.

    Attributes:
        factor: `[size, rank]`.
        first: The column of the states where its `rank` ones begin.
    """

    factor: Tensor
    first: int


def multiplies_at_once(hidden: Tensor, factors: Sequence[object]) -> bool:
    """Whether one kernel is to multiply all factors: few states, no gradient, and plain matrices of one layout.

    Args:
        hidden: `[*, dim]` what the states are computed from.
        factors: Of all blocks.

    Raises:
        ValueError: If the environment variable that chooses between kernels has another value.
        ModuleNotFoundError: If it asks for Triton, which is not installed.

    Example:
        >>> multiplies_at_once(torch.zeros(1, 4), [torch.zeros(9, 4)])
        False
    """
    if not takes_triton(hidden) or not 1 <= hidden.numel() // max(1, hidden.shape[-1]) <= MOST_STATES:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled(hidden.device.type):
        return False
    plain = [factor for factor in factors if isinstance(factor, Tensor)]
    if len(plain) < len(factors) or any((one.dtype, one.device) != (hidden.dtype, hidden.device) for one in plain):
        return False
    return _layout(plain) is not None


def _layout(factors: Sequence[Tensor]) -> bool | None:
    """Whether factors are laid out column by column; None if some are and others are not."""
    if all(factor.stride(1) == 1 or factor.shape[1] <= 1 for factor in factors):
        return False
    return True if all(factor.stride(0) == 1 or factor.shape[0] <= 1 for factor in factors) else None


def block_products(states: Tensor, blocks: Sequence[Block], shift: Tensor | None = None) -> Tensor:
    """Products of states with all blocks, side by side.

    Args:
        states: `[*, columns]`.
        blocks: Some that `multiplies_at_once` says can be multiplied by one kernel.
        shift: `[*, blocks]` what is added to all logits of a block.

    Returns:
        `[*, Σ size]` in the dtype of the states, added up in float32.
    """
    from lightning_embcompress.methods.kernels import triton_block_head

    flat = states.reshape(math.prod(states.shape[:-1]), states.shape[-1])
    sizes = [factor.shape[0] for factor, _ in blocks]
    out = flat.new_empty(len(flat), sum(sizes))
    by_column = bool(_layout([factor for factor, _ in blocks]))
    table = tuple(
        (factor.data_ptr(), *factor.shape, factor.stride(1 if by_column else 0), first) for factor, first in blocks
    )
    constants = None if shift is None else shift.reshape(len(flat), -1)
    triton_block_head.block_products(flat, table, by_column, constants, out)
    return out.view(*states.shape[:-1], out.shape[1])
