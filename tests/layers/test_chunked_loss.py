"""The loss of a head, a chunk of tokens at a time, against the loss over all of its logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_embcompress import collect_statistics
from lightning_embcompress.layers import chunked_loss
from lightning_embcompress.layers.chunked_loss import loss_of_head, loss_of_logits
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.layers.distillation import Distillation, teacher_scores
from lightning_embcompress.layers.full_softmax import CrossEntropy, full_softmax_loss, head_softmax_loss
from lightning_embcompress.methods.blocks import RowBlocks
from lightning_embcompress.methods.registry import Quantization
from toys import compressed_head

TOKENS, VOCAB_SIZE, DIM, CHUNK = 23, 60, 8, 5


def _compressed(method: str, dtype: torch.dtype = torch.float64) -> CompressedLinear:
    return compressed_head(method, VOCAB_SIZE, DIM, dtype)


def _linear(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(DIM, VOCAB_SIZE, bias=bias, dtype=dtype)


def _data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, DIM, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (TOKENS,), generator=generator)
    # Single ones, and one whole chunk.
    targets[[0, 7, 22]] = -100
    targets[10:15] = -100
    return hidden, targets


def _gradients(head: nn.Module, hidden: Tensor) -> dict[str, Tensor | None]:
    found = {"hidden": hidden.grad, **{name: parameter.grad for name, parameter in head.named_parameters()}}
    hidden.grad = None
    head.zero_grad()
    return {name: None if gradient is None else gradient.clone() for name, gradient in found.items()}


def _both(head: nn.Module, hidden: Tensor, targets: Tensor, **options: Any) -> list[dict[str, Any]]:
    """Loss and gradients by all logits, and by chunks of them."""
    found = []
    for loss, count in (
        full_softmax_loss(head(hidden), targets),
        head_softmax_loss(head, hidden, targets, **{"chunk_tokens": CHUNK, **options}),
    ):
        (3 * loss).backward()
        found.append({"loss": loss.detach(), "count": count, **_gradients(head, hidden)})
    return found


class _TwoTables(nn.Module):
    """A gradient of one tensor is that of both weights, and the bias is as large as the logits of one token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(_linear().weight.detach()), nn.Parameter(torch.zeros(VOCAB_SIZE, DIM))
        self.bias = nn.Parameter(torch.randn(1, VOCAB_SIZE))
        self.double()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.first + self.second).T + self.bias


def _all_logits(head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return full_softmax_loss(head(hidden), targets)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, None])
@pytest.mark.parametrize("head", [_linear(bias=False), _TwoTables(), nn.Sequential(_linear(), nn.Tanh())])
def test_other_heads(head: nn.Module, chunk_tokens: int | None) -> None:
    whole, chunked = _both(head, *_data(), chunk_tokens=chunk_tokens)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [["hidden"], ["bias"], ["weight", "bias"], ["hidden", "weight"]])
