"""Heads laid out for decoding: of factors nothing but their strides may change, codes become bytes for a while."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from lightning_embcompress import (
    compress,
    densify,
    load_compressed,
    optimize_for_inference,
    prepare_qat,
    save_compressed,
)
from lightning_embcompress.methods.registry import Quantization
from toys import LanguageModel, falling_counts


def _model(tied: bool = False) -> LanguageModel:
    return LanguageModel(500, 16, tied=tied, bias=not tied)


@pytest.mark.parametrize("method", ["group_reduce", "transform_coding"])
@pytest.mark.parametrize("tied", [False, True])
def test_state_dicts_files_and_gradients_stay(method: str, tied: bool, tmp_path: Path) -> None:
    model = _model(tied)
    compress(model, method, ratio=2, token_counts=falling_counts(500, seed=0))
    before = copy.deepcopy(model)
    ids, states = torch.tensor([[3, 499, 3]]), torch.ones(1, 16)
    assert optimize_for_inference(model) == 1
    factors = model.decoder.product_factors()
    assert all(factor.stride(0) == 1 for factor in factors if min(factor.shape) > 1)
    with torch.no_grad():
        # Codes become bytes that are proportional to their levels, or nearly so.
        error = (model(ids) - before(ids)).abs().max() / before(ids).abs().max()
        assert (1e-6 if factors else 1e-2) > error
    torch.testing.assert_close(model.decoder.topk(states, 5).ids, before.decoder.topk(states, 5).ids)
    assert optimize_for_inference(model) == 1
    torch.testing.assert_close(dict(model.state_dict()), dict(before.state_dict()), rtol=0, atol=0)
    save_compressed(model, tmp_path / "small")
    loaded = _model(tied)
    load_compressed(tmp_path / "small", loaded)
    torch.testing.assert_close(loaded(ids), before(ids))
    before.load_state_dict(copy.deepcopy(model).state_dict())
    for one in (model, before):
        one(ids).sum().backward()
    gradients = [[parameter.grad for parameter in one.parameters()] for one in (model, before)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    densify(model)
    torch.testing.assert_close(model(ids), before(ids))


def test_it_can_be_called_in_inference_mode_and_trained_afterwards() -> None:
    model = _model()
    compress(model, "low_rank", ratio=2)
    with torch.inference_mode():
        optimize_for_inference(model)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.tensor([[1, 2]])).logsumexp(-1).sum().backward()
    optimizer.step()


def test_models_without_such_heads_stay_as_they_are() -> None:
    model = _model()
    assert optimize_for_inference(model) == 0
    compress(model, "low_rank", ratio=2)
    prepare_qat(model, Quantization(bits=4))
    assert optimize_for_inference(model) == 0


def test_factors_of_inference_mode_are_refused() -> None:
    model = _model()
    compress(model, "low_rank", ratio=2, tables=["decoder"])
    with torch.inference_mode():
        model = copy.deepcopy(model)
        with pytest.raises(ValueError, match="factors of 'decoder' were made in torch.inference_mode"):
            optimize_for_inference(model)


@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_goes_on_with_its_moments(foreach: bool) -> None:
    found = []
    for is_laid_out in (False, True):
        model = _model(tied=True)
        compress(model, "low_rank", ratio=2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=foreach)
        for step in range(3):
            if is_laid_out and step == 1:
                optimize_for_inference(model)
            optimizer.zero_grad()
            model(torch.tensor([[1, 2]])).logsumexp(-1).sum().backward()
            optimizer.step()
        found.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*found)
