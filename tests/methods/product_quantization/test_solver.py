"""Weighted k-means in subspaces against a direct implementation in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import row_weights
from lightning_embcompress.methods.product_quantization import solver, training_sample
from lightning_embcompress.methods.product_quantization.descent import encode
from lightning_embcompress.methods.product_quantization.solver import product_quantization, subspace_sizes
from lightning_embcompress.methods.product_quantization.training_sample import Groups, Sample
from toys import normal


def _zipf(vocab_size: int) -> Tensor:
    return row_weights((10_000 / torch.arange(1, vocab_size + 1)).long(), vocab_size)


def _parts(values: Tensor, subspaces: int) -> list[Tensor]:
    return list(torch.split(values.double(), subspace_sizes(values.shape[1], subspaces), dim=1))


def _rows(codebook: Tensor, codes: Tensor) -> Tensor:
    columns = torch.repeat_interleave(torch.tensor(subspace_sizes(codebook.shape[1], codes.shape[1])))
    return torch.gather(codebook, 0, codes.long()[:, columns])


def _error(weight: Tensor, weights: Tensor, found: tuple[Tensor, Tensor]) -> float:
    return float(((weight - _rows(*found)).double().square().sum(1) * weights).sum())


def _check_nearest(weight: Tensor, codebook: Tensor, codes: Tensor, limit: int) -> None:
    """Every code against all distances in float64; ties and rounding may choose another one as near."""
    for part, centroids, chosen in zip(
        _parts(weight, codes.shape[1]), _parts(codebook, codes.shape[1]), codes.T.long(), strict=True
    ):
        distances = torch.cdist(part, centroids[:limit], compute_mode="donot_use_mm_for_euclid_dist")
        own = distances.gather(1, chosen.unsqueeze(1)).squeeze(1)
        scale = part.norm(dim=1) + centroids.norm(dim=1).max()
        assert torch.all(own**2 - distances.amin(1) ** 2 <= 1e-5 * scale**2)


def _reference_lloyd(weight: Tensor, weights: Tensor, start: Tensor, subspaces: int, steps: list[int]) -> Tensor:
    """Lloyd's iteration as it is written down, centroids that lose all rows staying where they are."""
    found = []
    for part, centroids, count in zip(_parts(weight, subspaces), _parts(start, subspaces), steps, strict=True):
        centroids = centroids.clone()
        for _ in range(count):
            codes = torch.cdist(part, centroids).argmin(1)
            for index in range(len(centroids)):
                mine = codes == index
                if mine.any():
                    centroids[index] = (part[mine] * weights[mine, None]).sum(0) / weights[mine].sum()
        found.append(centroids)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("subspaces", [1, 2, 3, 5, 7])
def test_steps_are_those_of_lloyd(subspaces: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "_TOLERANCE", -1e9)
    monkeypatch.setattr(solver, "_reseed", lambda *_: None)
    weight, weights = normal(200, 7, dtype=dtype), _zipf(200)
    start = weight[torch.randperm(200, generator=torch.Generator().manual_seed(1))[:6]]
    codebook, codes = product_quantization(weight, weights, subspaces, 6, start=start, max_iterations=4)
    # Of single columns the steps cost nothing, and there are more.
    steps = [12 if size == 1 else 4 for size in subspace_sizes(7, subspaces)]
    expected = _reference_lloyd(weight, weights, start, subspaces, steps)
    torch.testing.assert_close(codebook.double(), expected, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-4)
    _check_nearest(weight, codebook, codes, 6)


