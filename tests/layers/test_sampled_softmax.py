"""The log-uniform sampler against its law, the sampled softmax against the full one."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_embcompress.layers.sampled_softmax import (
    Candidates,
    head_rows,
    log_expected_count,
    log_uniform_draws,
    log_uniform_probability,
    sample_candidates,
    sampled_softmax_loss,
)
from toys import DIM, VOCAB_SIZE, compressed_head


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
    many = log_uniform_draws(793_471, 500_000, _generator())
    assert many.min() == 0
    assert 790_000 < many.max() < 793_471


@pytest.mark.parametrize("num_sampled", [1, 10, 99])
def test_candidates_are_different_and_counted(num_sampled: int) -> None:
    candidates = sample_candidates(100, num_sampled, _generator(3))
    # The draws as an independent loop sees them, until the last new id.
    generator, draws = _generator(3), torch.empty(0, dtype=torch.long)
    for size in (2 * num_sampled, *(2 * num_sampled * 2**doubling for doubling in range(8))):
        draws = torch.cat([draws, log_uniform_draws(100, size, generator)])
    seen: set[int] = set()
    tries = 0
    while len(seen) < num_sampled:
        seen.add(int(draws[tries]))
        tries += 1
    assert sorted(candidates.ids.tolist()) == sorted(seen)
    assert candidates.num_tries == tries


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
    torch.testing.assert_close(*(torch.autograd.grad(one, (table, bias, hidden)) for one in (loss, full)))


@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_formula_written_out(bias: bool) -> None:
    table, own, hidden, targets = _problem()
    candidates, added = sample_candidates(40, 12, _generator()), own if bias else None
    scores = F.linear(hidden, table, added) - log_expected_count(torch.arange(40), 40, candidates.num_tries)
    losses = []
    for position, target in enumerate(targets.tolist()):
        # A candidate that is the target by accident stands for nothing else.
        classes = [target] + [k for k in candidates.ids.tolist() if k != target]
        losses.append(scores[position, classes].logsumexp(0) - scores[position, target])
    assert set(targets.tolist()) & set(candidates.ids.tolist())
    found = _loss(table, added, hidden.view(3, 10, -1), targets.view(3, 10), candidates)
    torch.testing.assert_close(found, torch.stack(losses).mean())


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


@pytest.mark.parametrize(("target", "candidates"), [(7, Candidates(torch.tensor([7]), 1.0)), (-100, None)])
def test_nothing_to_predict(target: int, candidates: Candidates | None) -> None:
    """The only candidate is the target, or all targets are ignored."""
    table, bias, hidden, _ = _problem()
    loss = _loss(table, bias, hidden, torch.full((30,), target), candidates or sample_candidates(40, 12))
    assert loss.item() == 0.0
    assert not any(bool(gradient.any()) for gradient in torch.autograd.grad(loss, (table, bias, hidden)))


def test_ignored_targets_contribute_nothing() -> None:
    table, bias, hidden, targets = _problem()
    candidates = sample_candidates(40, 12, _generator())
    kept = _loss(table, bias, hidden[10:], targets[10:], candidates)
    targets[:10] = -100
    loss = _loss(table, bias, hidden, targets, candidates)
    torch.testing.assert_close(loss, kept)
    assert torch.autograd.grad(loss, hidden)[0][:10].eq(0).all()


def test_bfloat16_inputs_give_a_float32_loss() -> None:
    table, bias, hidden, targets = _problem()
    candidates = sample_candidates(40, 12, _generator())
    low = [tensor.detach().bfloat16() for tensor in (table, bias, hidden)]
    loss = _loss(low[0], low[1], low[2], targets, candidates)
    assert loss.dtype == torch.float32
    reference = _loss(low[0].float(), low[1].float(), low[2].float(), targets, candidates)
    torch.testing.assert_close(loss, reference, rtol=1e-2, atol=0)


def test_mistakes() -> None:
    with pytest.raises(TypeError, match=r"Identity.*factorization.*softmax='full'"):
        head_rows(nn.Identity(), torch.tensor([0]))
    for num_sampled in (0, 11):
        with pytest.raises(ValueError, match=f"num_sampled={num_sampled} .*vocab_size=10"):
            sample_candidates(10, num_sampled)
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
    head = compressed_head(method)
    dense = nn.Linear(DIM, VOCAB_SIZE)
    dense.load_state_dict({"weight": head.factorization.materialize(), "bias": head.bias})
    ids = torch.tensor([[5, 149, 5], [0, 77, 77]])
    torch.testing.assert_close(head_rows(head, ids), head_rows(dense, ids))
    hidden, targets = torch.randn(2, 3, DIM, requires_grad=True), torch.tensor([[1, 2, 3], [4, 149, -100]])
    # And all ids sampled: the full softmax.
    for candidates in (sample_candidates(VOCAB_SIZE, 50), sample_candidates(VOCAB_SIZE, VOCAB_SIZE)):
        losses = [
            sampled_softmax_loss(hidden, targets, partial(head_rows, layer), layer.bias, candidates, VOCAB_SIZE)
            for layer in (head, dense)
        ]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, hidden, retain_graph=True) for loss in losses))
    torch.testing.assert_close(losses[0], F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten()))
    losses[0].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters() if parameter.numel())
