"""Formats of other programs against what those programs read."""

from __future__ import annotations

import pytest
import torch
from carvq import carvq
from formats import FORMATS, NF4_LEVELS, iq4_nl, nf4, rounded

BITS = {
    "Q8_0 (llama.cpp)": 8.5,
    "Q5_1 (llama.cpp)": 6,
    "Q5_0 (llama.cpp)": 5.5,
    "Q4_1 (llama.cpp)": 5,
    "Q4_0 (llama.cpp)": 4.5,
    "IQ4_NL (llama.cpp)": 4.5,
    "int4, symmetric (round to nearest)": 4.5,
    "NF4 (bitsandbytes)": 4.5,
    "int4, HQQ (torchao)": 4.5,
    **{f"int{bits}, zero points (round to nearest)": bits + (16 + bits) / 32 for bits in (4, 3, 2)},
}


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_and_errors(name: str) -> None:
    package = {"llama.cpp": "gguf", "torchao": "torchao"}
    for word, module in package.items():
        if word in name:
            pytest.importorskip(module)
    table = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    table[7] = 0
    values, size = FORMATS[name](table)
    assert (values.shape, values.dtype) == (table.shape, torch.float32)
    assert size == table.numel() * BITS[name] / 8
    error = float((values - table).square().mean().sqrt())
    # Of normal values: half a step of four standard deviations each way, and more for fewer levels.
    assert 0 < error < 4 / 2 ** int(BITS[name])
    assert torch.equal(values[7], table[7])


def test_values_on_the_levels_are_kept() -> None:
    levels = torch.tensor(NF4_LEVELS).repeat(4, 4) * torch.tensor([[1.0], [0.5], [3.0], [1e-3]])
    torch.testing.assert_close(nf4(levels)[0], levels, rtol=1e-6, atol=0)
    integers = torch.arange(16.0).repeat(4, 2) - torch.tensor([[0.0], [3.0], [7.0], [15.0]])
    assert torch.equal(rounded(4)(integers)[0], integers)


def test_iq4_nl_loses_less_than_q4_0() -> None:
    pytest.importorskip("gguf")
    table = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    errors = [float((form(table)[0] - table).square().sum()) for form in (iq4_nl, FORMATS["Q4_0 (llama.cpp)"])]
    assert errors[0] < 0.85 * errors[1]


def test_carvq_gains_by_every_stage_and_by_its_network() -> None:
    generator = torch.Generator().manual_seed(0)
    # Rows of which 16 numbers tell a part, and vectors that fill no whole group.
    table = torch.randn(700, 16, generator=generator) @ torch.randn(16, 64, generator=generator) / 4
    table += torch.randn(700, 64, generator=generator)
    (first, few), (second, more) = (carvq(stages)(table) for stages in (1, 2))
    network = 2 * (700 * 16 + 17 * 384 + 385 * 64)
    assert (few, more) == tuple(stages * (700 * 64 // 16 + 6 * 256) + network for stages in (1, 2))
    errors = [float((one - table).square().sum()) for one in (first, second)]
    assert errors[1] < 0.7 * errors[0] < 0.5 * float(table.square().sum())
