"""`nn.EmbeddingBag` compressed: the same as `nn.functional.embedding_bag` over the table that the factors make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_embcompress import collect_statistics
from lightning_embcompress.compression.plan import apply_plan, compress, densify, plan_of
from lightning_embcompress.layers.bags import CompressedEmbeddingBag
from lightning_embcompress.layers.compressed import CompressedLinear

_V, _D = 50, 8
_FLAT = torch.tensor([3, 7, 3, 0, 49, 1, 2, 0, 0, 7])
_OFFSETS = torch.tensor([0, 4, 4, 7])
_BATCH = _FLAT.view(2, 5)


def _bag(**given: Any) -> nn.EmbeddingBag:
    torch.manual_seed(0)
    return nn.EmbeddingBag(_V, _D, **given)


def _compressed(bag: nn.EmbeddingBag) -> CompressedEmbeddingBag:
    model = nn.Sequential(bag)
    compress(model, "low_rank", rank=4)
    layer = model[0]
    assert isinstance(layer, CompressedEmbeddingBag)
    return layer


def _table(layer: CompressedEmbeddingBag) -> Tensor:
    """What the factors make, as a leaf."""
    return layer.factorization.materialize().requires_grad_()


_CALLS: list[tuple[Tensor, dict[str, Tensor]]] = [
    (_BATCH, {}),
    (_FLAT, {"offsets": _OFFSETS}),
    (_FLAT.int(), {"offsets": _OFFSETS.int()}),
    (_FLAT[:0], {"offsets": torch.tensor([0, 0])}),
]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize(("ids", "given"), _CALLS)
def test_a_bag_is_that_of_torch(mode: str, padding_idx: int | None, ids: Tensor, given: dict[str, Tensor]) -> None:
    layer = _compressed(_bag(mode=mode, padding_idx=padding_idx))
    table = _table(layer)
    expected = F.embedding_bag(ids, table, mode=mode, padding_idx=padding_idx, **given)
    found = layer(ids, **given)
    torch.testing.assert_close(found, expected)
    if not len(ids):
        return
    # Gradients of the factors are those of the table, carried on.
    (gradient,) = torch.autograd.grad(expected.square().sum(), table)
    found.square().sum().backward()
    factors = layer.factorization
    torch.testing.assert_close(factors.coefficients.grad, gradient @ factors.basis.T)


def test_weights_of_samples_have_a_gradient() -> None:
    layer = _compressed(_bag(mode="sum", include_last_offset=True))
    weights = torch.rand(len(_FLAT), requires_grad=True)
    given = {"offsets": torch.tensor([0, 4, 4, 10]), "per_sample_weights": weights}
    found = layer(_FLAT, **given)
    expected = F.embedding_bag(_FLAT, _table(layer), mode="sum", include_last_offset=True, **given)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(one.square().sum(), weights)[0] for one in (found, expected)]
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="per_sample_weights"):
        layer(_FLAT, given["offsets"], weights[:3])
    with pytest.raises(NotImplementedError, match="per_sample_weights"):
        _compressed(_bag())(_BATCH, None, torch.rand(2, 5))


@pytest.mark.parametrize(
    ("ids", "given", "message"),
    [
        (_BATCH, {"offsets": _OFFSETS}, "offsets has to be None"),
        (_FLAT, {}, "offsets has to be a 1D Tensor"),
        (_BATCH.unsqueeze(0), {}, "1D or 2D"),
    ],
)
def test_what_torch_refuses_is_refused_by_the_same_words(ids: Tensor, given: dict[str, Tensor], message: str) -> None:
    for layer in (_bag(), _compressed(_bag())):
        with pytest.raises(ValueError, match=message):
            layer(ids, **given)


def test_rows_longer_than_max_norm_are_scaled_down() -> None:
    layer = _compressed(_bag(mode="sum", max_norm=1.5))
    expected = F.embedding_bag(_BATCH, _table(layer).detach(), mode="sum", max_norm=1.5)
    torch.testing.assert_close(layer(_BATCH), expected)


def test_nested_bags() -> None:
    parts = [_FLAT[:4], _FLAT[4:7], _FLAT[7:]]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    layer = _compressed(_bag(mode="mean", padding_idx=0))
    torch.testing.assert_close(layer(nested), torch.cat([layer(part.unsqueeze(0)) for part in parts]))


def test_gradients_are_sparse_where_those_of_the_bag_were() -> None:
    layer = _compressed(_bag(mode="mean", sparse=True))
    layer(_BATCH).sum().backward()
    gradient = layer.factorization.coefficients.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient.coalesce().indices().flatten().tolist() == _BATCH.unique().tolist()


def test_a_dense_bag_comes_back_with_all_it_had() -> None:
    given = {"mode": "sum", "padding_idx": 3, "max_norm": 2.0, "norm_type": 1.0, "sparse": True}
    model = nn.Sequential(_bag(**given, include_last_offset=True)).eval()
    compress(model, "low_rank", rank=4)
    ids, offsets = _FLAT, torch.tensor([0, 4, 10])
    before = model[0](ids, offsets)
    empty = nn.Sequential(_bag(**given, include_last_offset=True))
    apply_plan(empty, plan_of(model))
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty[0](ids, offsets), before)
    densify(model)
    assert type(model[0]) is nn.EmbeddingBag
    assert all(getattr(model[0], name) == value for name, value in {**given, "include_last_offset": True}.items())
    assert not model[0].training
    torch.testing.assert_close(model[0](ids, offsets), before)


class _Words(nn.Module):
    """Predicts the word of a bag."""

    def __init__(self, tied: bool = False, **given: Any) -> None:
        super().__init__()
        self.bag = _bag(**given)
        self.out = nn.Linear(_D, _V)
        if tied:
            self.out.weight = self.bag.weight

    def forward(self, input: Tensor, offsets: Tensor | None = None) -> Tensor:
        logits: Tensor = self.out(self.bag(input, offsets=offsets))
        return logits


def test_a_bag_tied_to_a_softmax_shares_its_factors() -> None:
    model = _Words(tied=True, mode="sum")
    plan = compress(model, "low_rank", rank=4)
    assert [table.modules for table in plan.tables] == [("bag", "out")]
    assert isinstance(model.out, CompressedLinear)
    assert model.bag.factorization is model.out.factorization
    densify(model)
    assert model.bag.weight is model.out.weight


def _loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
    return F.cross_entropy(model(batch), batch[:, 0]), len(batch)


@pytest.mark.parametrize("given", [{"mode": "mean"}, {"mode": "sum", "padding_idx": 0}, {"mode": "max"}])
def test_statistics_are_of_the_rows_in_the_bags(given: dict[str, Any]) -> None:
    model = _Words(**given)
    statistics = collect_statistics(model, [_BATCH], _loss)
    # By a lookup of every row, put together by hand.
    rows = model.bag.weight.detach()[_BATCH].requires_grad_()
    kept = (given.get("padding_idx", -1) != _BATCH).unsqueeze(-1)
    pooled = {
        "sum": (rows * kept).sum(1),
        "mean": rows.mean(1),
        "max": rows.max(1).values,
    }[given["mode"]]
    loss = F.cross_entropy(model.out(pooled), _BATCH[:, 0], reduction="sum")
    gradient = torch.autograd.grad(loss, rows)[0].reshape(-1, _D).double()
    torch.testing.assert_close(statistics.gradients["bag"], gradient.T @ gradient / len(_BATCH), rtol=1e-4, atol=1e-8)
    counts = statistics.token_counts
    assert counts[7] == 2
    assert counts.sum() in (_BATCH.numel(), int(kept.sum()))
    # As of a compressed one.
    compress(model, "group_reduce", ratio=1.5, groups=2, statistics=statistics)
    again = collect_statistics(model, [_BATCH], _loss)
    assert torch.equal(again.token_counts, counts)
    assert isinstance(model.bag, CompressedEmbeddingBag)


def test_a_bag_that_is_read_by_its_weight() -> None:
    layer = _compressed(_bag(mode="sum", padding_idx=0))
    found = F.embedding_bag(_FLAT, layer.weight, _OFFSETS, mode="sum", padding_idx=0)
    torch.testing.assert_close(found, layer(_FLAT, _OFFSETS))
