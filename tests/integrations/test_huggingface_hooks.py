"""What a model of transformers knows of its compressed tables, and what is left of it afterwards."""

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
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from toys import gpt2

_VOCAB = 300
_IDS = torch.randint(3, _VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def _compressed(**given: Any) -> Any:
    model = gpt2(**given)
    compress(model, "low_rank", ratio=1.5)
    return model


@torch.no_grad()
def _run(model: Any) -> Tensor:
    output: Tensor = model(_IDS)[0]
    return output


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _assert_loads(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(_run(loaded), _run(model))
    assert plan_of(loaded) == plan_of(model)
    return loaded


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


def test_a_model_that_is_quantized_besides_is_not_saved_without_saying_so(tmp_path: Path) -> None:
    model = _compressed()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ValueError, match="bitsandbytes"):
        model.save_pretrained(tmp_path)
    assert model.config.quantization_config["quant_method"] == "bitsandbytes"
    assert list(tmp_path.iterdir()) == []