def test_frozen_parts_get_no_gradient(frozen: list[str]) -> None:
    head = _linear()
    hidden, targets = _data()
    hidden.requires_grad_("hidden" not in frozen)
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name not in frozen)
    whole, chunked = _both(head, hidden, targets)
    assert [name for name, found in chunked.items() if found is None] == frozen
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranges", ["minmax", "learned"])
def test_factors_in_training_are_rounded_once(ranges: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = _compressed("group_reduce")
    head.factorization = head.factorization.prepared(Quantization(bits=3, group_size=16, ranges=ranges))
    hidden, targets = _data()
    rounded, original = [], type(head.factorization).plain
    monkeypatch.setattr(type(head.factorization), "plain", lambda self: rounded.append(self) or original(self))
    head_softmax_loss(head, hidden, targets, chunk_tokens=CHUNK)
    assert len(rounded) == 1
    seen = []
    head.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    head_softmax_loss(head, hidden, targets, chunk_tokens=CHUNK)
    assert sum(seen) == len(hidden)


def test_the_graph_can_be_run_twice_but_not_differentiated() -> None:
    head = _linear()
    hidden, targets = _data()
    for loss, _ in (_all_logits(head, hidden, targets), head_softmax_loss(head, hidden, targets, chunk_tokens=CHUNK)):
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(loss, hidden, create_graph=True)
        loss.backward(retain_graph=True)
        once = _gradients(head, hidden)
        loss.backward()
        torch.testing.assert_close(_gradients(head, hidden), once)


def test_a_table_that_is_embedding_and_head() -> None:
    head = _compressed("group_reduce")
    embedding = CompressedEmbedding(head.factorization)
    found = []
    for loss in (_all_logits, partial(head_softmax_loss, chunk_tokens=CHUNK)):
        head.zero_grad()
        loss(head, embedding(torch.arange(TOKENS)).tanh(), _data()[1])[0].backward()
        found.append({name: parameter.grad.clone() for name, parameter in head.named_parameters()})
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_hooks_of_parameters_see_the_whole_gradient_once() -> None:
    head, seen = _linear(), []
    head.weight.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    doubled = [found["weight"] for found in _both(head, *_data())]
    torch.testing.assert_close([2 * one for one in seen], doubled)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype: torch.dtype, tolerance: float, autocast: bool) -> None:
    head = _compressed("group_reduce", torch.float32 if autocast else dtype)
    hidden, targets = _data(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        whole, chunked = _both(head, hidden, targets)
    assert chunked["loss"].dtype == torch.float32
    assert chunked["hidden"].dtype == hidden.dtype
    torch.testing.assert_close(chunked, whole, rtol=tolerance, atol=tolerance)


def test_half_precision_is_added_up_in_float32() -> None:
    head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    # Each token's gradient is -1/2: in bfloat16 a sum of -256 and -1/2 is -256.
    hidden = torch.ones(2048, 1, dtype=torch.bfloat16)
    loss, _ = head_softmax_loss(head, hidden, torch.zeros(2048, dtype=torch.long), chunk_tokens=1)
    (2048 * loss).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.flatten().tolist() == [-1024, 1024]


def test_small_probabilities_in_float16() -> None:
    head = nn.Linear(1, 2, bias=False, dtype=torch.float16)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[16.75], [0.0]]))  # e^-16.75 = 5.3e-8, twice below the half of 2^-24 at 1.0
    hidden = torch.ones(1, 1, dtype=torch.float16, requires_grad=True)
    loss, _ = head_softmax_loss(head, hidden, torch.zeros(1, dtype=torch.long))
    (2**16 * loss).backward()
    assert head.weight.grad is not None
    assert float(head.weight.grad[1, 0]) == pytest.approx(2**16 * 5.316e-8, rel=0.02)


@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("head", [_linear(), _compressed("group_reduce"), _compressed("tensor_train")])
def test_nothing_to_predict(head: nn.Module, tokens: int) -> None:
    hidden = torch.randn(tokens, DIM, dtype=torch.float64, requires_grad=True)
    targets = torch.full((tokens,), -100)
    loss, count = head_softmax_loss(head, hidden, targets, chunk_tokens=3)
    loss.backward()
    assert (loss.item(), count.item()) == (0, 0)
    assert not any(bool(gradient.any()) for gradient in _gradients(head, hidden).values() if gradient is not None)
    with torch.no_grad():
        assert head_softmax_loss(head, hidden, targets, chunk_tokens=3)[0].item() == 0


def test_chunks_go_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    head, calls = _linear(), []
    head.register_forward_hook(lambda _, __, logits: calls.append(len(logits)))
    hidden, targets = torch.zeros(1000, DIM, dtype=torch.float64), torch.zeros(1000, dtype=torch.long)
    monkeypatch.setattr(chunked_loss, "_CPU_LEAST_ELEMENTS", 300 * VOCAB_SIZE)
    head_softmax_loss(head, hidden, targets)
    assert calls == [250] * 4
    calls.clear()
    monkeypatch.setattr(chunked_loss, "MOST_ELEMENTS", 1)
    head_softmax_loss(head, hidden, targets)
    assert max(calls) <= 64
    assert (sum(calls), len(calls)) == (1000, 16)


