"""Factors laid out for decoding: nothing but their strides may change."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_embcompress import (
    compress,
    densify,
    load_compressed,
    optimize_for_inference,
    prepare_qat,
    save_compressed,
)
from lightning_embcompress.methods.registry import Quantization


class _Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Embedding(500, 16)
        self.decoder = nn.Linear(16, 500, bias=not tied)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.decoder(self.encoder(ids))
        return logits


@pytest.mark.parametrize("method", ["group_reduce", "transform_coding"])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_but_strides_changes(method: str, tied: bool, tmp_path: Path) -> None:
    model = _Model(tied)
    counts = torch.randint(1, 1000, (500,), generator=torch.Generator().manual_seed(0))
    compress(model, method, ratio=2, token_counts=counts)
    before = copy.deepcopy(model)
    ids = torch.tensor([[3, 499, 3]])
    heads = optimize_for_inference(model)
    has_products = bool(before.decoder.product_factors())
    assert heads == has_products
    if has_products:
        factors = model.decoder.product_factors()
        assert all(factor.stride(0) == 1 for factor in factors if min(factor.shape) > 1)
    torch.testing.assert_close(model(ids), before(ids))
    torch.testing.assert_close(
        model.decoder.topk(torch.ones(1, 16), 5).ids, before.decoder.topk(torch.ones(1, 16), 5).ids
    )
    assert optimize_for_inference(model) == heads
    for (name, one), (other_name, other) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    save_compressed(model, tmp_path / "small")
    loaded = _Model(tied)
    load_compressed(tmp_path / "small", loaded)
    torch.testing.assert_close(loaded(ids), before(ids))
    before.load_state_dict(copy.deepcopy(model).state_dict())
    model(ids).sum().backward()
    before(ids).sum().backward()
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    densify(model)
    torch.testing.assert_close(model(ids), before(ids))


def test_it_can_be_called_in_inference_mode_and_trained_afterwards() -> None:
    model = _Model()
    compress(model, "low_rank", ratio=2)
    with torch.inference_mode():
        optimize_for_inference(model)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.tensor([[1, 2]])).logsumexp(-1).sum().backward()
    optimizer.step()


def test_models_without_such_heads_stay_as_they_are() -> None:
    assert optimize_for_inference(_Model()) == 0
    model = _Model()
    compress(model, "low_rank", ratio=2)
    prepare_qat(model, Quantization(bits=4))
    assert optimize_for_inference(model) == 0


def test_factors_of_inference_mode_are_refused() -> None:
    model = _Model()
    with torch.inference_mode():
        model = copy.deepcopy(model)
        compress(model, "low_rank", ratio=2, tables=["decoder"])
        with pytest.raises(ValueError, match="factors of 'decoder' were made in torch.inference_mode"):
            optimize_for_inference(model)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}], ids=str)
def test_an_optimizer_goes_on_with_its_moments(options: dict[str, bool]) -> None:
    found = []
    for is_laid_out in (False, True):
        model = _Model(tied=True)
        compress(model, "low_rank", ratio=2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, **options)
        for step in range(3):
            if is_laid_out and step == 1:
                optimize_for_inference(model)
            optimizer.zero_grad()
            model(torch.tensor([[1, 2]])).logsumexp(-1).sum().backward()
            optimizer.step()
        found.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*found)
