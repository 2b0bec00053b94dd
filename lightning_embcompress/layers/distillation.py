r"""Distillation over large vocabularies: what a teacher says of few tokens, and the loss of a student, chunk by chunk.

At temperature `T` teacher and student have the distributions :math:`p = \mathrm{softmax}(t / T)` and
:math:`q = \mathrm{softmax}(z / T)`. Of the teacher only its `k` likeliest tokens are kept, and the mass
:math:`P = \sum_{v \notin K} p_v` of all others together, so that it takes `k` numbers a target and not `V`. The loss is
the divergence of these `k + 1` events, times :math:`T^2`, so that its gradient is of the same size at every temperature
(Hinton et al. 2015):

.. math:: L = T^2 \Big( \sum_{v \in K} p_v \log \frac{p_v}{q_v} + P \log \frac{P}{Q} \Big),
    \qquad Q = \sum_{v \notin K} q_v .

It is never more than the divergence over all tokens, and the same where `q` divides `Q` as the teacher divides `P`. Its
gradient needs nothing but the student's logits, like that of the cross-entropy, and both are computed together while a
chunk of them is in the cache:

.. math:: \frac{\partial L}{\partial z_v} = T (q_v - p_v) \text{ for } v \in K,
    \qquad T \, q_v (1 - P / Q) \text{ for the others.}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_embcompress.layers.head_loss import head_loss_sum, kept_order, kept_targets
from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX

# 2^20 float32 logits = 4 MiB; the loss needs three such buffers, which stay in the cache.
_CHUNK_ELEMENTS = 2**20


class TeacherScores(NamedTuple):
    """What a teacher says of `N` positions.

    Attributes:
        scores: Log-probabilities at the temperature of the likeliest tokens, ``[N, k]``, float32 at least; where all
            tokens are kept, the teacher's logits, ``[N, vocab_size]``, as they are.
        ids: Of the likeliest tokens, ``[N, k]``, int64; None where all are kept.
        log_rest: Logarithm of the mass of all other tokens, ``[N]``; None where all are kept.
    """

    scores: Tensor
    ids: Tensor | None = None
    log_rest: Tensor | None = None


class DistilledLoss(NamedTuple):
    """A loss and its parts, means over targets in nats.

    Attributes:
        loss: The weighted sum, with its gradient.
        cross_entropy: Without gradient and weight.
        distillation: Without gradient and weight.
        num_targets: Int64.
    """

    loss: Tensor
    cross_entropy: Tensor
    distillation: Tensor
    num_targets: Tensor


@torch.no_grad()
def teacher_scores(logits: Tensor, top_k: int | None = None, temperature: float = 1.0) -> TeacherScores:
    """Reduce a teacher's logits to what is kept of them.

    Args:
        logits: ``[*, vocab_size]``.
        top_k: How many of the likeliest tokens of each position are kept; None, or as many as there are, for all, which
            keeps the logits themselves.
        temperature: What logits are divided by; above 0.

    Returns:
        The scores of all positions, one after the other.

    Raises:
        ValueError: If `top_k` or `temperature` is out of its range.

    Example:
        >>> scores = teacher_scores(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), top_k=1)
        >>> scores.scores.exp(), scores.log_rest.exp()
        (tensor([[0.2500]]), tensor([0.7500]))
    """
    check_distillation(top_k, temperature)
    flat = logits.flatten(0, -2)
    if top_k is None or top_k >= flat.shape[-1]:
        return TeacherScores(flat)
    dtype = compute_dtype(flat.dtype)
    scores = torch.empty(len(flat), top_k, dtype=dtype, device=flat.device)
    ids = torch.empty(len(flat), top_k, dtype=torch.long, device=flat.device)
    log_rest = torch.empty(len(flat), dtype=dtype, device=flat.device)
    rows = _rows(flat)
    for start in range(0, len(flat), rows):
        part = slice(start, start + rows)
        values = flat[part].to(dtype)
        values = values if temperature == 1 else values / temperature
        chances, normalizer = _softmax(values)
        torch.topk(values, top_k, out=(scores[part], ids[part]))
        scores[part] -= normalizer.unsqueeze(-1)
        log_rest[part] = chances.scatter_(-1, ids[part], 0.0).sum(-1).log()
    return TeacherScores(scores, ids, log_rest)


def joined_scores(parts: Sequence[TeacherScores]) -> TeacherScores:
    """What a teacher says of some positions, and of those after them.

    Args:
        parts: At least one.

    Example:
        >>> scores = teacher_scores(torch.zeros(2, 4), top_k=1)
        >>> joined_scores([scores, scores]).scores.shape
        torch.Size([4, 1])
    """
    scores, ids, log_rest = ([one for one in column if one is not None] for column in zip(*parts, strict=True))
    return TeacherScores(torch.cat(scores), *(torch.cat(one) if one else None for one in (ids, log_rest)))


def check_distillation(top_k: int | None, temperature: float) -> None:
    """Refuse what is out of range.

    Raises:
        ValueError: Naming the argument.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"teacher_top_k={top_k} must be at least 1; None keeps all of the teacher's logits.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be above 0 and finite; 1 leaves the logits as they are.")


