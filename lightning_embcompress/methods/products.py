"""Tables that are a product of coefficients and a basis, in few bits: balanced, or rounded with error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.balance import balanced_factors
from lightning_embcompress.methods.numerics.error_feedback import quantize_factors
from lightning_embcompress.methods.numerics.metric import Metric


@torch.no_grad()
def balance_product(coefficients: Sequence[Tensor], basis: Tensor) -> None:
    """Balance coefficients of blocks and the basis of which they read the leading rows, in place.

    Args:
        coefficients: `[n_b, rank_b]` of every block.
        basis: `[rank, dim]`.
    """
    if not basis.numel() or basis.is_meta:
        return
    moved, turned = balanced_factors([own.detach() for own in coefficients], basis.detach())
    for own, values in zip(coefficients, moved, strict=True):
        own.copy_(values)
    basis.copy_(turned)


def store_product(
    packed: Sequence[Any], basis: Any, coefficients: Sequence[Tensor], numbers: Tensor, metric: Metric | None, rows: Any
) -> None:
    """Fill a packed product of coefficients and a basis with what loses least, see `numerics.error_feedback`.

    Args:
        packed: `PackedFactor` of the coefficients of every block.
        basis: `PackedFactor` of the basis, of which all blocks read the leading rows.
        coefficients: `[n_b, rank_b]` of every block.
        numbers: `[rank, dim]` basis.
        metric: What an error costs; None where all directions and rows count the same.
        rows: For every block, which rows of the table it has.
    """
    of, shared = packed[0].storage, basis.storage
    found = quantize_factors(
        [own.detach() for own in coefficients],
        numbers.detach(),
        None if metric is None else metric.matrix,
        None if metric is None else [metric.weights[ids.cpu()] for ids in rows],
        bits=of.bits,
        basis_bits=shared.bits,
        group_size=of.group_size,
        scale_dtype=of.scales,
    )
    for factor, codes, scales in zip(packed, found.codes, found.scales, strict=True):
        factor.keep_codes(codes, scales)
    basis.keep_codes(found.basis_codes, found.basis_scales)
