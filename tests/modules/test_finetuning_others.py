"""Fine-tuning of models of transformers and of modules of other classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_embcompress import compress
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.layers.chunked_loss import loss_of_logits
from lightning_embcompress.layers.distillation import Distillation, teacher_scores
from lightning_embcompress.modules import CompressedLanguageModel, HuggingFaceCausalLM
from toys import LanguageModel, dataset, quiet_trainer

VOCAB_SIZE, BLOCK, DIM, IGNORED = 60, 8, 16, 7
CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": DIM, "n_head": 2, "n_positions": 16}
CONFIG |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


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
    arguments: dict[str, Any] = {"teacher": str(tmp_path / "dense"), "teacher_shares_backbone": True}
    arguments |= {"freeze": "backbone", "distillation_weight": 1.0, "reconstruction_weight": 0.5}
    arguments |= {"optimizer": _sgd, "frequency_bands": False}
    tuned = []
    for given in (str(tmp_path / "small"), copy.deepcopy(small)):
        model = CompressedLanguageModel(given, **arguments)
        trainer = quiet_trainer(tmp_path, max_epochs=2)
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


def test_logits_that_a_model_changes_are_distilled_as_they_are(tmp_path: Path) -> None:
    config = {"model_type": "gemma2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 24, "final_logit_softcapping": 2.0}
    dense, small = (HuggingFaceCausalLM(config=config, vocab_size=VOCAB_SIZE) for _ in range(2))
    before, batch = copy.deepcopy(small), next(iter(DataLoader(_blocks(), batch_size=8)))  # type: ignore[arg-type]
    model = CompressedLanguageModel(small, teacher=dense, distillation_weight=0.5, temperature=2.0, optimizer=_sgd)
    trainer = quiet_trainer(tmp_path, max_steps=1, max_epochs=None)
    trainer.fit(model, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    logits, targets = before.scores(batch, "train")
    scores = teacher_scores(dense.scores(batch, "train")[0], 128, 2.0)
    found = loss_of_logits(logits, Distillation(targets, scores, 2.0, 1.0, 0.5))
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx(found.loss.item(), rel=1e-5)


class Foreign(LanguageModel):
    """Knows nothing of this package: it has data and hooks of its own, and a token that is no target."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(VOCAB_SIZE, DIM, cell="GRU", **changes)
        self.calls: list[str] = []

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        logits = self(inputs)
        loss = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED)
        # What is distilled must not be what is left of them.
        logits.mul_(0)
        return loss

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return {"loss": loss, "seen": batch}

    def configure_optimizers(self) -> Any:
        raise AssertionError("the optimizer is the one that is given")

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(8, BLOCK + 1, VOCAB_SIZE), batch_size=4)

    val_dataloader = predict_dataloader = train_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0], batch[1].masked_fill(batch[1] == 0, IGNORED)]

    def on_train_epoch_start(self) -> None:
        self.calls.append("epoch")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert outputs["seen"] is batch
        self.calls.append("batch")

    def on_validation_model_eval(self) -> None:
        self.calls.append("eval")
        self.eval()

    def on_validation_model_train(self) -> None:
        self.calls.append("train")
        self.train()

    def on_predict_epoch_start(self) -> None:
        self.calls.append("predict")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["calls"] = self.calls

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.calls = checkpoint["calls"]
        assert "encoder.factorization.basis" in checkpoint["state_dict"]


class Shifted(Foreign):
    """Scores all positions and leaves the last one out of its loss."""

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self(inputs)[:, :-1].transpose(1, 2), targets[:, :-1], ignore_index=IGNORED)


