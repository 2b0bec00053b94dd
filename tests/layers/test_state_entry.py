"""State dicts of compressed models given to dense ones, to those compressed otherwise, and the reverse."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_embcompress.compression.plan import apply_plan, densify, plan_of
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.layers.state_entry import is_table_entry
from toys import LanguageModel, compress_toy, model_of

_METHODS = ["low_rank", "transform_coding"]
_IDS = torch.arange(12).view(2, 6)


def _compressed(method: str = "low_rank", kind: str = "untied", **given: Any) -> LanguageModel:
    model = model_of(kind, **given)
    compress_toy(model, method, 2)
    return model


def _empty_like(model: nn.Module, kind: str = "untied") -> LanguageModel:
    fresh = model_of(kind, seed=5)
    apply_plan(fresh, plan_of(model))
    return fresh


@torch.no_grad()
def _run(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(_IDS)
    return logits


def _strictly(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state)


def _loosely(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state, strict=False)


def _assigned(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state, strict=False, assign=True)


def _copied(model: nn.Module, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            if name in own:
                own[name].copy_(value)


def _part_of_something(model: nn.Module, state: dict[str, Tensor]) -> None:
    outer = nn.ModuleDict({"model": model, "other": nn.Linear(2, 2)})
    outer.load_state_dict({f"model.{name}": value for name, value in state.items()}, strict=False)


_LOADERS = [_strictly, _loosely, _assigned, _part_of_something]


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("load", [*_LOADERS, _copied])
def test_a_dense_model_refuses_compressed_tables(load: Callable[..., None], kind: str) -> None:
    with pytest.raises(RuntimeError, match=r"(encoder|decoder).weight|size of tensor"):
        load(model_of(kind), _compressed(kind=kind).state_dict())


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("load", _LOADERS)
@pytest.mark.parametrize("method", _METHODS)
def test_a_compressed_model_refuses_dense_tables(load: Callable[..., None], method: str, kind: str) -> None:
    model = _compressed(method, kind)
    before = _run(model)
    with pytest.raises(RuntimeError, match=r"decoder.weight is a dense table of 150 x 16"):
        load(model, {"decoder.weight": model_of(kind, seed=3).decoder.weight})
    assert torch.equal(_run(model), before)


@pytest.mark.parametrize("load", _LOADERS)
def test_a_compressed_model_refuses_factors_of_another_structure(load: Callable[..., None]) -> None:
    with pytest.raises(RuntimeError, match=r"encoder.factorization.\w+ is no factor of this CompressedEmbedding"):
        load(_compressed("low_rank"), _compressed("transform_coding").state_dict())
    state = _compressed("low_rank").state_dict()
    del state["encoder.factorization.basis"]
    with pytest.raises(RuntimeError, match="encoder.factorization.basis is missing for this CompressedEmbedding"):
        load(_compressed("low_rank"), state)


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("method", _METHODS)
def test_round_trips_with_and_without_the_entry(method: str, kind: str, tmp_path: Path) -> None:
    model = _compressed(method, kind)
    state = model.state_dict()
    entries = {"encoder.weight", "decoder.weight"}
    assert all(is_table_entry(state[name]) for name in entries)
    of_before = {name: value for name, value in state.items() if name not in entries}
    for given in (state, of_before):
        file = io.BytesIO()
        torch.save(given, file)
        file.seek(0)
        loaded = _empty_like(model, kind)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(_run(loaded), _run(model))
    # Safetensors leaves out names of tensors that are shared, and loads without strict.
    save_model(model, str(tmp_path / "model.safetensors"))
    loaded = _empty_like(model, kind)
    assert load_model(loaded, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(_run(loaded), _run(model))
    with pytest.raises(RuntimeError, match=r"coder.weight"):
        load_model(model_of(kind), str(tmp_path / "model.safetensors"), strict=False)


@pytest.mark.parametrize("method", _METHODS)
def test_parts_that_are_loaded_without_strict(method: str) -> None:
    model = _compressed(method)
    other, before = copy.deepcopy(model), _run(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    # An adapter, say, which has nothing of the tables.
    model.load_state_dict({}, strict=False)
    assert torch.equal(_run(model), before)
    trained = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    model.load_state_dict({name: value for name, value in other.state_dict().items() if name in trained}, strict=False)
    assert all(torch.equal(value, other.get_parameter(name)) for name, value in model.named_parameters())


def test_the_entry_is_in_state_dicts_alone() -> None:
    model = _compressed().to(torch.bfloat16)
    assert model.state_dict()["encoder.weight"].dtype == torch.bfloat16
    assert not {"encoder.weight", "decoder.weight"} & {
        name for name, _ in [*model.named_parameters(), *model.named_buffers()]
    }
    # Without values there is nothing to be lost, and what looks for a parameter by each name finds it.
    assert "encoder.weight" not in copy.deepcopy(model).to("meta").state_dict()
    parameters = sum(tensor.nbytes for tensor in [*model.mix.parameters(), model.decoder.bias])
    assert model_bytes(model)["stored_bytes"] == parameters + sum(t.stored_bytes for t in plan_of(model).tables)


def test_distributed_checkpoints(tmp_path: Path) -> None:
    model = _compressed("transform_coding")
    state = get_model_state_dict(torch.compile(model))
    dcp.save({"model": state}, checkpoint_id=tmp_path)
    loaded = _empty_like(model)
    given = {"model": get_model_state_dict(loaded)}
    dcp.load(given, checkpoint_id=tmp_path)
    # The names are given without those of what wraps the model, and some are wrapped again.
    set_model_state_dict(torch.compile(loaded), given["model"])
    assert torch.equal(_run(loaded), _run(model))
    loose = StateDictOptions(strict=False)
    for wrapped in (loaded, torch.compile(loaded)):
        with pytest.raises(RuntimeError, match=r"encoder.weight is a dense table"):
            set_model_state_dict(wrapped, model_of().state_dict(), options=loose)
    with pytest.raises(RuntimeError, match="encoder.weight"):
        set_model_state_dict(model_of(), get_model_state_dict(model), options=loose)


def test_averages_of_weights() -> None:
    model = _compressed()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    with torch.no_grad():
        model.encoder.factorization.basis += 1
    average.update_parameters(model)
    average.update_parameters(model)
    loaded = _empty_like(model)
    loaded.load_state_dict(average.module.state_dict())
    assert torch.equal(_run(loaded), _run(average.module))
    again = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    again.load_state_dict(average.state_dict())
    # By hand, as many programs do it.
    with torch.no_grad():
        own = model.state_dict()
        for name, value in average.module.state_dict().items():
            own[name].mul_(0.5).add_(value, alpha=0.5)
    densify(model)
    with pytest.raises(RuntimeError, match=r"encoder.weight"):
        model.load_state_dict(average.module.state_dict(), strict=False)


def test_factors_without_elements_are_not_missed() -> None:
    model = model_of()
    for layer in (model.encoder, model.decoder):
        # Nothing is kept of rows that are zero.
        layer.weight.data[:100] = 0
    compress_toy(model, "shared_basis", 4)
    assert any(not factor.numel() for factor in model.parameters())
    fresh = _empty_like(model)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(_run(fresh), _run(model))
