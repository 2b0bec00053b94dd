"""Callbacks that weigh errors by what the loss grows by: statistics, one budget, and limits of the perplexity."""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_embcompress import EmbeddingCompression, GroupReduce, SharedBasis, TransformCoding, compress
from lightning_embcompress.calibration.loss_metric import metric_of
from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.callbacks import weighing
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.tables.finding import Table
from toys import (
    Copies,
    LanguageModel,
    assert_same_run,
    check_resuming,
    loaders_of,
    model_of,
    run_with_checkpoints,
)

MakeTrainer = Callable[..., Trainer]


def _loss_fn(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def _statistics(model: Any, **changes: Any) -> Statistics:
    return collect_statistics(model, loaders_of(shuffle=False, **changes)["train_dataloaders"], _loss_fn)


def _by_hand(module: type) -> type:
    """The same module, optimized by hand."""

    class ByHand(module):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    return ByHand


@pytest.mark.parametrize("method", ["transform_coding", "auto"])
def test_given_statistics_do_what_compress_does(make_trainer: MakeTrainer, tmp_path: Path, method: str) -> None:
    model, after = model_of(), Copies()
    statistics = _statistics(model)
    statistics.save(tmp_path / "statistics.safetensors")
    expected = model_of()
    plan = compress(expected, method, ratio=2, statistics=statistics)
    callback = EmbeddingCompression(method, ratio=2, statistics=tmp_path / "statistics.safetensors")
    make_trainer(callback, after, max_epochs=1, limit_train_batches=1).fit(model, **loaders_of())
    torch.testing.assert_close(dict(after.models[0].state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    assert plan_of(after.models[0]) == plan
    # Both tables together, and more for the one that is worth more.
    assert plan.ratio >= 2
    assert plan.tables[0].stored_bytes != plan.tables[1].stored_bytes


def test_the_loss_is_the_default_and_what_it_predicts_is_reported(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    model, before, after = model_of(), Copies(), Copies()
    callback = SharedBasis(ratio=6, at_epoch=2, refine_at_epochs=[3], statistics_batches=20)
    logger = CSVLogger(tmp_path / "logs")
    with caplog.at_level("INFO"):
        make_trainer(before, callback, after, max_epochs=4, logger=logger).fit(model, **loaders_of())
    assert (
        "shared_basis: errors are weighed by what the loss grows by, by statistics of 20 batches of the training data."
        in caplog.text
    )
    assert "The loss was predicted to grow by" in caplog.text
    shown = capsys.readouterr().out
    assert "all together" in shown
    assert "predicted loss" in shown
    report = json.loads((Path(logger.log_dir) / "report.json").read_text())
    assert all(table["predicted_loss"] > 0 for table in report["tables"])
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["step"] == "24"]
    logged = {name: float(value) for row in rows for name, value in row.items() if value}
    tables = [logged[f"embcompress/{name}/predicted_loss"] for name in ("encoder", "decoder")]
    assert logged["embcompress/predicted_loss"] == pytest.approx(sum(tables))
    grown = report["perplexity"]["compressed"] / report["perplexity"]["dense"]
    assert logged["embcompress/measured_loss"] == pytest.approx(math.log(grown))
    # Nothing is kept that no refinement will read.
    assert callback.state_dict()["statistics"] is None
    # Biases make up for the mean error of the logits, whenever the table is solved.
    mean = _statistics(before.models[2]).hidden_mean["decoder"].float()
    for epoch in (2, 3):
        logits = [kept.models[epoch].decoder(mean).detach() for kept in (before, after)]
        biases = [kept.models[epoch].decoder.bias.detach() for kept in (before, after)]
        shift = (logits[1] - logits[0]).norm()
        assert epoch == 3 or (biases[1] - biases[0]).norm() > 0
        assert shift <= 0.05 * (logits[1] - biases[1] - logits[0] + biases[0]).norm()


def test_refinement_is_in_the_metric_of_the_loss_too(make_trainer: MakeTrainer) -> None:
    model, before, after = model_of(), Copies(), Copies()
    statistics = _statistics(model)
    callback = SharedBasis(ratio=3, at_epoch=1, refine_at_epochs=[2], statistics=statistics)
    make_trainer(before, callback, after).fit(model, **loaders_of())
    sizes = {entry["modules"][0]: entry["max_bytes"] for entry in callback.state_dict()["compressed"]}
    for table in plan_of(model).tables:
        path = table.name
        assert table.stored_bytes <= sizes[path]
        dense = before.models[1].get_submodule(path).weight.detach()
        first, moved, solved = (
            kept.get_submodule(path).factorization.materialize()
            for kept in (after.models[1], before.models[2], after.models[2])
        )
        # The table as training has moved it, plus what was left out of it.
        target = moved + dense - first
        metric = metric_of(model, Table((path,), target), statistics)
        # Where training has done better than solving afresh does, the table stays as it is.
        assert metric.loss(target, solved) <= metric.loss(target, moved)
        assert metric.loss(target, solved) == pytest.approx(table.predicted_loss, rel=1e-3)


class Stop(Exception):
    """Raised where nothing is to be collected any more."""


@pytest.mark.parametrize("refresh", [False, True])
def test_resuming_equals_the_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refresh: bool) -> None:
    def make() -> list[Any]:
        given: dict[str, Any] = {"refine_at_epochs": [3], "statistics_batches": 5, "refresh_statistics": refresh}
        return [model_of(), TransformCoding(max_perplexity_increase="10%", at_epoch=1, **given)]

    # Batches are shuffled: statistics are of a part of them.
    whole = check_resuming(tmp_path, make, (0, 1) if refresh else (0,), max_epochs=5)
    for epoch in (0, 1, 3):
        saved = torch.load(tmp_path / "whole" / f"epoch={epoch}.ckpt", weights_only=True)
        state = next(iter(saved["callbacks"].values()))
        # From compression until the last refinement is done.
        assert (state["statistics"] is not None) == (epoch == 1)
    # Then nothing is collected any more; without a refresh nothing is after the compression.
    monkeypatch.setattr(weighing, "collect_in_training", lambda *_: (_ for _ in ()).throw(Stop))
    for epoch in (3,) if refresh else (1, 3):
        ckpt = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        assert_same_run(run_with_checkpoints(tmp_path / f"again{epoch}", *make(), ckpt_path=ckpt, max_epochs=5), whole)


def test_the_smallest_tables_within_a_limit(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of()
    callback = SharedBasis(max_perplexity_increase="5%", at_epoch=2)
    with caplog.at_level("INFO"):
        make_trainer(callback).fit(model, **loaders_of())
    perplexity = json.loads((tmp_path / "report.json").read_text())["perplexity"]
    assert 0.02 < perplexity["compressed"] / perplexity["dense"] - 1 <= 0.05
    # What was tried is said, and what was found is one of them.
    assert f"perplexity {perplexity['compressed']:.2f} (+" in caplog.text
    assert plan_of(model).ratio > 1.5
    assert callback.state_dict()["settings"]["max_perplexity_increase"] == "5%"


def test_a_limit_that_cannot_be_met_leaves_the_model_as_it_is(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_embcompress.callbacks.solving.validation_perplexity", lambda *_: 1e4)
    model, before = model_of(), Copies()
    callback = TransformCoding(max_perplexity_increase=1e-7, at_epoch=1, bits=1)
    trainer = make_trainer(before, callback)
    with pytest.raises(ValueError, match=r"max_perplexity_increase: .*% at least"):
        trainer.fit(model, **loaders_of())
    torch.testing.assert_close(dict(model.state_dict()), dict(before.models[1].state_dict()), rtol=0, atol=0)
    assert [id(parameter) for parameter in model.parameters()] == [
        id(parameter) for parameter in trainer.optimizers[0].param_groups[0]["params"]
    ]


def test_a_limit_needs_a_perplexity(make_trainer: MakeTrainer) -> None:
    class Unknown(LanguageModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_squares", self(batch[0]).square().mean())

    trainer = make_trainer(TransformCoding(max_perplexity_increase="1%"))
    with pytest.raises(ValueError, match="max_perplexity_increase='1%' .*name a logged loss"):
        trainer.fit(Unknown(), **loaders_of())
    loaders = loaders_of()
    del loaders["val_dataloaders"]
    with pytest.raises(ValueError, match="max_perplexity_increase='1%' .*validation data"):
        make_trainer(TransformCoding(max_perplexity_increase="1%")).fit(model_of(), **loaders)


@pytest.mark.parametrize(
    ("by_hand", "arguments", "reason"),
    [
        (True, {}, "by the frequency of tokens alone, because ByHand uses manual optimization"),
        (False, {"statistics_batches": 0}, "by the frequency of tokens alone, because statistics_batches=0 leaves out"),
    ],
)
def test_without_statistics_rows_count_by_their_frequency(
    make_trainer: MakeTrainer,
    caplog: pytest.LogCaptureFixture,
    by_hand: bool,
    arguments: dict[str, Any],
    reason: str,
) -> None:
    model = _by_hand(LanguageModel)() if by_hand else model_of()
    expected, after = deepcopy(model), Copies()
    counts = _statistics(expected).token_counts
    compress(expected, "shared_basis", ratio=2, groups=3, token_counts=counts)
    callback = SharedBasis(ratio=2, groups=3, token_counts=counts, **arguments)
    with caplog.at_level("INFO"):
        make_trainer(callback, after, max_epochs=1).fit(model, **loaders_of())
    assert reason in caplog.text
    torch.testing.assert_close(dict(after.models[0].state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_optimized_by_hand_with_given_statistics(make_trainer: MakeTrainer) -> None:
    model = _by_hand(LanguageModel)()
    callback = EmbeddingCompression(
        "shared_basis", ratio=2, at_epoch=0, refine_at_epochs=[1], statistics=_statistics(model)
    )
    make_trainer(callback).fit(model, **loaders_of())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "auto"}, "method='auto' .*ByHand .*give statistics"),
        ({"ratio": None, "max_perplexity_increase": 0.1}, "max_perplexity_increase=0.1 .*ByHand"),
        ({"refresh_statistics": True}, "refresh_statistics=True .*ByHand"),
    ],
)
def test_optimized_by_hand_what_needs_statistics_is_refused(
    make_trainer: MakeTrainer, arguments: dict[str, Any], message: str
) -> None:
    trainer = make_trainer(EmbeddingCompression(**{"method": "shared_basis", "ratio": 2, **arguments}))
    with pytest.raises(ValueError, match=message):
        trainer.fit(_by_hand(LanguageModel)(), **loaders_of())
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 2, "max_perplexity_increase": "1%"}, "give exactly one of ratio, size, bits_per_weight"),
        ({"max_perplexity_increase": "1%", "method": "group_reduce"}, "max_perplexity_increase .*'group_reduce'"),
        ({"ratio": 2, "statistics_batches": -1}, "statistics_batches must be 0 or more, it is -1"),
        (
            {"max_perplexity_increase": 0.1, "statistics_batches": 0},
            "max_perplexity_increase=0.1.*statistics_batches",
        ),
        ({"ratio": 2, "method": "auto", "statistics_batches": 0}, "method='auto' has to know what errors cost"),
        ({"ratio": 2, "refresh_statistics": True, "statistics_batches": 0}, "nothing to collect them from"),
        ({"ratio": 2, "statistics": "file", "token_counts": [1, 2]}, "give statistics or token_counts, not both"),
    ],
)
def test_refused_when_it_is_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingCompression(**{"method": "shared_basis", **arguments})