@given(
    vocab_size=st.integers(1, 60),
    dim=st.integers(1, 9),
    subspaces=st.integers(1, 9),
    centroids=st.integers(1, 20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    limit=st.integers(0, 20),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_codes_are_of_the_nearest_centroids_that_may_be_used(
    vocab_size: int, dim: int, subspaces: int, centroids: int, dtype: torch.dtype, limit: int, seed: int
) -> None:
    subspaces, centroids = min(subspaces, dim), min(centroids, vocab_size)
    weight = normal(vocab_size, dim, seed=seed, dtype=dtype)
    weight[::3] = 0
    rare = normal(vocab_size, seed=seed) > 0
    groups = None
    if 0 < limit < centroids:
        groups = Groups([(~rare).nonzero().flatten(), rare.nonzero().flatten()], [centroids, limit])
    codebook, codes = product_quantization(weight, _zipf(vocab_size), subspaces, centroids, groups)
    assert codebook.shape == (centroids, dim)
    assert codes.shape == (vocab_size, subspaces)
    assert codebook.isfinite().all()
    # As they are stored.
    assert torch.equal(codebook, codebook.to(dtype).to(codebook.dtype))
    assert int(codes.min()) >= 0
    assert int(codes.max()) < centroids
    if groups is None:
        _check_nearest(weight, codebook, codes, centroids)
    else:
        assert not rare.any() or int(codes[rare].max()) < limit
        _check_nearest(weight[rare], codebook, codes[rare], limit)
        _check_nearest(weight[~rare], codebook, codes[~rare], centroids)


def test_as_many_centroids_as_rows_are_exact() -> None:
    weight = normal(30, 6, dtype=torch.float32)
    for subspaces in (1, 4, 6):
        assert _error(weight, _zipf(30), product_quantization(weight, _zipf(30), subspaces, 30)) < 1e-9


def test_is_close_to_the_best_of_many_starts() -> None:
    weight, weights = normal(400, 2), _zipf(400)
    found = _error(weight, weights, product_quantization(weight, weights, 1, 8))
    others = []
    for seed in range(20):
        start = weight[torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:8]]
        codebook = _reference_lloyd(weight, weights, start, 1, [30])
        others.append(_error(weight, weights, (codebook, torch.cdist(weight, codebook).argmin(1, keepdim=True))))
    assert found <= 1.1 * min(others)


@pytest.mark.parametrize("columns", [1, 2])
def test_centroids_without_rows_are_moved(columns: int) -> None:
    weight = normal(100, columns)
    start = torch.full((8, columns), 50.0, dtype=torch.float64)
    codebook, codes = product_quantization(weight, torch.ones(100), 1, 8, start=start, max_iterations=20)
    assert len(codes.unique()) == 8
    fresh = product_quantization(weight, torch.ones(100), 1, 8, max_iterations=20)
    assert _error(weight, torch.ones(100), (codebook, codes)) <= 1.25 * _error(weight, torch.ones(100), fresh)


def test_rare_rows_share_the_first_centroids() -> None:
    weight, weights = normal(300, 4), torch.cat([torch.full((60,), 100.0), torch.ones(240)]).double()
    groups = Groups([torch.arange(60), torch.arange(60, 300)], [32, 4])
    codebook, codes = product_quantization(weight, weights, 2, 32, groups)
    assert int(codes[60:].max()) == 3
    assert int(codes[:60].max()) > 20
    # Not worse for the frequent rows than if they had no more than the rare ones, and about as good as alone.
    few = product_quantization(weight, weights, 2, 4)
    alone = product_quantization(weight[:60], weights[:60], 2, 32)
    frequent = _error(weight[:60], weights[:60], (codebook, codes[:60]))
    assert frequent < 0.3 * _error(weight[:60], weights[:60], (few[0], few[1][:60]))
    assert frequent < 2 * _error(weight[:60], weights[:60], alone) + 1e-9
    rare = _error(weight[60:], weights[60:], (codebook, codes[60:]))
    assert rare < 1.7 * _error(weight[60:], weights[60:], product_quantization(weight[60:], weights[60:], 2, 4))


@pytest.mark.parametrize("subspaces", [2, 4])
def test_training_on_a_sample_is_about_as_good(subspaces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, weights = normal(3000, 4, dtype=torch.float32), _zipf(3000)
    whole = _error(weight, weights, product_quantization(weight, weights, subspaces, 16))
    monkeypatch.setattr(training_sample, "_ROWS_PER_CENTROID", 30)
    groups = Groups([torch.arange(3000)], [16])
    sample = Sample.of(weights, groups, 16)
    assert sample.rows.numel() == 480
    codebook, _ = product_quantization(weight[sample.rows], sample.weights, subspaces, 16, sample.groups)
    found = codebook, encode(weight, codebook, subspaces, groups)
    assert _error(weight, weights, found) <= 1.15 * whole
    _check_nearest(weight, *found, 16)


def test_a_sample_has_the_heavy_rows_and_the_right_sums() -> None:
    weights = _zipf(5000)
    rows, priority = training_sample._sample(weights, 400, torch.Generator().manual_seed(0))
    assert rows.numel() == 400
    assert torch.equal(rows, rows.unique())
    assert torch.equal(rows[:20], torch.arange(20))
    assert torch.equal(priority[:20], weights[:20])
    assert float(priority.sum()) == pytest.approx(float(weights.sum()), rel=0.05)
    tail = rows >= 2500
    assert float(priority[tail].sum()) == pytest.approx(float(weights[2500:].sum()), rel=0.3)
    rows, priority = training_sample._sample(weights, 5000, torch.Generator().manual_seed(0))
    assert torch.equal(rows, torch.arange(5000))
    assert priority is weights


def test_starting_centroids_are_different_rows() -> None:
    weight = normal(40, 6)
    points = solver._Points(Groups([torch.arange(40)], [40]), torch.ones(40).double())
    spaces = [solver.Space(columns, None, weight) for columns in (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6))]
    starts = solver._starting_codebook(weight, points, spaces, 40, torch.Generator().manual_seed(0))
    for part, own in zip(_parts(starts, 4), _parts(weight, 4), strict=True):
        # Each row once, whatever the order.
        assert torch.equal(part[part[:, 0].argsort()], own[own[:, 0].argsort()])
