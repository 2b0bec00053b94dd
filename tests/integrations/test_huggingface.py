"""Compressed models of transformers: saved, loaded by `from_pretrained`, used, and made ordinary again."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from lightning_embcompress import compress, densify
from lightning_embcompress.compression.plan import Plan, plan_of
from lightning_embcompress.integrations.huggingface import aliases
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from small_models import VOCAB_SIZE, build
from toys import compress_toy, gpt2

_VOCAB = 300
_IDS = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(1))

_INPUT, _HEAD, _MODEL = "model.decoder.embed_tokens", "lm_head", "model.embed_tokens"
_T5_TIES = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", _HEAD)
# Class of the model, changes of its small configuration, and paths of its tables while they are tied.
_FAMILIES: dict[str, tuple[str, dict[str, Any], list[tuple[str, ...]]]] = {
    "gpt2": ("GPT2LMHeadModel", {}, [("transformer.wte", _HEAD)]),
    "gpt2 untied": ("GPT2LMHeadModel", {"tie_word_embeddings": False}, [("transformer.wte",), (_HEAD,)]),
    "gpt2 headless": ("GPT2Model", {}, [("wte",)]),
    "gpt2 of two heads": ("GPT2DoubleHeadsModel", {"num_labels": 1}, [("transformer.wte", _HEAD)]),
    "gpt-j with a head bias": ("GPTJForCausalLM", {}, [("transformer.wte",), (_HEAD,)]),
    "opt": ("OPTForCausalLM", {}, [(_INPUT, _HEAD)]),
    "opt projected": ("OPTForCausalLM", {"word_embed_proj_dim": 16}, [(_INPUT, _HEAD)]),
    "llama": ("LlamaForCausalLM", {}, [(_MODEL,), (_HEAD,)]),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}, [(_MODEL, _HEAD)]),
    "qwen2 tied": ("Qwen2ForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}, [(_MODEL, _HEAD)]),
    "gemma3 scaled": ("Gemma3ForCausalLM", {"num_key_value_heads": 1}, [(_MODEL, _HEAD)]),
    "bart scaled": ("BartForCausalLM", {"scale_embedding": True}, [(_INPUT, _HEAD)]),
    "bart encoder and decoder": (
        "BartForConditionalGeneration",
        {"scale_embedding": True},
        [("model.shared", "model.encoder.embed_tokens", _INPUT, _HEAD)],
    ),
    "t5": ("T5ForConditionalGeneration", {}, [_T5_TIES]),
    "bert": ("BertForPreTraining", {}, [("bert.embeddings.word_embeddings", "cls.predictions.decoder")]),
}


def _build(family: str, **given: Any) -> Any:
    name, changes, _ = _FAMILIES[family]
    model = build(name, **{**changes, **given})
    for name, parameter in model.named_parameters():
        # Otherwise biases are zero, and a lost one shows nowhere.
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval()


@torch.no_grad()
def _run(model: Any) -> Tensor:
    output = model(_IDS, **({"decoder_input_ids": _IDS} if model.config.is_encoder_decoder else {}))
    scores: Tensor = next(output[key] for key in ("logits", "prediction_logits", "last_hidden_state") if key in output)
    return scores


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _assert_loads(model: Any, folder: Path) -> Any:
    """Save and load a compressed model, and compare everything."""
    model.save_pretrained(folder)
    assert Plan.from_dict(_config(folder)["quantization_config"]) == plan_of(model)
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
    # Every tensor once, and the entry of every table.
    twice = {f"{path}.weight" for path in aliases(model)}
    state = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name not in twice}
    assert len(load_file(folder / "model.safetensors")) == len(state)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(_run(loaded), _run(model))
    assert plan_of(loaded) == plan_of(model)
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    return loaded


@pytest.mark.parametrize("family", sorted(_FAMILIES))
def test_families(family: str, tmp_path: Path) -> None:
    model = _build(family)
    dense, ties = _run(model), dict(model.all_tied_weights_keys)
    plan = compress_toy(model, "low_rank", 1.3)
    assert [table.modules for table in plan.tables] == _FAMILIES[family][2]
    compressed = _run(model)
    assert 0 < (compressed - dense).norm() < 0.95 * dense.norm()
    loaded = _assert_loads(model, tmp_path / "compressed")
    model.tie_weights()
    loaded.tie_weights()
    assert torch.equal(_run(model), compressed)
    assert torch.equal(_run(loaded), compressed)
    densify(loaded)
    torch.testing.assert_close(_run(loaded), compressed, rtol=1e-3, atol=1e-4)
    assert loaded.all_tied_weights_keys == ties
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in _config(tmp_path / "dense")
    again, report = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(_run(again), _run(loaded))
    assert {type(one) for one in again.modules()} == {type(one) for one in _build(family).modules()}


@pytest.mark.parametrize("family", ["gpt2", "opt", "bart encoder and decoder", "t5", "bert"])
def test_ties_that_were_given_up(family: str, tmp_path: Path) -> None:
    model = _build(family)
    compress_toy(model, "low_rank", 1.3, tie="untie")
    *tied, head = _FAMILIES[family][2][0]
    assert [table.modules for table in plan_of(model).tables] == [tuple(tied), (head,)]
    loaded = _assert_loads(model, tmp_path / "compressed")
    compressed = _run(loaded)
    loaded.tie_weights()
    assert torch.equal(_run(loaded), compressed)
    densify(loaded)
    dense = _run(loaded)
    torch.testing.assert_close(dense, compressed, rtol=1e-3, atol=1e-4)
    # Two different weights now: nothing may tie them again.
    loaded.tie_weights()
    assert torch.equal(_run(loaded), dense)
    loaded.save_pretrained(tmp_path / "dense")
    again, report = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(_run(again), dense)


def test_giving_up_ties_leaves_other_models_of_the_configuration_alone(tmp_path: Path) -> None:
    model = _build("gpt2")
    other = GPT2LMHeadModel(model.config).eval()
    compress_toy(model, "low_rank", 1.3, tie="untie")
    assert not model.config.tie_word_embeddings
    assert model.transformer.config is model.config
    assert other.config.tie_word_embeddings
    assert other.config is not model.config
    other.save_pretrained(tmp_path)
    assert torch.equal(_run(GPT2LMHeadModel.from_pretrained(tmp_path)), _run(other))


@pytest.mark.parametrize("method", ["product_quantization", "transform_coding"])
def test_what_is_loaded_trains(method: str, tmp_path: Path) -> None:
    model = _build("gpt2")
    plan = compress_toy(model, method, 1.5)
    loaded = _assert_loads(model, tmp_path)
    rest = sum(tensor.nbytes for name, tensor in model.state_dict().items() if "factorization" not in name)
    dense_tensors = sum("factorization" not in name for name in model.state_dict())
    size = (tmp_path / "model.safetensors").stat().st_size - rest
    assert 0.9 * plan.stored_bytes - 100 < size < 1.02 * plan.stored_bytes + 200 * dense_tensors
    # What is loaded trains, and is saved as it has become.
    loaded.train()
    before = _run(loaded)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    loaded(_IDS, labels=_IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.get_output_embeddings().parameters())
    optimizer.step()
    trained = _assert_loads(loaded.eval(), tmp_path)
    assert not torch.equal(_run(trained), before)
    # Another compression of what was loaded.
    densify(trained)
    compress_toy(trained, "low_rank", 2)
    _assert_loads(trained, tmp_path)


@pytest.mark.parametrize("method", ["group_reduce", "transform_coding"])
def test_narrow_dtypes(method: str, tmp_path: Path) -> None:
    model = _build("gpt2")
    compress_toy(model, method, 1.3)
    model.save_pretrained(tmp_path)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    # Casting and moving are not refused, as they are to models that transformers calls quantized.
    model.to(torch.bfloat16)
    assert torch.equal(_run(narrow), _run(model))
    assert {tensor.dtype for tensor in narrow.parameters()} == {torch.bfloat16}
    # The plan is that of the model as it is now.
    loaded = _assert_loads(narrow, tmp_path / "narrow")
    assert {table.dtype for table in plan_of(loaded).tables} == {"bfloat16"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "narrow").dtype == torch.bfloat16
    assert narrow.float().half().dtype == torch.float16


@pytest.mark.parametrize("family", ["gemma3 scaled", "bart scaled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_in_narrow_dtypes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = _build(family)
    dense, embedding = copy.deepcopy(model).to(dtype), type(model.get_input_embeddings())
    compress_toy(model, "low_rank", 1.3)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    densify(loaded)
    layer, original = loaded.get_input_embeddings(), dense.get_input_embeddings()
    original.weight = layer.weight
    assert type(layer) is embedding
    assert torch.equal(layer(_IDS), original(_IDS))
    # And while it is compressed.
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    torch.testing.assert_close(again.get_input_embeddings()(_IDS), original(_IDS))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt projected"])
@pytest.mark.parametrize("given", [{}, {"do_sample": True}, {"num_beams": 3}], ids=["greedy", "sampled", "beams"])
def test_generation(family: str, given: dict[str, Any], tmp_path: Path) -> None:
    model = _build(family)
    compress_toy(model, "group_reduce", 1.3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    dense = copy.deepcopy(loaded)
    densify(dense)
    texts = []
    for one in (model, loaded, dense):
        torch.manual_seed(2)
        texts.append(one.generate(_IDS, attention_mask=torch.ones_like(_IDS), max_new_tokens=6, **given))
    assert torch.equal(texts[0], texts[1])
    if not given:
        assert torch.equal(texts[0], texts[2])


def _compressed() -> Any:
    model = gpt2()
    compress(model, "low_rank", ratio=1.5)
    return model


def test_a_copied_and_a_pickled_model_look_after_themselves(tmp_path: Path) -> None:
    model = _compressed()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _assert_loads(other, tmp_path)
        densify(other)
        other.save_pretrained(tmp_path)
        assert "quantization_config" not in _config(tmp_path)
    _assert_loads(model, tmp_path)


def test_nothing_outlives_compression(tmp_path: Path) -> None:
    model = gpt2()
    attributes, config = set(vars(model)) | set(vars(model.transformer)), model.config.to_dict()
    ties, own_ties = dict(model.all_tied_weights_keys), model._tied_weights_keys
    compress(model, "low_rank", ratio=1.5)
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path)
    # A configuration is made into dense models too: it says nothing of the plan while nothing is saved.
    assert "quantization_config" not in model.config.to_dict()
    densify(model)
    assert set(vars(model)) | set(vars(model.transformer)) == attributes
    assert (model.all_tied_weights_keys, model._tied_weights_keys) == (ties, own_ties)
    assert model.resize_token_embeddings(_VOCAB + 10).num_embeddings == _VOCAB + 10
    assert model.lm_head.weight is model.transformer.wte.weight
    assert compress(model, "low_rank", ratio=1.5).tables[0].spec["vocab_size"] == _VOCAB + 10


_REFUSED: dict[str, Callable[[Any], Any]] = {
    "resize_token_embeddings": lambda model: model.resize_token_embeddings(_VOCAB + 10),
    "set_input_embeddings": lambda model: model.set_input_embeddings(nn.Embedding(_VOCAB, 32)),
    "set_output_embeddings": lambda model: model.set_output_embeddings(nn.Linear(32, _VOCAB)),
}


# The base model has no output embeddings.
_REFUSED_OF = [(name, base) for name in _REFUSED for base in (False, True) if not (base and "output" in name)]


@pytest.mark.parametrize(("name", "base"), _REFUSED_OF)
@pytest.mark.parametrize("loaded", [False, True])
def test_what_would_corrupt_a_table_is_refused(name: str, base: bool, loaded: bool, tmp_path: Path) -> None:
    model = _compressed()
    if loaded:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    part = model.transformer if base else model
    before, state = _run(model), dict(model.state_dict())
    with pytest.raises(ValueError, match=f"{name} .*densify"):
        _REFUSED[name](part)
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(_run(model), before)
    # The size that it has already is no change.
    assert part.resize_token_embeddings(_VOCAB) is model.transformer.wte
    assert part.resize_token_embeddings() is model.transformer.wte


def test_the_dense_side_of_a_partly_compressed_model_can_be_set(tmp_path: Path) -> None:
    model = gpt2(tie_word_embeddings=False)
    compress(model, "low_rank", ratio=1.5, tables=["lm_head"])
    model.set_input_embeddings(nn.Embedding(_VOCAB, 32))
    _assert_loads(model, tmp_path)
    with pytest.raises(ValueError, match="set_output_embeddings"):
        model.set_output_embeddings(nn.Linear(32, _VOCAB))
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        model.resize_token_embeddings(_VOCAB + 10)


def test_a_model_inside_of_a_lightning_module(tmp_path: Path) -> None:
    module = nn.ModuleDict({"model": gpt2()})
    plan = compress(module, "low_rank", ratio=1.5)
    assert plan.tables[0].modules == ("model.transformer.wte", "model.lm_head")
    loaded = _assert_loads(module["model"], tmp_path)
    # Paths from where it is saved.
    assert plan_of(loaded).tables[0].modules == ("transformer.wte", "lm_head")
    densify(module)
    module["model"].save_pretrained(tmp_path)
    assert "quantization_config" not in _config(tmp_path)


def test_a_base_model_by_itself(tmp_path: Path) -> None:
    model = gpt2()
    compress(model.transformer, "low_rank", ratio=1.5)
    assert plan_of(_assert_loads(model.transformer, tmp_path)).tables[0].modules == ("wte",)
    # And a part that is made dense by itself.
    model = _compressed()
    densify(model.transformer)
    assert isinstance(model.lm_head, CompressedLinear)
    loaded = _assert_loads(model, tmp_path)
    assert type(loaded.transformer.wte) is nn.Embedding


def test_a_state_dict_that_was_gathered_elsewhere(tmp_path: Path) -> None:
    model = gpt2()
    compress(model, "group_reduce", ratio=1.5, token_counts=torch.arange(_VOCAB, 0, -1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["transformer.ln_f.bias"] += 1
    model.save_pretrained(tmp_path, state_dict=state)
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "model.safetensors"))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.transformer.ln_f.bias, state["transformer.ln_f.bias"])
    assert isinstance(loaded.transformer.wte, CompressedEmbedding)


def test_a_failed_save_leaves_the_configuration_as_it_was(tmp_path: Path) -> None:
    model = _compressed()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        model.save_pretrained(tmp_path / "file" / "folder")
    assert "quantization_config" not in model.config.to_dict()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ValueError, match="bitsandbytes"):
        model.save_pretrained(tmp_path / "new")
    assert model.config.quantization_config["quant_method"] == "bitsandbytes"
    assert not list(tmp_path.glob("new/*"))
