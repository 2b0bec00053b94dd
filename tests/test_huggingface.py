"""Compressed models of transformers: saved, loaded by `from_pretrained`, used, and made ordinary again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_embcompress import compress
from lightning_embcompress.factorizations import METHODS
from lightning_embcompress.plan import Plan, plan_of

_VOCAB = 300
_IDS = torch.randint(_VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def _gpt2(**given: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": _VOCAB, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0, **given)).eval()


def _compress(model: Any, method: str = "group_reduce", ratio: float = 1.5, **given: Any) -> Plan:
    chosen = METHODS[method]
    # Not every method reaches every ratio.
    smallest = chosen.factorization.smallest_bytes(_VOCAB, 32, 4, chosen.options())
    ratio = min(ratio, _VOCAB * 32 * 4 / smallest)
    return compress(model, method, ratio=ratio, token_counts=torch.arange(_VOCAB, 0, -1), **given)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_by_transformers(method: str, tied: bool, tmp_path: Path) -> None:
    model = _gpt2(tie_word_embeddings=tied)
    _compress(model, method)
    model.save_pretrained(tmp_path)
    assert Plan.from_dict(_config(tmp_path)["quantization_config"]) == plan_of(model)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    # One copy of what is shared.
    stored = load_file(tmp_path / "model.safetensors")
    assert len(stored) == len({id(tensor) for tensor in model.state_dict(keep_vars=True).values()})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is GPT2LMHeadModel
    assert torch.equal(loaded(_IDS).logits, model(_IDS).logits)
    assert (loaded.transformer.wte.factorization is loaded.lm_head.factorization) == tied
    assert plan_of(loaded) == plan_of(model)