@pytest.mark.parametrize("kind", [Foreign, Shifted])
def test_a_module_of_another_class(tmp_path: Path, kind: type[Foreign]) -> None:
    dense, small = kind(seed=1), kind()
    compress(small, "low_rank", ratio=2)
    before = copy.deepcopy(small)
    weights: dict[str, Any] = {"cross_entropy_weight": 0.4, "distillation_weight": 0.6, "teacher_top_k": 5}
    model = CompressedLanguageModel(small, teacher=dense, **weights, optimizer=_sgd)
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0)
    trainer.fit(model)
    assert len(trainer.optimizers[0].param_groups) == 2
    assert small.calls == ["epoch", "batch", "eval", "train"]
    assert model.training
    assert "log" not in small.__dict__
    logged = trainer.callback_metrics
    # The step that was made, written down plainly: nothing is distilled where the loss has no target.
    inputs, targets = next(iter(small.train_dataloader()))
    targets = targets.masked_fill((targets == 0) | (targets == IGNORED), -100)
    if kind is Shifted:
        targets[:, -1] = -100
    goal = Distillation(targets, teacher_scores(dense(inputs), 5), 1.0, 0.4, 0.6)
    found = loss_of_logits(before(inputs), goal)
    assert logged["train_loss"].item() == pytest.approx(found.loss.item(), rel=1e-5)
    assert logged["train_cross_entropy"].item() == pytest.approx(found.terms[0].item(), rel=1e-5)
    assert logged["train_distillation"].item() == pytest.approx(found.terms[1].item(), rel=1e-5)
    found.loss.backward()
    with torch.no_grad():
        for parameter in before.parameters():
            parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(dict(small.state_dict()), dict(before.state_dict()))
    # What it logs itself has its own name.
    batches = [small.on_before_batch_transfer(batch, 0) for batch in small.val_dataloader()]
    with torch.no_grad():
        expected = sum(small.loss(batch).item() for batch in batches) / len(batches)
    assert logged["val_loss"].item() == pytest.approx(expected, rel=1e-5)
    trainer.predict(model)
    assert small.calls[-1] == "predict"
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    with pytest.raises(ValueError, match=rf"a fine-tuning of a .*{kind.__name__}, which a file cannot build"):
        CompressedLanguageModel.load_from_checkpoint(tmp_path / "tuned.ckpt")
    loaded = CompressedLanguageModel.load_from_checkpoint(tmp_path / "tuned.ckpt", model=kind())
    assert loaded.model.calls == small.calls
    assert plan_of(loaded) == plan_of(model)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


class Apart(Foreign):
    """Its loss comes from no logits."""

    def loss(self, batch: Any) -> Tensor:
        return self(batch[0]).detach().mean() + self.decoder.weight.square().mean()


def test_modules_that_cannot_be_tuned(tmp_path: Path) -> None:
    by_hand = Foreign()
    by_hand.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization=False"):
        CompressedLanguageModel(by_hand)
    with pytest.raises(TypeError, match="is no HuggingFaceCausalLM"):
        CompressedLanguageModel(Foreign()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another vocabulary"):
        CompressedLanguageModel(Foreign(), teacher=_gpt2(61), distillation_weight=1.0)
    model = CompressedLanguageModel(Apart(), teacher=Foreign(), distillation_weight=1.0)
    with pytest.raises(ValueError, match="does not come from the logits"):
        quiet_trainer(tmp_path, fast_dev_run=True).fit(model)


class Skipping(LanguageModel):
    """Trains by its first batch alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx == 0 else None


def test_a_step_that_is_skipped_and_a_weight_of_the_cross_entropy_alone(tmp_path: Path) -> None:
    states = []
    for batches in (1, 2):
        model = CompressedLanguageModel(Skipping(VOCAB_SIZE), cross_entropy_weight=0.5, optimizer=_sgd)
        trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=batches)
        trainer.fit(model, DataLoader(dataset(8, BLOCK, VOCAB_SIZE), batch_size=4))
        logged = trainer.callback_metrics
        assert logged["train_loss"].item() == pytest.approx(0.5 * logged["train_cross_entropy"].item())
        states.append(dict(model.state_dict()))
    torch.testing.assert_close(*states, rtol=0, atol=0)


class WithSide(Foreign):
    """Has a linear layer as large as its head, which no search could tell from it."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(DIM, VOCAB_SIZE)


def test_tables_that_are_named_are_those_of_the_teacher_too(tmp_path: Path) -> None:
    dense, tables = WithSide(), ["encoder", "decoder"]
    arguments: dict[str, Any] = {"tables": tables, "distillation_weight": 1.0, "optimizer": _sgd}
    model = CompressedLanguageModel(copy.deepcopy(dense), teacher=dense, **arguments)
    trainer = quiet_trainer(tmp_path, fast_dev_run=True)
    trainer.fit(model)
    assert model.teacher.own_parts.paths == model.parts.paths == tables
    assert trainer.callback_metrics["train_distillation"].item() == pytest.approx(0, abs=1e-5)
