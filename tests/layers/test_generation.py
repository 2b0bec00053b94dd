"""`generate()` from the best tokens alone, against `generate()` from all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, LogitsProcessorList, TopPLogitsWarper

from lightning_embcompress import compress, optimize_for_inference
from lightning_embcompress.layers.generation import generate_from_best
from toys import gpt2, gpt2_config

_SIZES = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
_LLAMA: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, **_SIZES}
_CONFIGS: dict[str, Any] = {
    "gpt2": gpt2_config(vocab_size=400, n_layer=2, **_SIZES),
    "llama": LlamaConfig(**_LLAMA),
    # Its logits go on, through a tanh.
    "gemma2": Gemma2Config(**_LLAMA, head_dim=16, final_logit_softcapping=5.0),
}


def _model(kind: str, method: str = "group_reduce") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_CONFIGS[kind]).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    compress(model, method, ratio=2, token_counts=torch.randint(1, 100, (400,)))
    return model


@pytest.mark.parametrize("kind", sorted(_CONFIGS))
@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": True, "top_k": 5, "top_p": 0.8, "temperature": 0.7}], ids=str
)
def test_the_same_tokens_come_out(kind: str, options: dict[str, Any]) -> None:
    model = _model(kind)
    ids = torch.randint(2, 400, (2, 6))
    found = []
    for custom in ({}, {"custom_generate": generate_from_best}):
        torch.manual_seed(0)
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **options, **custom))
    assert torch.equal(*found)
    optimize_for_inference(model)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, max_new_tokens=12, **options, custom_generate=generate_from_best), found[0])
    # Afterwards all logits are there again.
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


def test_only_the_best_have_scores() -> None:
    model = _model("gpt2", "low_rank")
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(torch.tensor([[5, 6]]), custom_generate=generate_from_best, **options)
    assert [int(logits.isfinite().sum()) for logits in found.logits] == [1] * len(found.logits)
    # Gradients want all of them.
    head = model.get_output_embeddings()
    head.best = 2
    assert head(torch.randn(3, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "top_k": 0}, "set top_k"),
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor"),
        ({"num_beams": 3}, "beam search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"do_sample": True, "top_k": 5, "logits_processor": LogitsProcessorList([TopPLogitsWarper(0.3)])}, "top p"),
    ],
)
def test_what_needs_other_tokens_is_refused(options: dict[str, Any], message: str) -> None:
    model = _model("gpt2", "low_rank")
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[5, 6]]), custom_generate=generate_from_best, max_new_tokens=3, **options)
    assert model.get_output_embeddings().best is None


def test_a_dense_head_is_refused() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel is a Linear"):
        gpt2().generate(torch.tensor([[5, 6]]), custom_generate=generate_from_best, max_new_tokens=3)
