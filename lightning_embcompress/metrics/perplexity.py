"""Perplexity from summed log-likelihoods.

The perplexity of a text of `N` target tokens is

    PPL = exp( -(1/N) * sum_t log p(w_t | w_<t) ),    log p(w | h) = z_w - log sum_v exp(z_v),

so two numbers per batch are enough: the sum of the negative log-likelihoods (nats) and the count. The softmax itself is
never needed, only its normaliser, and that is taken over a few thousand tokens at a time: with 793,471 words one copy
of the probabilities of a batch of 128 x 20 tokens would be 8 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

IGNORE_INDEX = -100
"""Targets of this value are not predicted; the default of :func:`torch.nn.functional.cross_entropy`."""

# 2^24 float32 logits = 64 MiB: large enough to keep the kernels busy, small next to the logits themselves.
_CHUNK_ELEMENTS = 2**24


def token_negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of every target token, in nats.

    Works in float32 (float64 for float64 logits) whatever the dtype of the logits, a chunk of tokens at a time.

    Args:
        logits: Unnormalised scores, floating point, shape ``[*, vocab_size]``.
        targets: Ids of the true tokens, int64, shape ``[*]``; -100 is not scored.

    Returns:
        Negative log-likelihoods, shape ``[*]``, float32 or float64; zero at ignored targets.

    Raises:
        ValueError: If the shape of ``targets`` is not the leading shape of ``logits``.
        TypeError: If ``logits`` is not floating point or ``targets`` not int64.

    Example:
        >>> import torch
        >>> token_negative_log_likelihood(torch.zeros(2, 4), torch.tensor([3, -100]))
        tensor([1.3863, 0.0000])
    """
    if logits.dim() < 2 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            "`logits` must have the shape of `targets` and one more dimension for the vocabulary,"
            f" but got {tuple(logits.shape)} and {tuple(targets.shape)}."
        )
    if not logits.is_floating_point():
        raise TypeError(f"`logits` must be floating point, but got {logits.dtype}.")
    if targets.dtype != torch.int64:
        raise TypeError(f"`targets` must be {torch.int64}, but got {targets.dtype}. Convert them with `.long()`.")
    flat_logits = logits.reshape(-1, logits.shape[-1])
    flat_targets = targets.reshape(-1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if not flat_targets.numel():
        return flat_logits.new_zeros(targets.shape, dtype=dtype)
    scored = flat_targets.ne(IGNORE_INDEX)
    ids = torch.where(scored, flat_targets, 0)
    tokens = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    chunks = []
    for chunk, chunk_ids in zip(torch.split(flat_logits, tokens), torch.split(ids, tokens), strict=True):
        scores = chunk.to(dtype)
        chunks.append(scores.logsumexp(dim=-1) - scores.gather(-1, chunk_ids.unsqueeze(-1)).squeeze(-1))
    # `where`, not a product: an infinite logit in an ignored row must not become NaN.
    return torch.where(scored, torch.cat(chunks), 0.0).reshape(targets.shape)


def _accumulator(device: torch.device) -> torch.dtype:
    # A float32 sum stops growing properly after about 10^7 tokens, the length of the common test sets; Apple's MPS has
    # no float64.
    return torch.float32 if device.type == "mps" else torch.float64


class LikelihoodSums(Metric):
    """Base of the perplexity metrics: sums of negative log-likelihoods (nats) and counts of tokens.

    Args:
        shape: Shape of the sums; one number each for the plain perplexity.
        **kwargs: Keyword arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nll_sum: Tensor
    count: Tensor

    def __init__(self, shape: Sequence[int] = (), **kwargs: Any) -> None:
        """Start from zero."""
        super().__init__(**kwargs)
        self.add_state("nll_sum", default=torch.zeros(tuple(shape), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros(tuple(shape), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> LikelihoodSums:
        # `module.to(torch.bfloat16)`, as Lightning's "bf16-true" does, would turn the sum to 8 bits of mantissa, and
        # moving a float64 tensor to MPS fails. So the sum follows the device only, in the widest dtype it has.
        super()._apply(fn, exclude_state=("nll_sum", *exclude_state))
        device = self.count.device
        self._defaults["nll_sum"] = torch.zeros_like(self.count, dtype=_accumulator(device))
        self.nll_sum = self.nll_sum.to(device=device, dtype=_accumulator(device))
        return self

    @override
    def compute(self) -> Any:
        """Return ``exp(nll_sum / count)``, elementwise; NaN where nothing was counted."""
        return (self.nll_sum / self.count).exp()


class Perplexity(LikelihoodSums):
    """Perplexity of a language model, aggregated over batches and processes from log-likelihoods.

    Unlike :class:`torchmetrics.text.Perplexity` it builds no softmax, keeps the sum in float64, and accepts a loss that
    was computed already, so that an evaluation step reads the logits only once.

    Args:
        **kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))
        >>> metric.update(nll_sum=torch.tensor(0.0), count=torch.tensor(6))
        >>> metric.compute()
        tensor(2.0000, dtype=torch.float64)
    """

    @override
    def update(
        self,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        nll_sum: Tensor | None = None,
        count: Tensor | None = None,
    ) -> None:
        """Add one batch: either logits and targets, or the sum that a loss has computed from them.

        Args:
            logits: Unnormalised scores, floating point, shape ``[*, vocab_size]``.
            targets: Ids of the true tokens, int64, shape ``[*]``; -100 is not scored.
            nll_sum: Sum of the negative log-likelihoods in nats, a scalar.
            count: Number of the tokens in that sum, an integer scalar.

        Raises:
            ValueError: If neither or both pairs are given, or the shapes do not agree.
            TypeError: If a dtype is not the expected one.
        """
        if logits is not None and targets is not None and nll_sum is None and count is None:
            nll = token_negative_log_likelihood(logits, targets)
            nll_sum, count = nll.sum(dtype=_accumulator(nll.device)), targets.ne(IGNORE_INDEX).sum()
        elif nll_sum is None or count is None or logits is not None or targets is not None:
            raise ValueError("Give either `logits` and `targets`, or `nll_sum` and `count`.")
        self.nll_sum += nll_sum.detach().to(self.nll_sum)
        self.count += count
