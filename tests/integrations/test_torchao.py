"""Weights that torchao has quantized beside compressed tables: files that cannot hold them are not begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from lightning_embcompress import densify, load_compressed, save_compressed
from toys import compress_toy

_IDS = torch.randint(200, (2, 7), generator=torch.Generator().manual_seed(1))


def _quantize(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    inner = {name for name, layer in model.named_modules() if type(layer) is nn.Linear and layer.out_features < 200}
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in inner)


def _plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(200, 64), nn.Linear(64, 64), nn.Linear(64, 200))


def _llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=200, **sizes)).eval()


def test_save_compressed(tmp_path: Path) -> None:
    model = _plain()
    compress_toy(model, "low_rank", 2)
    save_compressed(model, tmp_path / "before")
    _quantize(model)
    with pytest.raises(ValueError, match=r"cannot store '1\.weight', a .* of torchao.*get_submodule\('1'\)"):
        save_compressed(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    # The ways that are named.
    loaded = _plain()
    load_compressed(tmp_path / "before", loaded)
    _quantize(loaded)
    assert torch.equal(loaded(_IDS), model(_IDS))
    layer: Any = model.get_submodule("1")
    layer.weight = nn.Parameter(layer.weight.dequantize())
    save_compressed(model, tmp_path / "ordinary")
    load_compressed(tmp_path / "ordinary", again := _plain())
    assert torch.equal(again(_IDS), model(_IDS))


def test_save_pretrained(tmp_path: Path) -> None:
    model = _llama()
    compress_toy(model, "low_rank", 2)
    _quantize(model)
    with pytest.raises(ValueError, match=r"save_pretrained cannot store 'model\.layers.*\.weight', a .* of torchao"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert "quantization_config" not in model.config.to_dict()


def test_models_that_transformers_has_quantized(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    _llama().save_pretrained(tmp_path / "dense")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    compress_toy(model, "low_rank", 2)
    with pytest.raises(ValueError, match="quantized by torchao besides.*densify"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    densify(model)
    model.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    torch.testing.assert_close(loaded(_IDS).logits, model(_IDS).logits)
