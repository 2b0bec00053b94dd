"""The LSTM language model: state, losses, tying, checkpoints, dense and compressed, and the command line."""

from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_embcompress import GroupReduce, compress
from lightning_embcompress.layers import chunked_loss
from lightning_embcompress.modules import CompressedLanguageModel, LSTMLanguageModel, lstm
from toys import Losses, Windows, quiet_trainer

VOCAB_SIZE = 50


def _model(**changes: Any) -> LSTMLanguageModel:
    seed_everything(0, verbose=False)
    arguments: dict[str, Any] = {"embedding_dim": 8, "hidden_size": 12, "num_layers": 2, "dropout": 0.0}
    return LSTMLanguageModel(**{"vocab_size": VOCAB_SIZE, **arguments, **changes})


def _trainer(path: Path, **changes: Any) -> Trainer:
    return quiet_trainer(path, *changes.pop("callbacks", ()), **{"max_epochs": 1, **changes})


@pytest.mark.parametrize("changes", [{}, {"projection_size": 6}, {"softmax": "sampled", "num_sampled": 20}])
def test_learns_and_logs(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = _model(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05), **changes)
    trainer = _trainer(tmp_path, max_epochs=20)
    trainer.fit(model, datamodule=Windows())
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert set(metrics) == {"train_loss", "val_loss", "val_perplexity"}
    # The validation windows begin the training text, so a model that learns is far below the uniform log(50) = 3.91.
    assert metrics["val_loss"] < 3.0
    assert metrics["val_perplexity"] == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-5)
    (test,) = trainer.test(model, datamodule=Windows(), verbose=False)
    assert test["test_loss"] == pytest.approx(metrics["val_loss"], rel=1e-5)
    assert test["test_perplexity"] == pytest.approx(metrics["val_perplexity"], rel=1e-5)


def test_windows_with_carried_state_equal_one_long_text(tmp_path: Path) -> None:
    model, data = _model(projection_size=6), Windows()
    text, targets = (torch.cat(part, dim=1) for part in zip(*data.pairs[:2], strict=True))
    with torch.no_grad():
        expected = F.cross_entropy(model(text)[0].flatten(0, 1), targets.flatten(), reduction="none").view(3, 10)
    trainer = _trainer(tmp_path)
    (logged,) = trainer.validate(model, datamodule=data, verbose=False)
    assert logged["val_loss"] == pytest.approx(expected.mean().item(), rel=1e-6)
    predicted = trainer.predict(model, datamodule=data)
    assert isinstance(predicted, list)
    torch.testing.assert_close(torch.cat(predicted, dim=1), expected, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def test_training_is_not_disturbed_by_validation_in_between(tmp_path: Path) -> None:
    losses = []
    for changes in ({"limit_val_batches": 0}, {"val_check_interval": 2, "num_sanity_val_steps": 2}):
        recorded = Losses()
        _trainer(tmp_path, callbacks=[recorded], max_epochs=2, **changes).fit(_model(), datamodule=Windows())
        losses.append(recorded.values)
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]


