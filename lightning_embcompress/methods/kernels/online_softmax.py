r"""The two passes of a softmax cross-entropy over logits that come a tile of the vocabulary at a time.

The normalizer :math:`\log Z = \log \sum_v e^{z_v}` is added up tile by tile (Milakov and Gimelshein 2018, arXiv
1805.02867); with it the gradient of a tile's logits follows from these alone. In torch each takes several passes over
the tile, and a copy of one in 16 bits; in Triton one pass, and no memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcompress.methods.kernels.choice import takes_triton


def add_log_sum_exp(normalizer: Tensor, logits: Tensor, total: Tensor | None = None) -> None:
    r"""Add a tile of logits to the normalizers, in place.

    .. math:: \log Z_n \leftarrow \log\Big(Z_n + \sum_v e^{z_{nv}}\Big)

    Args:
        normalizer: `[N]` logarithms of the sums so far, `-inf` to begin with; of the dtype to add up in, which is
            float32, or float64 for float64 logits.
        logits: `[N, T]`.
        total: `[N]` sums of the logits so far, to be added to as well, in the same dtype.

    Example:
        >>> logits = torch.randn(3, 10)
        >>> normalizer = torch.full((3,), -torch.inf)
        >>> for tile in logits.split(4, dim=1):
        ...     add_log_sum_exp(normalizer, tile)
        >>> torch.testing.assert_close(normalizer, logits.logsumexp(dim=1))
    """
    if takes_triton(logits):
        from lightning_embcompress.methods.kernels import triton_softmax

        triton_softmax.add_log_sum_exp(normalizer, logits, total)
        return
    wide = logits.to(normalizer.dtype)
    if total is not None:
        total += wide.sum(dim=1)
    torch.logaddexp(normalizer, torch.logsumexp(wide, dim=1), out=normalizer)


def softmax_gradient(
    logits: Tensor,
    normalizer: Tensor,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    at_target: float = 1.0,
    uniform: float = 0.0,
) -> Tensor:
    r"""Gradient of losses at a tile of logits.

    .. math:: g_n \Big(e^{z_{nv} - \log Z_n} - u - t\, [v = y_n]\Big)

    It is computed in the dtype of the normalizers, that of the target too, where what a probability misses to 1 would
    be lost in 16 bits.

    Args:
        logits: `[N, T]`; they are written over.
        normalizer: `[N]`, of all tiles.
        scale: `[N]`, the gradients `g` of the losses.
        rows: `[m]` the tokens whose targets are in this tile, none of them twice.
        columns: `[m]` where in the tile they are.
        at_target: `t`, the mass of a target.
        uniform: `u`, what of the mass every other token has as well.

    Returns:
        `[N, T]` in the dtype of the logits, in their memory.

    Example:
        >>> logits, targets = torch.randn(3, 10), torch.tensor([1, 7, 7])
        >>> normalizer, expected = logits.logsumexp(dim=1), logits.softmax(dim=1) - torch.eye(10)[targets]
        >>> found = softmax_gradient(logits, normalizer, torch.ones(3), torch.arange(3), targets)
        >>> torch.testing.assert_close(found, expected)
    """
    if takes_triton(logits):
        from lightning_embcompress.methods.kernels import triton_softmax

        triton_softmax.softmax_gradient(logits, normalizer, scale, rows, columns, at_target, uniform)
        return logits
    values = logits.to(normalizer.dtype).sub_(normalizer.unsqueeze(1)).exp_()
    if uniform:
        values -= uniform
    values[rows, columns] -= at_target
    values *= scale.unsqueeze(1)
    return values if values.dtype == logits.dtype else logits.copy_(values)
