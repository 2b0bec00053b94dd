"""What a compressed layer cannot do for a module is said before the first step, and rehearsing it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_embcompress import GroupReduce, QuantizationAware
from lightning_embcompress.compression.plan import plan_of
from toys import LanguageModel, Losses, loaders_of

MakeTrainer = Callable[..., Trainer]


class Penalized(LanguageModel):
    """Reads the numbers of a table in training."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 1e-3 * self.decoder.weight.square().mean()


class Cosine(LanguageModel):
    """Reads them in validation only."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.log("cosine", F.normalize(self.encoder.weight, dim=1)[0].sum())
        return super().validation_step(batch, batch_idx, dataloader_idx)


class Reinitialized(LanguageModel):
    """Calls a method that only a dense layer has."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.encoder._fill_padding_idx_with_zero()
        return super().training_step(batch, batch_idx)


class Shown(LanguageModel):
    """Shows a table after every validation."""

    def on_validation_epoch_end(self) -> None:
        rows = self.encoder.weight.detach().cpu().numpy()
        if self.logger is not None:
            self.logger.experiment.add_embedding(rows)


class Stored(LanguageModel):
    """Stores a table in checkpoints, beside the state dict."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rows"] = {"of": [self.encoder.weight]}


class Closed(LanguageModel):
    """Calls a layer from a closure."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        decoder = self.decoder
        self.logits = lambda hidden: decoder(hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits(self.hidden(inputs))


class Functional(LanguageModel):
    """Reads a table as others do that a compressed layer can answer, and counts its steps outside of itself."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        self.seen = nn.Buffer(torch.zeros(()))
        self.last: Any = None

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += 1
        self.last = inputs
        return F.linear(self.hidden(inputs), self.encoder.weight)


class Unready(LanguageModel):
    """Relies on a hook that comes after those of callbacks."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.weight_of_loss = 2.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight_of_loss * super().training_step(batch, batch_idx)


def _callbacks() -> list[Any]:
    return [GroupReduce(ratio=2, at_epoch=2, groups=3), QuantizationAware(at_epoch=2, tables=["encoder", "decoder"])]


@pytest.mark.parametrize("kind", [Penalized, Cosine, Reinitialized, Shown, Stored, Closed])
@pytest.mark.parametrize("ours", [0, 1])
def test_steps_that_need_dense_tables_are_refused(make_trainer: MakeTrainer, kind: Any, ours: int) -> None:
    callback, losses, model = _callbacks()[ours], Losses(), kind()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = {Cosine: "validation_step", Shown: "on_validation_epoch_end", Stored: "on_save_checkpoint", Closed: "steps"}
    step = f"its {hooks.get(kind, 'training_step')} "
    with pytest.raises(ValueError, match=f"^{type(callback).__name__} cannot compress the tables.*{step}"):
        make_trainer(callback, losses).fit(model, **loaders_of())
    assert losses.values == []
    assert type(model.encoder) is nn.Embedding
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [LanguageModel, Functional, Unready])
def test_a_rehearsal_changes_nothing(make_trainer: MakeTrainer, kind: Any) -> None:
    found = []
    for callbacks in ([], _callbacks()[:1]):
        torch.manual_seed(0)
        losses, model = Losses(), kind(dropout=0.2)
        make_trainer(*callbacks, losses, max_epochs=3).fit(model, **loaders_of())
        found.append((losses.values, model))
    per_epoch = len(found[0][0]) // 3
    assert found[0][0][: 2 * per_epoch] == found[1][0][: 2 * per_epoch]
    assert len(plan_of(found[1][1]).tables) == 2
