"""Fine-tuning of LSTM language models: the terms of the loss, the teacher, what is trained, and resuming."""

from __future__ import annotations

import copy
import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import toys
from lightning_embcompress import EmbeddingCompression, QuantizationAware, compress
from lightning_embcompress.calibration.loss_metric import metric_of
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.cli.main import main
from lightning_embcompress.cli.recipes_index import available_recipes
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.data import TextFiles
from lightning_embcompress.layers.chunked_loss import loss_of_logits
from lightning_embcompress.layers.distillation import Distillation, teacher_scores
from lightning_embcompress.methods.registry import Quantization
from lightning_embcompress.modules import CompressedLanguageModel, LSTMLanguageModel
from lightning_embcompress.modules.finetuning.reconstruction import Reconstruction
from lightning_embcompress.quantization.aware import convert_qat, prepare_qat, quantize_tables
from lightning_embcompress.tables.finding import find_tables
from toys import Losses, quiet_trainer

WORDS, DIM = 58, 12


def _lstm(vocab_size: int, **changes: Any) -> LSTMLanguageModel:
    seed_everything(0, verbose=False)
    return LSTMLanguageModel(vocab_size, DIM, DIM, **{"dropout": 0.0, **changes})


def _trainer(path: Path, *callbacks: Callback, **changes: Any) -> Trainer:
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    changes = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_checkpointing": saves, **changes}
    return quiet_trainer(path, *callbacks, **changes)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A dense checkpoint, the same compressed, and the text: eight batches of four windows an epoch."""
    folder = tmp_path_factory.mktemp("start")
    chance = random.Random(0)
    words = [f"word{i}" for i in range(WORDS - 2)]
    for name, number in (("train", 24), ("valid", 6), ("test", 6)):
        lines = [" ".join(chance.choices(words, [1 / (i + 1) for i in range(len(words))], k=6)) for _ in range(number)]
        (folder / f"{name}.txt").write_text("\n".join([*lines, " ".join(words)]) + "\n")

    def data() -> TextFiles:
        files = {"train_files": str(folder / "train.txt"), "valid_files": str(folder / "valid.txt")}
        return TextFiles(**files, batch_size=4, sequence_length=7, cache_dir=folder / "cache")

    assert data().vocab_size == WORDS
    dense = _lstm(WORDS)
    trainer = _trainer(folder, max_epochs=3)
    dense.optimizer = lambda parameters: torch.optim.Adam(parameters, lr=0.01)
    trainer.fit(dense, datamodule=data())
    trainer.save_checkpoint(folder / "dense.ckpt", weights_only=True)
    small = copy.deepcopy(dense)
    compress(small, "weighted_low_rank", ratio=2.5, token_counts=data().token_counts)
    trainer.strategy._lightning_module = small
    trainer.save_checkpoint(folder / "small.ckpt", weights_only=True)
    return SimpleNamespace(folder=folder, data=data, batches=list(trainer.train_dataloader))


def _tuned(start: SimpleNamespace, model: Any = "small.ckpt", **arguments: Any) -> CompressedLanguageModel:
    arguments = {"optimizer": _sgd, **arguments}
    if arguments.get("teacher") == "dense.ckpt":
        arguments["teacher"] = str(start.folder / "dense.ckpt")
    return CompressedLanguageModel(str(start.folder / model) if isinstance(model, str) else model, **arguments)


def _fit(start: SimpleNamespace, model: CompressedLanguageModel, *callbacks: Callback, **changes: Any) -> list[float]:
    losses = Losses()
    ckpt_path = changes.pop("ckpt_path", None)
    trainer = _trainer(start.folder, losses, *callbacks, **changes)
    trainer.fit(model, datamodule=start.data(), ckpt_path=ckpt_path)
    return losses.values


def _save(model: CompressedLanguageModel, path: Path) -> Path:
    """A checkpoint of the weights alone, without training."""
    trainer = _trainer(path.parent)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path, weights_only=True)
    return path


def _state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_by_path_and_back(start: SimpleNamespace, tmp_path: Path) -> None:
    model = _tuned(start)
    values = _fit(start, model)
    alone = LSTMLanguageModel.load_from_checkpoint(start.folder / "small.ckpt")
    alone.optimizer = _sgd
    assert values == _fit(start, alone)
    assert _state(model.model).keys() == _state(alone).keys()
    # The weights without what tuned them, into a dense model and into a fine-tuning of one.
    model.save_compressed(tmp_path / "saved")
    again = _tuned(start, _lstm(WORDS), weights=str(tmp_path / "saved"))
    assert plan_of(again.model) == plan_of(model.model)
    torch.testing.assert_close(_state(again), _state(model), rtol=0, atol=0)
    into_dense = _tuned(start, _lstm(WORDS), weights=str(start.folder / "small.ckpt"))
    assert plan_of(into_dense.model) == plan_of(model.model)
    # The checkpoint needs no file that it came from, and goes on as a model too.
    path = _save(model, tmp_path / "tuned.ckpt")
    for loaded in (CompressedLanguageModel.load_from_checkpoint(path), _tuned(start, path)):
        assert type(loaded.model) is LSTMLanguageModel
        assert plan_of(loaded) == plan_of(model)
        torch.testing.assert_close(_state(loaded), _state(model), rtol=0, atol=0)
    _trainer(tmp_path).validate(loaded, datamodule=start.data(), ckpt_path=path, verbose=False)


def test_the_loss_is_the_weighted_sum_of_its_terms(start: SimpleNamespace) -> None:
    weights = {"cross_entropy_weight": 0.5, "distillation_weight": 0.8, "reconstruction_weight": 0.3}
    model = _tuned(start, teacher="dense.ckpt", temperature=2.0, teacher_top_k=9, **weights)
    dense = LSTMLanguageModel.load_from_checkpoint(start.folder / "dense.ckpt").eval()
    before = copy.deepcopy(model.model)
    trainer = _trainer(start.folder, limit_train_batches=2)
    losses = Losses()
    trainer.callbacks.append(losses)
    trainer.fit(model, datamodule=start.data())
    (inputs, targets) = start.batches[0]
    hidden, _ = before.hidden_states(inputs)
    said = teacher_scores(dense(inputs)[0], 9, 2.0)
    found = loss_of_logits(before.decoder(hidden), Distillation(targets, said, 2.0, 0.5, 0.8))
    plain = 0.0
    for mine, original in ((before.encoder, dense.encoder), (before.decoder, dense.decoder)):
        rows, table = mine.factorization.rows(inputs.flatten()), F.embedding(inputs.flatten(), original.weight)
        plain += ((rows - table).square().sum() / table.square().sum()).item()
    assert losses.values[0] == pytest.approx(found.loss.item() + 0.3 * plain, rel=1e-5)
    # The teacher goes on with the text, too.
    teacher = model.teacher
    _, state = dense(inputs)
    teacher.scores(start.batches[0], 0, 9, 2.0)
    found_scores, expected_scores = (
        teacher.scores(start.batches[1], 1, 9, 2.0),
        teacher_scores(dense(start.batches[1][0], state)[0], 9, 2.0),
    )
    torch.testing.assert_close(found_scores.scores, expected_scores.scores)
    logged = trainer.callback_metrics
    expected = 0.5 * logged["train_cross_entropy"] + 0.8 * logged["train_distillation"]
    assert logged["train_loss"].item() == pytest.approx((expected + 0.3 * logged["train_reconstruction"]).item(), 1e-5)
    assert logged["val_perplexity"].item() == pytest.approx(logged["val_loss"].exp().item())
    assert f"val_perplexity/rank_1-{WORDS}" in logged


def test_the_teacher_stays_what_it_is_and_out_of_everything(start: SimpleNamespace) -> None:
    dense = LSTMLanguageModel.load_from_checkpoint(start.folder / "dense.ckpt", dropout=0.4)
    before = _state(dense)
    model = _tuned(start, teacher=dense, distillation_weight=1.0, reconstruction_weight=1.0)
    _fit(start, model)
    torch.testing.assert_close(_state(dense), before, rtol=0, atol=0)
    assert not any(part.training for part in dense.modules())
    assert not any(parameter.requires_grad for parameter in dense.parameters())
    assert set(model.parameters()).isdisjoint(dense.parameters())
    assert all(name.startswith("model.") for name in model.state_dict())
    assert copy.deepcopy(model).teacher is model.teacher
    with pytest.raises(ValueError, match="has parameters that are the model's own"):
        CompressedLanguageModel(dense, teacher=dense, distillation_weight=1.0)


def test_tables_over_the_same_backbone_are_the_teacher(start: SimpleNamespace) -> None:
    runs = []
    for shares in (False, True):
        model = _tuned(
            start, teacher="dense.ckpt", teacher_shares_backbone=shares, freeze="backbone", distillation_weight=1.0
        )
        runs.append((model, _fit(start, model, max_epochs=2)))
    (whole, expected), (shared, values) = runs
    assert values == expected
    teacher = shared.teacher.model
    assert teacher.lstm.weight_ih_l0 is shared.model.lstm.weight_ih_l0
    assert whole.teacher.model.lstm.weight_ih_l0 is not whole.model.lstm.weight_ih_l0
    assert teacher.encoder.weight.shape == (WORDS, DIM)
    assert not teacher.training
    assert shared.model.training
    # A backbone that is another one: its tables say nothing over this one.
    other = _lstm(WORDS)
    torch.nn.init.normal_(other.lstm.weight_hh_l0)
    model = _tuned(start, teacher=other, teacher_shares_backbone=True, freeze="backbone", distillation_weight=1.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="'lstm.weight_ih_l0' of the teacher is not that of the model"):
            _fit(start, model)
    with pytest.raises(RuntimeError, match="The teacher is opened when a Trainer starts to fit"):
        model.training_step(start.batches[0], 0)


def test_a_second_fit_in_lower_precision_and_with_several_batches_a_step(start: SimpleNamespace) -> None:
    model = _tuned(start, teacher="dense.ckpt", distillation_weight=1.0, reconstruction_weight=0.1)
    first = _fit(start, model)
    teacher = model.teacher.model
    second = _fit(start, model, precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=1.0)
    assert model.teacher.model is teacher
    assert teacher.encoder.weight.dtype == torch.float32
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert sum(second) < sum(first)


def test_reconstruction_is_what_the_metric_says() -> None:
    """From all tokens as often as they occur it is the whole sum, from rows that are drawn about so."""
    seed_everything(0, verbose=False)
    model, dense = _lstm(30), _lstm(30)
    compress(model, "low_rank", ratio=2)
    counts = torch.arange(30, 0, -1)
    factors = {name: torch.randn(DIM, DIM, dtype=torch.double) for name in ("decoder", "encoder")}
    moments = {name: factor @ factor.T for name, factor in factors.items()}
    statistics = Statistics(
        counts,
        hidden={"decoder": moments["decoder"]},
        gradients={"encoder": moments["encoder"]},
        num_targets=9,
        hidden_mean={"decoder": torch.zeros(DIM, dtype=torch.double)},
        probabilities={"decoder": torch.linspace(0.1, 0.01, 30, dtype=torch.double)},
        squared_probabilities={"decoder": torch.linspace(0.03, 0.0005, 30, dtype=torch.double)},
    )
    text = torch.repeat_interleave(torch.arange(30), counts)
    for table, name in zip(find_tables(dense), ("encoder", "decoder"), strict=True):
        layer = model.get_submodule(name)
        expected = layer.factorization.loss_in(metric_of(dense, table, statistics), table.weight)
        term = Reconstruction(model, [name], dense.get_submodule(name), statistics)
        whole = term.of_tokens(model, text)
        assert whole.item() == pytest.approx(expected, rel=1e-5)
        drawn = [term.of_sample(model, 500, torch.Generator().manual_seed(seed)).item() for seed in range(20)]
        assert sum(drawn) / 20 == pytest.approx(expected, rel=0.05)
        assert drawn[3] == term.of_sample(model, 500, torch.Generator().manual_seed(3)).item()
        (gradient,) = torch.autograd.grad(whole, layer.factorization.basis)
        assert gradient.abs().max() > 0
    renamed = Statistics(counts, gradients={"model.encoder": moments["encoder"]}, num_targets=9)
    arguments: dict[str, Any] = {"teacher": dense, "reconstruction_weight": 1.0, "statistics": renamed}
    tuned = CompressedLanguageModel(model, **arguments, tables=["encoder"])
    tuned.teacher.open(tuned.model, 0.0, 1.0, SimpleNamespace(strategy=None))
    assert tuned.teacher.reconstruction(tuned.model, [torch.arange(30)], None, 0) > 0


@pytest.mark.parametrize("freeze", ["backbone", "factors", "rows"])
def test_freezing_and_learning_rates_with_a_schedule(start: SimpleNamespace, freeze: str) -> None:
    model = _tuned(
        start,
        freeze=freeze,
        factor_learning_rate=0.3,
        backbone_learning_rate=0.2,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
    )
    # The entries by which dense models refuse the state are empty.
    before = {name: value for name, value in _state(model.model).items() if value.numel()}
    trainer = _trainer(start.folder, max_epochs=2)
    trainer.fit(model, datamodule=start.data())
    after = _state(model.model)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    tables = {name for name in before if not name.startswith("lstm.")}
    shared = {name for name in tables if "coefficients" not in name}
    assert shared < tables
    assert changed == {"backbone": tables, "factors": before.keys() - tables, "rows": shared}[freeze]
    (optimizer,) = trainer.optimizers
    assert [group["lr"] for group in optimizer.param_groups] == [0.2 * 0.25, 0.3 * 0.25]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 5]


@pytest.mark.parametrize("codes", ["lloyd", "trellis"])
def test_what_rows_share_is_trained_and_codes_stay(tmp_path: Path, codes: Any) -> None:
    torch.manual_seed(0)
    dense = LSTMLanguageModel(vocab_size=2000, embedding_dim=32, hidden_size=32)
    model = copy.deepcopy(dense)
    options: dict[str, Any] = {"codes": codes, **({"effort": 6} if codes == "trellis" else {})}
    compress(model, "transform_coding", bits_per_weight=4, token_counts=1 / torch.arange(1.0, 2001), **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare_qat(model, Quantization(8))
    arguments: dict[str, Any] = {"freeze": "rows", "distillation_weight": 1.0, "optimizer": _sgd}
    tuned = CompressedLanguageModel(model, teacher=dense, **arguments)
    words = torch.randint(2000, (4, 3, 11))
    _trainer(tmp_path, max_epochs=2).fit(tuned, DataLoader([(w[:, :-1], w[:, 1:]) for w in words], batch_size=None))
    convert_qat(model)
    after = model.state_dict()
    moved = {name.rpartition(".")[2] for name, value in before.items() if not torch.equal(value, after[name])}
    assert {"bias", "scale_unit", "basis_scales"} <= moved
    for name in (name for name in before if name.endswith("packed_codes")):
        assert float((before[name] != after[name]).double().mean()) < 0.02


def test_what_was_frozen_before_is_trained_again(start: SimpleNamespace, tmp_path: Path) -> None:
    first = _tuned(start, freeze="backbone")
    path = _save(first, tmp_path / "first.ckpt")
    assert not CompressedLanguageModel.load_from_checkpoint(path).model.lstm.weight_ih_l0.requires_grad
    for again in (_tuned(start, path), _tuned(start, copy.deepcopy(first.model))):
        assert all(parameter.requires_grad for parameter in again.parameters())
    factors = _tuned(start, first.model, freeze="factors")
    assert factors.model.lstm.weight_ih_l0.requires_grad
    assert not factors.model.decoder.bias.requires_grad
    # Quantization gives what was frozen other names.
    for freeze in ("backbone", "factors"):
        quantized = _tuned(start, freeze=freeze).model
        prepare_qat(quantized, Quantization(4, ranges="learned"), backbone="int8")
        again = _tuned(start, quantized)
        assert all(parameter.requires_grad for parameter in again.parameters())
    # What somebody else has frozen stays so.
    own = _lstm(WORDS)
    own.lstm.weight_hh_l0.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"1 parameters of LSTMLanguageModel are frozen .*'lstm.weight_hh_l0'"):
        _tuned(start, own)
    for _ in range(2):
        tuned = _tuned(start, own, freeze="backbone")
    with pytest.warns(UserWarning, match="'lstm.weight_hh_l0'"):
        tuned = _tuned(start, tuned.model)
    frozen = [name for name, parameter in tuned.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.lstm.weight_hh_l0"]


def test_resuming_within_an_epoch_is_exact(start: SimpleNamespace, tmp_path: Path) -> None:
    """The teacher's text goes on too; the rows that are drawn are the same."""
    arguments: dict[str, Any] = {"teacher": "dense.ckpt", "distillation_weight": 1.0, "reconstruction_weight": 0.1}
    arguments |= {"reconstruction_rows": 16, "optimizer": torch.optim.Adam, "factor_learning_rate": 0.01}
    whole = _tuned(start, **arguments)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    losses = _fit(start, whole, keep, max_epochs=2)
    steps = len(losses) // 2
    for step in (3, steps, steps + 2):
        path = tmp_path / f"step={step}.ckpt"
        saved = torch.load(path, weights_only=True)
        assert saved["hyper_parameters"]["teacher"] == str(start.folder / "dense.ckpt")
        # From a dense model of the same class: the checkpoint has the structure.
        resumed = _tuned(start, _lstm(WORDS), **arguments)
        assert _fit(start, resumed, max_epochs=2, ckpt_path=path) == losses[step:]
        torch.testing.assert_close(_state(resumed), _state(whole), rtol=0, atol=0)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    saved["embcompress_teacher"]["lstm_state"] = [
        torch.zeros_like(s) for s in saved["embcompress_teacher"]["lstm_state"]
    ]
    torch.save(saved, tmp_path / "changed.ckpt")
    assert _fit(start, _tuned(start, **arguments), max_epochs=2, ckpt_path=tmp_path / "changed.ckpt") != losses[3:]


