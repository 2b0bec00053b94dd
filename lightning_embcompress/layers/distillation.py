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

import copy
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_embcompress.layers.objective import Objective, rows_of_chunk
from lightning_embcompress.methods.numerics.gram import compute_dtype


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
    rows = rows_of_chunk(flat, Distillation.chunk_elements)
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


class Distillation(Objective):
    """Cross-entropy and distillation (formula at the top of this module), the two terms of a weighted sum.

    Give it to :func:`~lightning_embcompress.layers.chunked_loss.loss_of_head`, or to
    :func:`~lightning_embcompress.layers.chunked_loss.loss_of_logits`.

    Args:
        targets: Ids of the true tokens, int64, ``[*]``; where they are -100 nothing is learnt from the teacher either.
        teacher: What the teacher says of the same positions, at the same temperature.
        temperature: What logits are divided by.
        cross_entropy_weight: Of the cross-entropy.
        distillation_weight: Of the divergence from the teacher.

    Raises:
        ValueError: If the loss is computed and the teacher has scored another number of positions or tokens.

    Example:
        >>> from lightning_embcompress.layers.chunked_loss import loss_of_head
        >>> head, targets = torch.nn.Linear(4, 8), torch.tensor([[1, 2, -100]])
        >>> objective = Distillation(targets, teacher_scores(torch.zeros(1, 3, 8), top_k=4))
        >>> found = loss_of_head(head, torch.zeros(1, 3, 4), objective)
        >>> found.loss.requires_grad, len(found.terms), found.num_targets
        (True, 2, tensor(2))
    """

    # The loss needs three buffers of 4 MiB, which stay in the cache.
    chunk_elements: ClassVar[int] = 2**20

    def __init__(
        self,
        targets: Tensor,
        teacher: TeacherScores,
        temperature: float = 1.0,
        cross_entropy_weight: float = 1.0,
        distillation_weight: float = 1.0,
    ) -> None:
        """Keep them."""
        super().__init__(targets, (cross_entropy_weight, distillation_weight))
        self.teacher = teacher
        self.temperature = temperature

    @override
    def summed(self, logits: Tensor, gradient: Tensor | None, part: slice = slice(None)) -> Tensor:
        tokens = logits.shape[-1]
        scored = (len(self.teacher.scores), self.teacher.scores.shape[-1] if self.teacher.ids is None else tokens)
        if scored != (len(self.ids), tokens):
            raise ValueError(
                f"The teacher has scored {scored[0]} positions over {scored[1]} tokens, but the model {len(self.ids)}"
                f" over {tokens}: they must be of the same batch and the same vocabulary."
            )
        return super().summed(logits, gradient, part)

    @override
    def rows(self, scores: Tensor, part: slice, gradient: Tensor | None) -> Tensor:
        gradient = torch.empty_like(scores) if gradient is None else gradient
        ids, temperature = self.ids[part].unsqueeze(-1), self.temperature
        said = TeacherScores(*(None if one is None else one[part] for one in self.teacher))  # type: ignore[arg-type]
        weight, pull = self.weights[0], self.weights[1] * temperature
        chances, normalizer = _softmax(scores, out=gradient)
        cross_entropy = normalizer - scores.gather(-1, ids).squeeze(-1)
        tempered = chances
        if temperature != 1:
            scores = scores / temperature
            tempered, normalizer = _softmax(scores)
        if said.ids is None or said.log_rest is None:
            theirs = said.scores.to(scores.dtype) / temperature
            expected, normalizer_of_theirs = _softmax(theirs)
            # A token that is impossible for both adds nothing, and its infinite logits no NaN.
            difference = torch.where(expected > 0, theirs - scores, 0.0).mul_(expected).sum(-1)
            divergence = difference + normalizer - normalizer_of_theirs
            if temperature == 1:
                gradient.mul_(weight + pull)
            else:
                gradient.mul_(weight).add_(tempered, alpha=pull)
            gradient.sub_(expected, alpha=pull)
        else:
            log_kept, log_rest = said.scores.to(scores.dtype), said.log_rest.to(scores.dtype)
            kept, own = log_kept.exp(), tempered.gather(-1, said.ids)
            log_own = scores.gather(-1, said.ids) - normalizer.unsqueeze(-1)
            # Taken out, so that the rest is summed and not what is left of 1, which would be rounding.
            rest = tempered.scatter_(-1, said.ids, 0.0).sum(-1).clamp_(min=torch.finfo(scores.dtype).tiny).log_()
            divergence = torch.where(kept > 0, kept * (log_kept - log_own), 0.0).sum(-1)
            divergence += torch.where(log_rest > -math.inf, log_rest.exp() * (log_rest - rest), 0.0)
            factor = ((1 - (log_rest - rest).exp()) * pull).unsqueeze(-1)
            correction = (own - kept) * pull
            if temperature == 1:
                gradient.mul_(factor + weight)
                correction += own * weight
            else:
                gradient.mul_(weight).addcmul_(tempered, factor)
            gradient.scatter_add_(-1, said.ids, correction)
        gradient.scatter_add_(-1, ids, gradient.new_full((1, 1), -weight).expand(len(gradient), 1))
        return torch.stack([cross_entropy, divergence * temperature**2])

    @override
    def reordered(self, storage_order: Tensor) -> Self | None:
        if self.teacher.ids is None:
            # All logits of a teacher are in the order of ids.
            return None
        made = copy.copy(self)
        made.ids = storage_order.index_select(0, self.ids)
        made.teacher = self.teacher._replace(ids=storage_order[self.teacher.ids])
        return made


def _softmax(scores: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities, and the logarithm of what `exp(scores)` was divided by."""
    values = torch.softmax(scores, -1, out=out)
    # The largest probability is 1 / Σ exp(z - max z): so one exponential of each logit is enough.
    return values, scores.amax(-1) - values.amax(-1).log()
