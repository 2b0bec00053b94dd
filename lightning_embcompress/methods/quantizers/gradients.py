"""Gradients of what is rounded, or read as a whole where gradients are sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lightning_embcompress.methods.quantizers.integer_quantizer import narrowed


class _SparseGradient(torch.autograd.Function):
    """A tensor as it is; its gradient is a sparse one with all rows, which optimizers of sparse gradients take."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor) -> Tensor:
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        values = gradients[0].contiguous()
        rows = torch.arange(len(values), device=values.device).unsqueeze(0)
        return torch.sparse_coo_tensor(rows, values, values.shape, check_invariants=False, is_coalesced=True)


def with_sparse_gradient(factor: Tensor) -> Tensor:
    """A tensor as it is, with a sparse gradient that has all of its rows."""
    return cast(Tensor, _SparseGradient.apply(factor))  # type: ignore[no-untyped-call]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return rounded(values.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(values: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function of rounding makes of numbers; the gradient goes straight through (Bengio et al. 2013)."""
    return cast(Tensor, _Straight.apply(values, rounded))  # type: ignore[no-untyped-call]


def rounded_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as they are in a narrower dtype, with the gradient to those that are trained."""
    return straight_through(values, lambda wide: narrowed(wide, dtype).to(wide.dtype))
