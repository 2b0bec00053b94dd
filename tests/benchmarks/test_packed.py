"""Speed of packed factors, both sides in turns: `pytest tests/benchmarks/test_packed.py -s --benchmark-only`.

The comparison of lookups needs torchao.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import Side, in_turns
from torch import nn

from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.methods.registry import LowRank

pytestmark = pytest.mark.timeout(1800)

VOCAB_SIZE, DIM, RANK = 50_304, 768, 192


def _factors(rank: int) -> LowRank:
    torch.manual_seed(0)
    factors = LowRank(VOCAB_SIZE, DIM, rank)
    with torch.no_grad():
        factors.coefficients.normal_(std=0.1)
        factors.basis.normal_(std=0.1)
    return factors


def _packed(rank: int, bits: int) -> Any:
    return _factors(rank).prepared(Quantization(bits)).converted()


@pytest.mark.parametrize(("bits", "least"), [(8, 3), (4, 3), (6, 1)])
@torch.no_grad()
def test_logits_of_one_state(benchmark, bits: int, least: float) -> None:
    floats, packed, hidden = _factors(RANK), _packed(RANK, bits), torch.randn(1, DIM)
    error = float((packed.logits(hidden).double() - hidden.double() @ packed.materialize().double().T).abs().max())
    print(f"\nlogits of one state, {VOCAB_SIZE} x {DIM}, rank {RANK}, error {error:.0e}", end="")
    sides = {
        "float32 factors": Side(lambda: floats.logits(hidden)),
        f"{bits} bits": Side(lambda: packed.logits(hidden)),
    }
    found = benchmark.pedantic(lambda: in_turns(sides, 9), rounds=1)[f"{bits} bits"]
    assert error < 1e-4
    assert found.ratio >= least


@pytest.mark.parametrize(("ratio", "least"), [(64, 50), (16, 15)])
@torch.no_grad()
def test_lookup_against_torchao(benchmark, ratio: int, least: float) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    table = nn.Sequential(nn.Embedding(VOCAB_SIZE, DIM))
    config = quantization.IntxWeightOnlyConfig(torch.int4, granularity=quantization.PerGroup(32))
    quantization.quantize_(table, config, filter_fn=lambda module, _: isinstance(module, nn.Embedding))
    dense = VOCAB_SIZE * DIM * 4
    at_100 = _packed(100, 4).stored_bytes()
    # The largest rank that fits: groups make steps of what a rank takes.
    rank = next(
        rank
        for rank in range(int(101 * dense / ratio / at_100), 0, -1)
        if _packed(rank, 4).stored_bytes() <= dense / ratio
    )
    packed, ids = _packed(rank, 4), torch.randint(VOCAB_SIZE, (2048,), generator=torch.Generator().manual_seed(1))
    print(f"\nlookup of 2,048 ids, {VOCAB_SIZE} x {DIM} in int4, at {ratio}x (rank {rank})", end="")
    sides = {"torchao": Side(lambda: table(ids)), "packed factors": Side(lambda: packed.rows(ids))}
    found = benchmark.pedantic(lambda: in_turns(sides, 5), rounds=1)["packed factors"]
    assert found.ratio >= least
