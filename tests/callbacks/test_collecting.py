"""Statistics within a fit: those of the training data, and nothing is any different for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.callbacks.collecting import collect_in_training
from lightning_embcompress.callbacks.evaluation import stream_token_counts, validation_perplexity
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.modules.lstm import LSTMLanguageModel
from toys import VOCAB_SIZE, LanguageModel, dataset_of, loaders_of, model_of, token_ids

MakeTrainer = Callable[..., Trainer]
WORKER = Path(__file__).parent / "workers" / "collect.py"
KINDS = ("hidden", "hidden_mean", "probabilities", "gradients")


class Collect(Callback):
    """Collects at the start of every epoch, at the hook where the compression happens."""

    def __init__(self, batches: int = 100, tables: Any = "auto", token_counts: Any = None) -> None:
        self.arguments = tables, token_counts, batches
        self.found: list[Statistics] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found.append(collect_in_training(trainer, pl_module, *self.arguments))


def _close(found: Statistics, expected: Statistics, **tolerances: float) -> None:
    assert torch.equal(found.token_counts, expected.token_counts)
    assert found.num_targets == expected.num_targets
    for kind in KINDS:
        one, other = getattr(found, kind), getattr(expected, kind)
        assert list(one) == list(other), kind
        for path in one:
            torch.testing.assert_close(one[path], other[path], **{"rtol": 1e-4, "atol": 1e-7, **tolerances}, msg=kind)


def _loss_fn(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


class Sequence(Dataset[Any]):
    """Windows of one text, to be read in their order."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __len__(self) -> int:
        return (self.text.shape[1] - 1) // 3

    def __getitem__(self, index: int) -> Any:
        start = 3 * index
        return self.text[:, start : start + 3], self.text[:, start + 1 : start + 4]


def _windows() -> DataLoader[Any]:
    return DataLoader(Sequence(token_ids()), batch_size=None)


@pytest.mark.parametrize("tied", [False, True])
def test_they_are_those_of_the_training_data(make_trainer: MakeTrainer, tied: bool) -> None:
    model, collect, loaders = model_of("tied" if tied else "untied"), Collect(), loaders_of(shuffle=False)
    expected = collect_statistics(model, loaders["train_dataloaders"], _loss_fn)
    first = collect_statistics(model, loaders["train_dataloaders"], _loss_fn, limit=2)
    limited, given = Collect(2), Collect(2, ["decoder"], torch.arange(VOCAB_SIZE))
    make_trainer(collect, limited, given, max_epochs=1).fit(model, **loaders)
    _close(collect.found[0], expected)
    _close(limited.found[0], first)
    assert torch.equal(given.found[0].token_counts, torch.arange(VOCAB_SIZE))
    assert list(given.found[0].gradients) == (["encoder"] if tied else [])
    torch.testing.assert_close(given.found[0].hidden, first.hidden)


def test_the_limit_of_the_trainer_holds(make_trainer: MakeTrainer) -> None:
    collect, loaders = Collect(), loaders_of(shuffle=False)
    make_trainer(collect, max_epochs=1, limit_train_batches=3).fit(model_of(), **loaders)
    assert collect.found[0].num_targets == 3 * 8 * 6