def test_in_a_checkpoint() -> None:
    head = _compressed("tensor_train")
    hidden, targets = _data()
    expected = _both(head, hidden, targets)[0]

    def run(states: Tensor) -> Any:
        return head_softmax_loss(head, states, targets, chunk_tokens=CHUNK)

    for use_reentrant in (False, True):
        loss, _ = checkpoint(run, hidden, use_reentrant=use_reentrant)
        (3 * loss).backward()
        torch.testing.assert_close(_gradients(head, hidden)["hidden"], expected["hidden"])


@pytest.mark.parametrize("method", [None, "group_reduce"])
@pytest.mark.parametrize("frozen_backbone", [False, True])
def test_statistics_are_the_same(method: str | None, frozen_backbone: bool) -> None:
    head = _linear(dtype=torch.float32) if method is None else _compressed(method, torch.float32)
    model = nn.Sequential(nn.Embedding(VOCAB_SIZE, DIM).requires_grad_(not frozen_backbone), head)
    tables = ["1"] if frozen_backbone else ["0", "1"]
    ids = torch.randint(VOCAB_SIZE, (3, 4, 6))
    targets = ids.roll(-1, -1)
    targets[..., -1] = -100

    def collect(loss: Callable[..., tuple[Tensor, Tensor]]) -> Any:
        def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            return loss(model[1], model[0](batch[0]), batch[1])[0]

        counts = torch.ones(VOCAB_SIZE)
        return collect_statistics(model, zip(ids, targets, strict=True), loss_fn, tables=tables, token_counts=counts)

    chunked, whole = collect(partial(head_softmax_loss, chunk_tokens=CHUNK)), collect(_all_logits)
    assert chunked.num_targets == whole.num_targets == 3 * 4 * 5
    for kind in ("hidden", "hidden_mean", "probabilities", "squared_probabilities", "gradients", "gradient_energies"):
        torch.testing.assert_close(getattr(chunked, kind), getattr(whole, kind), rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mistakes() -> None:
    head = _linear()
    hidden, targets = _data()
    with pytest.raises(ValueError, match="targets"):
        head_softmax_loss(head, hidden, targets[1:])
    with pytest.raises(ValueError, match="chunk_tokens"):
        head_softmax_loss(head, hidden, targets, chunk_tokens=0)
    outside = torch.ones(VOCAB_SIZE, dtype=torch.float64, requires_grad=True)
    head.forward = lambda input: nn.Linear.forward(head, input) * outside  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"tensor of shape \(60,\) that requires a gradient and is not among"):
        head_softmax_loss(head, hidden, targets)
    assert hidden.grad is outside.grad is None


def test_several_processes(torchrun: Callable[..., str]) -> None:
    """DDP and FSDP2 with tables that are tied, frozen or units of their own."""
    assert torchrun(Path(__file__).parent / "workers" / "chunked_loss.py").count("as one process") == 2


