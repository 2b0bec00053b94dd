"""The loss of distillation against one that is written down plainly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_embcompress.layers.chunked_loss import loss_of_head, loss_of_logits
from lightning_embcompress.layers.distillation import Distillation, joined_scores, teacher_scores

POSITIONS, VOCAB_SIZE = 11, 40


def _logits(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(POSITIONS, VOCAB_SIZE, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def _targets() -> Tensor:
    targets = torch.arange(POSITIONS) * 3
    targets[[2, 7]] = -100
    return targets


def _divergence(student: Tensor, teacher: Tensor, top_k: int | None, temperature: float) -> Tensor:
    """The likeliest tokens and the sum of all others, in double precision."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    if top_k is not None and top_k < VOCAB_SIZE:
        order = p.argsort(-1, descending=True)
        p, q = p.gather(-1, order), q.gather(-1, order)
        p, q = (torch.cat([x[:, :top_k], x[:, top_k:].sum(-1, keepdim=True)], -1) for x in (p, q))
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 7, VOCAB_SIZE, None])
@pytest.mark.parametrize("overwrite", [False, True])
def test_loss_and_gradient(
    temperature: float, top_k: int | None, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four positions at a time, and three at the end.
    monkeypatch.setattr(Distillation, "chunk_elements", 4 * VOCAB_SIZE)
    student, teacher, targets = _logits(0).requires_grad_(), _logits(1), _targets()
    said = teacher_scores(teacher, top_k, temperature)
    found = loss_of_logits(student.clone(), Distillation(targets, said, temperature, 0.7, 1.3), overwrite=overwrite)
    scored = targets >= 0
    divergence = _divergence(student, teacher, top_k, temperature)[scored].mean()
    cross_entropy = F.cross_entropy(student, targets)
    torch.testing.assert_close(found.terms, torch.stack([cross_entropy, divergence]).detach())
    assert found.num_targets == 9
    expected = torch.autograd.grad(2 * (0.7 * cross_entropy + 1.3 * divergence), student)
    torch.testing.assert_close(torch.autograd.grad(2 * found.loss, student), expected)


@pytest.mark.parametrize("top_k", [7, None])
def test_a_head_whose_logits_are_never_there_at_once(top_k: int | None) -> None:
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(6, VOCAB_SIZE).double(), _targets()
    hidden = torch.randn(POSITIONS, 6, dtype=torch.double, requires_grad=True)
    said = teacher_scores(_logits(1), top_k, 2.0)
    parts = [teacher_scores(part, top_k, 2.0) for part in _logits(1).split(4)]
    for one, other in zip(joined_scores(parts), said, strict=True):
        assert one is other is None or torch.equal(one, other)
    expected = loss_of_logits(head(hidden), Distillation(targets, said, 2.0, 0.7, 1.3))
    found = loss_of_head(head, hidden, Distillation(targets, said, 2.0, 0.7, 1.3), chunk_tokens=4)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    inputs = [hidden, *head.parameters()]
    torch.testing.assert_close(torch.autograd.grad(found.loss, inputs), torch.autograd.grad(expected.loss, inputs))
    with pytest.raises(ValueError, match="scored 10 positions over 40 tokens, but the model 11 over 40"):
        loss_of_head(head, hidden, Distillation(targets, teacher_scores(_logits(1)[:10], 5)))


def test_a_teacher_that_agrees_teaches_nothing_and_few_tokens_say_less_than_all() -> None:
    student, teacher, targets = _logits(0).requires_grad_(), _logits(1), _targets()
    equal = loss_of_logits(
        student, Distillation(targets, teacher_scores(student.detach(), 5), cross_entropy_weight=0.0)
    )
    (gradient,) = torch.autograd.grad(equal.loss, student)
    assert abs(equal.loss.item()) < 1e-12
    assert gradient.abs().max() < 1e-12
    parts = [
        loss_of_logits(student, Distillation(targets, teacher_scores(teacher, k))).terms[1] for k in (1, 4, 16, None)
    ]
    assert parts == sorted(parts)
    assert len(set(parts)) == 4


def test_what_is_left_of_sure_distributions_is_summed_and_not_what_rounding_leaves_of_one() -> None:
    """Masses of 10⁻¹⁷ beside one, in float32."""
    student, teacher = torch.zeros(1, VOCAB_SIZE), torch.zeros(1, VOCAB_SIZE)
    student[0, 3], teacher[0, 3] = 42.0, 40.0
    student.requires_grad_()
    found = loss_of_logits(student, Distillation(torch.tensor([3]), teacher_scores(teacher, 1), 1.0, 0.0, 1.0))
    (gradient,) = torch.autograd.grad(found.loss, student)
    rest = 39 * torch.exp(torch.tensor(-40.0, dtype=torch.double))
    expected = _divergence(student.detach().double(), teacher.double(), 1, 1.0)
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-14)
    # Pulled towards the teacher's 39 e⁻⁴⁰, from the student's 39 e⁻⁴².
    torch.testing.assert_close(
        gradient[0, 5].double() * 39, rest * (torch.exp(torch.tensor(-2.0)) - 1), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision(dtype: torch.dtype) -> None:
    student, teacher, targets = _logits(0).to(dtype).requires_grad_(), _logits(1).to(dtype), _targets()
    found = loss_of_logits(student, Distillation(targets, teacher_scores(teacher, 7), 1.5))
    exact = student.detach().double().requires_grad_()
    wide = loss_of_logits(exact, Distillation(targets, teacher_scores(teacher.double(), 7), 1.5))
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(wide.loss.item(), rel=1e-5)
    (gradient,), (expected,) = torch.autograd.grad(found.loss, student), torch.autograd.grad(wide.loss, exact)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-4)


def test_no_target_at_all() -> None:
    student = _logits(0).requires_grad_()
    with torch.no_grad():
        student[0, 0] = torch.inf
    found = loss_of_logits(student, Distillation(torch.full((POSITIONS,), -100), teacher_scores(_logits(1), 5)))
    assert found.loss == 0
    assert torch.autograd.grad(found.loss, student)[0].eq(0).all()


def test_what_does_not_fit_is_refused() -> None:
    for top_k, temperature, message in ((0, 1.0, "teacher_top_k=0"), (3, 0.0, "temperature=0")):
        with pytest.raises(ValueError, match=message):
            teacher_scores(_logits(1), top_k, temperature)
    fewer = (
        (teacher_scores(_logits(1)[:10], 5), "10 positions .* 11"),
        (teacher_scores(_logits(1)[:, :39]), "39 tokens"),
    )
    for teacher, message in fewer:
        with pytest.raises(ValueError, match=message):
            loss_of_logits(_logits(0), Distillation(_targets(), teacher))
