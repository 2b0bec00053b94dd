"""The two roles of a compressed table against the layers of torch that they replace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.methods.registry import Factorization
from toys import factors_of

_METHODS = ["low_rank", "transform_coding"]


def _factors(method: str = "low_rank") -> Factorization[Any]:
    return factors_of(method, 200, 8)


def _reference(factors: Factorization[Any], **given: object) -> nn.Embedding:
    return nn.Embedding.from_pretrained(factors.materialize(), freeze=False, **given)


@pytest.mark.parametrize("method", _METHODS)
def test_embedding_and_linear_equal_those_of_torch(method: str) -> None:
    factors = _factors(method)
    bias = nn.Parameter(torch.randn(200))
    ids, hidden = torch.tensor([[0, 7], [7, 199]]), torch.randn(2, 3, 8)
    torch.testing.assert_close(CompressedEmbedding(factors)(ids), _reference(factors)(ids))
    expected = nn.functional.linear(hidden, factors.materialize(), bias)
    torch.testing.assert_close(CompressedLinear(factors, bias)(hidden), expected, rtol=1e-4, atol=1e-4)
    # By name, as code that was written for the layers of torch may.
    assert torch.equal(CompressedEmbedding(factors)(input=ids), CompressedEmbedding(factors)(ids))
    assert torch.equal(CompressedLinear(factors)(input=hidden), CompressedLinear(factors)(hidden))


def _gradients(layer: nn.Module, ids: Tensor) -> list[Tensor]:
    layer.zero_grad()
    layer(ids).square().sum().backward()
    return [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("method", _METHODS)
def test_padding_gets_no_gradient(method: str) -> None:
    factors = _factors(method)
    layer, ids = CompressedEmbedding(factors, padding_idx=3), torch.tensor([[3, 5, 3], [7, 5, 3]])
    torch.testing.assert_close(layer(ids), _reference(factors, padding_idx=3)(ids))
    without = _gradients(CompressedEmbedding(factors), torch.tensor([5, 7, 5]))
    assert any(bool(gradient.any()) for gradient in without)
    torch.testing.assert_close(_gradients(layer, ids), without)
    assert not any(bool(gradient.any()) for gradient in _gradients(layer, torch.tensor([3, 3])))


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm_scales_rows_down(norm_type: float) -> None:
    factors = _factors()
    layer = CompressedEmbedding(factors, max_norm=1.5, norm_type=norm_type)
    ids = torch.arange(200)
    with torch.no_grad():
        expected = _reference(factors, max_norm=1.5, norm_type=norm_type)(ids)
    torch.testing.assert_close(layer(ids), expected, rtol=1e-5, atol=1e-6)
    norms = factors.materialize().norm(p=norm_type, dim=1)
    assert int((norms > 1.5).sum()) > 0
    torch.testing.assert_close(layer(ids)[norms <= 1.5], factors.materialize()[norms <= 1.5])
    assert all(gradient.isfinite().all() for gradient in _gradients(layer, ids))


def test_attributes_of_the_layers_they_replace() -> None:
    embedding, linear = CompressedEmbedding(_factors(), padding_idx=4), CompressedLinear(_factors())
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (200, 8, 4)
    assert (linear.in_features, linear.out_features, linear.bias) == (8, 200, None)
    assert "200, 8, padding_idx=4" in repr(embedding)
    assert "in_features=8, out_features=200, bias=False" in repr(linear)


def test_tied_layers_stay_tied_in_copies() -> None:
    factors = _factors()
    model = nn.ModuleList([CompressedEmbedding(factors), CompressedLinear(factors)])
    assert len(list(model.parameters())) == len(list(factors.parameters()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].factorization is other[1].factorization
        assert other[0].factorization is not factors
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert moved[0].factorization is moved[1].factorization
    assert moved[1](torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