def test_many_tokens_of_one_chunk_in_float16() -> None:
    """The gradient of the bias adds up those of all tokens, which no scale of the training makes smaller."""
    head, tokens = _linear(dtype=torch.float16), 12_000
    hidden = torch.zeros(tokens, DIM, dtype=torch.float16, requires_grad=True)
    loss, _ = head_softmax_loss(head, hidden, torch.zeros(tokens, dtype=torch.long), chunk_tokens=tokens)
    (gradient,) = torch.autograd.grad(loss, head.bias)
    expected = F.softmax(head.bias.detach().float(), -1) - F.one_hot(torch.tensor(0), VOCAB_SIZE)
    torch.testing.assert_close(gradient.float(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("method", ["group_reduce", "transform_coding"])
@pytest.mark.parametrize("top_k", [None, 7])
def test_logits_stay_in_the_order_of_the_blocks(
    method: str, top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = _compressed(method)
    hidden, targets = _data()
    teacher = teacher_scores(torch.randn(TOKENS, VOCAB_SIZE, dtype=torch.float64), top_k)
    whole = [
        full_softmax_loss(head(hidden), targets)[0],
        loss_of_logits(head(hidden), Distillation(targets, teacher)).loss,
    ]
    assert head.factorization.storage_order is not None
    if top_k is not None:
        monkeypatch.setattr(RowBlocks, "logits", None)
    chunked = [
        head_softmax_loss(head, hidden, targets, chunk_tokens=CHUNK)[0],
        loss_of_head(head, hidden, Distillation(targets, teacher), chunk_tokens=CHUNK).loss,
    ]
    torch.testing.assert_close(chunked, whole)
    inputs = [hidden, *head.parameters()]
    for one, other in zip(chunked, whole, strict=True):
        found, expected = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (one, other))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("distilled", [False, True])
def test_negative_targets_are_no_tokens(distilled: bool) -> None:
    head = _compressed("group_reduce")
    hidden, targets = _data()
    targets[0] = -1
    teacher = teacher_scores(torch.randn(TOKENS, VOCAB_SIZE, dtype=torch.float64), 7)
    assert head.factorization.storage_order is not None
    objective = Distillation(targets, teacher) if distilled else CrossEntropy(targets)
    with pytest.raises(IndexError, match="out of range"):
        loss_of_head(head, hidden, objective)


def test_heads_that_compute_something_else_are_called() -> None:
    class Scaled(CompressedLinear):
        def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * super().forward(input)

    scaled, other = Scaled(_compressed("group_reduce").factorization), _compressed("group_reduce")
    prepared = Scaled(scaled.factorization.prepared(Quantization(bits=4, group_size=16)))
    call = other.forward
    other.forward = lambda input: 3 * call(input)  # type: ignore[method-assign]
    for head in (scaled, prepared, other):
        torch.testing.assert_close(head_softmax_loss(head, *_data()), _all_logits(head, *_data()))


def test_backward_hooks_see_the_order_of_ids() -> None:
    head = _compressed("group_reduce")
    hidden, targets = _data()
    seen: list[Tensor] = []
    head.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    head_softmax_loss(head, hidden, targets, chunk_tokens=TOKENS)
    scored = targets.ne(-100)
    assert seen[0].argmin(dim=1)[scored].equal(targets[scored])


@pytest.mark.parametrize("head", [_compressed("group_reduce"), _linear()])
def test_a_large_vocabulary_is_computed_in_tiles(head: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, targets = _data()
    expected = _both(head, hidden, targets)[0]
    monkeypatch.setattr(chunked_loss, "MOST_ELEMENTS", chunked_loss.LEAST_TOKENS * VOCAB_SIZE - 1)
    monkeypatch.setattr(chunked_loss, "_with_gradients", None)
    loss, count = head_softmax_loss(head, hidden, targets)
    (3 * loss).backward()
    found = {"loss": loss.detach(), "count": count, **_gradients(head, hidden)}
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_batches_of_other_sizes_in_a_compiled_function(bias: bool) -> None:
    head = nn.Linear(8, 50, bias=bias)

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return head_softmax_loss(head, 2 * hidden, targets)[0]

    for tokens in (5, 6, 7, 9):
        hidden, targets = torch.randn(tokens, 8), torch.randint(50, (tokens,))
        losses = [function(hidden, targets) for function in (torch.compile(loss, backend="eager"), loss)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(one, list(head.parameters())) for one in losses))


def test_what_is_done_to_all_layers_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets = nn.Linear(8, 50), torch.randn(5, 8), torch.randint(50, (5,))
    forward = nn.Linear.forward

    def compare() -> None:
        found = torch.autograd.grad(head_softmax_loss(head, hidden, targets)[0], list(head.parameters()))
        expected = torch.autograd.grad(F.cross_entropy(head(hidden), targets), list(head.parameters()))
        torch.testing.assert_close(found, expected)

    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 2 * output)
    try:
        compare()
    finally:
        handle.remove()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: forward(self, input).tanh())
    compare()
