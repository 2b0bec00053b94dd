"""Softmaxes that are products with the weight of an embedding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcompress import EmbeddingCompression
from lightning_embcompress.calibration.statistics import collect_statistics
from lightning_embcompress.compression.plan import compress, densify
from toys import adam

VOCAB_SIZE, DIM = 90, 8
Product = Callable[[Tensor, Tensor], Tensor]
PRODUCTS: dict[str, Product] = {
    "linear": F.linear,
    "by name": lambda hidden, weight: F.linear(input=hidden, weight=weight, bias=hidden.new_ones(VOCAB_SIZE)),
    "operator": lambda hidden, weight: hidden @ weight.T,
    "matmul": lambda hidden, weight: torch.matmul(hidden, weight.transpose(0, 1)),
    "einsum": lambda hidden, weight: torch.einsum("btd,vd->btv", hidden, weight),
}


class Sequential(nn.Module):
    """Scores items by products with what it knows of them, or by a layer that is tied to it."""

    def __init__(self, product: Product | None) -> None:
        super().__init__()
        self.items, self.mix, self.product = nn.Embedding(VOCAB_SIZE, DIM), nn.Linear(DIM, DIM), product
        if product is None:
            self.head = nn.Linear(DIM, VOCAB_SIZE, bias=False)
            self.head.weight = self.items.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.items(ids)))
        return self.head(hidden) if self.product is None else self.product(hidden, self.items.weight)


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    targets = ids[:, 1:].masked_fill(ids[:, 1:] < 5, -100)
    return F.cross_entropy(model(ids[:, :-1])[..., :VOCAB_SIZE].flatten(0, 1), targets.flatten())


def _model(product: Product | None) -> Sequential:
    torch.manual_seed(0)
    return Sequential(product).double()


IDS = [torch.randint(VOCAB_SIZE, (4, 7), generator=torch.Generator().manual_seed(1))] * 2


@pytest.mark.parametrize("how", PRODUCTS)
def test_they_are_seen_as_a_layer_is(how: str) -> None:
    expected = collect_statistics(_model(None), IDS, _loss)
    model = _model(PRODUCTS[how])
    model.items.weight.data, model.mix = _model(None).items.weight.data, _model(None).mix
    found = collect_statistics(model, IDS, _loss)
    assert found.num_targets == expected.num_targets
    for kind in ("hidden", "hidden_mean", "probabilities", "squared_probabilities"):
        torch.testing.assert_close(getattr(found, kind)["items"], getattr(expected, kind)["head"])
    torch.testing.assert_close(found.gradients, expected.gradients)
    assert compress(model.float(), "weighted_low_rank", ratio=1.5, statistics=found).predicted_loss > 0


@pytest.mark.parametrize(
    ("product", "name"),
    [
        (lambda hidden, weight: torch.einsum("vd,btd->vbt", weight, hidden).permute(1, 2, 0), "einsum"),
        (lambda hidden, weight: hidden @ F.normalize(weight, dim=-1).T, "normalize"),
        (lambda hidden, weight: F.pad(F.linear(hidden, weight[1:]), (1, 0)), "linear"),
    ],
)
def test_it_is_said_of_what_is_not_seen(product: Product, name: str) -> None:
    def loss(model: nn.Module, ids: Tensor) -> tuple[Tensor, int]:
        return _loss(model, ids), 24

    with pytest.warns(UserWarning, match=f"'items' is read by '{name}'"):
        found = collect_statistics(_model(product), IDS, loss)
    assert not found.hidden
    assert list(found.gradients) == ["items"]


class Recommender(LightningModule):
    """A model that scores by a product, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _model(F.linear).float()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return _loss(self.model, batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self)


def test_in_training(make_trainer: Callable[..., Trainer]) -> None:
    callback = EmbeddingCompression(ratio=1.1, refine_at_epochs=[1], refresh_statistics=True, groups=1)
    data = DataLoader(TensorDataset(torch.cat(IDS)), batch_size=4)
    seen = []
    collect = callback._weighing.collect
    object.__setattr__(callback._weighing, "collect", lambda *given: seen.append(collect(*given)) or seen[-1])
    make_trainer(callback, max_epochs=2).fit(Recommender(), data)
    # Of the dense table, and of the compressed one before it is refined.
    assert [list(one.hidden) for one in seen] == [["model.items"], ["model.items"]]
    targets = int((torch.cat(IDS)[:, 1:] >= 5).sum())
    assert [one.num_targets for one in seen] == [targets, targets]


def test_of_a_compressed_table() -> None:
    model = _model(lambda hidden, weight: hidden @ weight.T).float()
    compress(model, "low_rank", ratio=1.5)
    compressed = collect_statistics(model, IDS, _loss)
    densify(model)
    dense = collect_statistics(model, IDS, _loss)
    torch.testing.assert_close(compressed.hidden, dense.hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compressed.probabilities, dense.probabilities, rtol=1e-4, atol=1e-6)
