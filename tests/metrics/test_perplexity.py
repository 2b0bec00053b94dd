"""Perplexity against torchmetrics, float64 numpy, and its own sums over parts of the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchmetrics.text
from torch import nn

from lightning_embcompress.metrics import Perplexity
from lightning_embcompress.metrics.perplexity import token_negative_log_likelihood


def _batches(dtype: torch.dtype = torch.float32, number: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(number):
        logits = (4 * torch.randn(4, 7, 50, generator=generator)).to(dtype)
        targets = torch.randint(50, (4, 7), generator=generator)
        targets[torch.rand(4, 7, generator=generator) < 0.2] = -100
        batches.append((logits, targets))
    return batches


def _numpy_perplexity(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    nll = []
    for logits, targets in batches:
        scores = logits.double().numpy().reshape(-1, logits.shape[-1])
        flat = targets.numpy().reshape(-1)
        scores, flat = scores[flat != -100], flat[flat != -100]
        log_probabilities = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        nll.append(-log_probabilities[np.arange(len(flat)), flat])
    return float(np.exp(np.concatenate(nll).mean()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_float64_reference_in_every_dtype(dtype: torch.dtype) -> None:
    batches = _batches(dtype)
    metric = Perplexity()
    for logits, targets in batches:
        metric.update(logits, targets)
    # The logits are the same rounded numbers on both sides, so even bfloat16 must agree to float32 precision.
    assert metric.compute().item() == pytest.approx(_numpy_perplexity(batches), rel=1e-5)


def test_equals_torchmetrics() -> None:
    metric, reference = Perplexity(), torchmetrics.text.Perplexity(ignore_index=-100)
    for logits, targets in _batches():
        # `forward` returns the value of the batch alone.
        torch.testing.assert_close(metric(logits, targets).float(), reference(logits, targets), rtol=1e-5, atol=0)
    torch.testing.assert_close(metric.compute().float(), reference.compute(), rtol=1e-5, atol=0)


def test_flat_and_chunked_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = _batches()[0]
    whole = token_negative_log_likelihood(logits, targets)
    monkeypatch.setattr("lightning_embcompress.metrics.perplexity._CHUNK_ELEMENTS", 3 * 50)
    assert torch.equal(token_negative_log_likelihood(logits.flatten(0, 1), targets.flatten()), whole.flatten())
    assert torch.equal(whole.eq(0), targets.eq(-100))


def test_update_from_a_computed_loss() -> None:
    metric = Perplexity()
    for logits, targets in _batches():
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        count = targets.ne(-100).sum()
        metric.update(nll_sum=loss * count, count=count)
    assert metric.compute().item() == pytest.approx(_numpy_perplexity(_batches()), rel=1e-5)


def test_sums_of_two_processes_add_up() -> None:
    batches = _batches()
    ranks = [Perplexity(), Perplexity()]
    ranks[0].update(*batches[0])
    for batch in batches[1:]:
        ranks[1].update(*batch)

    def gathered(_: torch.Tensor, group: object = None) -> list[torch.Tensor]:
        return [ranks[0].metric_state[state.pop(0)], ranks[1].metric_state[state.pop(0)]]

    # What DDP does: every state of every rank is gathered, then reduced by its function.
    state = [name for name in ranks[0].metric_state for _ in ranks]
    merged = Perplexity(dist_sync_fn=gathered, distributed_available_fn=lambda: True)
    merged.update(*batches[0])
    assert merged.compute().item() == pytest.approx(_numpy_perplexity(batches), rel=1e-6)
    if not hasattr(ranks[0], "merge_state"):
        pytest.skip("this version of torchmetrics merges states by gathering only")
    ranks[0].merge_state(ranks[1])
    assert ranks[0].compute().item() == pytest.approx(_numpy_perplexity(batches), rel=1e-6)


def test_the_sum_stays_float64_when_the_model_is_cast() -> None:
    model = nn.ModuleDict({"perplexity": Perplexity()})
    metric = model["perplexity"]
    metric.update(nll_sum=torch.tensor(1001.0), count=torch.tensor(1000))
    for cast in (model.bfloat16, model.half, lambda: model.to(torch.bfloat16)):
        cast()
        assert metric.nll_sum.dtype == torch.float64
    assert metric.compute().log().item() == pytest.approx(1.001)
    metric.reset()
    assert metric.nll_sum.dtype == torch.float64
    assert metric.count == 0


def test_long_sums_do_not_stall() -> None:
    metric = Perplexity()
    metric.update(nll_sum=torch.tensor(2.0**30), count=torch.tensor(2**28))
    for _ in range(100):
        metric.update(nll_sum=torch.tensor(1.0), count=torch.tensor(1))
    # In float32 each of the hundred would be lost beside 2^30.
    assert metric.nll_sum.item() == 2.0**30 + 100


def test_no_tokens_give_nan() -> None:
    metric = Perplexity()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan()
    metric.update(torch.zeros(1, 2, 3), torch.full((1, 2), -100))
    assert metric.compute().isnan()
    metric.update(torch.zeros(0, 2, 3), torch.zeros(0, 2, dtype=torch.int64))
    assert metric.compute().isnan()


def test_infinite_logits_of_ignored_tokens_do_not_count() -> None:
    logits = torch.zeros(2, 4)
    logits[1] = float("inf")
    metric = Perplexity()
    metric.update(logits, torch.tensor([0, -100]))
    assert metric.compute().item() == pytest.approx(4.0)


def test_the_likelihood_has_the_gradient_of_cross_entropy() -> None:
    logits, targets = _batches()[0]
    logits = logits.requires_grad_()
    (ours,) = torch.autograd.grad(token_negative_log_likelihood(logits, targets).sum(), logits)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(ours, torch.autograd.grad(loss, logits)[0])


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.int64), ValueError, r"\(2, 3, 4\) and \(2, 2\)"),
        (torch.zeros(4), torch.zeros((), dtype=torch.int64), ValueError, "vocabulary"),
        (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), TypeError, "floating point"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32), TypeError, "long"),
    ],
)
def test_bad_input(logits: torch.Tensor, targets: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Perplexity().update(logits, targets)


@pytest.mark.parametrize("arguments", [{}, {"count": torch.tensor(1)}, {"logits": torch.zeros(1, 2)}])
def test_half_an_update_is_refused(arguments: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="either"):
        Perplexity().update(**arguments)