def distilled_loss(
    logits: Tensor,
    targets: Tensor,
    teacher: TeacherScores,
    temperature: float = 1.0,
    cross_entropy_weight: float = 1.0,
    distillation_weight: float = 1.0,
    *,
    overwrite: bool = False,
) -> DistilledLoss:
    """Return the weighted sum of cross-entropy and distillation, in nats per token (formula at the top of this module).

    Works in float32 (float64 for float64 logits), a chunk of positions at a time. With no target at all everything is
    0, with gradients of zero.

    Args:
        logits: The student's, ``[*, vocab_size]``.
        targets: Ids of the true tokens, int64, ``[*]``; where they are -100 nothing is learnt from the teacher either.
        teacher: What the teacher says of the same positions, at the same temperature.
        temperature: What logits are divided by.
        cross_entropy_weight: Of the cross-entropy.
        distillation_weight: Of the divergence from the teacher.
        overwrite: Whether the gradient may be kept in the memory of the logits, which then hold it instead: for logits
            that nobody reads any more.

    Raises:
        ValueError: If the teacher has scored another number of positions or tokens.

    Example:
        >>> student, targets = torch.zeros(1, 3, 8, requires_grad=True), torch.tensor([[1, 2, -100]])
        >>> result = distilled_loss(student, targets, teacher_scores(torch.zeros(1, 3, 8), top_k=4))
        >>> round(result.cross_entropy.item(), 4), abs(round(result.distillation.item(), 4)), result.num_targets.item()
        (2.0794, 0.0, 2)
    """
    flat_logits, flat_targets = logits.flatten(0, -2), targets.flatten()
    _check_fit(teacher, len(flat_logits), flat_logits.shape[-1], flat_targets)
    function: Any = _DistilledLoss
    weights = (temperature, cross_entropy_weight, distillation_weight)
    total, cross_entropy, divergence = function.apply(flat_logits, flat_targets, teacher, weights, overwrite)
    return _means(total, cross_entropy, divergence, flat_targets)


