"""The log-uniform sampler against its law, the sampled softmax against the full one."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_embcompress import compress, densify
from lightning_embcompress.layers.sampled_softmax import (
    Candidates,
    head_rows,
    log_expected_count,
    log_uniform_draws,
    log_uniform_probability,
    sample_candidates,
    sampled_softmax_loss,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _problem(vocab_size: int = 40, dim: int = 6, positions: int = 30) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = _generator()
    table = torch.randn(vocab_size, dim, generator=generator)
    bias = torch.randn(vocab_size, generator=generator)
    hidden = torch.randn(positions, dim, generator=generator)
    targets = log_uniform_draws(vocab_size, positions, generator)
    return table.requires_grad_(), bias.requires_grad_(), hidden.requires_grad_(), targets


def _loss(table: Tensor, bias: Tensor | None, hidden: Tensor, targets: Tensor, candidates: Candidates) -> Tensor:
    rows = lambda ids: F.embedding(ids, table)  # noqa: E731
    return sampled_softmax_loss(hidden, targets, rows, bias, candidates, table.shape[0])


@pytest.mark.parametrize("vocab_size", [1, 7, 793_471])
def test_probabilities_sum_to_one(vocab_size: int) -> None:
    total = log_uniform_probability(torch.arange(vocab_size), vocab_size).double().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-6)


def test_draws_follow_the_law() -> None:
    vocab_size, num_draws = 50, 200_000
    observed = log_uniform_draws(vocab_size, num_draws, _generator()).bincount(minlength=vocab_size).double()
    expected = num_draws * log_uniform_probability(torch.arange(vocab_size), vocab_size).double()
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    # 49 degrees of freedom: mean 49, standard deviation 9.9; 85.35 is passed with probability 0.001.
    assert chi_square < 85.35


def test_draws_reach_both_ends_of_a_large_vocabulary() -> None:
    draws = log_uniform_draws(793_471, 500_000, _generator())
    assert draws.min() == 0
    assert 790_000 < draws.max() < 793_471


@pytest.mark.parametrize("num_sampled", [1, 10, 99])
def test_candidates_are_different_and_counted(num_sampled: int) -> None:
    candidates = sample_candidates(100, num_sampled, _generator(3))
    assert candidates.ids.unique().numel() == num_sampled
    # The draws as an independent loop sees them, until the last new id.
    draws = torch.cat([log_uniform_draws(100, size, g) for g in [_generator(3)] for size in _sizes(num_sampled)])
    seen: set[int] = set()
    tries = 0
    while len(seen) < num_sampled:
        seen.add(int(draws[tries]))
        tries += 1
    assert set(candidates.ids.tolist()) == seen
    assert candidates.num_tries == tries


def _sizes(num_sampled: int) -> list[int]:
    return [2 * num_sampled, *(2 * num_sampled * 2**doubling for doubling in range(8))]


def test_expected_counts_are_the_frequencies_of_candidates() -> None:
    vocab_size, repeats = 30, 3000
    ids = torch.arange(vocab_size)
    observed, expected = torch.zeros(vocab_size), torch.zeros(vocab_size)
    generator = _generator()
    for _ in range(repeats):
        candidates = sample_candidates(vocab_size, 8, generator)
        observed[candidates.ids] += 1 / repeats
        expected += log_expected_count(ids, vocab_size, candidates.num_tries).exp() / repeats
    # One standard deviation of a frequency is at most 0.009; 1 - (1 - P)^T itself is an approximation to O(1 / T).
    torch.testing.assert_close(observed, expected, atol=0.04, rtol=0)


def test_whole_vocabulary_equals_the_full_softmax() -> None:
    table, bias, hidden, targets = _problem()
    targets[:4] = -100
    loss = _loss(table, bias, hidden, targets, sample_candidates(40, 40))
    full = F.cross_entropy(F.linear(hidden, table, bias), targets)
    torch.testing.assert_close(loss, full)
    for ours, reference in zip(
        torch.autograd.grad(loss, (table, bias, hidden)), torch.autograd.grad(full, (table, bias, hidden)), strict=True
    ):
        torch.testing.assert_close(ours, reference)


def test_equals_the_formula_written_out() -> None:
    table, bias, hidden, targets = _problem()
    candidates = sample_candidates(40, 12, _generator())
    scores = F.linear(hidden, table, bias) - log_expected_count(torch.arange(40), 40, candidates.num_tries)
    losses = []
    for position, target in enumerate(targets.tolist()):
        classes = [target] + [k for k in candidates.ids.tolist() if k != target]
        losses.append(scores[position, classes].logsumexp(0) - scores[position, target])
    torch.testing.assert_close(_loss(table, bias, hidden, targets, candidates), torch.stack(losses).mean())


def test_mean_gradient_approaches_the_full_gradient() -> None:
    table, bias, hidden, targets = _problem()
    full = torch.autograd.grad(F.cross_entropy(F.linear(hidden, table, bias), targets), hidden)[0]
    errors = []
    for num_sampled in (5, 20, 39):
        generator = _generator()
        mean = torch.zeros_like(hidden)
        for _ in range(150):
            candidates = sample_candidates(40, num_sampled, generator)
            mean += torch.autograd.grad(_loss(table, bias, hidden, targets, candidates), hidden)[0] / 150
        errors.append(((mean - full).norm() / full.norm()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.35
    assert errors[2] < 0.05


def test_accidental_hits_are_masked() -> None:
    table, bias, hidden, _ = _problem()
    candidates = Candidates(torch.tensor([3, 7, 9]), num_tries=4.0)
    targets = torch.full((30,), 7)
    loss = _loss(table, bias, hidden, targets, candidates)
    torch.testing.assert_close(loss, _loss(table, bias, hidden, targets, Candidates(torch.tensor([3, 9]), 4.0)))


def test_only_candidate_is_the_target() -> None:
    table, bias, hidden, _ = _problem()
    loss = _loss(table, bias, hidden, torch.full((30,), 7), Candidates(torch.tensor([7]), 1.0))
    gradients = torch.autograd.grad(loss, (table, bias, hidden))
    assert loss.item() == 0.0
    assert all(bool(gradient.eq(0).all()) for gradient in gradients)


def test_ignored_targets_contribute_nothing() -> None:
    table, bias, hidden, targets = _problem()
    candidates = sample_candidates(40, 12, _generator())
    kept = _loss(table, bias, hidden[10:], targets[10:], candidates)
    targets[:10] = -100
    loss = _loss(table, bias, hidden, targets, candidates)
    torch.testing.assert_close(loss, kept)
    assert torch.autograd.grad(loss, hidden)[0][:10].eq(0).all()


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    table, bias, hidden, targets = _problem()
    loss = _loss(table, bias, hidden, torch.full_like(targets, -100), sample_candidates(40, 12))
    gradients = torch.autograd.grad(loss, (table, bias, hidden))
    assert loss.item() == 0.0
    assert all(bool(gradient.eq(0).all()) for gradient in gradients)


def test_bfloat16_inputs_give_a_float32_loss() -> None:
    table, bias, hidden, targets = _problem()
    candidates = sample_candidates(40, 12, _generator())
    low = [tensor.detach().bfloat16() for tensor in (table, bias, hidden)]
    loss = _loss(low[0], low[1], low[2], targets, candidates)
    assert loss.dtype == torch.float32
    reference = _loss(low[0].float(), low[1].float(), low[2].float(), targets, candidates)
    torch.testing.assert_close(loss, reference, rtol=1e-2, atol=0)


def test_three_dimensions_and_no_bias() -> None:
    table, _, hidden, targets = _problem()
    candidates = sample_candidates(40, 12, _generator())
    flat = _loss(table, None, hidden, targets, candidates)
    torch.testing.assert_close(_loss(table, None, hidden.view(3, 10, -1), targets.view(3, 10), candidates), flat)


def test_head_rows_of_foreign_heads() -> None:
    with pytest.raises(TypeError, match=r"Identity.*factorization.*softmax='full'"):
        head_rows(nn.Identity(), torch.tensor([0]))


@pytest.mark.parametrize("num_sampled", [0, 11])
def test_bad_number_of_candidates(num_sampled: int) -> None:
    with pytest.raises(ValueError, match=f"num_sampled={num_sampled} .*vocab_size=10"):
        sample_candidates(10, num_sampled)


def test_bad_shapes() -> None:
    table, bias, hidden, targets = _problem()
    with pytest.raises(ValueError, match="targets"):
        _loss(table, bias, hidden, targets[:-1], sample_candidates(40, 5))


def test_log_expected_count_is_accurate_for_rare_ids() -> None:
    # 1 - (1 - P)^T with P = 9.3e-8 cancels to nothing in float32 unless it is written with log1p and expm1.
    vocab_size = 793_471
    probability = math.log1p(1 / vocab_size) / math.log(vocab_size + 1)
    expected = math.log(-math.expm1(8192 * math.log1p(-probability)))
    assert log_expected_count(torch.tensor([vocab_size - 1]), vocab_size, 8192.0).item() == pytest.approx(expected)


@pytest.mark.parametrize("method", ["low_rank", "group_reduce"])
def test_rows_of_a_compressed_head(method: str) -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(16, 200))
    compress(head, method, ratio=2, token_counts=torch.arange(200, 0, -1))
    dense = copy.deepcopy(head)
    densify(dense)
    ids = torch.tensor([[5, 199, 5], [0, 77, 77]])
    torch.testing.assert_close(head_rows(head[0], ids), head_rows(dense[0], ids))
    hidden, targets = torch.randn(2, 3, 16, requires_grad=True), torch.tensor([[1, 2, 3], [4, 199, -100]])
    candidates = sample_candidates(200, 50)
    losses = [
        sampled_softmax_loss(hidden, targets, partial(head_rows, layer), layer.bias, candidates, 200)
        for layer in (head[0], dense[0])
    ]
    torch.testing.assert_close(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1])
    losses[0].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters() if parameter.numel())
    # All ids sampled: the full softmax of the compressed head.
    full = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten())
    every = sample_candidates(200, 200)
    rows = partial(head_rows, head[0])
    torch.testing.assert_close(sampled_softmax_loss(hidden, targets, rows, head[0].bias, every, 200), full)
