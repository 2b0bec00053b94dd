"""Fine-tuning of models of transformers and of modules of other classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_embcompress import compress
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.layers.chunked_loss import loss_of_logits
from lightning_embcompress.layers.distillation import Distillation, teacher_scores
from lightning_embcompress.modules import CompressedLanguageModel, HuggingFaceCausalLM

VOCAB_SIZE, BLOCK, DIM = 60, 8, 16
CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": DIM, "n_head": 2, "n_positions": 16}
CONFIG |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _trainer(path: Path, **changes: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "enable_checkpointing": False}
    return Trainer(default_root_dir=path, **{**quiet, **changes})


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def _blocks(number: int = 8) -> list[dict[str, Tensor]]:
    ids = torch.randint(VOCAB_SIZE, (number, BLOCK), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def _gpt2(vocab_size: int = VOCAB_SIZE) -> HuggingFaceCausalLM:
    seed_everything(0, verbose=False)
    return HuggingFaceCausalLM(config=CONFIG, vocab_size=vocab_size)


def test_a_model_of_transformers(tmp_path: Path) -> None:
    """Its table is tied; its directory, itself, and its checkpoint are the same model."""
    dense = _gpt2()
    dense.save_pretrained(tmp_path / "dense")
    small = copy.deepcopy(dense.model)
    compress(small, "low_rank", ratio=2)
    small.save_pretrained(tmp_path / "small")
    loader = DataLoader(_blocks(), batch_size=4)  # type: ignore[arg-type]
    arguments: dict[str, Any] = {
        "teacher": str(tmp_path / "dense"),
        "teacher_shares_backbone": True,
        "freeze": "backbone",
    }
    arguments |= {"distillation_weight": 1.0, "reconstruction_weight": 0.5, "optimizer": _sgd}
    arguments |= {"frequency_bands": False}
    tuned = []
    for given in (str(tmp_path / "small"), copy.deepcopy(small)):
        model = CompressedLanguageModel(given, **arguments)
        trainer = _trainer(tmp_path)
        trainer.fit(model, loader, loader)
        tuned.append(model)
    first, second = tuned
    torch.testing.assert_close(dict(first.state_dict()), dict(second.state_dict()), rtol=0, atol=0)
    teacher = first.teacher.model
    assert teacher.model.transformer.h[0].mlp.c_fc.weight is first.model.model.transformer.h[0].mlp.c_fc.weight
    assert teacher.model.lm_head.weight is teacher.model.transformer.wte.weight
    batch = {name: torch.stack([block[name] for block in _blocks(2)]) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(teacher.scores(batch, "train")[0], dense.eval().scores(batch, "train")[0])
    expected = teacher_scores(dense.scores(batch, "train")[0], 9)
    torch.testing.assert_close(first.teacher.scores(batch, 0, 9, 1.0).scores, expected.scores)
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    loaded = CompressedLanguageModel.load_from_checkpoint(tmp_path / "tuned.ckpt")
    assert plan_of(loaded) == plan_of(second)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(second.state_dict()), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(again(**batch).logits, second.eval()(**batch))
    into = CompressedLanguageModel(_gpt2(), weights=str(tmp_path / "tuned"), frequency_bands=False)
    torch.testing.assert_close(dict(into.state_dict()), dict(second.state_dict()), rtol=0, atol=0)


class Foreign(LightningModule):
    """Knows nothing of this package; it counts calls of its hooks."""

    def __init__(self, by_hand: bool = False, lost: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, DIM)
        self.mix = nn.GRU(DIM, DIM, batch_first=True)
        self.head = nn.Linear(DIM, VOCAB_SIZE)
        self.automatic_optimization = not by_hand
        self.lost = lost
        self.calls: list[str] = []

    def _loss(self, ids: Tensor) -> Tensor:
        logits = self.head(self.mix(self.tokens(ids[:, :-1]))[0])
        if self.lost:
            return self.head.weight.square().mean()
        targets = ids[:, 1:].masked_fill(ids[:, 1:] == 0, 7)
        loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=7)
        logits.mul_(0)
        return loss

    def training_step(self, batch: Tensor) -> Any:
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log_dict({"own": self._loss(batch)})

    def on_train_epoch_start(self) -> None:
        self.calls.append("epoch")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["input_ids"]

    def train_dataloader(self) -> Any:
        return DataLoader(_blocks(), batch_size=4)  # type: ignore[arg-type]

    val_dataloader = train_dataloader

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["calls"] = self.calls

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.calls = checkpoint["calls"]
        assert "tokens.factorization.basis" in checkpoint["state_dict"]


def _foreign(**arguments: bool) -> Foreign:
    seed_everything(0, verbose=False)
    return Foreign(**arguments)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_module_of_another_class(tmp_path: Path) -> None:
    dense, small = _foreign(), _foreign()
    compress(small, "low_rank", ratio=2)
    before = copy.deepcopy(small)
    values: list[Tensor] = []
    model = CompressedLanguageModel(
        small,
        teacher=dense,
        cross_entropy_weight=0.4,
        distillation_weight=0.6,
        teacher_top_k=5,
        optimizer=lambda groups: values.append(len(groups)) or _sgd(groups),
        frequency_bands=False,
    )
    trainer = _trainer(tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(model)
    assert values == [2]
    assert small.calls == ["epoch"]
    assert "log" not in small.__dict__
    logged = trainer.callback_metrics
    assert logged["own"] > 0
    # The step that was made, written down plainly: targets of 7 are ignored, and nothing is distilled there.
    ids = torch.stack([block["input_ids"] for block in _blocks()[:4]])
    targets = ids[:, 1:].masked_fill((ids[:, 1:] == 0) | (ids[:, 1:] == 7), -100)
    logits, said = (one.head(one.mix(one.tokens(ids[:, :-1]))[0]) for one in (before, dense))
    found = loss_of_logits(logits, Distillation(targets, teacher_scores(said, 5), 1.0, 0.4, 0.6))
    assert logged["train_loss"].item() == pytest.approx(found.loss.item(), rel=1e-5)
    assert logged["train_cross_entropy"].item() == pytest.approx(found.terms[0].item(), rel=1e-5)
    assert logged["train_distillation"].item() == pytest.approx(found.terms[1].item(), rel=1e-5)
    found.loss.backward()
    with torch.no_grad():
        for parameter in before.parameters():
            parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(dict(small.state_dict()), dict(before.state_dict()))
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    with pytest.raises(ValueError, match=r"a fine-tuning of a .*Foreign, which a file cannot build"):
        CompressedLanguageModel.load_from_checkpoint(tmp_path / "tuned.ckpt")
    loaded = CompressedLanguageModel.load_from_checkpoint(tmp_path / "tuned.ckpt", model=Foreign())
    assert loaded.model.calls == ["epoch"]
    assert plan_of(loaded) == plan_of(model)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_modules_that_cannot_be_tuned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="automatic_optimization=False"):
        CompressedLanguageModel(_foreign(by_hand=True))
    with pytest.raises(TypeError, match="is no HuggingFaceCausalLM"):
        CompressedLanguageModel(_foreign()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another vocabulary"):
        CompressedLanguageModel(_foreign(), teacher=_gpt2(61), distillation_weight=1.0)
    # Its loss comes from no logits of the head, so that there is nothing to distil at.
    arguments: dict[str, Any] = {"teacher": _foreign(), "distillation_weight": 1.0}
    model = CompressedLanguageModel(_foreign(lost=True), **arguments)
    with pytest.raises(ValueError, match="does not come from the logits"):
        _trainer(tmp_path, fast_dev_run=True).fit(model)


class Logging(Foreign):
    """Logs under the names of this package, also at the end of an epoch."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", 100.0)
        self.log("val_perplexity", 100.0)