def distilled_head_loss(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    teacher: TeacherScores,
    temperature: float = 1.0,
    cross_entropy_weight: float = 1.0,
    distillation_weight: float = 1.0,
    *,
    chunk_tokens: int | None = None,
) -> DistilledLoss:
    """`distilled_loss` of the logits that a head gives, which are never there at once.

    Args:
        head: Gives ``[n, vocab_size]`` logits for ``[n, dim]`` hidden states, see
            :func:`~lightning_embcompress.layers.head_loss.head_softmax_loss`.
        hidden: What the head reads, ``[*, dim]``; it or the head must require a gradient.
        targets: See `distilled_loss`, as for everything below.
        teacher: Of the same positions.
        temperature: Of both.
        cross_entropy_weight: Of the cross-entropy.
        distillation_weight: Of the divergence from the teacher.
        chunk_tokens: Positions of a call of the head; None to go by memory.

    Raises:
        ValueError: If the teacher has scored another number of positions or tokens.

    Example:
        >>> head, targets = torch.nn.Linear(4, 8), torch.tensor([[1, 2, -100]])
        >>> result = distilled_head_loss(head, torch.zeros(1, 3, 4), targets, teacher_scores(torch.zeros(1, 3, 8), 4))
        >>> result.loss.requires_grad
        True
    """
    flat, ids = hidden.flatten(0, -2), targets.flatten()
    # All logits of a teacher are in the order of ids.
    storage_order = None if teacher.ids is None else kept_order(head)
    if storage_order is not None and teacher.ids is not None:
        ids = kept_targets(ids, storage_order)
        teacher = teacher._replace(ids=storage_order[teacher.ids])
    parts: list[tuple[Tensor, Tensor]] = []

    def summed(logits: Tensor, part: slice, gradient: Tensor) -> Tensor:
        _check_fit(teacher, len(flat), logits.shape[-1], ids)
        weights = (temperature, cross_entropy_weight, distillation_weight)
        total, *terms = summed_distilled_loss(logits, ids[part], _part(teacher, part), *weights, gradient)
        parts.append((terms[0], terms[1]))
        return total

    total = head_loss_sum(head, flat, summed, chunk_tokens, as_kept=storage_order is not None)
    cross_entropy, divergence = (torch.stack(terms).sum() for terms in zip(*parts, strict=True))
    return _means(total, cross_entropy, divergence, ids)


def _check_fit(teacher: TeacherScores, positions: int, tokens: int, targets: Tensor) -> None:
    found = (len(teacher.scores), teacher.scores.shape[-1] if teacher.ids is None else tokens)
    if found != (positions, tokens) or len(targets) != positions:
        raise ValueError(
            f"The teacher has scored {found[0]} positions over {found[1]} tokens, but the model {positions} over"
            f" {tokens}, with {len(targets)} targets: they must be of the same batch and the same vocabulary."
        )


def _means(total: Tensor, cross_entropy: Tensor, divergence: Tensor, targets: Tensor) -> DistilledLoss:
    count = targets.ne(IGNORE_INDEX).sum()
    number = count.clamp(min=1)
    return DistilledLoss(total / number, cross_entropy / number, divergence / number, count)


def _part(teacher: TeacherScores, part: slice) -> TeacherScores:
    return TeacherScores(*(None if one is None else one[part] for one in teacher))  # type: ignore[arg-type]


