"""What reads a table, for all methods there are: losses, decoding and sparse gradients, in all of its states."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear, head_tiles
from lightning_embcompress.layers.full_softmax import head_softmax_loss
from lightning_embcompress.layers.fused_loss import fused_cross_entropy
from lightning_embcompress.methods.registry import METHODS, Quantization, factorization_from_spec
from toys import compressed_head, factors_of

VOCAB_SIZE, DIM, TOKENS = 70, 8, 23


def _states(method: str, bias: bool = True) -> Iterator[CompressedLinear]:
    """A head, prepared for quantization in both ways, and converted."""
    head = compressed_head(method, VOCAB_SIZE, DIM, torch.float64, bias)
    yield head
    factors = head.factorization
    for ranges in ("minmax", "learned"):
        if method == "transform_coding" and ranges == "learned":
            continue
        head.factorization = copy.deepcopy(factors).prepared(Quantization(bits=4, group_size=16, ranges=ranges))
        yield head
    head.factorization = head.factorization.converted()
    yield head


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCAB_SIZE, (TOKENS,), generator=generator)
    # Single ones, and one whole chunk.
    targets[[0, 7, 22, 10, 11, 12, 13, 14]] = -100
    return hidden, targets


def _gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor | None]:
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, [hidden, *trained], allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_losses(method: str) -> None:
    hidden, targets = _data()
    for head in _states(method):
        whole = F.cross_entropy(head(hidden), targets)
        expected = _gradients(whole, hidden, head)
        assert all(bool(gradient.any()) for gradient in expected if gradient is not None and gradient.numel())
        chunked, count = head_softmax_loss(head, hidden, targets, chunk_tokens=5)
        assert count == TOKENS - 8
        for loss in (chunked, fused_cross_entropy(head, hidden, targets, tile_rows=9)):
            torch.testing.assert_close(loss, whole, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(_gradients(loss, hidden, head), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_tiles(method: str) -> None:
    hidden, _ = _data()
    for head in _states(method, bias=False):
        for tile_rows in (1, 13, 1000):
            tiles = head_tiles(head, hidden, tile_rows)
            assert all(tile.stop - tile.start <= tile_rows for tile in tiles.tiles)
            assert [tile.start for tile in tiles.tiles] == [0, *(tile.stop for tile in tiles.tiles[:-1])]
            logits = torch.cat([tiles.logits(tile) for tile in tiles.tiles], dim=1)
            if tiles.position is not None:
                logits = logits[:, tiles.position]
            torch.testing.assert_close(logits, head(hidden))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_decoding(method: str) -> None:
    hidden, _ = _data()
    states = hidden.detach().view(TOKENS, 1, DIM)
    ids = torch.randint(VOCAB_SIZE, (TOKENS, 1, 5))
    for head in _states(method):
        logits = head(states).detach()
        for k in (1, 7, VOCAB_SIZE):
            found, expected = head.topk(states, k), logits.topk(k)
            torch.testing.assert_close(found.logits, expected.values)
            # The same logits: tokens that are equal up to rounding may stand for one another.
            torch.testing.assert_close(logits.gather(-1, found.ids), expected.values)
            assert all(len(set(row)) == k for row in found.ids.view(-1, k).tolist())
        torch.testing.assert_close(head.log_prob(states, ids), logits.log_softmax(-1).gather(-1, ids))


@pytest.mark.parametrize("given", [{}, {"padding_idx": 5, "max_norm": 2.0}])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_sparse_gradients_are_the_dense_ones(method: str, given: dict[str, Any]) -> None:
    ids = torch.tensor([[3, 5, 3, 67], [7, 5, 3, 64]])
    for head in _states(method):
        if not any(parameter.requires_grad for parameter in head.factorization.parameters()):
            continue
        found = []
        for sparse in (False, True):
            layer = CompressedEmbedding(copy.deepcopy(head.factorization), **given, sparse=sparse)
            for read in (ids, ids + 1, ids[:, :0], torch.arange(VOCAB_SIZE)):
                rows = layer(read)
                (rows * torch.linspace(-1, 2, rows.numel(), dtype=rows.dtype).view(rows.shape)).sum().backward()
            gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
            assert {gradient.is_sparse for gradient in gradients} == {sparse}
            found.append([gradient.to_dense() if sparse else gradient for gradient in gradients])
        torch.testing.assert_close(*found)


@torch.no_grad()
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_whatever_the_default_dtype_is(method: str, default: torch.dtype) -> None:
    # Serving frameworks build and load models under the dtype that they compute in.
    found = factors_of(method)
    ids, hidden = torch.arange(found.vocab_size), torch.randn(3, found.dim, generator=torch.Generator().manual_seed(0))
    expected = [found.read(ids), found.logits(hidden)]
    torch.set_default_dtype(default)
    try:
        empty = factorization_from_spec(found.spec(), found.dtype)
        empty.load_state_dict(found.state_dict())
        torch.testing.assert_close([empty.read(ids), empty.logits(hidden)], expected)
        # Codes that are laid out are read in steps of a byte.
        near = {"rtol": 0, "atol": 1e-2} if empty.lay_out() else {}
        torch.testing.assert_close([empty.read(ids), empty.logits(hidden)], expected, **near)
    finally:
        torch.set_default_dtype(torch.float32)
