"""The passes of a softmax over tiles: in torch, in Triton by its compiler, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.layers.fused_loss import fused_cross_entropy
from lightning_embcompress.methods.kernels.choice import VARIABLE
from lightning_embcompress.methods.kernels.online_softmax import add_log_sum_exp, softmax_gradient

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@settings(max_examples=60)
@given(st.data())
def test_in_torch(data: st.DataObject) -> None:
    tokens, size = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 30))
    dtype = data.draw(st.sampled_from(list(ROUNDING)))
    wide, rounding = torch.promote_types(dtype, torch.float32), ROUNDING[dtype]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = (3 * torch.randn(tokens, size, generator=generator)).to(dtype)
    if tokens and size and data.draw(st.booleans()):
        logits[0, : data.draw(st.integers(0, size))] = -torch.inf
    normalizer, total = torch.full((tokens,), -torch.inf, dtype=wide), torch.zeros(tokens, dtype=wide)
    for tile in logits.split(max(1, data.draw(st.integers(1, 12))), dim=1):
        add_log_sum_exp(normalizer, tile, total)
    torch.testing.assert_close(normalizer.double(), logits.double().logsumexp(dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), logits.double().sum(dim=1), rtol=1e-5, atol=1e-4)
    targets = torch.randint(max(1, size), (tokens,), generator=generator)[:: 2 if size else tokens + 1]
    rows = torch.arange(tokens)[:: 2 if size else tokens + 1]
    if not size:
        rows, targets = rows[:0], targets[:0]
    scale = torch.linspace(-1, 2, tokens, dtype=wide)
    expected = (logits.double() - normalizer.double().unsqueeze(1)).exp() - 0.01
    expected[rows, targets] -= 0.9
    found = softmax_gradient(logits, normalizer, scale, rows, targets, at_target=0.9, uniform=0.01)
    assert found.dtype == dtype
    assert found.data_ptr() == logits.data_ptr()
    expected *= scale.double().unsqueeze(1)
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=1e-6 + rounding / 1e3, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_probability_misses_to_one(dtype: torch.dtype) -> None:
    one = torch.zeros(1, dtype=torch.long)
    found = softmax_gradient(torch.zeros(1, 1, dtype=dtype), torch.tensor([1e-4]), torch.ones(1), one, one)
    torch.testing.assert_close(found.float(), torch.full((1, 1), -1e-4), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("dtype", "capability"), [("fp32", 90), ("bf16", 80), ("fp16", 90)])
def test_it_compiles(dtype: str, capability: int, compiled: Callable[..., Any]) -> None:
    from lightning_embcompress.methods.kernels import triton_softmax as kernels

    sizes = {"columns": "i32", "row_stride": "i32", "column_stride": 1}
    scalars = {"at_target": "fp32", "uniform": "fp32"}
    for kernel, others in (
        (
            kernels.partial_log_sum_exp,
            {"partial": "*fp32", "sums": "*fp32", **sizes, "SPAN": kernels.SPAN, "BLOCK": kernels.BLOCK, "ADDS": True},
        ),
        (
            kernels.gradient,
            {"normalizer": "*fp32", "scale": "*fp32", "target": "*i64", **scalars, **sizes, "BLOCK": kernels.BLOCK},
        ),
    ):
        aligned = ["logits", "columns", "row_stride"]
        ptx = compiled(kernel, capability, aligned, logits=f"*{dtype}", **others).asm["ptx"]
        # Whole vectors are read, and nothing goes through local memory.
        assert "ld.global.v4" in ptx
        assert ".local" not in ptx
        wide = {**others, "row_stride": "i64", "column_stride": "i64"}
        assert compiled(kernel, capability, logits=f"*{dtype}", **wide).asm["cubin"]


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(64, 50_257, dtype=dtype)
    torch.nn.init.normal_(head.weight, std=0.3, generator=generator)
    hidden = torch.randn(300, 64, generator=generator).to("cuda", dtype).requires_grad_()
    targets = torch.randint(50_257, (300,), generator=generator).cuda()
    head = head.cuda()
    found = []
    for chosen in ("torch", "triton"):
        monkeypatch.setenv(VARIABLE, chosen)
        loss = fused_cross_entropy(head, hidden, targets, label_smoothing=0.1, tile_rows=5_000)
        found.append([loss.detach(), *torch.autograd.grad(loss, [hidden, *head.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * ROUNDING[dtype], atol=float(other.abs().max()) / 1e3)
