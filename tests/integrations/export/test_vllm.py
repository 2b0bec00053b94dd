"""The plug-in of vLLM, against stand-ins for the classes of vLLM that it builds on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lightning_embcompress import compress, plan_of
from lightning_embcompress.integrations.sources import QUANT_METHOD
from toys import LanguageModel, falling_counts

VOCAB_SIZE, DIM = 203, 32
NAME = "lightning_embcompress.integrations.export.vllm"


class _Linear(nn.Module): ...


class _Embedding(nn.Module): ...


class _Head(_Embedding): ...


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Our module, imported beside stand-ins; `registered` has the classes by their names."""
    registered: dict[str, Any] = {}

    def register(name: str) -> Any:
        def keep(kind: Any) -> Any:
            registered[name] = kind
            return kind

        return keep

    layers = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {"LinearBase": _Linear, "UnquantizedLinearMethod": type("Unquantized", (), {})},
        f"{layers}.quantization": {"register_quantization_config": register},
        f"{layers}.quantization.base_config": {
            "QuantizationConfig": type("QuantizationConfig", (), {}),
            "QuantizeMethodBase": type("QuantizeMethodBase", (), {}),
        },
        f"{layers}.vocab_parallel_embedding": {"ParallelLMHead": _Head, "VocabParallelEmbedding": _Embedding},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    found: Any = importlib.import_module(NAME)
    found.registered = registered
    yield found
    # The operation that it has defined goes with it.
    del found._rows, found.registered
    sys.modules.pop(NAME, None)


def _compressed(method: str, tied: bool) -> Any:
    model = LanguageModel(VOCAB_SIZE, DIM, tied=tied).eval()
    compress(model, method, ratio=3, token_counts=falling_counts(VOCAB_SIZE, seed=0))
    return model


def _loaded(plugin: Any, config: Any, layer: nn.Module, prefix: str, tensors: dict[str, Any], **sizes: Any) -> Any:
    """A layer as vLLM makes, fills and finishes it."""
    method = config.get_quant_method(layer, prefix)
    given = {"output_partition_sizes": [256], "output_size": 256, **sizes}
    method.create_weights(layer, input_size_per_partition=DIM, input_size=DIM, params_dtype=torch.float32, **given)
    items = list(tensors.items())
    for part in (items[:2], items[2:]):
        layer.factorization.load_weights(iter(part))
    method.process_weights_after_loading(layer)
    return method


def test_rows_and_logits_of_a_tied_table(plugin: Any) -> None:
    model = _compressed("transform_coding", tied=True)
    record = plan_of(model).to_dict()
    # As a model of transformers calls them.
    record["tables"][0]["modules"] = ["model.embed_tokens", "lm_head"]
    config = plugin.registered[QUANT_METHOD].from_config(record)
    embedding = _Embedding()
    method = _loaded(plugin, config, embedding, "", model.encoder.factorization.state_dict())
    ids, hidden = torch.randint(VOCAB_SIZE, (7,)), torch.randn(3, DIM)
    with torch.no_grad():
        rows, logits = model.encoder(ids), model.decoder.factorization.logits(hidden)
        # Laid out for inference, codes are read in steps of a byte.
        near = {"rtol": 0, "atol": 3e-2}
        torch.testing.assert_close(method.embedding(embedding, ids), rows, **near)
        torch.testing.assert_close(method.apply(embedding, hidden), logits, **near)
        # What vLLM compiles sees one operation.
        compiled = torch.compile(lambda ids: method.embedding(embedding, ids) * 2, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids), rows * 2, **near)
    assert method.tie_weights(_Head(), embedding) is embedding
    assert isinstance(config.get_quant_method(_Linear(), "mlp"), plugin.UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Module(), "attn") is None
    assert list(dict(embedding.named_parameters())) == [
        "weight",
        *(f"factorization.table.{n}" for n, _ in _own(embedding)),
    ]


def _own(layer: Any) -> Any:
    return layer.factorization.table.named_parameters()


def test_two_tables(plugin: Any) -> None:
    model = _compressed("low_rank", tied=False)
    record = plan_of(model).to_dict()
    record["tables"][0]["modules"], record["tables"][1]["modules"] = ["model.embed_tokens"], ["lm_head"]
    config = plugin.registered[QUANT_METHOD].from_config(record)
    embedding, head = _Embedding(), _Head()
    read = _loaded(plugin, config, embedding, "", model.encoder.factorization.state_dict())
    write = _loaded(plugin, config, head, "lm_head", model.decoder.factorization.state_dict())
    ids, hidden = torch.arange(5), torch.randn(3, DIM)
    with torch.no_grad():
        torch.testing.assert_close(read.embedding(embedding, ids), model.encoder(ids))
        logits = model.decoder.factorization.logits(hidden)
        torch.testing.assert_close(write.apply(head, hidden, torch.ones(256)), logits + 1)


def test_what_cannot_be_is_refused(plugin: Any) -> None:
    model = _compressed("low_rank", tied=True)
    record = plan_of(model).to_dict()
    record["tables"][0]["modules"] = ["model.embed_tokens", "lm_head"]
    config = plugin.registered[QUANT_METHOD].from_config(record)
    tensors = model.encoder.factorization.state_dict()
    with pytest.raises(ValueError, match="tensor_parallel_size must be 1"):
        _loaded(plugin, config, _Embedding(), "", tensors, output_partition_sizes=[128])
    with pytest.raises(ValueError, match="'model.embed_tokens' is 203 x 32, and the model has 128 x 32"):
        _loaded(plugin, config, _Embedding(), "", tensors, output_partition_sizes=[128], output_size=128)
    tensors.popitem()
    with pytest.raises(ValueError, match="the compressed table 'model.embed_tokens' is not whole"):
        _loaded(plugin, config, _Embedding(), "", tensors)
    with pytest.raises(ValueError, match="tables"):
        plugin.registered[QUANT_METHOD].from_config({"quant_method": QUANT_METHOD})


def test_the_entry_point() -> None:
    (found,) = (one for one in entry_points(group="vllm.general_plugins") if one.name == "embcompress")
    assert found.value == f"{NAME}:register"
