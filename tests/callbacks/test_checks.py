"""Which callbacks, optimizers and Trainers go beside ours; those that do not are refused before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lightning_embcompress import EmbeddingCompression, GroupReduce, QuantizationAware, compress
from lightning_embcompress.compression.plan import plan_of
from toys import InMemory, LanguageModel, Losses, dataset, loaders_of, model_of

MakeTrainer = Callable[..., Trainer]


class Unfreeze(BaseFinetuning):
    """Trains one layer from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.mix)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.mix, optimizer)


def _trained_only(module: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam([parameter for parameter in module.parameters() if parameter.requires_grad], lr=0.01)


def _lbfgs(module: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(module.parameters(), lr=0.01, max_iter=2)


@pytest.mark.parametrize("other", [Unfreeze(), BackboneFinetuning()])
@pytest.mark.parametrize("ours_first", [True, False])
def test_finetuning_callbacks_are_refused(make_trainer: MakeTrainer, other: Callback, ours_first: bool) -> None:
    steps, ours = Losses(), EmbeddingCompression("low_rank", ratio=2)
    model = model_of()
    model.backbone = model.mix
    model.optimizer = _trained_only
    callbacks = [ours, other] if ours_first else [other, ours]
    message = f"^{type(other).__name__} keeps the names of parameters.*by hand, or compress.*instead of by Embedding"
    with pytest.raises(ValueError, match=message):
        make_trainer(*callbacks, steps).fit(model, **loaders_of())
    assert not steps.values


def test_lbfgs_is_refused(make_trainer: MakeTrainer) -> None:
    steps, model = Losses(), model_of()
    model.optimizer = _lbfgs
    with pytest.raises(ValueError, match="^LBFGS keeps its history.*another optimizer, such as Adam, or compress"):
        make_trainer(EmbeddingCompression("low_rank", ratio=2), steps).fit(model, **loaders_of())
    assert not steps.values


@pytest.mark.parametrize("optimizers_of", [_trained_only, _lbfgs])
def test_both_work_with_a_model_that_is_compressed_before(make_trainer: MakeTrainer, optimizers_of: Any) -> None:
    model = model_of()
    compress(model, "low_rank", ratio=2)
    model.optimizer = optimizers_of
    others = [Unfreeze()] if optimizers_of is _trained_only else []
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    make_trainer(*others, max_epochs=2).fit(model, **loaders_of())
    moved = [not torch.equal(before[name], parameter) for name, parameter in model.named_parameters()]
    assert all(moved)


class Tuned(LanguageModel):
    """Has what the finders of Lightning look for: data of its own, a batch size and a learning rate."""

    batch_size, learning_rate = 8, 0.01

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(lines=16), batch_size=self.batch_size)


class LearningRateFinderWithin(of_lightning.LearningRateFinder):
    """Looks for a learning rate at the epoch after the compression, as its documentation shows."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


class Writer(of_lightning.BasePredictionWriter):
    def write_on_batch_end(self, *_: Any) -> None:
        pass


BESIDE: dict[str, Callable[[Any], Callback]] = {
    "BatchSizeFinder": lambda _: of_lightning.BatchSizeFinder(max_trials=2, steps_per_trial=1),
    "DeviceStatsMonitor": lambda _: of_lightning.DeviceStatsMonitor(cpu_stats=False),
    "GradientAccumulationScheduler": lambda _: of_lightning.GradientAccumulationScheduler({0: 1, 1: 2}),
    "LambdaCallback": lambda _: of_lightning.LambdaCallback(on_train_epoch_end=lambda *_: None),
    "LearningRateFinder": lambda _: of_lightning.LearningRateFinder(num_training_steps=10),
    "LearningRateFinder within": lambda _: LearningRateFinderWithin(num_training_steps=10),
    "LearningRateMonitor": lambda _: of_lightning.LearningRateMonitor("step", log_momentum=True),
    "ModelPruning of others": lambda model: ModelPruning("l1_unstructured", [(model.mix, "weight")], amount=0.3),
    "ModelSummary": lambda _: of_lightning.ModelSummary(2),
    "Writer": lambda _: Writer("batch"),
    "ThroughputMonitor": lambda _: of_lightning.ThroughputMonitor(len),
    "Timer": lambda _: of_lightning.Timer({"hours": 1}),
    "TQDMProgressBar": lambda _: of_lightning.TQDMProgressBar(),
}


@pytest.mark.parametrize("name", BESIDE)
def test_other_callbacks_go_on_beside_ours(make_trainer: MakeTrainer, tmp_path: Path, name: str) -> None:
    model = Tuned()
    others = [BESIDE[name](model), of_lightning.OnExceptionCheckpoint(tmp_path)]
    ours = GroupReduce(ratio=3, at_epoch=1, groups=3, refine_at_epochs=[2])
    shown = {"enable_progress_bar": "Bar" in name, "enable_model_summary": "Summary" in name, "logger": InMemory()}
    make_trainer(*others, ours, max_epochs=3, enable_checkpointing=True, **shown).fit(model)
    assert len(plan_of(model).tables) == 2
    assert ours._done.refined == [2]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("of_table", [True, False])
def test_pruning_of_tables_is_refused(make_trainer: MakeTrainer, ours_first: bool, of_table: bool) -> None:
    steps, model = Losses(), model_of()
    pruning = ModelPruning("l1_unstructured", [(model.decoder, "weight")] if of_table else (), amount=0.3)
    for ours in (EmbeddingCompression("low_rank", ratio=2, at_epoch=1), QuantizationAware(tables=["decoder"])):
        callbacks = [ours, pruning] if ours_first else [pruning, ours]
        with pytest.raises(ValueError, match=f"ModelPruning prunes the layer '..coder', which {type(ours).__name__}"):
            make_trainer(*callbacks, steps).fit(model, **loaders_of())
    assert not steps.values


def test_averaging_is_refused(make_trainer: MakeTrainer) -> None:
    steps, model = Losses(), model_of()
    for other in (WeightAveraging(), type("Own", (WeightAveraging,), {})(), StochasticWeightAveraging(0.1)):
        with pytest.raises(ValueError, match=f"^{type(other).__name__} averages weights by shape"):
            make_trainer(EmbeddingCompression("low_rank", ratio=2), other, steps).fit(model, **loaders_of())
    model.average = AveragedModel(nn.ModuleList([model.encoder, model.mix]))
    ours = EmbeddingCompression("low_rank", ratio=2, at_epoch=1, tables=["encoder"])
    with pytest.raises(ValueError, match="^AveragedModel 'average' averages.*'encoder'"):
        make_trainer(ours, steps).fit(model, **loaders_of())
    assert not steps.values
    del model.average

    class Average(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            self.kept = AveragedModel(pl_module)

    with pytest.raises(ValueError, match="^AveragedModel 'of Average' averages.*'encoder'"):
        make_trainer(ours, Average(), steps).fit(model, **loaders_of())
    assert not steps.values
    model.average = AveragedModel(model.mix)
    make_trainer(ours, steps).fit(model, **loaders_of())


def test_optimizers_that_would_not_train_factors_are_refused(make_trainer: MakeTrainer) -> None:
    steps, ours = Losses(), EmbeddingCompression("low_rank", ratio=2, at_epoch=1)

    class Muon(torch.optim.SGD):
        """Of another package."""

    model = model_of()
    model.optimizer = lambda module: Muon(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="^Muon trains matrices only.*table 'encoder'"):
        make_trainer(ours, steps).fit(model, **loaders_of())
    model = model_of()
    model.decoder.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match="decoder.*has hooks for its gradient"):
        make_trainer(ours, steps).fit(model, **loaders_of())
    assert not steps.values


def test_a_trainer_of_another_package_is_named() -> None:
    other = pytest.importorskip("pytorch_lightning")
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    class Other(other.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(torch.ones(4, 2))  # type: ignore[arg-type]
    for ours in (GroupReduce(ratio=2), QuantizationAware()):
        with pytest.raises(ValueError, match=f"^{type(ours).__name__} .*pytorch_lightning"):
            other.Trainer(callbacks=[ours], max_epochs=1, **quiet).fit(Other(), data)