@pytest.mark.parametrize("softmax", ["full", "sampled"])
def test_lstm_that_carries_its_state(make_trainer: MakeTrainer, softmax: Any) -> None:
    class States(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            # As if an epoch was under way.
            pl_module._states["train"] = (torch.ones(1, 96, 8), torch.ones(1, 96, 8))
            self.before = pl_module._states["train"]

    class Check(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            assert pl_module._states["train"] is states.before
            assert pl_module._states["train"][0].eq(1).all()
            self.keys = list(pl_module._states)

    final, found = [], []
    for collects in (False, True):
        seed_everything(0, verbose=False)
        model = LSTMLanguageModel(VOCAB_SIZE, 8, 8, softmax=softmax, num_sampled=VOCAB_SIZE, dropout=0.3)
        states, check, collect = States(), Check(), Collect()
        loader = _windows()
        callbacks = [states, collect, check] if collects else [states, check]
        make_trainer(*callbacks, max_epochs=1, num_sanity_val_steps=0).fit(model, loader, loader)
        final.append([value.clone() for value in model.state_dict().values()])
        assert check.keys == ["train"]
        found += collect.found
    torch.testing.assert_close(final[1], final[0], rtol=0, atol=0)

    # With a state that starts from one in training, and from zero in validation.
    seed_everything(0, verbose=False)
    model = LSTMLanguageModel(VOCAB_SIZE, 8, 8)
    start: Any = (torch.ones(1, 96, 8), torch.ones(1, 96, 8))
    state: dict[str, Any] = {"train": start, "val": None}

    def loss_fn(model: Any, batch: Any, stage: str = "train") -> Tensor:
        logits, (h, c) = model(batch[0], state[stage])
        state[stage] = (h.detach(), c.detach())
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    expected = collect_statistics(model, _windows(), loss_fn)
    torch.testing.assert_close(found[0].gradients, expected.gradients, rtol=1e-4, atol=1e-8)
    assert found[0].num_targets == expected.num_targets == 2 * 96 * 3
    if softmax == "sampled":
        assert not found[0].probabilities
        expected = collect_statistics(model, _windows(), lambda *arguments: loss_fn(*arguments, stage="val"))
    else:
        torch.testing.assert_close(found[0].probabilities, expected.probabilities, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found[0].hidden, expected.hidden, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found[0].hidden_mean, expected.hidden_mean, rtol=1e-4, atol=1e-8)


def test_reduced_precision(make_trainer: MakeTrainer) -> None:
    model, collect, loaders = model_of(), Collect(), loaders_of(shuffle=False)
    expected = collect_statistics(model, loaders["train_dataloaders"], _loss_fn)
    trainer = make_trainer(collect, max_epochs=1, precision="bf16-mixed")
    trainer.fit(model, **loaders)
    (found,) = collect.found
    for kind in KINDS:
        for path, tensor in getattr(expected, kind).items():
            difference = (getattr(found, kind)[path] - tensor).norm() / tensor.norm()
            assert 1e-6 < difference < 0.01


@pytest.mark.parametrize("kind", ["embedding", "head"])
def test_one_table_alone(make_trainer: MakeTrainer, kind: str) -> None:
    collect = Collect(token_counts=torch.ones(VOCAB_SIZE) if kind == "head" else None)
    make_trainer(collect, max_epochs=1).fit(model_of(kind), **loaders_of(kind))
    (found,) = collect.found
    assert found.num_targets == len(dataset_of(kind))
    assert (bool(found.gradients), bool(found.hidden)) == (kind == "embedding", kind == "head")


def test_compressed_tables(make_trainer: MakeTrainer) -> None:
    model, loaders = model_of(), loaders_of(shuffle=False)
    compress(model, "low_rank", ratio=2)
    expected = collect_statistics(model, loaders["train_dataloaders"], _loss_fn)
    auto, named = Collect(), Collect(tables=["encoder", "decoder"])
    make_trainer(auto, named, max_epochs=1).fit(model, **loaders)
    _close(auto.found[0], expected)
    _close(named.found[0], expected)


def test_heads_that_no_step_calls(make_trainer: MakeTrainer) -> None:
    class Functional(LanguageModel):
        def forward(self, inputs: Tensor) -> Tensor:
            return F.linear(self.encoder(inputs), self.decoder.weight)

    with pytest.raises(ValueError, match="head 'decoder' was never called"):
        make_trainer(Collect()).fit(Functional(), **loaders_of())


def test_all_passes_call_steps_as_lightning_does(make_trainer: MakeTrainer) -> None:
    class Short(LanguageModel):
        def training_step(self, batch: Any) -> Tensor:
            return self.loss(batch)

        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", self.loss(batch))

    class Passes(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            self.counts = stream_token_counts(trainer, pl_module, pl_module.encoder, VOCAB_SIZE)
            self.perplexity = validation_perplexity(trainer, pl_module, None, "Measuring")

    passes, collect = Passes(), Collect()
    make_trainer(passes, collect, max_epochs=1).fit(Short(), **loaders_of())
    assert 1 < passes.perplexity < 1000
    assert int(passes.counts.sum()) == collect.found[0].num_targets == 96 * 6
    assert torch.equal(passes.counts, collect.found[0].token_counts)


def test_steps_without_a_loss_and_with_infinite_ones(make_trainer: MakeTrainer) -> None:
    class Skips(LanguageModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {0: None, 1: loss * torch.inf}.get(batch_idx, loss)

    collect = Collect()
    with pytest.warns(UserWarning, match="2 of 12 batches were left out of the statistics"):
        make_trainer(collect, max_epochs=1).fit(Skips(), **loaders_of())
    assert collect.found[0].skipped_batches == 2
    assert collect.found[0].num_targets == 10 * 8 * 6


def test_several_processes(torchrun: Callable[..., str], tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, processes=2, timeout=120)
    seed_everything(0, verbose=False)
    model = LSTMLanguageModel(60, 8, 8, carry_state=False).double()
    text = torch.load(tmp_path / "text.pt")
    data = DataLoader(TensorDataset(text[:, :-1], text[:, 1:]), batch_size=4)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0])[0].flatten(0, 1), batch[1].flatten())

    expected = collect_statistics(model, data, loss_fn)
    for rank in range(2):
        for name in ("plain", "trainer", "trainer again"):
            found = Statistics.load(tmp_path / f"{name}-{rank}.safetensors")
            _close(found, expected, rtol=1e-10)
            first = (tmp_path / f"{name}-0.safetensors").read_bytes()
            assert (tmp_path / f"{name}-{rank}.safetensors").read_bytes() == first
