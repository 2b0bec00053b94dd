r"""Sampled softmax with log-uniform candidates: the training loss of the One-Billion-Word models.

With :math:`z_v = h^\top w_v + b_v`, the full softmax loss of a target :math:`y` needs all `V` scores:

.. math:: -\log p(y \mid h) = \log \sum_{v=1}^{V} e^{z_v} - z_y .

Importance sampling (Jean et al. 2015, section 3; Jozefowicz et al. 2016, section 3.1) classifies the target among
itself and a set :math:`S` of sampled ids instead, each score corrected by the expected count :math:`Q(v)` of its id,
the target's too, although it is always there: this is the loss whose optimum is the true distribution for every size
of `S` (it classifies which of the candidates the text has drawn), and correcting the samples only trained worse.

.. math::
    \tilde z_v = z_v - \log Q(v), \qquad
    \mathcal L = \log \Big( e^{\tilde z_y} + \sum_{v \in S \setminus \{y\}} e^{\tilde z_v} \Big) - \tilde z_y .

Sampled ids that equal the target ("accidental hits") are left out of that position's sum. Where :math:`Q = 1` for all
ids, :math:`\mathcal L` is the full softmax loss. One set `S` serves all positions of a batch.

**Sampler.** Ids must be sorted by falling frequency. By Zipf's law the text then follows about

.. math:: P(k) = \frac{\log\frac{k+2}{k+1}}{\log(V+1)}, \qquad k = 0, \dots, V-1,

whose distribution function :math:`F(k) = \log(k+2) / \log(V+1)` has the closed inverse
:math:`k = \lfloor (V+1)^u \rfloor - 1` for uniform :math:`u`, so no table of `V` probabilities is kept. Ids are drawn
until ``num_sampled`` different ones are found, in `T` draws, and :math:`Q(v) = 1 - (1 - P(v))^T`. Different ones,
because with replacement 8,192 draws from 793,471 words hit only about 4,600 of them: 44 % of the scores would be
computed twice. It is also what the released code of the bigLSTM used
(`tf.nn.sampled_softmax_loss`, whose default is `log_uniform_candidate_sampler(unique=True)`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_embcompress.layers.fused_loss import check_shapes
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX


class Candidates(NamedTuple):
    """Different ids drawn from the log-uniform law.

    Attributes:
        ids: The sampled ids, int64, shape ``[num_sampled]``, in the order of their first draw.
        num_tries: Number of draws that were needed; infinite if ``ids`` is the whole vocabulary.
    """

    ids: Tensor
    num_tries: float


def log_uniform_probability(ids: Tensor, vocab_size: int) -> Tensor:
    """Return ``P(k) = log((k + 2) / (k + 1)) / log(V + 1)``.

    Args:
        ids: Token ids, sorted by falling frequency, shape ``[*]``.
        vocab_size: Number of tokens ``V``.

    Returns:
        Probabilities, float32, shape ``[*]``.

    Example:
        >>> import torch
        >>> log_uniform_probability(torch.arange(3), vocab_size=3)
        tensor([0.5000, 0.2925, 0.2075])
    """
    # log1p: for k near 10^6 the quotient (k + 2) / (k + 1) rounds to 1 in float32.
    return torch.log1p(1.0 / (ids + 1).float()) / math.log(vocab_size + 1)


def log_uniform_draws(vocab_size: int, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw independent ids from the log-uniform law by the inverse of its distribution function.

    Args:
        vocab_size: Number of tokens ``V``.
        num_draws: Number of draws.
        generator: Source of the random numbers, on the CPU; the global one if None.

    Returns:
        Ids, with repetitions, int64, shape ``[num_draws]``.

    Example:
        >>> import torch
        >>> log_uniform_draws(1000, 5, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([5])
    """
    # In float32, (V + 1)^u is off by whole ids near V = 10^6.
    uniform = torch.rand(num_draws, dtype=torch.float64, generator=generator)
    ids = uniform.mul_(math.log(vocab_size + 1)).exp_().long() - 1
    return ids.clamp_(0, vocab_size - 1)


def sample_candidates(vocab_size: int, num_sampled: int, generator: torch.Generator | None = None) -> Candidates:
    """Draw from the log-uniform law until ``num_sampled`` different ids are found.

    Runs on the CPU on purpose: whether enough ids were found decides what happens next, and asking a GPU would make
    the host wait for all it has queued.

    Args:
        vocab_size: Number of tokens ``V``, ids sorted by falling frequency.
        num_sampled: Number of different ids, at most ``V``.
        generator: Source of the random numbers, on the CPU; the global one if None.

    Returns:
        The ids and the number of draws.

    Raises:
        ValueError: If ``num_sampled`` is not within 1 and ``vocab_size``.

    Example:
        >>> import torch
        >>> candidates = sample_candidates(1000, 5, generator=torch.Generator().manual_seed(0))
        >>> len(set(candidates.ids.tolist()))
        5
    """
    if not 1 <= num_sampled <= vocab_size:
        raise ValueError(f"num_sampled={num_sampled} must be within 1 and vocab_size={vocab_size}.")
    if num_sampled == vocab_size:
        # The limit of ever more draws: all ids are there, and every expected count is exactly 1.
        return Candidates(torch.arange(vocab_size), math.inf)
    draws = log_uniform_draws(vocab_size, 2 * num_sampled, generator)
    while True:
        ids, positions = draws.sort(stable=True)
        is_first = torch.ones_like(ids, dtype=torch.bool)
        torch.ne(ids[1:], ids[:-1], out=is_first[1:])
        first_draws = positions[is_first].sort().values
        if first_draws.numel() >= num_sampled:
            first_draws = first_draws[:num_sampled]
            return Candidates(draws[first_draws], float(first_draws[-1]) + 1)
        draws = torch.cat([draws, log_uniform_draws(vocab_size, draws.numel(), generator)])


