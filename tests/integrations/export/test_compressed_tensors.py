"""Directories of compressed-tensors against what that package and transformers read in them."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_embcompress import compress
from lightning_embcompress.calibration.loss_metric import metric_of
from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.integrations.export import compressed_tensors as exporting
from lightning_embcompress.integrations.export.compressed_tensors import export_compressed_tensors
from lightning_embcompress.tables.finding import find_tables
from toys import gpt2

VOCAB_SIZE, DIM = 300, 64


def _model(tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    sizes = {"hidden_size": DIM, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCAB_SIZE, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
        return LlamaForCausalLM(config).to(dtype).eval()


def _statistics(model: Any) -> Statistics:
    ids = torch.randint(VOCAB_SIZE, (16, 33), generator=torch.Generator().manual_seed(1))
    return collect_statistics(model, [{"input_ids": part} for part in ids.split(4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tied", "tie"), [(True, "keep"), (True, "untie"), (False, "keep")])
@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_reads_what_was_found(
    bits: Any, tied: bool, tie: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    model, found = _model(tied, dtype), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit = exporting.fit_table

    def remembered(*arguments: Any) -> Any:
        one, codes = fit(*arguments)
        found.append(codes.materialize())
        return one, codes

    monkeypatch.setattr(exporting, "fit_table", remembered)
    written = export_compressed_tensors(model, tmp_path / "out", bits, tie=tie)
    names = ["model.embed_tokens"] if tied and tie == "keep" else ["model.embed_tokens", "lm_head"]
    assert [(one.name, one.bits_per_weight) for one in written] == [(name, bits + 0.5) for name in names]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.dtype == dtype
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head is embedding) == (len(names) == 1)
    # Products are rounded to the dtype of the scales.
    near = {"rtol": 1e-3 if dtype != torch.bfloat16 else 1e-2, "atol": 0}
    torch.testing.assert_close(embedding.detach().float(), found[0].to(dtype).float(), **near)
    torch.testing.assert_close(head.detach().float(), found[-1].to(dtype).float(), **near)
    for name, tensor in loaded.state_dict().items():
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(tensor, before[name])
    # The model itself is as it was.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_bytes_in_the_file(tmp_path: Path) -> None:
    export_compressed_tensors(_model(), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if "embed_tokens" in name or "lm_head" in name}
    kinds = {name.rpartition(".")[2]: (tensor.dtype, tuple(tensor.shape)) for name, tensor in own.items()}
    assert kinds == {
        "weight_packed": (torch.int32, (VOCAB_SIZE, DIM // 8)),
        "weight_scale": (torch.float16, (VOCAB_SIZE, DIM // 32)),
        "weight_shape": (torch.int64, (2,)),
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert config["tie_word_embeddings"]


def test_in_the_metric_of_the_loss(tmp_path: Path) -> None:
    model = _model()
    statistics = _statistics(model)
    (plain,) = export_compressed_tensors(model, tmp_path / "plain")
    (one,) = export_compressed_tensors(model, tmp_path / "out", statistics=statistics)
    assert plain.predicted_loss is None
    assert one.plain_error > plain.plain_error
    (table,) = find_tables(model)
    metric = metric_of(model, table, statistics)

    def lost(folder: str) -> float:
        tensors = load_file(tmp_path / folder / "model.safetensors")
        bytes_ = tensors["model.embed_tokens.weight_packed"].view(torch.uint8)
        codes = torch.stack([bytes_ & 15, bytes_ >> 4], dim=2).flatten(1).float() - 8
        scales = tensors["model.embed_tokens.weight_scale"].float().repeat_interleave(32, dim=1)
        return metric.loss(model.model.embed_tokens.weight.detach(), codes * scales)

    assert one.predicted_loss == pytest.approx(lost("out"), rel=1e-4)
    assert one.predicted_loss < 0.9 * lost("plain")


def test_a_model_of_other_names(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    model = gpt2(n_embd=64)
    written = export_compressed_tensors(model, tmp_path / "out", 8)
    assert [one.name for one in written] == ["transformer.wte"]
    loaded: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=2e-2)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        export_compressed_tensors(_model(), target, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tie must be 'keep' or 'untie'"):
        export_compressed_tensors(_model(), target, tie="auto")  # type: ignore[arg-type]
    for group_size in (0, 20, 48, 128):
        with pytest.raises(ValueError, match="group_size must be a multiple of 8 that divides the 64 columns of"):
            export_compressed_tensors(_model(), target, group_size=group_size)
    with pytest.raises(ValueError, match="statistics"):
        export_compressed_tensors(_model(), target, statistics=Statistics(torch.ones(200)))
    small = _model()
    compress(small, "low_rank", ratio=4)
    with pytest.raises(ValueError, match=r"densify|no embedding"):
        export_compressed_tensors(small, target)
    assert not target.exists()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    model = _model()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="could not be written, and what was there before is as it was"):
        export_compressed_tensors(model, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "mine.txt").read_text() == "mine"


def test_files_beside(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("notes")
    export_compressed_tensors(_model(), tmp_path / "out", files={"notes.md": tmp_path / "notes.md"})
    assert (tmp_path / "out" / "notes.md").read_text() == "notes"