def test_state_starts_anew_each_epoch_and_with_another_batch_size(tmp_path: Path) -> None:
    still = _model(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    recorded = Losses()
    _trainer(tmp_path, callbacks=[recorded], max_epochs=2).fit(still, datamodule=Windows())
    assert recorded.values[:6] == recorded.values[6:]
    inputs, _ = Windows().pairs[0]
    still.start_text("val")
    first = still.logits(inputs, "val")
    assert not torch.equal(still.logits(inputs, "val"), first)
    torch.testing.assert_close(still.logits(inputs[:2], "val"), first[:2])
    still.start_text("val")
    assert torch.equal(still.logits(inputs, "val"), first)
    unrelated = _model(carry_state=False)
    assert torch.equal(unrelated.logits(inputs, "train"), unrelated.logits(inputs, "train"))


def test_tied_tables_are_one_parameter_and_move_together(tmp_path: Path) -> None:
    model = _model(tie_weights=True, projection_size=8)
    before = model.encoder.get_parameter("weight").clone()
    _trainer(tmp_path).fit(model, datamodule=Windows())
    assert model.decoder.weight is model.encoder.weight
    assert not torch.equal(before, model.encoder.get_parameter("weight"))


def test_initialisation() -> None:
    model = _model(projection_size=6)
    bounds = {"weight_ih_l0": 3 / 14, "weight_hh_l1": 3 / 12, "weight_hr_l0": 3 / 12}
    for name, square in bounds.items():
        assert 0.8 * square < model.lstm.get_parameter(name).abs().max().item() ** 2 <= square
    assert model.lstm.get_parameter("bias_ih_l1").tolist() == [0.0] * 12 + [1.0] * 12 + [0.0] * 24
    for table in (model.encoder, model.decoder):
        assert 0.08 < table.get_parameter("weight").abs().max().item() <= 0.1
    assert not model.lstm.get_parameter("bias_hh_l0").any()
    assert not model.decoder.get_parameter("bias").any()


def test_only_the_lstm_gradients_are_clipped(tmp_path: Path) -> None:
    norms: dict[str, float] = {}

    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            if any(parameter.grad is not None for parameter in pl_module.parameters()):
                for name in ("lstm", "decoder"):
                    gradients = [parameter.grad for parameter in getattr(pl_module, name).parameters()]
                    norms[name] = nn.utils.get_total_norm(gradients).item()

    for clip in (None, 1e-3):
        _trainer(tmp_path, max_steps=2, callbacks=[Norms()]).fit(_model(lstm_gradient_clip=clip), datamodule=Windows())
        if clip is None:
            assert norms["lstm"] > 1e-3
    assert norms["lstm"] == pytest.approx(1e-3, rel=1e-2)
    assert norms["decoder"] > 1e-2


@pytest.mark.parametrize(
    ("precision", "softmax", "projection_size"), [("bf16-mixed", "sampled", 6), ("bf16-true", "full", 0)]
)
def test_reduced_precision(tmp_path: Path, precision: Any, softmax: Any, projection_size: int) -> None:
    model = _model(softmax=softmax, num_sampled=20, projection_size=projection_size, dropout=0.1)
    trainer = _trainer(tmp_path, precision=precision)
    trainer.fit(model, datamodule=Windows())
    assert 3.0 < trainer.callback_metrics["val_loss"] < 4.2
    assert model.val_perplexity.nll_sum.dtype == torch.float64


def test_windows_of_ignored_targets(tmp_path: Path) -> None:
    data, padded = Windows(), Windows()
    padded.pairs.insert(1, (padded.pairs[0][0], torch.full((3, 5), -100)))
    for changes in ({}, {"softmax": "sampled", "num_sampled": 20}):
        model = _model(carry_state=False, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), **changes)
        trainer = _trainer(tmp_path)
        trainer.fit(model, datamodule=padded)
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        (alone,) = _trainer(tmp_path, limit_val_batches=1).validate(model, datamodule=data, verbose=False)
        (both,) = _trainer(tmp_path, limit_val_batches=2).validate(model, datamodule=padded, verbose=False)
        assert alone == pytest.approx(both)


def test_frequency_bands(tmp_path: Path) -> None:
    data = Windows()
    data.token_counts = torch.arange(200, 0, -1)
    (logged,) = _trainer(tmp_path).test(_model(frequency_bands=True), datamodule=data, verbose=False)
    assert logged["test_perplexity/rank_1-100"] == pytest.approx(logged["test_perplexity"], rel=1e-5)
    assert math.isnan(logged["test_perplexity/rank_101-200"])
    with pytest.warns(UserWarning, match="frequency_bands=True has no effect"):
        _trainer(tmp_path).validate(_model(frequency_bands=True), data.val_dataloader(), verbose=False)


