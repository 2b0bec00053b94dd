"""The Triton kernel of the block head on a CPU, by Triton's interpreter, against torch in float64."""

from __future__ import annotations

import copy
import math
import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.layers.serving import optimize_for_inference
from lightning_embcompress.methods.kernels import triton_block_head
from lightning_embcompress.methods.kernels.choice import VARIABLE
from lightning_embcompress.methods.registry import BlockLowRank, Factorization
from lightning_embcompress.methods.shared_basis.factorization import SharedBasisBlocks

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
launches = 0


def counted(*arguments: object) -> None:
    global launches
    launches += 1
    own(*arguments)  # type: ignore[arg-type]


own, triton_block_head.block_products = triton_block_head.block_products, counted


def blocks_of(data: st.DataObject) -> Factorization:
    """Random blocks of either method: empty ones, ranks of 0 and of all columns, rows and columns that fill no tile."""
    dim = data.draw(st.sampled_from([1, 5, 16, 70, 130]))
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 31, 32, 33, 129, 300]), min_size=1, max_size=5).filter(sum))
    ranks = [data.draw(st.sampled_from([0, 1, 64, min(size, dim)])) for size in sizes]
    ranks = [min(rank, size, dim) for rank, size in zip(ranks, sizes, strict=True)]
    if data.draw(st.booleans()):
        return BlockLowRank(sum(sizes), dim, sizes, ranks)
    rank = max(ranks)
    segments = [[[0, own]] if own else [] for own in ranks]
    return SharedBasisBlocks(sum(sizes), dim, rank, sizes, segments, False)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def check_logits(data: st.DataObject) -> None:
    factors = blocks_of(data)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    blocks = torch.arange(len(factors.sizes)).repeat_interleave(torch.tensor(factors.sizes))
    factors._index(blocks[torch.randperm(len(blocks), generator=generator)])
    for parameter in factors.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    shape = data.draw(st.sampled_from([(), (1,), (2,), (3, 4), (16,), (17,), (0,)]))
    # The interpreter multiplies matrices of bfloat16 as if they were integers.
    dtypes = [dtype for dtype in ROUNDING if math.prod(shape) <= 1 or dtype != torch.bfloat16]
    dtype = data.draw(st.sampled_from(dtypes))
    head = CompressedLinear(factors.to(dtype), torch.nn.Parameter(torch.randn(factors.vocab_size).to(dtype)))
    wide = copy.deepcopy(head).double()
    if data.draw(st.booleans()):
        optimize_for_inference(head)
    hidden = torch.randn(*shape, factors.dim, generator=generator).to(dtype)
    before = launches
    with torch.no_grad():
        found, expected = head(hidden), wide(hidden.double())
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert launches - before == (1 <= hidden.numel() // factors.dim <= 16)
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ROUNDING[dtype] * max(1.0, scale))
    if hidden.numel() // factors.dim <= 16 and dtype == torch.float32:
        k = min(3, factors.vocab_size)
        best = head.topk(hidden, k)
        torch.testing.assert_close(best.logits.double(), expected.topk(k).values, rtol=0, atol=1e-5 * max(1.0, scale))
        ids = torch.zeros(shape, dtype=torch.long)
        chances = expected.log_softmax(dim=-1)[..., 0]
        torch.testing.assert_close(head.log_prob(hidden, ids).double(), chances, rtol=1e-4, atol=1e-4)


def check_who_takes_it() -> None:
    """Gradients, other dtypes, autocast, packed factors and mixed layouts go through torch."""
    factors = BlockLowRank(90, 12, [30, 40, 20], [5, 9, 12])
    head, hidden = CompressedLinear(factors), torch.randn(2, 12)
    for parameter in factors.parameters():
        torch.nn.init.normal_(parameter)
    before = launches
    logits = head(hidden)
    assert logits.requires_grad
    logits.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(head.double()(hidden.double()), logits.detach().double(), rtol=1e-5, atol=1e-5)
        head.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert head(hidden).dtype == torch.bfloat16
        os.environ[VARIABLE] = "torch"
        torch.testing.assert_close(head(hidden), logits.detach())
        os.environ[VARIABLE] = "triton"
        assert launches == before
        factors.coefficients[0].data = factors.coefficients[0].data.T.contiguous().T
        torch.testing.assert_close(head(hidden), logits.detach())
        assert launches == before, "one layout of some blocks, and another of others"
        optimize_for_inference(head)
        torch.testing.assert_close(head(hidden), logits.detach())
        assert launches == before + 1
        # Factors that have moved are found where they are.
        kept = [parameter.data for parameter in factors.parameters()]
        for parameter in factors.parameters():
            parameter.data = 2 * parameter.data
        found = head(hidden)
        assert launches == before + 2
        os.environ[VARIABLE] = "torch"
        torch.testing.assert_close(head(hidden), found)
        assert len(kept) == len(list(factors.parameters()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ[VARIABLE] = "triton"
    check_logits()
    check_who_takes_it()
    print("interpreted_block_head")
