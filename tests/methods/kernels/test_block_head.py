"""The logits of a few states by all blocks at once: in Triton by its compiler, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.layers.serving import optimize_for_inference
from lightning_embcompress.methods.kernels.choice import VARIABLE
from lightning_embcompress.methods.registry import BlockLowRank


@pytest.mark.parametrize(("dtype", "capability"), [("fp32", 90), ("bf16", 80), ("fp16", 90)])
@pytest.mark.parametrize("by_column", [False, True])
def test_it_compiles(dtype: str, capability: int, by_column: bool, compiled: Callable[..., Any]) -> None:
    from lightning_embcompress.methods.kernels import triton_block_head as kernels

    floats = dict.fromkeys(("states", "shift", "out"), f"*{dtype}")
    tables = {"table": "*i64", "programs": "*i64", "count": "i32"}
    strides = {"state_stride": "i32", "shift_stride": "i32", "out_stride": "i32"}
    rows, columns = kernels.TILES[by_column]
    for states in (1, kernels.LEAST_STATES):
        found = compiled(
            kernels.multiply_blocks,
            capability,
            **floats,
            **tables,
            **strides,
            ROWS=rows,
            COLUMNS=columns,
            STATES=states,
            BY_COLUMN=by_column,
            SHIFTED=True,
        )
        # All that a program adds up stays in registers.
        assert ".local" not in found.asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("laid_out", [False, True])
def test_on_a_gpu(dtype: torch.dtype, laid_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    factors = BlockLowRank(9000, 96, [1000, 0, 3000, 5000], [64, 0, 37, 11], dtype=dtype, device=torch.device("cuda"))
    for parameter in factors.parameters():
        torch.nn.init.normal_(parameter)
    head = CompressedLinear(factors)
    if laid_out:
        optimize_for_inference(head)
    for states in (1, 2, 16):
        hidden = torch.randn(states, 96, device="cuda", dtype=dtype)
        found = []
        for chosen in ("torch", "triton"):
            monkeypatch.setenv(VARIABLE, chosen)
            with torch.no_grad():
                found.append(head(hidden))
        bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(*found, rtol=0, atol=bound * float(found[0].abs().max()))