class _DistilledLoss(torch.autograd.Function):
    """Sums over all targets; the gradient is computed in `forward`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        teacher: TeacherScores,
        weights: tuple[float, float, float],
        overwrite: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Not scaled yet, small probabilities would be zero in float16.
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        overwrite = overwrite and kept == logits.dtype
        # The same memory, with the same count of changes: autograd raises where an overwritten tensor is needed.
        gradient = logits.detach() if overwrite else torch.empty_like(logits, dtype=kept)
        total, cross_entropy, divergence = summed_distilled_loss(logits.detach(), targets, teacher, *weights, gradient)
        ctx.save_for_backward(gradient)
        ctx.overwrite, ctx.dtype = overwrite, logits.dtype
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return total, cross_entropy, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient.mul_(scale) if ctx.overwrite else (gradient * scale).to(ctx.dtype)
        return scaled, None, None, None, None


def summed_distilled_loss(
    logits: Tensor,
    targets: Tensor,
    teacher: TeacherScores,
    temperature: float,
    cross_entropy_weight: float,
    distillation_weight: float,
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the sums over all targets of the loss and its parts, and the gradient of the first at the logits.

    Args:
        logits: ``[N, vocab_size]``, without a graph.
        targets: Int64, ``[N]``; -100 is ignored.
        teacher: See `distilled_loss`, as for the weights.
        temperature: Of both.
        cross_entropy_weight: Of the cross-entropy.
        distillation_weight: Of the divergence.
        gradient: ``[N, vocab_size]``, is written over; it may be the logits themselves.

    Returns:
        The weighted sum, the cross-entropy and the divergence, float32 scalars (float64 for float64 logits).
    """
    scored = targets.ne(IGNORE_INDEX)
    # Any valid id does for the ignored targets, whose loss and gradient are dropped.
    ids = torch.where(scored, targets, 0).unsqueeze(-1)
    dtype = compute_dtype(logits.dtype)
    losses = torch.zeros(2, len(logits), dtype=dtype, device=logits.device)
    pull = distillation_weight * temperature
    with torch.autocast(logits.device.type, enabled=False):
        rows = _rows(logits)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            scores = logits[part].to(dtype)
            chances, normalizer = _softmax(scores)
            losses[0, part] = normalizer - scores.gather(-1, ids[part]).squeeze(-1)
            if temperature == 1:
                tempered, normalizer_of_tempered = chances, normalizer
            else:
                scores = scores / temperature
                tempered, normalizer_of_tempered = _softmax(scores)
            said = _part(teacher, part)
            if said.ids is None or said.log_rest is None:
                theirs = said.scores.to(dtype) / temperature
                expected, normalizer_of_theirs = _softmax(theirs)
                # A token that is impossible for both adds nothing, and its infinite logits no NaN.
                difference = torch.where(expected > 0, theirs - scores, 0.0).mul_(expected).sum(-1)
                losses[1, part] = difference + normalizer_of_tempered - normalizer_of_theirs
                values = chances * cross_entropy_weight
                values.add_(tempered, alpha=pull).sub_(expected, alpha=pull)
            else:
                log_kept, log_rest = said.scores.to(dtype), said.log_rest.to(dtype)
                kept, own = log_kept.exp(), tempered.gather(-1, said.ids)
                log_own = scores.gather(-1, said.ids) - normalizer_of_tempered.unsqueeze(-1)
                # Taken out, so that the rest is summed and not what is left of 1, which would be rounding.
                rest = tempered.scatter_(-1, said.ids, 0.0).sum(-1).clamp_(min=torch.finfo(dtype).tiny).log_()
                losses[1, part] = torch.where(kept > 0, kept * (log_kept - log_own), 0.0).sum(-1)
                losses[1, part] += torch.where(log_rest > -math.inf, log_rest.exp() * (log_rest - rest), 0.0)
                factor = ((1 - (log_rest - rest).exp()) * pull).unsqueeze(-1)
                correction = (own - kept) * pull
                if temperature == 1:
                    values = chances.mul_(factor + cross_entropy_weight)
                    correction += own * cross_entropy_weight
                else:
                    values = chances.mul_(cross_entropy_weight).addcmul_(tempered, factor)
                values.scatter_add_(-1, said.ids, correction)
            values.scatter_add_(-1, ids[part], values.new_full((1, 1), -cross_entropy_weight).expand(len(values), 1))
            gradient[part] = values
    # Not a product: an infinite logit in an ignored row must not become NaN.
    gradient.index_fill_(0, scored.logical_not().nonzero().flatten(), 0.0)
    cross_entropy, divergence = losses.masked_fill_(~scored, 0.0).sum(-1)
    divergence = divergence * temperature**2
    return cross_entropy_weight * cross_entropy + distillation_weight * divergence, cross_entropy.clone(), divergence


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and the logarithm of what `exp(scores)` was divided by."""
    values = torch.softmax(scores, -1)
    # The largest probability is 1 / Σ exp(z - max z): so one exponential of each logit is enough.
    return values, scores.amax(-1) - values.amax(-1).log()


def _rows(logits: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // max(1, logits.shape[-1]))