@pytest.mark.parametrize("weights", [(0.5, 0.0), (0.0, 1.0)])
def test_what_a_module_logs_under_the_same_names(tmp_path: Path, weights: tuple[float, float]) -> None:
    seed_everything(0, verbose=False)
    small = Logging()
    teacher = copy.deepcopy(small) if weights[1] else None
    model = CompressedLanguageModel(
        small,
        teacher=teacher,
        cross_entropy_weight=weights[0],
        distillation_weight=weights[1],
        optimizer=_sgd,
        frequency_bands=False,
    )
    trainer = _trainer(tmp_path, fast_dev_run=True)
    trainer.fit(model)
    logged = trainer.callback_metrics
    assert {"train_loss", "train_cross_entropy"} <= logged.keys()
    if teacher is None:
        assert logged["train_loss"].item() == pytest.approx(0.5 * logged["train_cross_entropy"].item())
    assert logged["val_loss"] == logged["val_perplexity"] == 100


class WithSide(Foreign):
    """Has a linear layer as large as its head, which no search could tell from it."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(DIM, VOCAB_SIZE)


def test_tables_that_are_named_are_those_of_the_teacher_too(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    dense = WithSide()
    model = CompressedLanguageModel(
        copy.deepcopy(dense),
        teacher=dense,
        tables=["tokens", "head"],
        distillation_weight=1.0,
        optimizer=_sgd,
        frequency_bands=False,
    )
    trainer = _trainer(tmp_path, fast_dev_run=True)
    trainer.fit(model)
    assert model.teacher is not None
    assert model.teacher.own_parts.paths == model.parts.paths == ["tokens", "head"]
    assert trainer.callback_metrics["train_distillation"].item() == pytest.approx(0, abs=1e-5)


class Shifted(Foreign):
    """Scores all positions and leaves the last out; it changes its mode itself."""

    def training_step(self, batch: Tensor) -> Any:
        logits = self.head(self.mix(self.tokens(batch))[0])
        return {"loss": F.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:]), "seen": batch}

    def predict_step(self, batch: Tensor) -> Tensor:
        return self.head(self.mix(self.tokens(batch))[0])

    predict_dataloader = Foreign.train_dataloader

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["seen"] is batch
        self.calls.append("batch")

    def on_predict_epoch_start(self) -> None:
        self.calls.append("predict")

    def on_validation_model_eval(self) -> None:
        self.calls.append("eval")
        self.eval()

    def on_validation_model_train(self) -> None:
        self.calls.append("train")
        self.train()


def test_logits_that_are_shifted_and_hooks(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    small = Shifted()
    arguments: dict[str, Any] = {"teacher": copy.deepcopy(small), "distillation_weight": 1.0, "optimizer": _sgd}
    model = CompressedLanguageModel(small, **arguments, frequency_bands=False)
    trainer = _trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, limit_val_batches=1)
    trainer.fit(model)
    assert small.calls == ["epoch", "batch", "batch", "eval", "train"] * 2
    assert model.training
    assert trainer.callback_metrics["train_distillation"] > 0
    trainer.predict(model)
    assert small.calls[-1] == "predict"
