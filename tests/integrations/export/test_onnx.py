"""Graphs of causal language models in ONNX Runtime, against torch, in all states of their tables."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_embcompress import Quantization, compress, plan_of, quantize_tables
from lightning_embcompress.integrations.export.onnx import export_onnx
from toys import falling_counts, gpt2

onnx = pytest.importorskip("onnx", reason="pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
VOCAB_SIZE, DIM = 2003, 64


def _model(method: str = "", bits: int = 0, group_size: int = 64, tied: bool = True, options: Any = {}) -> Any:  # noqa: B006
    model = gpt2(vocab_size=VOCAB_SIZE, n_embd=DIM, tie_word_embeddings=tied)
    if method:
        compress(model, method, ratio=4, token_counts=falling_counts(VOCAB_SIZE, seed=0), **options)
    if bits:
        quantize_tables(model, Quantization(bits=bits, group_size=group_size))
    return model


def _check(model: Any, file: Path) -> Any:
    """Export a model, compare it with what the runtime computes, and give its graph."""
    export_onnx(model, file)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in ((2, 5), (1, 2), (3, 7)):
        ids = torch.randint(VOCAB_SIZE, shape)
        (found,) = session.run(["logits"], {"input_ids": ids.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(ids).logits, rtol=1e-4, atol=2e-5)
    return onnx.load(file).graph


def _table_bytes(graph: Any) -> int:
    """Bytes of constants that are not of the backbone."""
    backbone = (".h.", ".ln_f", ".wpe")
    return sum(
        int(np.prod(one.dims)) * onnx.helper.tensor_dtype_to_np_dtype(one.data_type).itemsize
        for one in graph.initializer
        if not any(part in one.name for part in backbone)
    )


@pytest.mark.parametrize(
    ("method", "bits", "group_size", "options", "tied"),
    [
        ("low_rank", 8, 64, {}, True),
        ("low_rank", 4, 64, {}, False),
        ("low_rank", 4, 16, {}, True),
        ("shared_basis", 8, 48, {}, True),
        ("group_reduce", 4, 64, {}, True),
        ("low_rank", 3, 64, {}, True),
        ("low_rank", 6, 20, {}, True),
        ("transform_coding", 0, 0, {}, True),
        ("transform_coding", 0, 0, {}, False),
        ("transform_coding", 0, 0, {"bits": 5}, True),
        ("transform_coding", 0, 0, {"bits": 7, "groups": 3}, True),
        ("transform_coding", 0, 0, {"codes": "trellis", "effort": 6}, True),
    ],
)
def test_tables_stay_small(
    method: str, bits: int, group_size: int, options: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    model = _model(method, bits, group_size, tied, options)
    graph = _check(model, tmp_path / "model.onnx")
    stored = plan_of(model).stored_bytes
    # Tables that say where codes are, and numbers of every token, are small beside real tables.
    unpacked = 2 * VOCAB_SIZE * DIM if options.get("codes") == "trellis" else 0
    assert _table_bytes(graph) < 1.1 * stored + 40 * VOCAB_SIZE + 2**15 + unpacked
    operators = {node.op_type for node in graph.node if node.domain == "com.microsoft"}
    if bits in (4, 8):
        assert operators == {"GatherBlockQuantized", "MatMulNBits"}


def test_a_dense_model_and_its_mode(tmp_path: Path) -> None:
    model = _model().train()
    export_onnx(model, tmp_path / "model.onnx")
    assert model.training
    _check(model.eval(), tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert not any(node.metadata_props for node in onnx.load(tmp_path / "model.onnx").graph.node)


def test_weights_beside_a_large_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_embcompress.integrations.export.onnx._ONE_FILE", 1000)
    _check(_model("low_rank", 8), tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_text("mine")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lightning_embcompress.integrations.export.onnx.synchronize", full)
    with pytest.raises(OSError, match="could not be written, and what was there before is as it was"):
        export_onnx(_model("low_rank"), tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "mine"


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(ValueError, match="GPT2LMHeadModel cannot be made a graph of ONNX: no such operator"):
        export_onnx(model, tmp_path / "model.onnx")
    monkeypatch.setattr("lightning_embcompress.integrations.export.onnx.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"lightning-embcompress\[export\]"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
