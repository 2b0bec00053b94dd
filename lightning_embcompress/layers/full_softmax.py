r"""The full softmax loss over large vocabularies, a few tokens at a time.

With :math:`\log p_v = z_v - \log \sum_u e^{z_u}` the loss of a target :math:`y` is :math:`-\log p_y`, and its gradient
:math:`\partial / \partial z_v = p_v - [v = y]` needs nothing but the logits. So it is computed with the loss, while a
chunk of logits is in the cache, in float32, and kept in the dtype of the logits. Written with
:func:`torch.nn.functional.cross_entropy`, bfloat16 logits of 2,048 tokens over 50,257 words get three companions in
float32 of 412 MB each, and a CPU spends most of the time of the loss on giving out that memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX

# 2^21 float32 logits = 8 MiB: they stay in the cache, and the allocator has room for them without asking the system.
_CHUNK_ELEMENTS = 2**21


def full_softmax_loss(logits: Tensor, targets: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy in nats per token and the number of tokens; 0, not NaN, for no tokens.

    Works in float32 (float64 for float64 logits) whatever the dtype of the logits, a chunk of tokens at a time. Without
    gradients every chunk goes through :func:`torch.nn.functional.cross_entropy`, by which others recognise a loss.

    Args:
        logits: Unnormalised scores, floating point, shape ``[*, vocab_size]``.
        targets: Ids of the true tokens, int64, shape ``[*]``; -100 is ignored.
        overwrite: Whether the gradient may be kept in the memory of the logits, which then hold it instead: for logits
            that nobody reads any more.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits), and the number of targets that are not ignored, an
        int64 scalar.

    Example:
        >>> import torch
        >>> full_softmax_loss(torch.zeros(1, 2, 4), torch.tensor([[0, -100]]))
        (tensor(1.3863), tensor(1))
    """
    flat_logits, flat_targets = logits.flatten(0, -2), targets.flatten()
    count = flat_targets.ne(IGNORE_INDEX).sum()
    if torch.is_grad_enabled() and logits.requires_grad:
        function: Any = _SummedLoss
        total: Tensor = function.apply(flat_logits, flat_targets, overwrite)
    else:
        total = torch.zeros((), dtype=compute_dtype(logits.dtype), device=logits.device)
        rows = _rows(flat_logits)
        for chunk, ids in zip(torch.split(flat_logits, rows), torch.split(flat_targets, rows), strict=True):
            mean = F.cross_entropy(chunk.to(total.dtype), ids, ignore_index=IGNORE_INDEX)
            chunk_count = ids.ne(IGNORE_INDEX).sum()
            total += torch.where(chunk_count > 0, mean * chunk_count, 0.0)
    return total / count.clamp(min=1), count


class _SummedLoss(torch.autograd.Function):
    """Sum of the losses of all targets; the gradient is computed in `forward`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, overwrite: bool) -> Tensor:
        # Not scaled yet, small probabilities would be zero in float16.
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        overwrite = overwrite and kept == logits.dtype
        # The same memory, with the same count of changes: autograd raises where an overwritten tensor is needed.
        gradient = logits.detach() if overwrite else torch.empty_like(logits, dtype=kept)
        loss = summed_loss(logits.detach(), targets, gradient)
        ctx.save_for_backward(gradient)
        ctx.overwrite, ctx.dtype = overwrite, logits.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place it counts as a change too: a second backward pass raises.
        scaled = gradient.mul_(scale) if ctx.overwrite else (gradient * scale).to(ctx.dtype)
        return scaled, None, None


def summed_loss(logits: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
    """Compute the sum of the losses of all targets, and its gradient at the logits.

    Args:
        logits: ``[N, vocab_size]``, without a graph.
        targets: Int64, shape ``[N]``; -100 is ignored.
        gradient: ``[N, vocab_size]``, is written over; it may be the logits themselves.

    Returns:
        A float32 scalar (float64 for float64 logits).
    """
    scored = targets.ne(IGNORE_INDEX)
    # Any valid id does for the ignored targets, whose loss and gradient are dropped.
    ids = torch.where(scored, targets, 0).unsqueeze(-1)
    rows, dtype = _rows(logits), compute_dtype(logits.dtype)
    shape = (min(rows, len(logits)), logits.shape[-1])
    wide = logits if logits.dtype == dtype else logits.new_empty(shape, dtype=dtype)
    # A kernel must not write over what it reads.
    apart = gradient.dtype == dtype and gradient.data_ptr() != logits.data_ptr()
    buffer = gradient if apart else logits.new_empty(shape, dtype=dtype)
    losses = torch.empty(len(logits), dtype=dtype, device=logits.device)
    # Autocast would only copy what is float32 already.
    with torch.autocast(logits.device.type, enabled=False):
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            chunk = ids[part]
            scores = logits[part] if wide is logits else wide[: len(chunk)].copy_(logits[part])
            values = gradient[part] if apart else buffer[: len(chunk)]
            torch.softmax(scores, -1, out=values)
            # The largest probability is 1 / Σ exp(z - max z): so one exponential of each logit is enough.
            losses[part] = scores.amax(-1) - scores.gather(-1, chunk).squeeze(-1) - values.amax(-1).log()
            values.scatter_add_(-1, chunk, values.new_full((1, 1), -1.0).expand(len(values), 1))
            if not apart:
                gradient[part] = values
    # Not a product: an infinite logit in an ignored row must not become NaN.
    gradient.index_fill_(0, scored.logical_not().nonzero().flatten(), 0.0)
    return torch.where(scored, losses, 0.0).sum()


def _rows(logits: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // max(1, logits.shape[-1]))
