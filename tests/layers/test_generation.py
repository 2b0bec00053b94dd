"""`generate()` from the best tokens alone, against `generate()` from all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LogitsProcessorList,
    TopPLogitsWarper,
)

from lightning_embcompress import compress, optimize_for_inference
from lightning_embcompress.layers.generation import generate_from_best

_SIZES = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
_LLAMA = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    **_SIZES,
}
_CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, **_SIZES),
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
    found = model.generate(
        torch.tensor([[5, 6]]),
        custom_generate=generate_from_best,
        max_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert [int(logits.isfinite().sum()) for logits in found.logits] == [1] * len(found.logits)


def test_gradients_want_all_logits() -> None:
    model = _model("gpt2", "low_rank")
    head = model.get_output_embeddings()
    head.best = 2
    assert head(torch.randn(3, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "top_k": 0}, "set top_k, or leave custom_generate out"),
        ({"repetition_penalty": 1.3}, "RepetitionPenaltyLogitsProcessor may need the scores of all tokens"),
        ({"num_beams": 3}, "beam search needs more than the best tokens: leave custom_generate out"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation needs more than the best tokens"),
        (
            {"do_sample": True, "top_k": 5, "logits_processor": LogitsProcessorList([TopPLogitsWarper(0.3)])},
            "top p comes before top k",
        ),
    ],
)
def test_what_needs_other_tokens_is_refused(options: dict[str, Any], message: str) -> None:
    model = _model("gpt2", "low_rank")
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[5, 6]]), custom_generate=generate_from_best, max_new_tokens=3, **options)
    assert model.get_output_embeddings().best is None


def test_a_dense_head_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(_CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="the head of GPT2LMHeadModel is a Linear, which is not compressed"):
        model.generate(torch.tensor([[5, 6]]), custom_generate=generate_from_best, max_new_tokens=3)
