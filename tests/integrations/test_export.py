"""Graphs for devices: lookup and logits from the factors in `torch.export` and ONNX."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_embcompress.compression.plan import Plan
from lightning_embcompress.methods.registry import METHODS
from toys import LanguageModel, compress_toy, falling_counts, gpt2

VOCAB_SIZE, DIM = 203, 32
COUNTS = falling_counts(VOCAB_SIZE, seed=0)


def _compressed(method: str) -> tuple[LanguageModel, Plan]:
    model = LanguageModel(VOCAB_SIZE, DIM, tied=True, padding_idx=0).eval()
    return model, compress_toy(model, method, token_counts=COUNTS)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_exported_graph_gives_the_same_for_any_batch(method: str) -> None:
    model, plan = _compressed(method)
    ids = torch.randint(VOCAB_SIZE, (2, 5))
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=64)
    exported = torch.export.export(model, (ids,), dynamic_shapes=({0: batch, 1: length},))
    constants = [value for value in exported.state_dict.values() if value.is_floating_point()]
    assert all(value.nbytes <= plan.stored_bytes < VOCAB_SIZE * DIM * 4 for value in constants)
    for shape in ((2, 5), (1, 1), (3, 7)):
        other = torch.randint(VOCAB_SIZE, shape)
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_onnx_runtime_gives_the_same(method: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="exporting to ONNX needs it: pip install onnx onnxscript onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    model, plan = _compressed(method)
    ids = torch.randint(VOCAB_SIZE, (2, 5))
    file = tmp_path / "model.onnx"
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # `optimize` would store the transposed factors beside them.
        program: Any = torch.onnx.export(
            model, (ids,), dynamo=True, optimize=False, dynamic_shapes=({0: batch, 1: length},), verbose=False
        )
    program.save(file)
    # The factors, once for both layers, and no table.
    constants = program.model.graph.initializers.values()
    assert max(value.const_value.nbytes for value in constants) < VOCAB_SIZE * DIM * 4
    dense = sum(parameter.nbytes for name, parameter in model.named_parameters() if "factorization" not in name)
    # And some numbers of a token, and where the codes of a component are.
    assert sum(value.const_value.nbytes for value in constants) < dense + plan.stored_bytes + 16 * VOCAB_SIZE + 2**13
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in ((2, 5), (1, 1), (3, 7)):
        other = torch.randint(VOCAB_SIZE, shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(other), rtol=1e-4, atol=1e-5)


def test_a_model_of_transformers_can_be_exported() -> None:
    model = gpt2(vocab_size=VOCAB_SIZE, use_cache=False)
    compress_toy(model, "group_reduce", token_counts=COUNTS)
    ids = torch.randint(VOCAB_SIZE, (2, 8))
    exported = torch.export.export(model, (ids,), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
