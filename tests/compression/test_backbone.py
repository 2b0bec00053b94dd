"""Linear and recurrent weights in few bits: what is read, what is stored, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Model

from lightning_embcompress import compress, densify, load_compressed, plan_of, save_compressed
from lightning_embcompress.compression.backbone import (
    Backbone,
    apply_backbone,
    backbone_of,
    backbone_weights,
    convert_backbone,
    converted_backbone,
    freeze_backbone_ranges,
    plan_backbone,
    restore_backbone,
)
from lightning_embcompress.compression.plan import Plan
from lightning_embcompress.integrations.checkpoint import restore_structure, write_record
from lightning_embcompress.integrations.skeleton import build_skeleton
from lightning_embcompress.layers.parametrized_weights import parametrized_bytes
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.methods.quantizers.integer_quantizer import from_codes, group_scales, to_codes
from lightning_embcompress.methods.quantizers.quantization import Storage, storage_of
from lightning_embcompress.methods.registry import Quantization
from lightning_embcompress.quantization.aware import convert_qat, prepare_qat
from toys import gpt2


class Tied(nn.Module):
    """Two layers of one weight, and a layer that is registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.weight = self.first.weight
        self.again, self.last = self.first, nn.Linear(24, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.second(self.first(x))))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], list[int], int]] = {
    "LSTM with projections": (lambda: nn.LSTM(24, 40, 2, proj_size=16), [5, 3, 24], 6),
    "GRU in both directions": (lambda: nn.GRU(24, 40, bidirectional=True, bias=False), [5, 3, 24], 4),
    "RNN": (lambda: nn.RNN(24, 17, batch_first=True), [3, 5, 24], 2),
    "cell": (lambda: nn.GRUCell(24, 40), [3, 24], 2),
    "linear layers": (lambda: nn.Sequential(nn.Linear(24, 50), nn.ReLU(), nn.Linear(50, 7, bias=False)), [3, 24], 2),
    "attention": (lambda: nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0), [5, 3, 24], 4),
    "tied": (Tied, [3, 24], 4),
}


def _prepare(model: nn.Module, storage: Storage) -> Backbone:
    backbone = plan_backbone(model, storage)
    apply_backbone(model, backbone)
    return backbone


INT4 = storage_of("int4", Quantization(group_size=16))


def _built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    return make(), torch.randn(shape)


