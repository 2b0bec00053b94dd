"""Causal language models of transformers: batches, perplexity, checkpoints, mistakes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_embcompress import EmbeddingCompression, GroupReduce, compress
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.modules import HuggingFaceCausalLM
from toys import check_resuming, quiet_trainer

VOCAB_SIZE, BLOCK = 60, 12

_LLAMA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
_OPT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, "attn_pdrop": 0.0},
    "opt": {**_OPT, "word_embed_proj_dim": 8, "max_position_embeddings": 32},
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
GPT2 = {"model_type": "gpt2", **CONFIGS["gpt2"], "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def _model(kind: str = "gpt2", **changes: Any) -> HuggingFaceCausalLM:
    seed_everything(0, verbose=False)
    return HuggingFaceCausalLM(**{"config": {"model_type": kind, **CONFIGS[kind]}, "vocab_size": VOCAB_SIZE, **changes})


def _batch(rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(VOCAB_SIZE, (rows, BLOCK), generator=torch.Generator().manual_seed(seed))}


pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


class Blocks(LightningDataModule):
    """Blocks of random text of falling frequency."""

    def __init__(self) -> None:
        super().__init__()
        chance = torch.rand(24, BLOCK, generator=torch.Generator().manual_seed(5))
        self.blocks = [{"input_ids": row} for row in (VOCAB_SIZE**chance).long() - 1]
        self.token_counts = torch.arange(VOCAB_SIZE, 0, -1)
        self.vocab_size = VOCAB_SIZE

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.blocks, batch_size=8)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.blocks[:7], batch_size=3)  # type: ignore[arg-type]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def _trainer(path: Path, *callbacks: Any, **changes: Any) -> Trainer:
    return quiet_trainer(path, *callbacks, **{"max_epochs": 1, **changes})


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_that_of_transformers(kind: str, padded: bool) -> None:
    model = _model(kind).eval()
    batch = _batch()
    labels = batch["input_ids"].clone()
    labels[0, :4] = -100
    if padded:
        batch["attention_mask"] = torch.ones(3, BLOCK, dtype=torch.long)
        batch["attention_mask"][1, 7:] = 0
        labels[1, 7:] = -100
    reference = model.model(**batch, labels=labels)
    logits, targets = model.scores({**batch, "labels": labels}, "val")
    text = batch.get("attention_mask", torch.ones_like(labels)).bool()
    torch.testing.assert_close(logits[text], reference.logits[text])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, reference.loss)
    torch.testing.assert_close(model.validation_step({**batch, "labels": labels}, 0), reference.loss)
    if not padded:
        # Labels are the ids where there are none.
        ids = batch["input_ids"]
        expected = model.model(**batch, labels=ids).loss
        torch.testing.assert_close(model.validation_step(batch, 0), expected)
        # Pairs are shifted already.
        torch.testing.assert_close(model.validation_step((ids[:, :-1], ids[:, 1:]), 0), expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_on_either_side_changes_nothing(kind: str) -> None:
    model = _model(kind).eval()
    text = _batch(1)["input_ids"]
    alone = model.predict_step({"input_ids": text}, 0)
    assert alone.shape == (1, BLOCK)
    assert alone[0, -1] == 0
    padding, ones = torch.full((1, 5), 3), torch.ones_like(text)
    for order in (slice(None), slice(None, None, -1)):
        parts, masks = [text, padding][order], [ones, torch.zeros_like(padding)][order]
        batch = {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(masks, 1)}
        padded = model.predict_step(batch, 0)
        start = 0 if parts[0] is text else 5
        torch.testing.assert_close(padded[:, start : start + BLOCK], alone, rtol=1e-4, atol=1e-5)
        assert padded.sum().item() == pytest.approx(alone.sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_learns_logs_and_measures(tmp_path: Path, kind: str) -> None:
    model = _model(kind, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01), frequency_bands=True)
    data = Blocks()
    trainer = _trainer(tmp_path, max_epochs=4)
    trainer.fit(model, datamodule=data)
    logged = trainer.callback_metrics
    assert logged["val_perplexity"] < 0.9 * VOCAB_SIZE
    assert {"train_loss", "val_loss"} <= logged.keys()
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    exact = AutoModelForCausalLM.from_config(model.model.config).double().eval()
    exact.load_state_dict(model.model.double().state_dict())
    total = 0.0
    for block in data.blocks[:7]:
        scores = exact(block["input_ids"].unsqueeze(0)).logits[0, :-1].log_softmax(-1)
        total -= scores.gather(-1, block["input_ids"][1:, None]).sum().item()
    assert tested["test_perplexity"] == pytest.approx(math.exp(total / (7 * (BLOCK - 1))), rel=1e-5)
    assert tested["test_perplexity/rank_1-60"] == pytest.approx(tested["test_perplexity"], rel=1e-5)


def test_the_training_loss_and_its_gradients() -> None:
    model = _model(config=GPT2)
    batch = _batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :3] = 0
    labels = batch["input_ids"].clone()
    labels[0, :4] = -100  # the token after padding is not predicted
    reference = model.model(**batch, position_ids=torch.tensor([[0] * 3 + list(range(9))] + [list(range(12))] * 2))
    expected = F.cross_entropy(reference.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = model.training_step(batch, 0)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, gradients)


@pytest.mark.parametrize("compressed", [False, True])
def test_no_step_has_all_logits(compressed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(config=GPT2)
    if compressed:
        compress(model.model, "low_rank", ratio=1.5)
    model.model.transformer.wte.eval()
    batch = _batch()
    logits, targets = model.scores(batch, "train")
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    monkeypatch.setattr(model, "scores", None)
    loss = model.training_step(batch, 0)
    torch.testing.assert_close(loss, expected)
    with torch.no_grad():
        torch.testing.assert_close(model.validation_step(batch, 0), expected.detach())
        assert model.val_perplexity.compute().log().item() == pytest.approx(expected.item(), rel=1e-6)
        predicted = model.predict_step(batch, 0)
    torch.testing.assert_close(predicted.sum() / targets.ne(-100).sum(), expected.detach())
    # What was not in training mode is not either afterwards.
    assert model.model.training
    assert not model.model.transformer.wte.training


def _capped(cap: float, **changes: Any) -> HuggingFaceCausalLM:
    own = {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": cap}
    return _model(config={"model_type": "gemma2", **own, **_LLAMA}, **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cap_that_does_nothing_yet_is_known(dtype: str) -> None:
    model = _capped(32.0, dtype=dtype)
    with torch.no_grad():
        model.model.get_output_embeddings().weight.zero_()
    assert model.head_inputs(_batch(), "train") is None
    assert not model.model.get_output_embeddings()._forward_hooks
    other = _model("llama", dtype=dtype)
    assert other.head_inputs(_batch(), "train") is not None
    assert not other.model.get_output_embeddings()._forward_hooks


def test_logits_that_are_capped_are_computed_by_the_model() -> None:
    model, batch = _capped(2.0), _batch()
    logits, targets = model.scores(batch, "train")
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.training_step(batch, 0), expected)
    assert logits.abs().max() <= 2


def test_the_look_at_a_model_leaves_nothing_to_autocast() -> None:
    model = _model("llama")
    seen: list[tuple[bool, bool]] = []
    model.model.base_model.register_forward_hook(
        lambda *_: seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    )
    with torch.autocast("cpu", torch.bfloat16):
        model.training_step(_batch(), 0).backward()
    assert seen == [(False, False), (False, False), (True, True)]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = _model("llama", gradient_checkpointing=checkpointing).train()
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == checkpointing
        model.training_step(_batch(), 0).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pretrained_directories(tmp_path: Path, dtype: Any) -> None:
    source = _model("opt", dtype=dtype)
    source.save_pretrained(tmp_path / "saved")
    model = HuggingFaceCausalLM(str(tmp_path / "saved"), vocab_size=VOCAB_SIZE - 3)
    assert model.vocab_size == VOCAB_SIZE
    # Not half: mixed precision is the Trainer's affair. And with dropout, as if it had been made here.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(module.training for module in model.modules())
    expected = {name: value.float() for name, value in source.model.state_dict().items()}
    torch.testing.assert_close(dict(model.model.state_dict()), expected, rtol=0, atol=0)
    assert HuggingFaceCausalLM(str(tmp_path / "saved"), dtype="bfloat16").model.dtype == torch.bfloat16
    # A directory is a configuration too: the same sizes, other weights.
    scratch = HuggingFaceCausalLM(config=str(tmp_path / "saved"))
    assert scratch.model.config.word_embed_proj_dim == 8
    assert not torch.equal(scratch.model.get_input_embeddings().weight, model.model.get_input_embeddings().weight)


def test_special_ids_fit_a_small_vocabulary(tmp_path: Path) -> None:
    model = _model("gpt2")
    assert model.model.config.eos_token_id is None
    model.save_pretrained(tmp_path)
    assert _model("opt").model.config.pad_token_id == 1
    named = _model(config={**GPT2, "eos_token_id": 7})
    assert (named.model.config.eos_token_id, named.model.config.bos_token_id) == (7, None)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("compressed", [False, True])
def test_checkpoints_need_neither_hub_nor_directory(tmp_path: Path, kind: str, compressed: bool) -> None:
    source = tmp_path / "source"
    _model(kind).save_pretrained(source)
    model = HuggingFaceCausalLM(pretrained=str(source), vocab_size=VOCAB_SIZE)
    if compressed:
        compress(model, "group_reduce", ratio=1.2, groups=2, token_counts=torch.arange(VOCAB_SIZE, 0, -1))
    trainer = _trainer(tmp_path)
    trainer.fit(model, datamodule=Blocks())
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    for file in source.iterdir():
        file.unlink()
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"]["pretrained"] is None
    loaded = HuggingFaceCausalLM.load_from_checkpoint(path)
    assert plan_of(loaded) == plan_of(model)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    batch = _batch()["input_ids"]
    torch.testing.assert_close(loaded.eval()(batch), model.eval()(batch), rtol=0, atol=0)


METHODS = {
    "group_reduce": lambda **when: GroupReduce(ratio=1.2, groups=2, **when),
    "untied": lambda **when: EmbeddingCompression("low_rank", ratio=1.5, tie="untie", **when),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_compresses_resumes(tmp_path: Path, method: str) -> None:
    callbacks: list[EmbeddingCompression] = []

    def make() -> list[Any]:
        callbacks.append(METHODS[method](at_epoch=1))
        return [_model(config=GPT2), callbacks[-1]]

    found = check_resuming(tmp_path, make, (0, 1), data={"datamodule": Blocks()}, max_epochs=3)
    whole = found.module
    assert plan_of(whole).tables
    final = callbacks[0].state_dict()["perplexity"]["final"]
    assert final == pytest.approx(float(found.trainer.callback_metrics["val_perplexity"]), rel=1e-5)
    loaded = HuggingFaceCausalLM.load_from_checkpoint(tmp_path / "whole" / "epoch=2.ckpt")
    torch.testing.assert_close(dict(loaded.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    # And out to a directory of transformers, with the same logits.
    whole.save_pretrained(tmp_path / "saved")
    ids = _batch()["input_ids"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(reloaded(ids).logits, whole.eval()(ids), rtol=0, atol=0)


def test_the_callback_leaves_padding_out(tmp_path: Path) -> None:
    class Padded(Blocks):
        def val_dataloader(self) -> DataLoader[Any]:
            masks = torch.ones(6, BLOCK, dtype=torch.long)
            masks[::2, :4] = 0
            blocks = [{**block, "attention_mask": mask} for block, mask in zip(self.blocks, masks, strict=False)]
            return DataLoader(blocks, batch_size=4)  # type: ignore[arg-type]

    callback = METHODS["group_reduce"]()
    trainer = _trainer(tmp_path, callback)
    trainer.fit(_model(config=GPT2), datamodule=Padded())
    measured = callback.state_dict()["perplexity"]["final"]
    assert measured == pytest.approx(float(trainer.callback_metrics["val_perplexity"]), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pretrained and config"),
        ({"pretrained": "gpt2", "config": GPT2}, "pretrained='gpt2' and config"),
        ({"pretrained": "/nowhere/model"}, "pretrained='/nowhere/model'"),
        ({"config": {"n_layer": 2}}, "model_type"),
        ({"config": {"model_type": "gtp2"}}, "config.model_type='gtp2' .*did you mean.*gpt2"),
        ({"config": {"model_type": "gpt2", "n_layers": 2}}, "config.n_layers .*GPT2Config .did you mean 'n_layer'"),
        ({"config": {"model_type": "gpt2", "n_layer": "x"}}, "config of type 'gpt2'"),
        ({"config": {"model_type": "t5"}}, "config of type 't5'"),
        ({"config": {**GPT2, "vocab_size": 50}, "vocab_size": 60}, "vocab_size=60 tokens, .* 50 rows"),
        ({"config": {**GPT2, "eos_token_id": 99}, "vocab_size": 60}, "config.eos_token_id=99"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFaceCausalLM(**arguments)


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pretrained=.* has no config.json"):
        HuggingFaceCausalLM(str(tmp_path))
    _model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pretrained=.*model\.safetensors"):
        HuggingFaceCausalLM(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config=.* cannot be read"):
        HuggingFaceCausalLM(config=str(tmp_path))


def test_data_that_does_not_fit(tmp_path: Path) -> None:
    cases = (("block_size", 64, "block_size=64 of Blocks .* 32 pos"), ("vocabulary", range(61), "61 .* vocab_size=60"))
    for name, value, message in cases:
        data = Blocks()
        setattr(data, name, value)
        with pytest.raises(ValueError, match=message):
            _trainer(tmp_path).fit(_model(), datamodule=data)
