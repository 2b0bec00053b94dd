"""Models with tables in training for few bits, in the Trainer of transformers: its checkpoints are gone on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lightning_embcompress import convert_qat, load_compressed, prepare_qat
from lightning_embcompress.quantization.aware import is_prepared
from toys import compress_toy, gpt2

_VOCAB = 300
_IDS = torch.randint(3, _VOCAB, (12, 8), generator=torch.Generator().manual_seed(1))


def _prepared(method: str, **given: Any) -> Any:
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **given)
    compress_toy(model, method, 1.5)
    prepare_qat(model, backbone="int8")
    return model


def _train(model: Any, folder: Path, steps: int, **given: Any) -> Trainer:
    pytest.importorskip("accelerate")
    arguments = {"max_steps": steps, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    arguments |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", **given}
    data: Any = [{"input_ids": ids, "labels": ids} for ids in _IDS]
    return Trainer(model, TrainingArguments(str(folder), **arguments), train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize(("method", "tied"), [("low_rank", False), ("transform_coding", True)])
def test_training_is_resumed_exactly(method: str, tied: bool, tmp_path: Path) -> None:
    whole, resumed = (_prepared(method, tie_word_embeddings=tied) for _ in range(2))
    _train(whole, tmp_path, steps=4).train()
    _train(resumed, tmp_path / "resumed", steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, parameter), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    # A checkpoint is of what trains, which is packed afterwards; what a user saves is packed.
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    other = _prepared(method, tie_word_embeddings=tied)
    load_compressed(tmp_path / "checkpoint-4", other)
    logits = whole.eval()(_IDS).logits
    whole.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not is_prepared(saved)
    for one in (checkpoint, other.eval()):
        assert is_prepared(one)
        assert torch.equal(one(_IDS).logits, logits)
        convert_qat(one)
        assert torch.equal(one(_IDS).logits, saved(_IDS).logits)


def test_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    model = _prepared("low_rank")
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    trainer = _train(model, tmp_path, steps=4, **best, greater_is_better=True, metric_for_best_model="loss")
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert is_prepared(model)
    assert torch.equal(model.eval()(_IDS).logits, expected(_IDS).logits)