@pytest.mark.parametrize("compressed", [False, True])
def test_checkpoint_loads_and_knows_its_vocabulary(tmp_path: Path, compressed: bool) -> None:
    model, path = (_compressed if compressed else _model)(projection_size=6), tmp_path / "model.ckpt"
    trainer = _trainer(tmp_path)
    trainer.fit(model, datamodule=Windows())
    trainer.save_checkpoint(path)
    loaded = LSTMLanguageModel.load_from_checkpoint(path)
    assert loaded.lstm.proj_size == 6
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    saved = torch.load(path, weights_only=True)
    assert saved["vocabulary"] == {"size": VOCAB_SIZE, "fingerprint": "abc"}
    assert "lstm_state" not in saved
    with pytest.raises(ValueError, match=r"vocabulary of 50 tokens.*vocab_size=60"):
        LSTMLanguageModel.load_from_checkpoint(path, vocab_size=60)
    # It is checked before the structure is.
    for callbacks in ([], [GroupReduce(ratio=1.3)] if compressed else []):
        fresh, trainer = _model(projection_size=6), _trainer(tmp_path, callbacks=callbacks)
        with pytest.raises(ValueError, match=r"fingerprint abc\).*fingerprint xyz"):
            trainer.validate(fresh, datamodule=Windows(fingerprint="xyz"), ckpt_path=path)
        assert isinstance(fresh.encoder, nn.Embedding)


