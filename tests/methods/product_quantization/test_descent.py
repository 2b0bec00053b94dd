"""Product quantization in the metric of the loss: k-means in subspaces, and subspaces that answer to each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.product_quantization import descent, training_sample
from lightning_embcompress.methods.product_quantization.config import ProductQuantizationConfig
from lightning_embcompress.methods.product_quantization.descent import descend, encode
from lightning_embcompress.methods.product_quantization.factorization import ProductQuantization
from lightning_embcompress.methods.product_quantization.solver import (
    gather_rows,
    product_quantization,
    subspace_sizes,
)
from lightning_embcompress.methods.product_quantization.training_sample import Groups
from toys import loss_metric, normal


def _distances(points: Tensor, centroids: Tensor, matrix: Tensor) -> Tensor:
    change = points.double().unsqueeze(1) - centroids.double().unsqueeze(0)
    return torch.einsum("vks,st,vkt->vk", change, matrix, change)


def _columns(dim: int, subspaces: int) -> list[slice]:
    ends = torch.tensor([0, *subspace_sizes(dim, subspaces)]).cumsum(0).tolist()
    return [slice(start, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True)]


@pytest.mark.parametrize(
    ("dtype", "subspaces", "rank"),
    [(torch.float64, 1, None), (torch.float32, 2, None), (torch.bfloat16, 3, 2), (torch.float16, 7, None)],
)
def test_codes_of_kmeans_are_nearest_in_the_metric_to_what_is_stored(
    dtype: torch.dtype, subspaces: int, rank: int | None
) -> None:
    table, metric = normal(150, 7, dtype=dtype), loss_metric(150, 7, rank=rank)
    table[::5] = 0
    codebook, codes = product_quantization(table, metric.weights, subspaces, 8, metric=metric)
    assert torch.equal(codebook, codebook.to(dtype).to(codebook.dtype))
    for subspace, columns in enumerate(_columns(7, subspaces)):
        # Of a singular metric with its eigenvalues floored.
        matrix = (metric.root @ metric.root)[columns, columns]
        distances = _distances(table[:, columns], codebook[:, columns], matrix)
        own = distances.gather(1, codes[:, subspace, None].long()).squeeze(1)
        assert torch.all(own <= distances.amin(dim=1) + 1e-5 * float(matrix.diagonal().sum()))


@pytest.mark.parametrize("subspaces", [1, 2])
def test_kmeans_in_the_metric_loses_less_than_without(subspaces: int) -> None:
    table, metric = normal(600, 8), loss_metric(600, 8)

    def block_loss(found: tuple[Tensor, Tensor]) -> float:
        """What k-means lowers: the metric within subspaces."""
        matrix = torch.zeros(8, 8, dtype=torch.float64)
        for columns in _columns(8, subspaces):
            matrix[columns, columns] = metric.matrix[columns, columns]
        return Metric(matrix, metric.weights).loss(table, gather_rows(*found))

    without = product_quantization(table, metric.weights, subspaces, 16)
    within = product_quantization(table, metric.weights, subspaces, 16, metric=metric)
    assert block_loss(within) < 0.95 * block_loss(without)


@pytest.mark.parametrize("scale", [1e-20, 1e12])
def test_the_unit_of_the_metric_does_not_matter(scale: float) -> None:
    table = normal(200, 6, dtype=torch.float32)
    found, once = [], loss_metric(200, 6)
    for metric in (once, Metric(scale * once.matrix, once.weights)):
        codebook, codes = product_quantization(table, metric.weights, 3, 8, metric=metric)
        descend(table, metric, codebook, codes)
        found.append(metric.loss(table, gather_rows(codebook, codes)))
    assert found[1] == pytest.approx(scale * found[0], rel=1e-3)


@given(
    vocab_size=st.integers(1, 60),
    dim=st.integers(1, 9),
    subspaces=st.integers(1, 9),
    centroids=st.integers(1, 20),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    rank=st.one_of(st.none(), st.integers(0, 4)),
    limit=st.integers(0, 20),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_no_round_raises_the_loss(
    vocab_size: int,
    dim: int,
    subspaces: int,
    centroids: int,
    dtype: torch.dtype,
    rank: int | None,
    limit: int,
    seed: int,
) -> None:
    subspaces, centroids = min(subspaces, dim), min(centroids, vocab_size)
    table, metric = normal(vocab_size, dim, seed=seed, dtype=dtype), loss_metric(vocab_size, dim, rank, seed)
    table[::3] = 0
    rare = normal(vocab_size, 1, seed=seed).squeeze(1) > 0
    groups = None
    if 0 < limit < centroids:
        groups = Groups([(~rare).nonzero().flatten(), rare.nonzero().flatten()], [centroids, limit])
    codebook, codes = product_quantization(table, metric.weights, subspaces, centroids, groups, metric=metric)
    # As it is used: with its eigenvalues floored.
    floored = Metric(metric.root @ metric.root, metric.weights)
    losses = [floored.loss(table, gather_rows(codebook, codes))]
    for _ in range(3):
        descend(table, metric, codebook, codes, groups, rounds=1)
        losses.append(floored.loss(table, gather_rows(codebook, codes)))
    # Centroids are rounded to float32, which a metric of floored eigenvalues sees.
    slack = (1e-12 if dtype == torch.float64 else 1e-5) * floored.loss(table, 0 * table)
    assert all(after <= before * (1 + 1e-9) + slack for before, after in zip(losses[:-1], losses[1:], strict=True))
    assert codebook.isfinite().all()
    assert torch.equal(codebook, codebook.to(dtype).to(codebook.dtype))
    assert int(codes.min()) >= 0
    assert int(codes.max()) < centroids
    if groups is not None and rare.any():
        assert int(codes[rare].max()) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subspaces_make_up_for_each_other(dtype: torch.dtype) -> None:
    table, metric = normal(800, 8, dtype=dtype), loss_metric(800, 8)
    found = product_quantization(table, metric.weights, 4, 16, metric=metric)
    before = metric.loss(table, gather_rows(*found))
    shares: list[float] = []
    descend(table, metric, *found, advance=shares.append)
    assert sum(shares) == pytest.approx(1)
    assert metric.loss(table, gather_rows(*found)) < 0.6 * before
    assert torch.equal(found[0], found[0].to(dtype).to(found[0].dtype))


def test_no_change_of_one_code_lowers_the_loss() -> None:
    table, metric = normal(60, 6), loss_metric(60, 6)
    codebook, codes = product_quantization(table, metric.weights, 3, 5, metric=metric)
    descend(table, metric, codebook, codes, rounds=40)
    matrix = metric.root @ metric.root

    def losses(some: Tensor) -> Tensor:
        change = table - gather_rows(codebook, some)
        return ((change @ matrix) * change).sum(dim=1)

    own = losses(codes)
    for subspace in range(3):
        for code in range(5):
            other = codes.clone()
            other[:, subspace] = code
            assert torch.all(losses(other) >= own - 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_codebook_of_a_sample_is_about_as_good(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    table, metric = normal(2000, 8, dtype=dtype), loss_metric(2000, 8)
    monkeypatch.setattr(descent, "_NUMBERS", 2**12)
    losses = []
    for rows_per_centroid in (1000, 30):
        monkeypatch.setattr(training_sample, "_ROWS_PER_CENTROID", rows_per_centroid)
        config = ProductQuantizationConfig(bits=4)
        found = ProductQuantization.decompose(table, 2000 * 2 + 1024, None, config, metric=metric)
        losses.append(metric.loss(table, found.materialize()))
    assert losses[1] < 1.2 * losses[0]


def test_encoding_finds_what_descent_ends_with() -> None:
    table, metric = normal(300, 6), loss_metric(300, 6)
    rare = torch.arange(300) >= 200
    groups = Groups([(~rare).nonzero().flatten(), rare.nonzero().flatten()], [16, 4])
    codebook, codes = product_quantization(table, metric.weights, 3, 16, groups, metric=metric)
    shares: list[float] = []
    found = encode(table, codebook, 3, groups, metric, shares.append)
    assert sum(shares) == pytest.approx(1)
    assert int(found[rare].max()) < 4
    assert metric.loss(table, gather_rows(codebook, found)) < 0.9 * metric.loss(table, gather_rows(codebook, codes))
    # Each row alone gives the same.
    one = Groups([torch.arange(0), torch.arange(1)], [16, 4])
    assert torch.equal(encode(table[250:251], codebook, 3, one, metric), found[250:251])
