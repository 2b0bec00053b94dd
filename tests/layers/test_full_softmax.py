"""The full softmax loss against torch's own cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_embcompress.layers.full_softmax import CrossEntropy, full_softmax_loss

TOKENS, VOCAB_SIZE, DIM = 23, 37, 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens a chunk, so that there are several and the last is shorter."""
    monkeypatch.setattr(CrossEntropy, "chunk_elements", 5 * VOCAB_SIZE)


def _case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, generator=generator)
    weight = torch.randn(VOCAB_SIZE, DIM, generator=generator)
    targets = torch.randint(VOCAB_SIZE, (TOKENS,), generator=generator)
    targets[[0, 7, 22]] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
def test_loss_and_gradients(dtype: torch.dtype, tolerance: float, overwrite: bool) -> None:
    hidden, weight, targets = _case(dtype)
    loss, count = full_softmax_loss(hidden @ weight.T, targets, overwrite=overwrite)
    (3 * loss).backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert int(count) == TOKENS - 3
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    # Logits rounded as those that the loss has seen, gradients not.
    rounded = (hidden @ weight.T).detach().double()
    logits = exact_hidden @ exact_weight.T
    exact = F.cross_entropy(logits + (rounded - logits).detach(), targets)
    (3 * exact).backward()
    assert loss.item() == pytest.approx(exact.item(), rel=min(tolerance, 1e-6))
    for found, expected in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert found is not None
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [TOKENS, 0])
def test_nothing_to_predict(tokens: int) -> None:
    logits, targets = torch.randn(tokens, VOCAB_SIZE).requires_grad_(), torch.full((tokens,), -100)
    loss, count = full_softmax_loss(logits, targets)
    assert (loss.item(), count.item()) == (0, 0)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    with torch.no_grad():
        assert full_softmax_loss(logits, targets)[0].item() == 0


def test_infinite_logits_in_an_ignored_row() -> None:
    logits = torch.randn(TOKENS, VOCAB_SIZE)
    logits[0] = torch.inf
    loss, _ = full_softmax_loss(logits.requires_grad_(), _case()[2])
    with torch.no_grad():
        torch.testing.assert_close(full_softmax_loss(logits, _case()[2])[0], loss.detach())
    assert torch.isfinite(loss)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_overwriting_what_is_needed_raises() -> None:
    hidden, _, targets = _case()
    scores = torch.randn(TOKENS, VOCAB_SIZE).requires_grad_().exp()  # whose gradient is itself
    loss, _ = full_softmax_loss(scores, targets, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    hidden, weight, targets = _case()
    loss, _ = full_softmax_loss(hidden @ weight.T, targets, overwrite=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