def test_tables_that_a_callback_compresses_while_it_is_tuned(start: SimpleNamespace, tmp_path: Path) -> None:
    def run(*callbacks: Callback, **fit: Any) -> tuple[CompressedLanguageModel, list[float]]:
        model = _tuned(start, "dense.ckpt", teacher="dense.ckpt", distillation_weight=1.0, factor_learning_rate=0.05)
        callback = EmbeddingCompression("shared_basis", ratio=1.3, groups=2, at_epoch=1, statistics_batches=3)
        return model, _fit(start, model, callback, *callbacks, max_epochs=3, **fit)

    model, losses = run(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"))
    assert [table.modules for table in plan_of(model).tables] == [("model.encoder",), ("model.decoder",)]
    groups = model.trainer.optimizers[0].param_groups
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.parts.split(model.model)[1]}
    resumed, rest = run(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert rest == losses[-len(rest) :]
    torch.testing.assert_close(_state(resumed), _state(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cross_entropy_weight": 0.0}, "cross_entropy_weight"),
        ({"distillation_weight": -1.0}, "distillation_weight=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"teacher_top_k": 0}, "teacher_top_k=0"),
        ({"factor_learning_rate": -0.1}, "factor_learning_rate=-0.1"),
        ({"freeze": "tables"}, "freeze='tables'"),
        ({"freeze": "factors", "reconstruction_weight": 1.0}, "freeze='factors'"),
        ({"reconstruction_rows": 0}, "reconstruction_rows=0"),
        ({"teacher_shares_backbone": True}, "teacher_shares_backbone=True with freeze=None"),
        ({"teacher": "dense.ckpt"}, r"teacher='.*dense.ckpt' has no effect"),
        ({"teacher_shares_backbone": True, "freeze": "backbone"}, "teacher_shares_backbone=True .* teacher=None"),
        ({"reconstruction_rows": 8}, "reconstruction_rows=8 has no effect"),
        ({"statistics": "x.pt"}, "statistics='x.pt' has no effect"),
        ({"weights": "x.ckpt"}, "weights='x.ckpt'"),
        ({"tables": ["nowhere"]}, "no module 'nowhere'"),
    ],
)
def test_arguments_that_cannot_work(start: SimpleNamespace, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _tuned(start, **arguments)


def test_models_and_teachers_that_cannot_work(start: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another vocabulary, of 59 tokens, than the model, of 58"):
        _tuned(start, teacher=_lstm(59), distillation_weight=1.0)
    with pytest.raises(FileNotFoundError, match="no file or directory"):
        CompressedLanguageModel("nowhere.ckpt")
    with pytest.raises(TypeError, match="model is a Linear, which is neither"):
        CompressedLanguageModel(torch.nn.Linear(2, 3))
    torch.save({"state_dict": {}, "hyper_parameters": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="give it as model and the checkpoint as weights"):
        CompressedLanguageModel(str(tmp_path / "a.ckpt"))
    _tuned(start).save_compressed(tmp_path / "saved")
    with pytest.raises(ValueError, match="and the directory as weights"):
        CompressedLanguageModel(str(tmp_path / "saved"))
    packed = _tuned(start).model
    quantize_tables(packed, Quantization(8))
    with pytest.raises(ValueError, match="'encoder', 'decoder' have no parameters"):
        _tuned(start, packed)
    packed.lstm.requires_grad_(False)
    with pytest.raises(ValueError, match="freeze='factors' leaves nothing to train"):
        _tuned(start, packed, freeze="factors")
    # What is found when training starts: before anything of it.
    other_names = toys.LanguageModel(WORDS, DIM)
    other_names.embedding, other_names.encoder = other_names.encoder, None
    cases: list[tuple[CompressedLanguageModel, type[Exception], str]] = [
        (_tuned(start, distillation_weight=1.0), ValueError, "distillation_weight=1 needs the dense original"),
        (_tuned(start, reconstruction_weight=1.0, teacher="a/b.ckpt"), FileNotFoundError, "no file or directory"),
        (_tuned(start, teacher=_lstm(WORDS, projection_size=6), reconstruction_weight=1.0), ValueError, "58 x 6"),
        (_tuned(start, teacher=other_names, reconstruction_weight=1.0), ValueError, "no layer 'encoder'"),
    ]
    other = torch.load(start.folder / "dense.ckpt", weights_only=True)
    other["vocabulary"]["fingerprint"] = "of another text"
    torch.save(other, tmp_path / "other.ckpt")
    path = str(tmp_path / "other.ckpt")
    cases.append((_tuned(start, teacher=path, distillation_weight=1.0), ValueError, "fingerprint of another text"))
    cases.append((_tuned(start, Path(path)), ValueError, "its ids stand for other tokens"))
    for model, error, message in cases:
        before = _state(model)
        with pytest.raises(error, match=message):
            _fit(start, model)
        torch.testing.assert_close(_state(model), before, rtol=0, atol=0)


def test_a_backbone_that_is_quantized_cannot_be_shared(start: SimpleNamespace) -> None:
    arguments: dict[str, Any] = {"teacher": "dense.ckpt", "distillation_weight": 1.0, "freeze": "backbone"}
    model = _tuned(start, teacher_shares_backbone=True, **arguments)
    before = _state(model)
    with pytest.raises(ValueError, match=r"teacher_shares_backbone=True, but QuantizationAware\(backbone='int8'\)"):
        _fit(start, model, QuantizationAware(at_epoch=2, backbone="int8"), max_epochs=3)
    torch.testing.assert_close(_state(model), before, rtol=0, atol=0)
    prepare_qat(model.model, Quantization(8), [], backbone="int8")
    with pytest.raises(ValueError, match=r"but QuantizationAware\(backbone=...\) has quantized"):
        _fit(start, model)
    _fit(start, _tuned(start, **arguments), QuantizationAware(backbone="int8"), limit_train_batches=1)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_backbone_that_is_shared_in_another_precision(start: SimpleNamespace, precision: Any) -> None:
    dense = LSTMLanguageModel.load_from_checkpoint(start.folder / "dense.ckpt")
    runs = []
    for shares in (True, False):
        arguments: dict[str, Any] = {"teacher": dense, "teacher_shares_backbone": shares, "freeze": "backbone"}
        model = _tuned(start, **arguments, distillation_weight=1.0, reconstruction_weight=0.1)
        runs.append(_fit(start, model, precision=precision, limit_train_batches=3))
        assert dense.encoder.weight.dtype == torch.float32
    assert runs[0] == pytest.approx(runs[1], rel=0.05)


def test_paths_are_kept_as_strings(start: SimpleNamespace, tmp_path: Path) -> None:
    dense, arguments = start.folder / "dense.ckpt", {"reconstruction_weight": 1.0, "statistics": tmp_path / "x.pt"}
    model = CompressedLanguageModel(_lstm(WORDS), weights=dense, teacher=dense, **arguments)
    assert (model.hparams["teacher"], model.hparams["statistics"]) == (str(dense), str(tmp_path / "x.pt"))
    torch.testing.assert_close(_state(model.model), torch.load(dense, weights_only=True)["state_dict"])
    with pytest.raises(FileNotFoundError, match=r"x\.pt"):
        _fit(start, model)


def test_a_checkpoint_of_a_run_with_a_module_as_teacher(start: SimpleNamespace, tmp_path: Path) -> None:
    dense = LSTMLanguageModel.load_from_checkpoint(start.folder / "dense.ckpt")
    model = _tuned(start, teacher=dense, teacher_shares_backbone=True, freeze="backbone", distillation_weight=1.0)
    path = _save(model, tmp_path / "tuned.ckpt")
    for weight in (0.0, 1.0):
        loaded = CompressedLanguageModel.load_from_checkpoint(path, distillation_weight=weight)
        torch.testing.assert_close(_state(loaded), _state(model), rtol=0, atol=0)


def test_a_checkpoint_from_when_the_backbone_was_called_body(start: SimpleNamespace, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"teacher": "dense.ckpt", "distillation_weight": 1.0, "freeze": "backbone"}
    arguments |= {"teacher_shares_backbone": True, "backbone_learning_rate": 0.2}
    model = _tuned(start, **arguments)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="now")
    losses = _fit(start, model, keep, limit_train_batches=5)
    saved = torch.load(tmp_path / "now.ckpt", weights_only=True)
    old = saved["hyper_parameters"]
    old |= {"freeze": "body", "teacher_shares_body": old.pop("teacher_shares_backbone")}
    old["body_learning_rate"] = old.pop("backbone_learning_rate")
    torch.save(saved, tmp_path / "old.ckpt")
    loaded = CompressedLanguageModel.load_from_checkpoint(tmp_path / "old.ckpt", optimizer=_sgd)
    assert [group.get("lr") for group in loaded.parameter_groups()] == [0.2, None]
    assert (loaded.freeze_part, loaded.teacher.shares_backbone) == ("backbone", True)
    assert loaded.hparams == model.hparams
    assert _fit(start, loaded, limit_train_batches=5, ckpt_path=tmp_path / "old.ckpt") == losses[3:]
    assert _tuned(start, tmp_path / "old.ckpt").learning_rates == (None, None)


def test_the_head_of_a_teacher_is_called_with_as_many_positions_as_that_of_the_model(tmp_path: Path) -> None:
    """At a vocabulary of which 2²² logits are a few rows only."""
    dense, model = (LSTMLanguageModel(2**20, 2, 2, dropout=0.0) for _ in range(2))
    tuned, calls = CompressedLanguageModel(model, teacher=dense, distillation_weight=1.0), []
    dense.decoder.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    batch = (torch.zeros(2, 48, dtype=torch.long), torch.zeros(2, 48, dtype=torch.long))
    _trainer(tmp_path, fast_dev_run=True, limit_val_batches=0).fit(tuned, DataLoader([batch], batch_size=None))
    assert calls == [48, 48]


@pytest.mark.distributed
def test_processes_stay_equal_and_resume(torchrun: Callable[..., str], start: SimpleNamespace) -> None:
    worker = Path(__file__).parent / "workers" / "finetune.py"
    assert torchrun(worker, start.folder / "train.txt", start.folder / "valid.txt").count("well") == 2


def test_the_recipe_by_its_documented_command_lines(
    start: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    header = available_recipes()["finetune_compressed"].read_text().partition("\n\n")[0].replace("\n#\n", "\n\n")
    lines = re.sub(r" \\\n# +", " ", header).splitlines()
    commands = [shlex.split(line[1:]) for line in lines if re.match(r"#   (lightning|embcompress) ", line)]
    assert [command[1] for command in commands] == ["run", "compress", "run", "run"]
    small = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    small += ["--data.class_path=TextFiles", f"--data.cache_dir={tmp_path / 'cache'}", "--data.batch_size=4"]
    small += ["--data.min_count=1", "--data.sequence_length=7"]
    small += [f"--data.{name}_files={start.folder / name}.txt" for name in ("train", "valid", "test")]
    tiny = ["--model.embedding_dim=16", "--model.hidden_size=16"]
    assert main([*commands[0][1:], *small, *tiny]) == 0
    assert main([*commands[1][1:-1], "1.3"]) == 0
    assert main([*commands[2][1:], *small]) == 0
    last = tmp_path / "embcompress_runs" / "finetune_compressed" / "version_0" / "checkpoints" / "last.ckpt"
    tuned = CompressedLanguageModel.load_from_checkpoint(last)
    assert [table.name for table in plan_of(tuned).tables] == ["model.encoder", "model.decoder"]
    # Resumed; and from a directory, into a module that the command line names.
    assert main([*commands[2][1:], *small, "--trainer.max_epochs=3", "--ckpt_path", str(last)]) == 0
    tuned.save_compressed(tmp_path / "DIRECTORY")
    vocab_size = torch.load(last, weights_only=True)["vocabulary"]["size"]
    named = (
        commands[3][-1]
        .replace("my_package.MyModel", "LSTMLanguageModel")
        .replace('"hidden_size": 128', '"hidden_size": 16')
    )
    named = named.replace("{}", "").replace(
        '"hidden_size"', f'"vocab_size": {vocab_size}, "embedding_dim": 16, "hidden_size"'
    )
    assert main([*commands[3][1:-1], named, *small, "--trainer.fast_dev_run=true"]) == 0