def _read(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return found[0] if isinstance(found, tuple) else found


def _rounded(weight: Tensor, storage: Storage) -> Tensor:
    if not isinstance(storage, Quantization):
        return weight.to(getattr(torch, storage)).to(weight.dtype)
    of, shape = storage, weight.shape
    scales = group_scales(weight, of.bits, of.group_size, of.scales)
    return from_codes(to_codes(weight, scales, of.bits, of.group_size), scales, of.bits, of.group_size).view(shape)


@pytest.mark.parametrize("dtype", ["int8", "int3", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_what_trains_is_what_is_stored(name: str, dtype: str) -> None:
    storage = storage_of(dtype, INT4)
    model, x = _built(name)
    dense, names = copy.deepcopy(model), [own for own, _ in model.named_parameters()]
    parameters = {id(parameter) for parameter in model.parameters()}
    weights = backbone_weights(model)
    assert len(weights) == MODELS[name][2]
    shapes = {own: tuple(weight.shape) for own, weight in weights.items()}
    with torch.no_grad():
        for weight in {id(weight): weight for weight in backbone_weights(dense).values()}.values():
            weight.copy_(_rounded(weight, storage))
    backbone = _prepare(model, storage)
    assert backbone_of(model) == backbone == Backbone(shapes, storage, "fake")
    assert {id(parameter) for parameter in model.parameters()} == parameters
    read = _read(model, x)
    torch.testing.assert_close(read, _read(dense, x))
    # Straight through the rounding: the gradients of a model of the rounded weights.
    read.square().sum().backward()
    _read(dense, x).square().sum().backward()
    by_name = dict(dense.named_parameters())
    for own, weight in weights.items():
        if own in by_name:
            torch.testing.assert_close(weight.grad, by_name[own].grad)
    twin = copy.deepcopy(model)
    with converted_backbone(model):
        assert backbone_of(model) == Backbone(shapes, storage, "packed")
        stored = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        torch.testing.assert_close(_read(model, x), read)
    assert backbone_of(model) == backbone
    assert {id(parameter) for parameter in model.parameters()} == parameters
    convert_backbone(model)
    torch.testing.assert_close(_read(model, x), read)
    # Empty, and loaded into, over whatever it was.
    for other in (_built(name)[0], twin):
        apply_backbone(other, backbone_of(model))
        other.load_state_dict(stored)
        torch.testing.assert_close(_read(other, x), read)
    of_weights = {key: tensor for key, tensor in stored.items() if "parametrizations" in key}
    assert all(tensor.dtype == torch.uint8 for tensor in of_weights.values())
    # As stored: neither casts nor devices change what is in it.
    model.half().double().float()
    for key, tensor in of_weights.items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=0)
    restore_backbone(model)
    assert [own for own, _ in model.named_parameters()] == names
    assert backbone_of(model) is None
    assert type(model) is type(dense)
    # Biases went through 16 bits.
    torch.testing.assert_close(_read(model, x), read, rtol=1e-2, atol=2e-3)


def test_bytes_are_those_of_the_bits() -> None:
    model = nn.LSTM(64, 64)
    dense = model_bytes(model)["dense_bytes"]
    scales = 2 * 512
    for dtype, of_weights in (("int8", 32_768 + scales), ("int6", 24_576 + scales), ("float16", 65_536)):
        packed = copy.deepcopy(model)
        _prepare(packed, storage_of(dtype))
        convert_backbone(packed)
        assert parametrized_bytes(packed) == (4 * 32_768, of_weights)
        assert model_bytes(packed) == {
            "dense_bytes": dense,
            "stored_bytes": dense - 4 * 32_768 + of_weights,
            "ratio": pytest.approx(dense / (dense - 4 * 32_768 + of_weights)),
            "bits_per_weight": pytest.approx(32 * (dense - 4 * 32_768 + of_weights) / dense),
        }


def test_learned_and_frozen_ranges() -> None:
    model, x = _built("RNN")
    _prepare(model, replace(INT4, ranges="learned"))
    learned = {name for name, _ in model.named_parameters() if name.endswith("scales")}
    assert len(learned) == 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _read(model, x).square().sum().backward()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    read = _read(model, x)
    with converted_backbone(model):
        torch.testing.assert_close(_read(model, x), read)
    freeze_backbone_ranges(model)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == learned

    model, x = _built("RNN")
    _prepare(model, INT4)
    freeze_backbone_ranges(model)
    assert backbone_of(model) == Backbone({"weight_ih_l0": (17, 24), "weight_hh_l0": (17, 17)}, INT4, "frozen")
    scales = model.state_dict()["parametrizations.weight_ih_l0.0.scales"].clone()
    with torch.no_grad():
        model.get_parameter("parametrizations.weight_ih_l0.original").mul_(3)
    reads = model.get_submodule("parametrizations.weight_ih_l0")()
    # Twice the range is beyond it: ends of the range are what is read.
    assert reads.abs().max() <= 8 * scales.max()
    fresh = _built("RNN")[0]
    apply_backbone(fresh, backbone_of(model))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(_read(fresh, x), _read(model, x), rtol=0, atol=0)


def test_tables_are_left_alone() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.position = nn.Embedding(300, 24), nn.Embedding(24, 24)
            self.lstm, self.mix = nn.LSTM(24, 24), nn.Linear(24, 24)
            self.decoder, self.scores = nn.Linear(24, 300), nn.Linear(24, 300)

    backbone = ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "mix.weight"]
    model = Language()
    model.decoder.weight = model.encoder.weight
    # Nothing says which of the projections is the softmax: none is touched but by what it shares.
    assert list(backbone_weights(model)) == [*backbone, "scores.weight"]
    del model.scores
    assert list(backbone_weights(model)) == backbone
    compress(model, "low_rank", ratio=4, tables="encoder")
    assert list(backbone_weights(model)) == backbone
    # A class of its own may read its weight otherwise.
    model.mix = type("Own", (nn.Linear,), {})(24, 24)
    assert list(backbone_weights(model)) == backbone[:2]


def test_what_cannot_be_quantized() -> None:
    with pytest.raises(ValueError, match="no backbone"):
        plan_backbone(nn.Embedding(10, 4), "float16")
    model = nn.Sequential(nn.Linear(4, 8), nn.LSTM(4, 4), nn.Linear(8, 5))
    for value, storage in ((torch.nan, storage_of("int8")), (1e6, storage_of("float16")), (1e9, storage_of("int8"))):
        broken: Any = copy.deepcopy(model)
        with torch.no_grad():
            broken[1].weight_hh_l0[0, 0] = value
        with pytest.raises(ValueError, match="'1.weight_hh_l0'"):
            plan_backbone(broken, storage)
    assert not convert_backbone(model)
    _prepare(model, "bfloat16")
    with pytest.raises(ValueError, match="prepared for quantization already"):
        plan_backbone(model, "float16")
    convert_qat(model)
    for again in (convert_qat, lambda model: prepare_qat(model, tables=[], backbone="int8")):
        with pytest.raises(ValueError, match="packed already|nothing is prepared"):
            again(model)
    lstm = {"1.weight_ih_l0": (16, 4), "1.weight_hh_l0": (16, 4)}
    assert backbone_of(model) == Backbone({"0.weight": (8, 4), **lstm, "2.weight": (5, 8)}, "bfloat16", "packed")


SHAPES = {"1.weight_ih_l0": (64, 24), "1.weight_hh_l0": (64, 16)}


def _language() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(500, 24), nn.LSTM(24, 16), nn.Linear(16, 500))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Sequential, Path]:
    """A compressed model whose LSTM trains for int4, and what was saved of it."""
    model = _language()
    compress(model, "low_rank", ratio=3)
    prepare_qat(model, Quantization(bits=8, group_size=16), backbone="int4")
    save_compressed(model, tmp_path / "saved")
    return model, tmp_path / "saved"


