"""Callbacks and optimizers that do not bear replaced tables are refused before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning

from lightning_embcompress import EmbeddingCompression, compress
from toys import loaders_of, model_of

MakeTrainer = Callable[..., Trainer]


class Unfreeze(BaseFinetuning):
    """Trains one layer from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.mix)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.mix, optimizer)


class Steps(Callback):
    count = 0

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.count += 1


def _trained_only(module: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam([parameter for parameter in module.parameters() if parameter.requires_grad], lr=0.01)


def _lbfgs(module: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(module.parameters(), lr=0.01, max_iter=2)


@pytest.mark.parametrize("other", [Unfreeze(), BackboneFinetuning()])
@pytest.mark.parametrize("ours_first", [True, False])
def test_finetuning_callbacks_are_refused(make_trainer: MakeTrainer, other: Callback, ours_first: bool) -> None:
    steps, ours = Steps(), EmbeddingCompression("low_rank", ratio=2)
    model = model_of()
    model.backbone = model.mix
    model.optimizer = _trained_only
    callbacks = [ours, other] if ours_first else [other, ours]
    message = f"^{type(other).__name__} keeps the names of parameters.*by hand, or compress.*instead of by Embedding"
    with pytest.raises(ValueError, match=message):
        make_trainer(*callbacks, steps).fit(model, **loaders_of())
    assert steps.count == 0


def test_lbfgs_is_refused(make_trainer: MakeTrainer) -> None:
    steps, model = Steps(), model_of()
    model.optimizer = _lbfgs
    with pytest.raises(ValueError, match="^LBFGS keeps its history.*another optimizer, such as Adam, or compress"):
        make_trainer(EmbeddingCompression("low_rank", ratio=2), steps).fit(model, **loaders_of())
    assert steps.count == 0


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