class Skip(Callback):
    """Gives every step the window that comes next: a plain loader starts over when training is resumed."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for part, expected in zip(batch, Windows().pairs[batch_idx], strict=True):
            part.copy_(expected)


@pytest.fixture
def middle(tmp_path: Path) -> SimpleNamespace:
    """The losses of an epoch of six steps, and its checkpoints after the third, whole and of the weights alone."""
    whole = Losses()
    keep = {"dirpath": tmp_path, "save_top_k": -1}
    checkpoints = [ModelCheckpoint(**keep, filename="{step}", every_n_train_steps=3)]
    # Of every step: two callbacks that save as often cannot both be kept in a checkpoint.
    weights = ModelCheckpoint(**keep, filename="weights-{step}", every_n_train_steps=1, save_weights_only=True)
    checkpoints.append(weights)
    trainer = _trainer(tmp_path, callbacks=[whole, *checkpoints], enable_checkpointing=True)
    trainer.fit(_model(), datamodule=Windows())
    return SimpleNamespace(path=tmp_path / "step=3.ckpt", losses=whole.values)


def _resumed(middle: SimpleNamespace, state: Any) -> list[float]:
    """Losses of the rest of the epoch from another state."""
    path = middle.path.with_name("changed.ckpt")
    torch.save({**torch.load(middle.path, weights_only=True), "lstm_state": state}, path)
    rest = Losses()
    _trainer(path.parent, callbacks=[Skip(), rest]).fit(_model(), datamodule=Windows(), ckpt_path=path)
    return rest.values


def test_resuming_within_an_epoch_takes_up_the_state(middle: SimpleNamespace) -> None:
    state = torch.load(middle.path, weights_only=True)["lstm_state"]
    assert [part.shape for part in state] == [(2, 3, 12), (2, 3, 12)]
    assert "lstm_state" not in torch.load(middle.path.with_name("weights-step=3.ckpt"), weights_only=True)
    assert _resumed(middle, state) == middle.losses[3:]
    from_zero = _resumed(middle, [torch.zeros_like(part) for part in state])
    assert from_zero[0] != middle.losses[3]
    for rows in (1, 6):
        changed = [part.repeat(1, 2, 1)[:, :rows] for part in state]
        with pytest.warns(UserWarning, match=f"LSTM state of {rows} texts, but now there are 3"):
            assert _resumed(middle, changed) == from_zero


def test_a_damaged_state_is_refused(middle: SimpleNamespace) -> None:
    state = torch.load(middle.path, weights_only=True)["lstm_state"]
    for damaged in ({}, [], 3, state[:1], [*state, state[0]], [state[0], state[1][:1]], [part[0] for part in state]):
        with pytest.raises(ValueError, match="LSTM state of the checkpoint"):
            _resumed(middle, damaged)
    with pytest.raises(ValueError, match=r"\[2, 3, 12\]\], but this model's are \[\[2, 'batch_size', 6\], \[2, 'b"):
        LSTMLanguageModel.load_from_checkpoint(middle.path, projection_size=6)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_on_an_exception_waits_for_no_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    gathered: list[Any] = []

    def gather(state: Any) -> list[Any]:
        gathered.append(state)
        return [state]

    class Fail(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "before.ckpt")
                raise RuntimeError("out of luck")

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(Trainer, "world_size", processes)
        patch.setattr(lstm, "gather_over_processes", gather)
        trainer = _trainer(tmp_path, callbacks=[Fail(), OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer.fit(_model(), datamodule=Windows())
    said = [str(warning.message) for warning in caught if "no LSTM state" in str(warning.message)]
    path = tmp_path / "on_exception.ckpt"
    saved = [torch.load(tmp_path / name, weights_only=True) for name in ("before.ckpt", path.name)]
    # All processes come to the first one.
    assert ["lstm_state" in checkpoint for checkpoint in saved] == [True, processes == 1]
    assert len(gathered) == 3 - processes
    assert len(said) == processes - 1
    losses = Losses()
    _trainer(tmp_path, callbacks=[losses]).fit(_model(), datamodule=Windows(), ckpt_path=path)
    assert losses.values
    assert all(math.isfinite(loss) for loss in losses.values)


def _compressed(**changes: Any) -> LSTMLanguageModel:
    model = _model(**changes)
    compress(model, "group_reduce", ratio=1.3, groups=2, token_counts=torch.arange(VOCAB_SIZE, 0, -1))
    return model


def test_data_of_another_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"60 tokens.*vocab_size=50"):
        _trainer(tmp_path).fit(_model(), datamodule=Windows(vocab_size=60))
    model = _model()
    model.on_load_checkpoint({"vocabulary": {"size": VOCAB_SIZE, "fingerprint": "abc"}, "state_dict": {}})
    with pytest.raises(ValueError, match="fingerprint abc, that of the data has xyz"):
        _trainer(tmp_path).fit(model, datamodule=Windows(fingerprint="xyz"))
    _trainer(tmp_path, fast_dev_run=True).fit(model, datamodule=Windows())


def test_optimizer_and_scheduler_from_the_command_line(tmp_path: Path) -> None:
    optimizer = ["optimizer=Adagrad", "optimizer.lr=0.2", "softmax=sampled", "num_sampled=20", "hidden_size=16"]
    scheduler = ["lr_scheduler=StepLR", "lr_scheduler.step_size=2", "lr_scheduler.gamma=0.5"]
    arguments = [*optimizer, *scheduler, "lr_scheduler_interval=step", "vocab_size=50"]
    cli = LightningCLI(
        LSTMLanguageModel,
        Windows,
        args=[f"--model.{one}" for one in arguments],
        run=False,
        auto_configure_optimizers=False,
        save_config_callback=None,
    )
    trainer = _trainer(tmp_path)
    trainer.fit(cli.model, datamodule=cli.datamodule)
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.Adagrad)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.5**3)
    assert cli.model.lstm.hidden_size == 16


def test_plateau_scheduler_watches_the_validation_loss(tmp_path: Path) -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    model = _model(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        lr_scheduler=lambda optimizer: plateau(optimizer, patience=0, threshold=0.5),
    )
    trainer = _trainer(tmp_path, max_epochs=3)
    trainer.fit(model, datamodule=Windows())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 0},
        {"projection_size": 12},
        {"dropout": 1.0},
        {"table_init_range": 0.0},
        {"tie_weights": True},
        {"softmax": "hierarchical"},
        {"num_sampled": 51, "softmax": "sampled"},
        {"lstm_gradient_clip": 0.0},
    ],
)
def test_bad_arguments(changes: dict[str, Any]) -> None:
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        _model(**changes)


class Scaled(LSTMLanguageModel):
    def logits(self, inputs: Tensor, stage: Any) -> Tensor:
        return 0.5 * super().logits(inputs, stage)


def test_evaluation_has_logits_of_a_few_tokens_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "LEAST_TOKENS", 4)
    monkeypatch.setattr(chunked_loss, "_CPU_LEAST_ELEMENTS", 4 * VOCAB_SIZE)
    monkeypatch.setattr(chunked_loss, "MOST_ELEMENTS", 4 * VOCAB_SIZE)
    for kind in (LSTMLanguageModel, Scaled):
        model = kind(VOCAB_SIZE, embedding_dim=8, hidden_size=12, dropout=0.0, frequency_bands=True)
        seen: list[int] = []
        model.decoder.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(inputs[0].shape[:-1].numel()))
        trainer, data = _trainer(tmp_path), Windows()
        (found,) = trainer.test(model, data, verbose=False)
        # Of 15 tokens of a batch; the subclass gives them all.
        assert max(seen) == (4 if kind is LSTMLanguageModel else 15)
        model.start_text("test")
        with torch.no_grad():
            losses = [
                F.cross_entropy(model.logits(inputs, "test").flatten(0, 1), targets.flatten(), reduction="none")
                for inputs, targets in data.pairs[:2]
            ]
        assert found["test_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
        assert found["test_perplexity/rank_1-50"] == pytest.approx(found["test_perplexity"], rel=1e-6)
        predicted = trainer.predict(model, data)
        assert predicted is not None
        for batch, wanted in zip(predicted, losses, strict=True):
            torch.testing.assert_close(batch, wanted.view(3, 5))


@pytest.mark.parametrize("softmax", ["full", "sampled"])
@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("method", [None, "group_reduce"])
def test_sparse_gradients_train_as_dense_ones(
    tmp_path: Path, softmax: Any, tie_weights: bool, method: str | None
) -> None:
    arguments = {"softmax": softmax, "num_sampled": 10, "tie_weights": tie_weights, "projection_size": 8}
    models = []
    for sparse in (False, True):
        sgd = partial(torch.optim.SGD, lr=0.5)
        model = _model(**arguments, sparse_gradients=sparse, optimizer=sgd)
        if method is not None:
            compress(model, method=method, ratio=1.3, token_counts=torch.arange(VOCAB_SIZE, 0, -1))
        seed_everything(1, verbose=False)
        kinds = Kinds()
        _trainer(tmp_path, callbacks=[kinds]).fit(model, Windows())
        # A softmax over all words has a gradient for all of them.
        read = {"encoder"} if softmax == "full" else {"encoder", "decoder"}
        wanted = read if sparse and not (tie_weights and softmax == "full") else set()
        assert kinds.sparse == wanted - ({"decoder"} if tie_weights else set())
        models.append(dict(model.named_parameters()))
    torch.testing.assert_close(models[1], models[0], rtol=1e-4, atol=1e-5)


class Kinds(Callback):
    """Which tables have sparse gradients alone."""

    sparse: set[str]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients: dict[str, list[bool]] = {}
        for name, parameter in pl_module.named_parameters():
            if name.split(".")[0] in ("encoder", "decoder") and "bias" not in name and parameter.grad is not None:
                gradients.setdefault(name.split(".")[0], []).append(parameter.grad.is_sparse)
        self.sparse = {name for name, kinds in gradients.items() if all(kinds)}


def test_what_sparse_gradients_cannot_do(tmp_path: Path) -> None:
    model = _model(sparse_gradients=True, optimizer=torch.optim.Adagrad)
    with pytest.raises(ValueError, match="gradient_clip_val=1.0"):
        _trainer(tmp_path, gradient_clip_val=1.0).fit(model, Windows())
    model.trainer = _trainer(tmp_path, strategy="ddp")
    with pytest.raises(ValueError, match="sparse_gradients=True .* DDPStrategy"):
        model.setup("fit")
    for optimizer, said in (
        (torch.optim.Adam, "Adam as it is set does not"),
        (lambda parameters: torch.optim.Adagrad(parameters, weight_decay=0.1), "Adagrad as it is set does not"),
    ):
        model = _model(sparse_gradients=True, optimizer=optimizer)
        with pytest.raises(ValueError, match=said):
            _trainer(tmp_path).fit(model, Windows())


def test_what_was_trained_with_sparse_gradients_is_fine_tuned_by_adam(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.fit(
        _model(softmax="sampled", num_sampled=10, sparse_gradients=True, optimizer=torch.optim.Adagrad), Windows()
    )
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    tuned = CompressedLanguageModel(str(tmp_path / "dense.ckpt"))
    _trainer(tmp_path, gradient_clip_val=1.0).fit(tuned, Windows())
