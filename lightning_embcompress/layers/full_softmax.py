r"""The cross-entropy of a softmax over a large vocabulary, of logits or of the hidden states that a head reads.

With :math:`\log p_v = z_v - \log \sum_u e^{z_u}` the loss of a target :math:`y` is :math:`-\log p_y`, and its gradient
:math:`\partial / \partial z_v = p_v - [v = y]` needs nothing but the logits. So it is computed with the loss, while a
chunk of logits is in the cache, in float32, and kept in the dtype of the logits. Written with
:func:`torch.nn.functional.cross_entropy`, bfloat16 logits of 2,048 tokens over 50,257 words get three companions in
float32 of 412 MB each, and a CPU spends most of the time of the loss on giving out that memory.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_embcompress.layers import chunked_loss
from lightning_embcompress.layers.chunked_loss import loss_of_head, loss_of_logits
from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.layers.fused_loss import check_shapes, fused_cross_entropy
from lightning_embcompress.layers.objective import Objective
from lightning_embcompress.methods.kernels.choice import uncompiled


class CrossEntropy(Objective):
    """`-log p` of the targets."""

    @override
    def rows(self, scores: Tensor, part: slice, gradient: Tensor | None) -> Tensor:
        ids = self.ids[part].unsqueeze(-1)
        if gradient is None:
            return -torch.log_softmax(scores, -1).gather(-1, ids).T
        torch.softmax(scores, -1, out=gradient)
        # The largest probability is 1 / Σ exp(z - max z): so one exponential of each logit is enough.
        losses = scores.amax(-1) - scores.gather(-1, ids).squeeze(-1) - gradient.amax(-1).log()
        gradient.scatter_add_(-1, ids, gradient.new_full((1, 1), -1.0).expand(len(gradient), 1))
        return losses.unsqueeze(0)

    @override
    def reordered(self, storage_order: Tensor) -> Self:
        made = copy.copy(self)
        # Not by indexing, which takes -1 for the last one.
        made.ids = storage_order.index_select(0, self.ids)
        return made


def full_softmax_loss(logits: Tensor, targets: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy in nats per token and the number of tokens; 0, not NaN, for no tokens.

    Works in float32 (float64 for float64 logits) whatever the dtype of the logits, a chunk of tokens at a time.

    Args:
        logits: Unnormalised scores, floating point, shape ``[*, vocab_size]``.
        targets: Ids of the true tokens, int64, shape ``[*]``; -100 is ignored.
        overwrite: Whether the gradient may be kept in the memory of the logits, which then hold it instead: for logits
            that nobody reads any more.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits), and the number of targets that are not ignored, an
        int64 scalar. It can be differentiated once: a backward pass with ``create_graph=True`` raises a RuntimeError.

    Example:
        >>> import torch
        >>> full_softmax_loss(torch.zeros(1, 2, 4), torch.tensor([[0, -100]]))
        (tensor(1.3863), tensor(1))
    """
    found = loss_of_logits(logits, CrossEntropy(targets), overwrite=overwrite)
    return found.loss, found.num_targets


@uncompiled
def head_softmax_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of a head in nats per token and the number of tokens; 0, not NaN, for no tokens.

    The logits of all tokens are never there at once, see
    :func:`~lightning_embcompress.layers.chunked_loss.loss_of_head`. Of a vocabulary of more than 262,144 words (2^24
    logits for 64 tokens), they are computed tile by tile, see
    :func:`~lightning_embcompress.layers.fused_loss.fused_cross_entropy`, unless `chunk_tokens` is given or the head has
    hooks.

    Args:
        head: A :class:`~lightning_embcompress.layers.compressed.CompressedLinear`, an :class:`torch.nn.Linear`, or any
            module that gives ``[n, vocab_size]`` logits for ``[n, dim]`` hidden states, row by row.
        hidden: What the head reads, floating point, shape ``[*, dim]``.
        targets: Ids of the true tokens, int64, shape ``[*]``; -100 is ignored.
        chunk_tokens: Tokens of a call of the head; None to go by memory.

    Returns:
        As for `full_softmax_loss`.

    Raises:
        ValueError: If the shapes do not fit, ``chunk_tokens`` is not positive, or the head reads tensors that require a
            gradient and are not among its parameters.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(8, 100)
        >>> loss, count = head_softmax_loss(head, torch.zeros(2, 5, 8), torch.randint(100, (2, 5)), chunk_tokens=3)
        >>> loss.backward()
        >>> head.weight.grad.shape, count
        (torch.Size([100, 8]), tensor(10))
    """
    check_shapes(hidden, targets)
    objective = CrossEntropy(targets)
    if chunk_tokens is None and _is_too_wide(head) and chunked_loss.wants_gradients(head, hidden):
        count = objective.scored.sum()
        return fused_cross_entropy(head, hidden, targets, reduction="sum") / count.clamp(min=1), count
    found = loss_of_head(head, hidden, objective, chunk_tokens=chunk_tokens)
    return found.loss, found.num_targets


def _is_too_wide(head: nn.Module) -> bool:
    """Whether the logits of the fewest tokens of a call are too many, but known tile by tile."""
    if not isinstance(head, CompressedLinear | nn.Linear) or type(head) not in (CompressedLinear, nn.Linear):
        return False
    too_many = chunked_loss.LEAST_TOKENS * head.out_features > chunked_loss.MOST_ELEMENTS
    return too_many and not chunked_loss.is_watched(head) and not chunked_loss.is_gathered_by_calls(head)
