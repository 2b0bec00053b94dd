"""Bands of frequency ranks, against the plain perplexity of each band's tokens."""

from __future__ import annotations

import pytest
import torch

from lightning_embcompress.metrics import Perplexity, PerplexityByFrequency
from lightning_embcompress.metrics.frequency_bands import band_of_tokens


def test_default_bands_of_a_large_vocabulary() -> None:
    band, names = band_of_tokens(torch.arange(20_000))
    assert names == ["rank_1-100", "rank_101-1000", "rank_1001-10000", "rank_10001-20000"]
    # Counts rise with the id, so the last ids are the most frequent.
    assert band[-100:].eq(0).all()
    assert band.bincount().tolist() == [100, 900, 9_000, 10_000]


def test_bounds_beyond_the_vocabulary_are_dropped() -> None:
    assert band_of_tokens(torch.ones(100))[1] == ["rank_1-100"]
    assert band_of_tokens(torch.ones(101))[1] == ["rank_1-100", "rank_101-101"]


def test_equal_counts_keep_the_order_of_ids() -> None:
    assert band_of_tokens(torch.zeros(4), bands=(2,))[0].tolist() == [0, 0, 1, 1]


def test_every_band_equals_the_perplexity_of_its_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1000, (60,), generator=generator)
    metric, plain = PerplexityByFrequency(counts, bands=(5, 20)), Perplexity()
    reference = [Perplexity() for _ in metric.names]
    for _ in range(3):
        logits = torch.randn(4, 9, 60, generator=generator)
        targets = torch.randint(60, (4, 9), generator=generator)
        targets[0, :3] = -100
        metric.update(logits, targets)
        plain.update(logits, targets)
        band = metric.band_of_token[targets.clamp(min=0)]
        for index, one in enumerate(reference):
            one.update(logits, targets.where(band == index, -100))
    for value, one in zip(metric.compute().values(), reference, strict=True):
        torch.testing.assert_close(value, one.compute())
    torch.testing.assert_close(metric.nll_sum.sum(), plain.nll_sum)
    assert metric.count.sum() == plain.count


def test_a_band_without_tokens_is_nan_and_casts_change_nothing() -> None:
    metric = PerplexityByFrequency(torch.tensor([9, 8, 1]), bands=(2,)).to(torch.bfloat16)
    metric.update(torch.zeros(2, 3), torch.tensor([1, -100]))
    values = metric.compute()
    assert values["rank_1-2"].item() == pytest.approx(3.0)
    assert values["rank_3-3"].isnan()
    assert metric.band_of_token.dtype == torch.uint8
    assert not metric.state_dict()


@pytest.mark.parametrize(
    ("counts", "bands", "message"),
    [
        (torch.ones(3), (2, 2), r"increasing ranks.*\(2, 2\)"),
        (torch.ones(3), (0,), "above 0"),
        (torch.ones(3, 2), (1,), r"vector.*\(3, 2\)"),
        (torch.tensor([1, -1]), (1,), "not negative"),
        (torch.tensor([1, float("nan")]), (1,), "finite"),
    ],
)
def test_bad_arguments(counts: torch.Tensor, bands: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerplexityByFrequency(counts, bands)
