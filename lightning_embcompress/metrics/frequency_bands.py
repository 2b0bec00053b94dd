"""Perplexity by how frequent the target token is: where a compressed table has lost something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_embcompress.metrics.perplexity import IGNORE_INDEX, LikelihoodSums, token_negative_log_likelihood

DEFAULT_BANDS = (100, 1_000, 10_000)


def band_of_tokens(token_counts: Tensor, bands: Sequence[int] = DEFAULT_BANDS) -> tuple[Tensor, list[str]]:
    """Assign every token to a band of frequency ranks.

    Rank 1 is the most frequent token; tokens of equal count keep the order of their ids. The bounds ``(100, 1000)``
    make the bands of ranks 1 to 100, 101 to 1,000 and 1,001 to the end. Ranks, and not shares of the text, because the
    same bounds then name the same kind of words for every corpus, and methods that give frequent rows more capacity
    divide the table by rank too. Bounds beyond the vocabulary are dropped.

    Args:
        token_counts: Occurrences in the training text, shape ``[vocab_size]``.
        bands: Last rank of each band but the last one, increasing.

    Returns:
        The band of every token, uint8, shape ``[vocab_size]``, and the names of the bands (``rank_1-100``).

    Raises:
        ValueError: If the counts are no non-empty vector of finite, non-negative numbers, or the bounds are not
            positive and increasing or more than 255.

    Example:
        >>> import torch
        >>> band_of_tokens(torch.tensor([5, 9, 1, 1]), bands=(1, 3))
        (tensor([1, 0, 1, 2], dtype=torch.uint8), ['rank_1-1', 'rank_2-3', 'rank_4-4'])
    """
    if token_counts.dim() != 1 or not token_counts.numel():
        raise ValueError(f"`token_counts` must be a vector, one number a token, but has {tuple(token_counts.shape)}.")
    if not bool((torch.isfinite(token_counts) & (token_counts >= 0)).all()):
        raise ValueError("`token_counts` must be finite and not negative.")
    starts = [0, *bands]
    if len(bands) > 255 or any(low >= high for low, high in zip(starts, bands, strict=False)):
        raise ValueError(f"`bands` must be at most 255 increasing ranks above 0, but got {tuple(bands)}.")
    vocab_size = token_counts.numel()
    starts = [start for start in starts if start < vocab_size]
    ends = [*starts[1:], vocab_size]
    order = token_counts.argsort(descending=True, stable=True)
    band = torch.empty(vocab_size, dtype=torch.uint8, device=token_counts.device)
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        band[order[start:end]] = index
    return band, [f"rank_{start + 1}-{end}" for start, end in zip(starts, ends, strict=True)]


class PerplexityByFrequency(LikelihoodSums):
    """Perplexity of the target tokens of each frequency band.

    The perplexity of a band is ``exp`` of the mean negative log-likelihood over the target tokens that belong to it;
    the sums of the bands add up to those of :class:`~lightning_embcompress.metrics.Perplexity`. A band without target
    tokens is NaN.

    Args:
        token_counts: Occurrences in the training text, shape ``[vocab_size]``.
        bands: Last rank of each band but the last one, increasing (:func:`band_of_tokens`).
        **kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the counts or the bounds are not usable.

    Example:
        >>> import torch
        >>> metric = PerplexityByFrequency(torch.tensor([50, 30, 2, 1]), bands=(2,))
        >>> metric.update(torch.zeros(3, 4), torch.tensor([0, 1, 1]))
        >>> {band: round(value.item(), 4) for band, value in metric.compute().items()}
        {'rank_1-2': 4.0, 'rank_3-4': nan}
    """

    band_of_token: Tensor

    def __init__(
        self,
        token_counts: Tensor,
        bands: Sequence[int] = DEFAULT_BANDS,
        **kwargs: Any,
    ) -> None:
        """Start from zero, with every token in its band."""
        band, names = band_of_tokens(torch.as_tensor(token_counts), bands)
        super().__init__(shape=(len(names),), **kwargs)
        self.names = names
        # Not in the checkpoint: it comes from the corpus, which is there whenever the metric is used.
        self.register_buffer("band_of_token", band, persistent=False)

    @override
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add one batch.

        Args:
            logits: Unnormalised scores, floating point, shape ``[*, vocab_size]``.
            targets: Ids of the true tokens, int64, shape ``[*]``; -100 is not scored.

        Raises:
            ValueError: If the shapes do not agree.
            TypeError: If a dtype is not the expected one.
        """
        nll = token_negative_log_likelihood(logits, targets).detach().flatten()
        scored = targets.flatten().ne(IGNORE_INDEX)
        # Ignored tokens go to a band like any other, with weight zero: no boolean indexing, so no wait for the GPU.
        band = self.band_of_token[torch.where(scored, targets.flatten(), 0)].long()
        self.nll_sum.index_add_(0, band, nll.to(self.nll_sum.dtype))
        self.count.index_add_(0, band, scored.to(self.count.dtype))

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the perplexity of each band by its name, in order of frequency; NaN for a band without tokens."""
        return dict(zip(self.names, super().compute().unbind(), strict=True))
