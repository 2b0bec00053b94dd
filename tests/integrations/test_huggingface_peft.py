"""Adapters and prompts on top of a compressed model, where PEFT is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_embcompress.compression.plan import plan_of
from toys import compress_toy, gpt2

peft = pytest.importorskip("peft")

_IDS = torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Directory of a compressed model."""
    model = gpt2()
    compress_toy(model, "group_reduce", 1.5)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _adapted(folder: Path, **given: Any) -> Any:
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, **given})
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def test_adapters_train_merge_and_are_saved(folder: Path, tmp_path: Path) -> None:
    model = _adapted(folder)
    factors = [parameter for name, parameter in model.named_parameters() if "factorization" in name]
    assert factors
    assert not any(parameter.requires_grad for parameter in factors)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(_IDS, labels=_IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    model.eval()
    scores = model(_IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    assert torch.equal(again(_IDS).logits, scores)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(_IDS).logits, scores)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(_IDS).logits, merged(_IDS).logits)
    assert plan_of(loaded) == plan_of(merged)


def test_adapters_of_transformers_itself_are_saved_alone(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", "0.22", reason="transformers itself takes no older peft")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


def test_adapters_of_a_compressed_table_are_refused_by_peft(folder: Path) -> None:
    with pytest.raises(ValueError, match="CompressedLinear"):
        _adapted(folder, target_modules=["lm_head"])


_PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "sampled": lambda: peft.PromptTuningConfig(
        num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM"
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", _PROMPTS)
@pytest.mark.parametrize("method", ["low_rank", "transform_coding"])
def test_prompts_train_and_are_saved(method: str, name: str, tmp_path: Path) -> None:
    base = gpt2()
    compress_toy(base, method, 1.5)
    model = peft.get_peft_model(base, _PROMPTS[name]()).eval()
    loss = model(_IDS, labels=_IDS).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(_IDS, labels=_IDS).loss, loss)


def test_a_copy_of_a_compressed_table_trains_beside_adapters(folder: Path) -> None:
    model = _adapted(folder, modules_to_save=["lm_head"])
    scores, kept = model(_IDS).logits, model.get_input_embeddings().factorization.materialize()
    scores.square().mean().backward()
    head = model.get_output_embeddings()
    copied = [parameter for parameter in head.parameters() if parameter.requires_grad]
    assert copied
    torch.optim.SGD(copied, lr=1.0).step()
    assert not torch.equal(model(_IDS).logits, scores)
    assert torch.equal(model.get_input_embeddings().factorization.materialize(), kept)


def test_single_tokens_of_a_compressed_table_do_not_train(folder: Path) -> None:
    model = _adapted(folder, trainable_token_indices=[5, 6])
    with pytest.raises(TypeError, match=r"^index_copy .* compressed layer: its table of 300 x 32"):
        model(_IDS)
