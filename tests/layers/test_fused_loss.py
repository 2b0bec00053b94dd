"""The loss over tiles of the vocabulary, against the loss over all logits."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.layers.fused_loss import fused_cross_entropy
from toys import compressed_head, draw_blocks

TOKENS, VOCAB_SIZE, DIM, ROWS = 23, 70, 8, 9


def _head(method: str, dtype: torch.dtype = torch.float64, bias: bool = True) -> CompressedLinear:
    return compressed_head(method, VOCAB_SIZE, DIM, dtype, bias)


def _data(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, DIM, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (tokens,), generator=generator)
    targets[::5] = -100
    targets[3:6] = 7
    return hidden, targets


def _check(head: nn.Module, hidden: Tensor, targets: Tensor, **options: Any) -> None:
    """Loss and all gradients, by all logits and by tiles."""
    found = []
    tile_rows = options.pop("tile_rows", ROWS)
    inputs = [one for one in (hidden, *head.parameters()) if one.requires_grad]
    for fused in (False, True):
        if fused:
            loss = fused_cross_entropy(head, hidden, targets, tile_rows=tile_rows, **options)
        else:
            loss = F.cross_entropy(head(hidden).flatten(0, -2), targets.flatten(), **options)
            loss = loss.view(targets.shape) if loss.ndim else loss
        weights = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if loss.ndim else 3.0
        # A block that is kept as its rows has no basis.
        gradients = torch.autograd.grad((weights * loss).sum(), inputs, allow_unused=True, materialize_grads=True)
        found.append([loss.detach(), *gradients])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tile_rows", [1, 31, 1000])
def test_options(reduction: Any, label_smoothing: float, tile_rows: int) -> None:
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "tile_rows": tile_rows}
    _check(nn.Linear(DIM, VOCAB_SIZE, dtype=torch.float64), *_data(), **options)
    _check(_head("group_reduce"), *_data(), **options)


def test_another_ignored_target_and_leading_dimensions() -> None:
    hidden, targets = _data()
    states, ids = hidden.detach()[:20].view(4, 5, DIM).requires_grad_(), targets.where(targets >= 0, 7)[:20].view(4, 5)
    for reduction in ("mean", "none"):
        _check(_head("group_reduce"), states, ids, ignore_index=7, reduction=reduction)


@settings(max_examples=60)
@given(st.data())
def test_random_blocks(data: st.DataObject) -> None:
    factors = draw_blocks(data.draw, torch.float64, most=12)
    generator, tokens = torch.Generator().manual_seed(data.draw(st.integers(0, 9))), data.draw(st.integers(0, 6))
    hidden = torch.randn(tokens, factors.dim, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(factors.vocab_size, (tokens,), generator=generator)
    bias = torch.randn(factors.vocab_size, generator=generator, dtype=torch.float64)
    head = CompressedLinear(factors, nn.Parameter(bias))
    _check(head, hidden, targets, reduction="none", tile_rows=data.draw(st.integers(1, 9)))


@pytest.mark.parametrize("frozen", ["hidden", "factors", "bias"])
def test_only_what_is_asked_for_gets_a_gradient(frozen: str) -> None:
    head = _head("group_reduce")
    hidden, targets = _data()
    if frozen == "hidden":
        hidden = hidden.detach()
    elif frozen == "factors":
        head.factorization.requires_grad_(False)
    else:
        assert head.bias is not None
        head.bias.requires_grad_(False)
    _check(head, hidden, targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_are_added_up_in_float32(dtype: torch.dtype) -> None:
    """As parameters, or in float32 ones under autocast, which the backward pass follows."""
    head = _head("low_rank", dtype)
    hidden, targets = _data(dtype, tokens=200)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        found = fused_cross_entropy(head, hidden, targets, tile_rows=ROWS)
    assert found.dtype == torch.float32
    wide = _head("low_rank", dtype).double()
    states = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(wide(states), targets)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    gradients = [
        torch.autograd.grad(loss, inputs)
        for loss, inputs in ((found, [hidden, *head.parameters()]), (expected, [states, *wide.parameters()]))
    ]
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= 0.02 * other.norm()


@pytest.mark.parametrize(("factor", "common"), [(1.0, 1), (2.0**16, 1000)])
def test_small_probabilities_have_gradients_in_float16(factor: float, common: int) -> None:
    tokens, vocab_size = 1000, 20_000
    head = nn.Linear(4, vocab_size).half()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    hidden = torch.full((tokens, 4), 8.0, dtype=torch.float16, requires_grad=True)
    targets = torch.arange(tokens) % common
    (factor * fused_cross_entropy(head, hidden, targets)).backward()
    expected = torch.full((vocab_size,), factor / vocab_size)
    expected[:common] -= factor / common
    torch.testing.assert_close(head.bias.grad.float(), expected.half().float(), rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(head.weight.grad[:, 0].float(), (8 * expected).half().float(), rtol=1e-2, atol=1e-7)


_HEADS = [_head("group_reduce"), nn.Linear(DIM, VOCAB_SIZE, dtype=torch.float64), nn.Linear(DIM, VOCAB_SIZE).half()]


@pytest.mark.parametrize("head", _HEADS)
def test_no_targets_cost_nothing(head: nn.Module) -> None:
    hidden, _ = _data(next(head.parameters()).dtype)
    for states, ids in ((hidden, torch.full((TOKENS,), -100)), (hidden[:0], torch.zeros(0, dtype=torch.long))):
        loss = fused_cross_entropy(head, states, ids)
        assert loss.item() == 0
        assert not any(bool(gradient.any()) for gradient in torch.autograd.grad(loss, list(head.parameters())))
        assert fused_cross_entropy(head, states, ids, reduction="none").shape == ids.shape
    one_word = nn.Linear(DIM, 1, dtype=hidden.dtype)
    assert fused_cross_entropy(one_word, hidden, torch.zeros(TOKENS, dtype=torch.long)).item() == 0


def test_without_gradients_it_is_the_same_loss_of_one_tile_at_a_time() -> None:
    head = _head("group_reduce")
    hidden, targets = _data()
    widths = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            made = found if isinstance(found, tuple | list) else (found,)
            widths.extend(one.shape[1] for one in made if isinstance(one, Tensor) and one.shape[:-1] == (TOKENS,))
            return found

    with Watch():
        fused_cross_entropy(head, hidden, torch.where(targets < 0, 0, targets), tile_rows=ROWS).backward()
    assert 0 < max(widths) <= max(ROWS, DIM, sum(head.factorization.ranks))
    with torch.no_grad():
        loss = fused_cross_entropy(head, hidden, targets, tile_rows=ROWS)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden), targets).detach())


def test_deterministic_algorithms_are_enough() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        _check(_head("group_reduce"), *_data(), reduction="none", label_smoothing=0.1)
    finally:
        torch.use_deterministic_algorithms(before)


def test_it_is_differentiated_once() -> None:
    hidden, targets = _data()
    loss = fused_cross_entropy(_head("low_rank"), hidden, targets)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    # Twice through a graph that is kept is something else.
    first = torch.autograd.grad(loss, hidden, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets"),
        ({"targets": torch.full((TOKENS,), VOCAB_SIZE)}, "targets"),
        ({"targets": torch.full((TOKENS,), -1)}, "targets"),
        ({"reduction": "max"}, "reduction"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"tile_rows": 0}, "tile_rows"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    hidden, targets = _data()
    with pytest.raises(ValueError, match=message):
        fused_cross_entropy(_head("low_rank"), hidden, **{"targets": targets, **change})


def test_heads_that_compute_something_else_are_refused() -> None:
    class Scaled(CompressedLinear):
        def forward(self, input: Tensor, **options: Any) -> Tensor:
            return 2 * super().forward(input, **options)

    hidden, targets = _data()
    with pytest.raises(TypeError, match="Sequential"):
        fused_cross_entropy(nn.Sequential(nn.Linear(DIM, VOCAB_SIZE)), hidden, targets)
    with pytest.raises(TypeError, match="Scaled"):
        fused_cross_entropy(Scaled(_head("low_rank").factorization), hidden, targets)
    pruned = prune.l1_unstructured(nn.Linear(DIM, VOCAB_SIZE, dtype=torch.float64), "weight", 0.5)
    with pytest.raises(TypeError, match="weight"):
        fused_cross_entropy(pruned, hidden, targets)


@pytest.mark.full
def test_memory_does_not_grow() -> None:
    head = _head("group_reduce", torch.float32)
    hidden, targets = _data(torch.float32)
    resident = []
    for step in range(10_000):
        fused_cross_entropy(head, hidden, targets, tile_rows=ROWS).backward()
        head.topk(hidden[:2], 3)
        head.zero_grad()
        hidden.grad = None
        if step in (2_000, 9_999):
            gc.collect()
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert resident[1] - resident[0] < 2**20
