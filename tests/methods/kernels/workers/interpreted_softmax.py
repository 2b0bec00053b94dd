"""The Triton kernels of a softmax on a CPU, by Triton's interpreter, against torch in float64."""

from __future__ import annotations

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.layers.fused_loss import fused_cross_entropy
from lightning_embcompress.methods.kernels import triton_softmax
from lightning_embcompress.methods.kernels.choice import VARIABLE, takes_triton
from lightning_embcompress.methods.registry import BlockLowRank

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# One part of a row, and several of it, the last one cut off or not.
SIZES = (0, 1, 7, 2048, 2049, 16384, 16385, 33_000)


def logits_of(data: st.DataObject) -> torch.Tensor:
    """Of some shape, dtype, strides and range, with infinities."""
    tokens, size = data.draw(st.integers(0, 4)), data.draw(st.sampled_from(SIZES))
    dtype = data.draw(st.sampled_from(list(ROUNDING)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    wide = torch.randn(tokens, size + 3, generator=generator) * data.draw(st.sampled_from([1.0, 30.0]))
    if tokens and size:
        infinite = data.draw(st.sampled_from(["none", "some", "row", "above"]))
        if infinite == "some":
            wide[:, ::3] = -torch.inf
        elif infinite == "row":
            wide[0] = -torch.inf
        elif infinite == "above":
            wide[0, size // 2] = torch.inf
    wide = wide.to(dtype)
    layout = data.draw(st.sampled_from(["rows", "columns", "contiguous"]))
    if layout == "columns":
        return wide[:, :size].T.contiguous().T
    return wide[:, :size] if layout == "rows" else wide[:, :size].contiguous()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def check_add_log_sum_exp(data: st.DataObject) -> None:
    logits = logits_of(data)
    normalizer = torch.full((len(logits),), data.draw(st.sampled_from([-torch.inf, 0.0, 5.0, torch.inf])))
    total = torch.full((len(logits),), 3.0) if data.draw(st.booleans()) else None
    expected = torch.logaddexp(normalizer.double(), logits.double().logsumexp(dim=1))
    added = 3.0 + logits.double().sum(dim=1)
    triton_softmax.add_log_sum_exp(normalizer, logits, total)
    torch.testing.assert_close(normalizer.double(), expected, rtol=1e-5, atol=1e-5)
    if total is not None:
        torch.testing.assert_close(total.double(), added, rtol=1e-4, atol=1e-2, equal_nan=True)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def check_softmax_gradient(data: st.DataObject) -> None:
    logits = logits_of(data)
    tokens, size = logits.shape
    normalizer = logits.double().logsumexp(dim=1) + 0.5
    scale = torch.linspace(-2, 3, tokens).expand(2, tokens)[1]
    rows = torch.arange(tokens)[data.draw(st.integers(0, 2)) :: 2] if size else torch.empty(0, dtype=torch.long)
    columns = torch.tensor([data.draw(st.integers(0, size - 1)) for _ in rows], dtype=torch.long)
    at_target, uniform = data.draw(st.sampled_from([(1.0, 0.0), (0.9, 0.1 / 33_000), (0.0, 0.25)]))
    expected = (logits.double() - normalizer.unsqueeze(1)).exp() - uniform
    expected[rows, columns] -= at_target
    expected *= scale.double().unsqueeze(1)
    triton_softmax.softmax_gradient(logits, normalizer.float(), scale, rows, columns, at_target, uniform)
    rounding = ROUNDING[logits.dtype]
    # What is left of 1 at a target is as exact as the rest.
    torch.testing.assert_close(logits.double(), expected, rtol=rounding, atol=2e-6, equal_nan=True)


def check_the_target_in_narrow_dtypes() -> None:
    """p - 1 of a p that 16 bits cannot tell from 1."""
    for dtype in (torch.bfloat16, torch.float16):
        logits = torch.zeros(1, 2, dtype=dtype)
        one = torch.zeros(1, dtype=torch.long)
        triton_softmax.softmax_gradient(logits, torch.tensor([1e-4]), torch.ones(1), one, one)
        torch.testing.assert_close(logits[0, 0].float(), torch.tensor(-1e-4), rtol=1e-2, atol=1e-7)


def check_loss_and_log_prob() -> None:
    """The whole of it, chosen by the environment variable."""
    generator = torch.Generator().manual_seed(0)
    factors = BlockLowRank(90, 12, [30, 0, 40, 20], [5, 0, 9, 12])
    # The interpreter multiplies matrices of bfloat16, as of log_prob, as if they were integers.
    for dtype in (torch.float32, torch.float16):
        head = CompressedLinear(factors.to(dtype), torch.nn.Parameter(torch.randn(90, generator=generator).to(dtype)))
        for parameter in factors.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
        hidden = torch.randn(5, 12, generator=generator).to(dtype).requires_grad_()
        targets = torch.randint(90, (5,), generator=generator)
        for smoothing in (0.0, 0.1):
            found = []
            for chosen in ("torch", "triton"):
                os.environ[VARIABLE] = chosen
                assert takes_triton(hidden) == (chosen == "triton")
                loss = fused_cross_entropy(head, hidden, targets, label_smoothing=smoothing, tile_rows=25)
                gradients = torch.autograd.grad(loss, [hidden, *head.parameters()])
                found.append([loss.detach(), *gradients, head.log_prob(hidden.detach(), targets)])
            for one, other in zip(*found, strict=True):
                assert (one - other).norm() <= ROUNDING[dtype] * one.norm()


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_add_log_sum_exp()
    check_softmax_gradient()
    check_the_target_in_narrow_dtypes()
    check_loss_and_log_prob()
    print("interpreted_softmax")
