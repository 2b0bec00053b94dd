"""Measuring within a fit: the right values, and nothing is any different for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_embcompress import EmbeddingCompression
from lightning_embcompress.callbacks.evaluation import stream_token_counts, validation_perplexity
from lightning_embcompress.compression.plan import plan_of
from toys import VOCAB_SIZE, LanguageModel, Losses, dataset_of, loaders_of, model_of, token_ids

MakeTrainer = Callable[..., Trainer]


class Measure(Callback):
    """Measures at every epoch's start, at the hook where the compression does."""

    def __init__(self, monitor: str | None = None, count: bool = False) -> None:
        self.monitor, self.count = monitor, count
        self.values: list[float | None] = []
        self.counts: list[Tensor] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.values.append(validation_perplexity(trainer, pl_module, self.monitor, "Measuring"))
        if self.count:
            embedding = pl_module.encoder
            self.counts.append(stream_token_counts(trainer, pl_module, embedding, embedding.num_embeddings))


def test_counting_changes_nothing(make_trainer: MakeTrainer) -> None:
    results = []
    for arguments in ({}, {"token_counts": torch.bincount(token_ids()[:, :-1].flatten(), minlength=150)}):
        model = model_of(dropout=0.3)
        callback = EmbeddingCompression("weighted_low_rank", ratio=2, at_epoch=1, **arguments)
        make_trainer(callback).fit(model, **loaders_of())
        assert len(plan_of(model).tables) == 2
        results.append(dict(model.state_dict()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["untied", "tied", "embedding", "bag"])
def test_streamed_counts(make_trainer: MakeTrainer, kind: str) -> None:
    measure = Measure(count=True)
    make_trainer(measure, max_epochs=2).fit(model_of(kind), **loaders_of(kind))
    true = torch.bincount(dataset_of(kind).tensors[0].flatten(), minlength=VOCAB_SIZE)
    assert [torch.equal(counts, true) for counts in measure.counts] == [True, True]


def test_streamed_counts_obey_the_limit(make_trainer: MakeTrainer) -> None:
    measure, loaders = Measure(count=True), loaders_of(shuffle=False)
    make_trainer(measure, max_epochs=1, limit_train_batches=5).fit(model_of(), **loaders)
    true = torch.bincount(token_ids()[:40, :-1].flatten(), minlength=VOCAB_SIZE)
    assert torch.equal(measure.counts[0], true)


def test_counting_leaves_persistent_workers_to_training(make_trainer: MakeTrainer) -> None:
    steps = Losses()
    loaders = loaders_of(num_workers=1, persistent_workers=True)
    callback = EmbeddingCompression("weighted_low_rank", ratio=2, at_epoch=0)
    make_trainer(callback, steps, max_epochs=1).fit(model_of(), **loaders)
    assert len(steps.values) == 12


@pytest.mark.parametrize("toggle", ["toggle_optimizer", "toggle_model"])
def test_counting_leaves_toggled_optimizers_as_they_were(make_trainer: MakeTrainer, toggle: str) -> None:
    class Manual(type(model_of())):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                if toggle == "toggle_model":
                    with optimizer.toggle_model():
                        self.step(optimizer, batch)
                else:
                    self.toggle_optimizer(optimizer)
                    self.step(optimizer, batch)
                    self.untoggle_optimizer(optimizer)

        def step(self, optimizer: Any, batch: Any) -> None:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    seed_everything(0, verbose=False)
    model, measure = Manual(), Measure(count=True)
    *rest, frozen, bias = model.parameters()
    frozen.requires_grad_(False)
    model.optimizer = lambda _: [torch.optim.SGD([*rest[1:], frozen], 0.1), torch.optim.SGD([rest[0], bias], 0.1)]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    make_trainer(measure, max_epochs=2).fit(model, **loaders_of())
    assert [bool(counts.any()) for counts in measure.counts] == [True, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True] * len(rest) + [False, True]
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert moved == [True] * len(rest) + [False, True]
    assert model._param_requires_grad_state == {}


def test_no_embedding_to_count_by(make_trainer: MakeTrainer) -> None:
    model = model_of("head")
    with pytest.raises(ValueError, match="token_counts"):
        make_trainer(EmbeddingCompression("group_reduce", ratio=2)).fit(model, **loaders_of("head"))
    assert not plan_of(model).tables


def _cross_entropy(model: Any, loader: Any, limit: int = 10**9) -> tuple[float, int]:
    """Sum and count, computed anew from the definition."""
    total, count = 0.0, 0
    with torch.no_grad():
        for index, (inputs, targets) in enumerate(loader):
            if index < limit:
                scores = model(inputs).double().log_softmax(dim=-1)
                total -= scores.gather(-1, targets.unsqueeze(-1)).sum().item()
                count += targets.numel()
    return total, count


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("loss", ["plain", "likelihood"])
def test_the_value(make_trainer: MakeTrainer, loss: str, limit: int | None) -> None:
    model, loaders = model_of(), loaders_of()
    if loss == "likelihood":
        model.decoder = nn.Sequential(model.decoder, nn.LogSoftmax(dim=-1))
        model.loss = lambda batch: F.nll_loss(model(batch[0]).flatten(0, -2), batch[1].flatten())
    measure = Measure()
    changes = {} if limit is None else {"limit_val_batches": limit}
    total, count = _cross_entropy(model.eval(), loaders["val_dataloaders"], limit=limit or 10**9)
    make_trainer(measure, max_epochs=1, **changes).fit(model.train(), **loaders)
    assert measure.values[0] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_loss_whose_perplexity_is_beyond_all_numbers(make_trainer: MakeTrainer) -> None:
    model, measure = model_of(), Measure()
    model.decoder.bias.data[5] = 1e6
    make_trainer(measure, max_steps=1).fit(model, **loaders_of())
    assert measure.values == [math.inf]


def test_the_value_over_several_loaders(make_trainer: MakeTrainer) -> None:
    model, loaders = model_of(), loaders_of()
    text = token_ids()[:20]
    second = DataLoader(TensorDataset(text[:, :3], text[:, 1:4]), batch_size=7)
    loaders["val_dataloaders"] = [loaders["val_dataloaders"], second]
    losses = [np.divide(*_cross_entropy(model.eval(), loader)) for loader in loaders["val_dataloaders"]]
    measure, monitored = Measure(), Measure("val_loss/dataloader_idx_1")
    make_trainer(measure, monitored, max_epochs=1).fit(model.train(), **loaders)
    # By samples, as Lightning does: 48 and 20.
    assert measure.values[0] == pytest.approx(math.exp(np.average(losses, weights=[48, 20])), rel=1e-5)
    assert monitored.values[0] == pytest.approx(math.exp(losses[1]), rel=1e-5)


def test_the_value_in_reduced_precision(make_trainer: MakeTrainer) -> None:
    model, loaders, measure = model_of(), loaders_of(), Measure()
    exact = math.exp(np.divide(*_cross_entropy(model.eval(), loaders["val_dataloaders"])))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = math.exp(np.divide(*_cross_entropy(model, loaders["val_dataloaders"])))
    make_trainer(measure, max_epochs=1, precision="bf16-mixed").fit(model.train(), **loaders)
    assert measure.values[0] == pytest.approx(rounded, rel=1e-5)
    assert measure.values[0] != pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("at_end", [False, True])
def test_a_monitored_metric(make_trainer: MakeTrainer, at_end: bool) -> None:
    class Monitored(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.nats = MeanMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.nats.update(100.0)
            return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.nats.update(loss, weight=batch[1].numel())
            if not at_end:
                self.log("nats", self.nats)
            return loss  # type: ignore[no-any-return]

        def on_validation_epoch_end(self) -> None:
            if at_end:
                self.log("nats", self.nats.compute())

    seed_everything(0, verbose=False)
    model, loaders = Monitored(), loaders_of()
    model.optimizer = lambda module: torch.optim.SGD(module.parameters(), lr=0.0)
    expected = math.exp(np.divide(*_cross_entropy(model.eval(), loaders["val_dataloaders"])))
    measure = Measure("nats")
    make_trainer(measure, max_epochs=2).fit(model.train(), **loaders)
    # The second is measured when the metric is full of what training has put there.
    assert measure.values == pytest.approx([expected] * 2, rel=1e-5)


def test_a_wrong_monitor(make_trainer: MakeTrainer) -> None:
    model = model_of()
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(ValueError, match=r"monitor 'val_los' is not logged in validation; logged are \['val_loss'\]"):
        make_trainer(EmbeddingCompression("low_rank", ratio=2, monitor="val_los")).fit(model, **loaders_of())
    torch.testing.assert_close(list(model.state_dict().values()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("names", "usual", "expected"),
    [
        (["nats"], None, "no loss.*nats"),
        (["val_loss", "Aux_Loss"], None, "several losses.*Aux_Loss, val_loss"),
        (["val_loss", "Aux_Loss"], "val_loss", None),
        (["val_loss_head", "nats"], "val_loss", None),
    ],
)
def test_the_loss_that_counts(
    make_trainer: MakeTrainer, names: list[str], usual: str | None, expected: str | None
) -> None:
    class Logs(LanguageModel):
        monitored_loss = usual

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log_dict({name: float(index + 1) for index, name in enumerate(names)})

    measure = Measure()
    with pytest.warns(UserWarning, match=expected) if expected else nullcontext():
        make_trainer(measure, max_epochs=1).fit(Logs(), **loaders_of())
    assert measure.values == [None if expected else pytest.approx(math.e)]


@pytest.mark.parametrize("changes", [{"limit_val_batches": 0}, {"num_sanity_val_steps": 0}])
def test_validation_that_is_off_or_late(make_trainer: MakeTrainer, changes: dict[str, Any]) -> None:
    measure = Measure()
    trainer = make_trainer(measure, max_epochs=2, check_val_every_n_epoch=2, **changes)
    trainer.fit(model_of(), **loaders_of())
    assert [value is None for value in measure.values] == ["limit_val_batches" in changes] * 2
