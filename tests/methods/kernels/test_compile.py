"""Models that users compile: the same numbers, and as few graphs as can be."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.layers.fused_loss import fused_cross_entropy
from lightning_embcompress.methods.quantizers.integer_quantizer import narrowed, repeated
from lightning_embcompress.methods.registry import Factorization, Quantization
from toys import factors_of

VOCAB_SIZE, DIM = 300, 70


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


# What inductor compiles its code with.
_has_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler"
)


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _forms(method: str) -> list[Factorization[Any]]:
    """Factors as they are, prepared for quantization, and packed."""
    factors = factors_of(method, VOCAB_SIZE, DIM)
    prepared = copy.deepcopy(factors).prepared(Quantization(bits=4, group_size=32))
    return [factors, prepared, copy.deepcopy(prepared).converted()]


class Model(nn.Module):
    """A table that is read both ways."""

    def __init__(self, factors: Factorization[Any]) -> None:
        super().__init__()
        self.encoder, self.backbone = CompressedEmbedding(factors), nn.Linear(DIM, DIM)
        self.head = CompressedLinear(factors, nn.Parameter(torch.randn(VOCAB_SIZE)))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.backbone(self.encoder(ids[:, :-1])).tanh()
        loss: Tensor = fused_cross_entropy(self.head, hidden, ids[:, 1:], tile_rows=64)
        return loss


def _step(model: nn.Module, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(ids)
    loss.backward()
    return [loss.detach(), *(one.grad.clone() for one in model.parameters() if one.grad is not None)]


@pytest.mark.parametrize("method", ["low_rank", "group_reduce"])
def test_steps_of_a_compiled_model(method: str) -> None:
    model = Model(factors_of(method, VOCAB_SIZE, DIM))
    batches = [torch.randint(VOCAB_SIZE, (tokens, 6)) for tokens in (3, 3, 4, 7)]
    expected = [_step(model, ids) for ids in batches]
    # Everything but the code that is generated.
    model.compile(backend="aot_eager")
    found = [_step(model, ids) for ids in batches]
    torch.testing.assert_close(found, expected)
    before = _graphs()
    for tokens in (5, 9, 12, 6):
        _step(model, torch.randint(VOCAB_SIZE, (tokens, 6)))
    assert _graphs() == before, "it is compiled for every batch"


@pytest.mark.parametrize(
    "method",
    ["low_rank", "group_reduce", "product_quantization", pytest.param("transform_coding", marks=pytest.mark.full)],
)
def test_heads_are_one_graph(method: str) -> None:
    forms = _forms(method)
    hidden = torch.randn(5, DIM)
    for form in forms:
        head = CompressedLinear(form)
        expected = head(hidden)
        head.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(head(hidden), expected)


@_has_compiler
def test_generated_code_scales_and_rounds_as_eager_code_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of a group that is cut off, and roundings: one function, as every one is a run of the C++ compiler."""
    # Inductor gets both wrong with plain instructions too; to find out about wider ones it builds six programs.
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)
    cut_off = [(torch.randn(50, columns), columns, group) for columns, group in ((102, 64), (60, 16))]
    scales = [torch.rand(50, -(-columns // group)) + 1 for _, columns, group in cut_off]
    values = torch.rand(100)

    def scaled_and_rounded() -> tuple[list[Tensor], list[Tensor]]:
        scaled = [of / repeated(own, columns, group) for (of, columns, group), own in zip(cut_off, scales, strict=True)]
        return scaled, [2 * narrowed(values / 3, dtype).float() for dtype in (torch.float16, torch.bfloat16)]

    expected = scaled_and_rounded()
    for found, (of, columns, group), own in zip(expected[0], cut_off, scales, strict=True):
        torch.testing.assert_close(found, of / own[:, torch.arange(columns) // group])
    scaled, rounded = torch.compile(scaled_and_rounded)()
    torch.testing.assert_close(scaled, expected[0])
    torch.testing.assert_close(rounded, expected[1], rtol=0, atol=0)


@_has_compiler
@pytest.mark.full
@pytest.mark.parametrize("method", ["group_reduce", "transform_coding"])
def test_generated_code(method: str) -> None:
    forms = _forms(method)
    hidden, ids = torch.randn(5, DIM), torch.randint(VOCAB_SIZE, (3, 7))
    for form in forms:
        for layer, given in ((CompressedLinear(form), hidden), (CompressedEmbedding(form), ids)):
            torch.compiler.reset()
            with torch.no_grad():
                expected = layer(given)
                layer.compile()
                torch.testing.assert_close(layer(given), expected)


@_has_compiler
@pytest.mark.full
@pytest.mark.parametrize("method", ["low_rank", "group_reduce"])
@pytest.mark.parametrize("ranges", [None, "minmax", "learned"])
def test_steps_of_generated_code(method: str, ranges: Any) -> None:
    factors = factors_of(method, VOCAB_SIZE, DIM)
    if ranges is not None:
        factors = factors.prepared(Quantization(bits=4, group_size=32, ranges=ranges))
    model = Model(factors)
    batches = [torch.randint(VOCAB_SIZE, (tokens, 6)) for tokens in (3, 4)]
    expected = [_step(model, ids) for ids in batches]
    model.compile()
    torch.testing.assert_close([_step(model, ids) for ids in batches], expected)