def test_statistics_of_another_model_are_refused_before_the_first_step(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    other = nn.Sequential(nn.Embedding(150, 16), nn.Linear(16, 150))
    ids = torch.arange(150).reshape(5, 30)
    strange = collect_statistics(
        other, [ids], lambda model, ids: F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    )
    (tmp_path / "damaged").write_bytes(b"nothing")
    for statistics, message in (
        (strange, "the statistics have no moments of table 'encoder' .* only of '0', '1'"),
        (tmp_path / "damaged", "cannot be read as statistics"),
        (str(tmp_path / "missing"), "there is no file .* with statistics"),
    ):
        trainer = make_trainer(SharedBasis(ratio=2, at_epoch=1, statistics=statistics))  # type: ignore[arg-type]
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            trainer.fit(model_of(), **loaders_of())
        assert trainer.global_step == 0


def test_a_trial_run_searches_too(make_trainer: MakeTrainer) -> None:
    model = model_of()
    callback = TransformCoding(max_perplexity_increase="50%", at_epoch=3, refine_at_epochs=[4])
    make_trainer(callback, fast_dev_run=True).fit(model, **loaders_of())
    assert len(plan_of(model).tables) == 2
    assert math.isfinite(callback.state_dict()["perplexity"]["compressed"])


def test_a_run_of_an_older_version_goes_on_by_the_method_of_now(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"ratio": 2, "groups": 3, "refine_at_epochs": [1], "statistics_batches": 5}
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = model_of()
    make_trainer(SharedBasis(**arguments), keep, max_epochs=2, enable_checkpointing=True).fit(whole, **loaders_of())
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    # As it was written when this was a variant of another method.
    options = {"variant": "loss", "groups": 3, "refine_rounds": 5, "grouping": "equal"}
    states, plan = saved["callbacks"], saved["embcompress"]
    key = next(name for name in states if name.startswith("SharedBasis"))
    state = states.pop(key)
    states[key.replace("SharedBasis", "GroupReduce").replace("shared_basis", "group_reduce")] = {
        **state,
        "settings": {"ratio": 2, "size": None, **options},
    }
    plan["version"] = 5
    for table in plan["tables"]:
        table |= {"method": "group_reduce", "options": options}
    torch.save(saved, tmp_path / "old.ckpt")
    resumed = model_of()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is ignored")
        trainer = make_trainer(SharedBasis(**arguments), max_epochs=2)
        trainer.fit(resumed, **loaders_of(), ckpt_path=tmp_path / "old.ckpt")
    torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    trainer = make_trainer(GroupReduce(ratio=2, groups=3, refine_at_epochs=[1]), max_epochs=2)
    with pytest.raises(ValueError, match="compressed by 'shared_basis' and cannot be refined by 'group_reduce'"):
        trainer.fit(model_of(), **loaders_of(), ckpt_path=tmp_path / "old.ckpt")