def test_files_hold_the_integers(saved: tuple[nn.Sequential, Path]) -> None:
    model, folder = saved
    x = torch.randn(3, 2, 24)
    assert backbone_of(model) == Backbone(SHAPES, INT4, "fake")
    fresh = _language()
    plan = load_compressed(folder, fresh)
    assert plan.backbone == Backbone(SHAPES, INT4, "packed")
    torch.testing.assert_close(fresh[1](x), model[1](x))
    packed = sum(tensor.nbytes for key, tensor in load_file(folder / "model.safetensors").items() if "parametr" in key)
    assert packed == parametrized_bytes(fresh)[1] == (24 + 16) * 64 // 2 + 2 * (64 * 2 + 64)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    densify(fresh)
    assert plan_of(fresh) == Plan()
    torch.testing.assert_close(fresh[1](x), model[1](x))


def _change(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(config, tensors)
    config.pop("sha256")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


HH = "1.parametrizations.weight_hh_l0."


def _backbone(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: config["plan"]["backbone"].update(changes)


def _plan(entry: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: config["plan"].update(backbone=entry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_backbone(weights={"1.weight_ih_l0": [64, 24], "1.other": [4, 4]}), "'1.other'"),
        (_backbone(weights={"1.bias_ih_l0": [64, 1]}), "'1.bias_ih_l0'"),
        (_backbone(weights={"1.weight_ih_l0": [64, 23]}), r"'1.weight_ih_l0'.*\[64, 23\].*\[64, 24\]"),
        (_backbone(weights={}), "'weights'"),
        (_backbone(weights={"1.weight_ih_l0": [64, -1]}), "'1.weight_ih_l0'"),
        (_backbone(weights={"1.weight_ih_l0": [64, 24]}), f"'{HH}original0'"),
        (_backbone(dtype="int9", state="packed"), "'dtype'"),
        (_backbone(quantization={"bits": 4}), "'quantization'"),
        (_plan(3), "'weights'"),
        (lambda config, tensors: tensors.pop(HH + "original1"), f"'{HH}original1' is missing"),
        (lambda config, tensors: tensors[HH + "original1"].fill_(255), f"NaN.*'{HH}original1'"),
        (lambda config, tensors: tensors.update({HH + "original0": tensors[HH + "original0"].float()}), "uint8"),
    ],
)
def test_damaged_files_change_nothing(
    saved: tuple[nn.Sequential, Path], change: Callable[[dict[str, Any], dict[str, Tensor]], None], message: str
) -> None:
    _change(saved[1], change)
    fresh = _language()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_compressed(saved[1], fresh)
    torch.testing.assert_close(dict(fresh.state_dict()), before, rtol=0, atol=0)


def test_checkpoints_without_a_record(saved: tuple[nn.Sequential, Path]) -> None:
    model = nn.Sequential(nn.LSTM(24, 16))
    dense = {"pytorch-lightning_version": "2.6.0", "state_dict": copy.deepcopy(model.state_dict())}
    _prepare(model, storage_of("int8"))
    checkpoint: dict[str, Any] = {"pytorch-lightning_version": "2.6.0", "state_dict": model.state_dict()}
    with pytest.raises(ValueError, match=r"no weight '0.weight_ih_l0', and does not say how it is quantized"):
        restore_structure(model, checkpoint)
    assert backbone_of(model) is not None
    write_record(model, checkpoint)
    fresh = nn.Sequential(nn.LSTM(24, 16))
    restore_structure(fresh, checkpoint)
    assert backbone_of(fresh) == backbone_of(model)
    # One of the dense model makes it dense.
    restore_structure(model, dense)
    assert backbone_of(model) is None
    model.load_state_dict(dense["state_dict"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_state_dict_alone_is_made_dense(saved: tuple[nn.Sequential, Path], packed: bool) -> None:
    model, _ = saved
    if packed:
        convert_qat(model)
    skeleton = build_skeleton(model.state_dict(), plan_of(model), "it")
    assert plan_of(skeleton) == plan_of(model)
    for one in (model, skeleton):
        densify(one)
    torch.testing.assert_close(dict(skeleton.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("tables", ["auto", []])
def test_models_of_transformers(tmp_path: Path, tables: Any) -> None:
    model, ids = gpt2(), torch.arange(10)[None]
    if tables:
        compress(model, "low_rank", ratio=3)
    prepare_qat(model, Quantization(bits=4, group_size=32), tables, backbone="int8")
    assert len(plan_of(model).backbone.weights) == 4  # type: ignore[union-attr]
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    assert backbone_of(model).state == "fake"  # type: ignore[union-attr]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    torch.testing.assert_close(loaded(ids).logits, logits)
    assert plan_of(loaded).backbone.state == "packed"  # type: ignore[union-attr]
    assert loaded.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 12)
    base = GPT2Model.from_pretrained(tmp_path, dtype="float32").eval()
    torch.testing.assert_close(base(ids).last_hidden_state, model.transformer(ids).last_hidden_state)
    with pytest.raises(ValueError, match="has no integers: call save_pretrained without a state_dict"):
        model.save_pretrained(tmp_path / "other", state_dict=model.state_dict())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.0.attn.c_attn.parametrizations.weight.original1"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"c_attn.parametrizations.weight.original1' was not loaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
