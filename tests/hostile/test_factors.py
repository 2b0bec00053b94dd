"""Factors that do not fit their plan, or have values that no factors have: refused before a module is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_embcompress import load_compressed, save_compressed
from lightning_embcompress.integrations.checkpoint import restore_structure

# Two that stand for all: what is checked is the same.
_METHODS = ("group_reduce", "transform_coding")


def _with_one(tensor: Tensor, value: float) -> Tensor:
    tensor.view(-1)[-1] = value
    return tensor


# What is done to the tensors of the decoder, by the name of one, and what is said.
_FACTORS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "NaN": (lambda tensor: _with_one(tensor, float("nan")), r"has NaN or infinite values in '{}'"),
    "infinity": (lambda tensor: _with_one(tensor, -float("inf")), r"has NaN or infinite values in"),
    "another shape": (lambda tensor: tensor[1:], r"'{}' has the shape \(.*\), by the plan \("),
    "integers": (lambda tensor: tensor.long(), r"'{}' holds torch.int64 instead of floating-point numbers"),
    "complex numbers": (lambda tensor: tensor.cfloat(), r"'{}' holds torch.complex64 instead of floating-point"),
    "sparse": (lambda tensor: tensor.to_sparse(), r"'{}' is no plain tensor, but Tensor"),
    "no tensor": (lambda tensor: tensor.tolist(), r"'{}' is no plain tensor, but list"),
    "missing": (lambda tensor: None, r"'{}' is missing"),
}


@pytest.mark.parametrize("name", sorted(_FACTORS))
@pytest.mark.parametrize("method", _METHODS)
def test_factors_are_refused_before_the_module_is_changed(method: str, name: str, hostile: Any) -> None:
    change, message = _FACTORS[name]
    checkpoint = hostile.checkpoint(method)
    factor = next(
        key
        for key, tensor in checkpoint["state_dict"].items()
        if key.startswith("decoder.f") and tensor.is_floating_point() and tensor.numel()
    )
    changed = change(checkpoint["state_dict"][factor].detach().clone())
    checkpoint["state_dict"] |= {factor: changed}
    if changed is None:
        del checkpoint["state_dict"][factor]
    for module in (hostile.Model(), copy.deepcopy(hostile.models[method])):
        modules, values = dict(module.named_modules()), copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match="the checkpoint .*" + message.format(factor)):
            restore_structure(module, checkpoint)
        assert dict(module.named_modules()) == modules
        torch.testing.assert_close(module.state_dict(), values, rtol=0, atol=0)
    # A file of another precision is another matter.
    torch.manual_seed(0)
    checkpoint = hostile.checkpoint(method)
    for key, tensor in checkpoint["state_dict"].items():
        checkpoint["state_dict"][key] = tensor.double() if tensor.is_floating_point() else tensor
    restored = hostile.Model()
    restore_structure(restored, checkpoint)
    restored.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(restored(torch.arange(9)), hostile.models[method](torch.arange(9)))


@pytest.mark.parametrize("method", _METHODS)
def test_tensors_too_many(method: str, hostile: Any) -> None:
    for extra, message in (
        ("decoder.factorization.more", r"'decoder.factorization.more' is no tensor of what is stored"),
        ("decoder.weight", r"it has 'decoder.weight', whose table is compressed"),
    ):
        checkpoint = hostile.checkpoint(method)
        checkpoint["state_dict"][extra] = torch.ones(3)
        with pytest.raises(ValueError, match=message):
            restore_structure(hostile.Model(), checkpoint)


def test_tensors_of_others_are_not_looked_at(hostile: Any) -> None:
    checkpoint = hostile.checkpoint("low_rank")
    checkpoint["state_dict"] |= {"other.factorization.more": torch.tensor(float("nan")), "decoder.bias": "no tensor"}
    restore_structure(hostile.Model(), checkpoint)


@pytest.mark.parametrize("method", ["group_reduce", "product_quantization"])
def test_any_packed_integers_are_refused_or_can_be_read(method: str, hostile: Any) -> None:
    @settings(hostile.quick, max_examples=60)
    @given(st.data())
    def run(data: Any) -> None:
        checkpoint = hostile.checkpoint(method)
        name = data.draw(st.sampled_from([key for key in checkpoint["state_dict"] if "packed" in key]))
        packed = checkpoint["state_dict"][name].clone()
        for _ in range(data.draw(st.integers(1, 3))):
            packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
        checkpoint["state_dict"][name] = packed
        module = hostile.Model()
        try:
            with hostile.unchanged_if_refused(module):
                restore_structure(module, checkpoint)
        except ValueError:
            return
        module.load_state_dict(checkpoint["state_dict"])
        ids = torch.arange(hostile.vocab_size)
        assert module(ids).isfinite().all()
        assert module(ids[:1]).isfinite().all()

    run()
    checkpoint = hostile.checkpoint(method)
    name = next(key for key in checkpoint["state_dict"] if "packed" in key)
    checkpoint["state_dict"][name] = checkpoint["state_dict"][name].long()
    with pytest.raises(ValueError, match=rf"'{name}' holds torch.int64 instead of packed bytes"):
        restore_structure(hostile.Model(), checkpoint)


def test_values_in_saved_directories(tmp_path: Path, hostile: Any) -> None:
    model = copy.deepcopy(hostile.models["tensor_train"])
    model.encoder.factorization.cores.data[5, 1] = float("nan")
    save_compressed(model, tmp_path)
    fresh = hostile.Model()
    with pytest.raises(ValueError, match=r"' has NaN or infinite values in 'encoder.factorization.cores'"):
        load_compressed(tmp_path, fresh)
    assert type(fresh.encoder) is nn.Embedding
