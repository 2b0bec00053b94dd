"""Monitors compare a compressed model with itself only, and what ends a run early says what it left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, SpikeDetection
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_embcompress import GroupReduce, QuantizationAware, compress
from toys import LanguageModel, loaders_of, model_of

MakeTrainer = Callable[..., Trainer]


class Scored(LanguageModel):
    """Logs something that is to grow, too."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = super().validation_step(batch, batch_idx, dataloader_idx)
        self.log("score", -loss)
        return loss


class OwnCheckpoint(ModelCheckpoint):
    """One that a user has made."""


class OwnStopping(EarlyStopping):
    """One that a user has made."""


class Validated(Callback):
    """Keeps the loss of every validation with the epoch it came in."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.losses.append((trainer.current_epoch, float(trainer.callback_metrics["val_loss"])))

    def best_from(self, epoch: int) -> float:
        return min(loss for when, loss in self.losses if when >= epoch)


def _compressing(at_epoch: int = 2, **more: Any) -> GroupReduce:
    return GroupReduce(ratio=6, at_epoch=at_epoch, groups=2, **more)


def _is_compressed(path: str | Path) -> bool:
    return "embcompress" in torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (ModelCheckpoint, {"monitor": "val_loss"}),
        (OwnCheckpoint, {"monitor": "val_loss", "save_top_k": 3, "save_last": True}),
        (ModelCheckpoint, {"monitor": "score", "mode": "max", "save_top_k": 2, "filename": "best"}),
        (ModelCheckpoint, {"monitor": "train_loss", "save_top_k": -1}),
    ],
)
def test_the_best_checkpoint_after_the_compression_is_compressed(
    make_trainer: MakeTrainer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: type[ModelCheckpoint],
    arguments: dict[str, Any],
) -> None:
    keep, seen, known = kind(tmp_path / "kept", **arguments), Validated(), []

    class Before(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            known.append((keep.best_model_path, set(keep.best_k_models)))

    model = Scored()
    trainer = make_trainer(Before(), _compressing(), keep, seen, max_epochs=4, enable_checkpointing=True)
    with caplog.at_level("INFO"):
        trainer.fit(model, **loaders_of())
    best, ones = known[2]
    assert best in caplog.text
    assert all(Path(one).exists() and not _is_compressed(one) for one in ones)
    assert keep.best_k_models
    assert all(_is_compressed(one) for one in keep.best_k_models)
    if arguments["monitor"] != "train_loss":
        assert abs(float(keep.best_model_score)) == pytest.approx(seen.best_from(2))  # type: ignore[arg-type]
    trainer.test(model, loaders_of()["val_dataloaders"], ckpt_path="best", verbose=False)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [({"monitor": "step", "mode": "max", "save_top_k": 2}, 2), ({"monitor": None}, 1)],
)
def test_checkpoints_that_compare_no_quality_go_on(
    make_trainer: MakeTrainer, tmp_path: Path, arguments: dict[str, Any], count: int
) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", **arguments)
    make_trainer(_compressing(), keep, max_epochs=4, enable_checkpointing=True).fit(model_of(), **loaders_of())
    assert len(list((tmp_path / "kept").iterdir())) == count


def test_checkpoints_within_an_epoch_are_not_kept_by_a_metric_of_before(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    seen = Validated()
    keep = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", every_n_train_steps=5)
    trainer = make_trainer(_compressing(), keep, seen, max_epochs=5, enable_checkpointing=True)
    trainer.fit(model_of(), **loaders_of())
    assert _is_compressed(keep.best_model_path)
    assert float(keep.best_model_score) >= seen.best_from(2)  # type: ignore[arg-type]


def test_a_monitor_is_not_missed_where_validation_comes_later(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    # At the end of epoch 2 there is no metric of the compressed model yet, and none is asked for.
    keep = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_on_train_epoch_end=True)
    trainer = make_trainer(
        _compressing(), keep, max_epochs=4, enable_checkpointing=True, check_val_every_n_epoch=2, num_sanity_val_steps=0
    )
    with pytest.warns(UserWarning, match="val_loss"):
        trainer.fit(model_of(), **loaders_of())
    assert _is_compressed(keep.best_model_path)


@pytest.mark.parametrize("kind", [EarlyStopping, OwnStopping])
def test_patience_begins_anew(make_trainer: MakeTrainer, kind: type[EarlyStopping]) -> None:
    stop, seen = kind("val_loss", patience=1), Validated()
    trainer = make_trainer(_compressing(), stop, seen, max_epochs=5)
    trainer.fit(model_of(), **loaders_of())
    assert trainer.current_epoch == 5
    # It would have ended at epoch 2 by the score of the dense model.
    assert seen.best_from(2) > min(loss for when, loss in seen.losses if when < 2)
    assert float(stop.best_score) == pytest.approx(seen.best_from(2))


def test_what_an_early_end_leaves_out_is_said(make_trainer: MakeTrainer) -> None:
    impatient = {"patience": 1, "min_delta": 10.0}
    with pytest.warns(UserWarning, match=r"refine_at_epochs \[4, 5\].*EarlyStopping\(monitor='val_loss', patience=1\)"):
        make_trainer(
            _compressing(1, refine_at_epochs=[2, 4, 5]), EarlyStopping("val_loss", **impatient), max_epochs=6
        ).fit(model_of(), **loaders_of())
    quantizing = QuantizationAware(at_epoch=4, tables=["encoder", "decoder"])
    for callback, what in ((_compressing(4), "compressed"), (quantizing, "quantized")):
        with pytest.warns(UserWarning, match=f"at_epoch=4: nothing was {what}.*EarlyStopping.monitor='val_loss'"):
            make_trainer(callback, EarlyStopping("val_loss", **impatient), max_epochs=6).fit(model_of(), **loaders_of())


def test_quantization_begins_them_anew_too(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model, seen = model_of(), Validated()
    compress(model, "low_rank", ratio=2)
    keep, stop = ModelCheckpoint(tmp_path / "kept", monitor="val_loss"), EarlyStopping("val_loss", patience=1)
    make_trainer(QuantizationAware("int2", at_epoch=2), keep, stop, seen, max_epochs=4, enable_checkpointing=True).fit(
        model, **loaders_of()
    )
    assert float(stop.best_score) == float(keep.best_model_score) == pytest.approx(seen.best_from(2))  # type: ignore[arg-type]


def test_plateaus_and_spikes_begin_anew(make_trainer: MakeTrainer) -> None:
    model, seen, spikes, means = model_of(), Validated(), SpikeDetection(rtol=5.0), []

    class AtStart(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            means.append(float(spikes.running_mean.compute()))

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = ReduceLROnPlateau(optimizer, patience=0)
    model.optimizer = lambda _: {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}
    make_trainer(_compressing(), spikes, AtStart(), seen, max_epochs=3).fit(model, **loaders_of())
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert schedule.best == pytest.approx(seen.best_from(2))
    assert [mean == mean for mean in means] == [False, True, False]


def test_resuming_goes_on_comparing_as_the_uninterrupted_run(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def run(**fit: Any) -> tuple[ModelCheckpoint, EarlyStopping]:
        keep = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_top_k=2)
        every = ModelCheckpoint(tmp_path / "every", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        stop = EarlyStopping("val_loss", patience=9)
        make_trainer(_compressing(), keep, every, stop, max_epochs=5, enable_checkpointing=True).fit(
            model_of(), **loaders_of(), **fit
        )
        return keep, stop

    keep, stop = run()
    for epoch in (1, 2, 3):
        again = run(ckpt_path=tmp_path / "every" / f"epoch={epoch}.ckpt")
        assert list(again[0].best_k_models.values()) == list(keep.best_k_models.values())
        assert again[0].best_model_score == keep.best_model_score
        assert {**again[1].state_dict(), "best_score": 0} == {**stop.state_dict(), "best_score": 0}
        assert again[1].best_score == stop.best_score