def log_expected_count(ids: Tensor, vocab_size: int, num_tries: float) -> Tensor:
    """Return ``log Q(k)``, with ``Q(k) = 1 - (1 - P(k))^num_tries`` the chance that an id is among the candidates.

    Args:
        ids: Token ids, shape ``[*]``.
        vocab_size: Number of tokens ``V``.
        num_tries: Number of draws (:class:`Candidates`).

    Returns:
        Logarithms of the expected counts, float32, shape ``[*]``; zero for infinitely many draws.

    Example:
        >>> import torch
        >>> log_expected_count(torch.arange(3), vocab_size=3, num_tries=1).exp()
        tensor([0.5000, 0.2925, 0.2075])
    """
    return torch.log(-torch.expm1(num_tries * torch.log1p(-log_uniform_probability(ids, vocab_size))))


def head_rows(decoder: nn.Module, ids: Tensor, sparse: bool = False) -> Tensor:
    """Gather rows of the table of a softmax head, dense or compressed.

    Args:
        decoder: An :class:`torch.nn.Linear`, or a layer that holds the table as ``factorization``.
        ids: Token ids, shape ``[*]``.
        sparse: Whether the gradients are sparse tensors, of the rows of these ids alone.

    Returns:
        Rows, shape ``[*, d]``.

    Raises:
        TypeError: If the head is neither.

    Example:
        >>> import torch
        >>> head_rows(torch.nn.Linear(4, 10), torch.tensor([1, 2, 3])).shape
        torch.Size([3, 4])
    """
    if isinstance(decoder, nn.Linear):
        return F.embedding(ids, decoder.weight, sparse=sparse)
    factorization = getattr(decoder, "factorization", None)
    if factorization is None:
        raise TypeError(
            f"Sampled softmax cannot read rows of a head of type {type(decoder).__name__}:"
            " it must be an nn.Linear or hold a `factorization` with `rows(ids)`. Train with softmax='full' instead."
        )
    # Others that hold a `factorization` need to know of sparse gradients only if they are asked for.
    rows: Tensor = factorization.rows(ids, sparse=True) if sparse else factorization.rows(ids)
    return rows


def sampled_softmax_loss(
    hidden: Tensor,
    targets: Tensor,
    rows: Callable[[Tensor], Tensor],
    bias: Tensor | None,
    candidates: Candidates,
    vocab_size: int,
) -> Tensor:
    """Return the mean sampled softmax loss of the targets, in nats (formula at the top of this module).

    The scores come in the dtype of the inputs, or of autocast; the correction and the log-sum-exp are in float32.
    Ignored targets contribute nothing. If all are ignored the loss is 0, not NaN, with gradients of zero, so that a
    batch of padding leaves the weights alone.

    Args:
        hidden: Inputs of the head, shape ``[*, d]``.
        targets: Ids of the true tokens, int64, shape ``[*]``.
        rows: Gathers rows of the table: ids of shape ``[n]`` to ``[n, d]`` (:func:`head_rows`).
        bias: Bias of the head, shape ``[vocab_size]``, or None.
        candidates: The sampled ids, shared by all positions (:func:`sample_candidates`).
        vocab_size: Number of tokens ``V``.

    Returns:
        The loss in nats per token, a float32 scalar.

    Raises:
        ValueError: If the shape of ``targets`` is not the leading shape of ``hidden``.

    Example:
        >>> import torch
        >>> table, hidden = torch.randn(100, 8), torch.randn(2, 3, 8)
        >>> targets = torch.randint(100, (2, 3))
        >>> candidates = sample_candidates(100, num_sampled=20)
        >>> sampled_softmax_loss(hidden, targets, lambda ids: table[ids], None, candidates, 100).shape
        torch.Size([])
    """
    check_shapes(hidden, targets)
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    scored = targets.ne(IGNORE_INDEX)
    # Any valid id does for the ignored positions, whose loss is dropped below.
    targets = torch.where(scored, targets, 0)
    sampled = candidates.ids.to(targets.device, non_blocking=True)
    # One gather for both: a factorized table then multiplies its factors once.
    ids = torch.cat([targets, sampled])
    target_rows, sampled_rows = torch.split(rows(ids), [targets.numel(), sampled.numel()])
    target_scores = (hidden.float() * target_rows.float()).sum(-1)
    sampled_scores = F.linear(hidden, sampled_rows.to(hidden.dtype)).float()
    correction = log_expected_count(ids, vocab_size, candidates.num_tries)
    if bias is not None:
        correction = correction - bias[ids].float()
    target_scores = target_scores - correction[: targets.numel()]
    sampled_scores = sampled_scores - correction[targets.numel() :]
    sampled_scores = sampled_scores.masked_fill(targets.unsqueeze(1) == sampled, -math.inf)
    # log(e^t + sum_s e^s) - t = log(1 + e^(lse(s) - t)): no cancellation, and no copy to join the columns.
    loss = F.softplus(sampled_scores.logsumexp(-1) - target_scores)
    return torch.where(scored, loss, 0.0).sum() / scored.sum().clamp(min=1)
