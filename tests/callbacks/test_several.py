"""Several callbacks in one run: of different tables, or of the same ones one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_embcompress import EmbeddingCompression, GroupReduce
from lightning_embcompress.callbacks.checks import Turn, check_order
from lightning_embcompress.compression.plan import plan_of
from toys import DIM, Copies, check_resuming, loaders_of, model_of

MakeTrainer = Callable[..., Trainer]


def _twice(**changes: Any) -> list[Callback]:
    first = GroupReduce(ratio=1.5, at_epoch=1, refine_at_epochs=[2], groups=3)
    return [first, GroupReduce(ratio=3, at_epoch=3, groups=2, **changes)]


def _state(callback: Callback) -> Any:
    return callback.state_dict()


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_one_after_the_other(tmp_path: Path, kind: str) -> None:
    def make() -> list[Any]:
        return [model_of(kind), *_twice(refine_at_epochs=[4])]

    whole = check_resuming(tmp_path, make, range(5), max_epochs=6)
    assert len(whole.plan.tables) == (1 if kind == "tied" else 2)
    for table in whole.plan.tables:
        # Of the dense table, not of what the first callback left.
        assert table.ratio >= 3
        assert table.options["groups"] == 2
    groups = whole.trainer.optimizers[0].param_groups
    assert [id(p) for group in groups for p in group["params"]] == [id(p) for p in whole.module.parameters()]
    callbacks = [one for one in whole.trainer.callbacks if isinstance(one, GroupReduce)]
    first, second = (_state(callback)["perplexity"] for callback in callbacks)
    assert whole.report["perplexity"] == {
        "dense": first["dense"],
        "compressed": second["compressed"],
        "refined": [*first["refined"], *second["refined"]],
        "final": second["final"],
        "split": "validation",
    }
    assert [entry["epoch"] for entry in whole.report["perplexity"]["refined"]] == [2, 4]


def test_the_second_solves_for_what_the_first_has_left(make_trainer: MakeTrainer) -> None:
    before, after, model = Copies(), Copies(), model_of()
    callbacks = [
        EmbeddingCompression("low_rank", ratio=1.5, at_epoch=1),
        EmbeddingCompression("low_rank", ratio=4, at_epoch=2),
    ]
    make_trainer(before, *callbacks, after, max_epochs=3).fit(model, **loaders_of())
    for name in ("encoder", "decoder"):
        left, right = (kept.models[2].get_submodule(name).factorization.materialize() for kept in (before, after))
        rank = int(torch.linalg.matrix_rank(right))
        assert rank < int(torch.linalg.matrix_rank(left)) < DIM
        u, s, v = torch.linalg.svd(left.double(), full_matrices=False)
        torch.testing.assert_close(right.double(), (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"refine_at_epochs": [2]}, {"at_epoch": 2, "tables": "decoder"}, "table 'decoder' .* at epoch 2"),
        ({"at_epoch": 1, "tables": "encoder"}, {"at_epoch": 1}, "two callbacks compress table 'encoder' at epoch 1"),
        ({"keep_reference": "kept"}, {"at_epoch": 1, "keep_reference": "kept"}, "keep_reference='kept' .*'..coder'"),
    ],
)
def test_orders_that_are_refused(
    make_trainer: MakeTrainer, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    callbacks = [EmbeddingCompression("low_rank", ratio=2, **first), GroupReduce(ratio=3, groups=2, **second)]
    with pytest.raises(ValueError, match=message):
        make_trainer(*callbacks).fit(model_of(), **loaders_of())


def test_others_stay_as_they_are(make_trainer: MakeTrainer) -> None:
    callbacks = [
        EmbeddingCompression("low_rank", ratio=2, at_epoch=0),
        EmbeddingCompression("low_rank", ratio=5, at_epoch=2, tables="decoder"),
    ]

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            layer = pl_module.encoder
            self.layers = {*getattr(self, "layers", ()), id(layer)}

    watch, model = Watch(), model_of()
    make_trainer(*callbacks, watch, max_epochs=4).fit(model, **loaders_of())
    assert [(table.name, table.ratio >= 5) for table in plan_of(model).tables] == [
        ("encoder", False),
        ("decoder", True),
    ]
    # The layer itself, with its parameters, and not one that was rebuilt.
    assert watch.layers == {id(model.encoder)}


def test_a_solver_that_fails_leaves_the_first_compression(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_embcompress.methods.registry import CP

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no convergence")

    monkeypatch.setattr(CP, "decompose", fail)
    callbacks = [
        EmbeddingCompression("low_rank", ratio=2, at_epoch=0),
        EmbeddingCompression("cp", ratio=4, at_epoch=1),
    ]
    model = model_of("tied")
    with pytest.raises(RuntimeError, match="no convergence"):
        make_trainer(*callbacks).fit(model, **loaders_of())
    (table,) = plan_of(model).tables
    assert (table.method, table.modules) == ("low_rank", ("encoder", "decoder"))
    assert model.encoder.factorization is model.decoder.factorization


@pytest.mark.parametrize("listed", [1, -1])
def test_a_trial_run_does_both(make_trainer: MakeTrainer, listed: int) -> None:
    model, callbacks = model_of(), _twice(refine_at_epochs=[4])
    make_trainer(*callbacks[::listed], fast_dev_run=True).fit(model, **loaders_of())
    # In the order of their epochs, however they are listed.
    assert all(table.ratio >= 3 for table in plan_of(model).tables)
    assert [_state(callback)["refined"] for callback in callbacks] == [[2], [4]]


@pytest.mark.parametrize("listed", [1, -1])
def test_both_are_late(make_trainer: MakeTrainer, tmp_path: Path, listed: int) -> None:
    dense, model = make_trainer(max_epochs=4), model_of()
    dense.fit(model_of(), **loaders_of())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    trainer = make_trainer(*_twice()[::listed], max_epochs=5)
    with pytest.warns(UserWarning, match="refinement at epoch 2 is left out"):
        trainer.fit(model, **loaders_of(), ckpt_path=tmp_path / "dense.ckpt")
    assert all(table.ratio >= 3 for table in plan_of(model).tables)


def test_a_plateau_scheduler_steps_once(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def configure(module: Any) -> Any:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "val_loss"}
        ]

    def fit(epochs: int, ckpt_path: Path | None = None, *callbacks: Callback) -> Trainer:
        model = model_of()
        model.optimizer = configure
        trainer = make_trainer(*_twice(), *callbacks, max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(model, **loaders_of(), ckpt_path=ckpt_path)
        return trainer

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=20, save_top_k=-1, filename="{step}")
    ended = fit(4, None, keep)
    ended.save_checkpoint(tmp_path / "end.ckpt")
    assert ended.lr_scheduler_configs[0].scheduler.last_epoch == 4
    # From within an epoch, and from what was saved after the end.
    for path, epochs in ((tmp_path / "step=20.ckpt", 4), (tmp_path / "end.ckpt", 6)):
        assert fit(epochs, path).lr_scheduler_configs[0].scheduler.last_epoch == epochs


def test_turns_of_different_tables_are_free() -> None:
    one, other = frozenset({"encoder"}), frozenset({"decoder"})
    check_order([Turn(1, [2, 9], one), Turn(1, [3], other), Turn(10, [], one)])
