"""Hugging Face directories compressed, inspected and made dense again from the shell."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.utils import logging

from lightning_embcompress.cli import text as shell_text
from lightning_embcompress.compression.plan import Plan, compress, plan_of
from lightning_embcompress.layers.compressed import CompressedEmbedding

_VOCAB = 300
_IDS = torch.randint(_VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def test_compress_a_hugging_face_directory(shell: Any, gpt2: Path, text: Path) -> None:
    logging.enable_progress_bar()
    words = ["--method", "group_reduce", "--ratio", 1.4, "--groups", 3, "--text", text]
    assert shell("compress", gpt2, "out", *words) == 0
    logging.disable_progress_bar()
    captured = shell.capsys.readouterr()
    assert captured.err == "", "nothing of transformers' own"
    for part in ("GPT2LMHeadModel", "Tables to compress", "transformer.wte = lm_head", "3 groups", "whole model"):
        assert part in captured.out
    assert "Written: out, out/report.json" in captured.out
    # Loaded by transformers, with its tokenizer and generation config.
    dense, model = AutoModelForCausalLM.from_pretrained(gpt2), AutoModelForCausalLM.from_pretrained("out")
    assert isinstance(model.transformer.wte, CompressedEmbedding)
    assert model.transformer.wte.factorization is model.lm_head.factorization
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(gpt2).get_vocab()
    written = "LICENSE.txt config.json generation_config.json model.safetensors notes.md report.json tokenizer.json"
    assert sorted(path.name for path in Path("out").iterdir()) == [*written.split(), "tokenizer_config.json"]
    # The same as in Python.
    ids = torch.tensor(tokenizer(shell.sentences)["input_ids"] + [0])
    counts = torch.bincount(ids[: len(ids) * 9 // 10], minlength=_VOCAB)
    plan = compress(dense, "group_reduce", ratio=1.4, groups=3, token_counts=counts)
    assert plan_of(model) == plan
    assert torch.equal(model(_IDS).logits, dense(_IDS).logits)
    report = shell.read("out/report.json")
    assert set(report) == {"tables", "model", "perplexity", "source", "token_counts", "statistics", "text"}
    assert report["token_counts"] == "text"
    perplexity = report["perplexity"]
    assert perplexity["split"] == "text"
    assert perplexity["final"] == perplexity["compressed"]
    assert f"{perplexity['dense']:.2f} before, {perplexity['compressed']:.2f} compressed" in captured.out


def test_what_lies_beside_a_model_is_copied(shell: Any, gpt2: Path) -> None:
    shutil.copytree(gpt2, "source")
    modules = [{"idx": index, "path": path, "type": "?"} for index, path in enumerate(["", "1_Pooling", "2_Dense"])]
    beside = {
        "modules.json": json.dumps(modules),
        "1_Pooling/config.json": "{}",
        "2_Dense/model.safetensors": "of another module",
        "2_Dense/config.json": "{}",
        "README.md": "# A model",
        "prompts/system.txt": "Be brief.",
        "preprocessing.py": "",
        ".gitattributes": "",
    }
    weights = ["tf_model.h5", "onnx/model.onnx", "checkpoint-5/model.safetensors", "checkpoint-5/trainer_state.json"]
    unseen = ["pytorch_model.bin.index.json", ".git/HEAD"]
    for name in [*beside, *weights, *unseen]:
        file = Path("source", name)
        file.parent.mkdir(exist_ok=True)
        file.write_text(beside.get(name, "weights"))
    words = ["--method", "low_rank", "--rank", 4]
    assert shell("compress", "source", "small", *words) == 0
    assert "Not copied, as weights of the model before: checkpoint-5/, onnx/, tf_model.h5\n" in shell.printed()
    # Of folders only those of modules are known to be a part of a model, which may be replaced.
    shutil.rmtree("small/prompts")
    assert shell("compress", "source", "small", "--overwrite", *words) == 0
    assert shell("densify", "small", "dense") == 0
    shell.printed()
    assert shell("compress", "source", "source/small", *words) == 0
    assert "before: checkpoint-5/, onnx/, tf_model.h5\n" in shell.printed()
    for folder in ("small", "dense", "source/small"):
        for name, content in beside.items():
            assert Path(folder, name).read_text() == content
        assert not [name for name in [*weights, *unseen] if Path(folder, name).exists()]
    GPT2LMHeadModel.from_pretrained("small")
    Path("source/adapter_config.json").write_text("{}")
    shell.refuses("compress", "source", "new", *words, says="'source' has an adapter of PEFT")
    assert Path("small/report.json").exists()
    assert not Path("dense/report.json").exists()


def _reference_perplexity(model: Any, ids: Tensor, start: int, block_size: int) -> float:
    """Every token from `start` on, predicted once, in blocks that overlap by one token."""
    total = count = 0.0
    position = start - 1
    while position < len(ids) - 1:
        first = min(position, len(ids) - block_size)
        block = ids[first : first + block_size]
        log_likelihoods = model(block[None]).logits[0].double().log_softmax(-1)
        for offset in range(position - first, len(block) - 1):
            total -= float(log_likelihoods[offset, block[offset + 1]])
            count += 1
        position += block_size - 1
    assert count == len(ids) - start
    return math.exp(total / count)


def test_perplexity_predicts_each_token_of_the_last_tenth_once(
    shell: Any, gpt2: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text.write_text(shell.sentences * 12)
    # Batches of two blocks.
    monkeypatch.setattr(shell_text, "_LOGIT_ELEMENTS", 2 * 64 * _VOCAB)
    assert shell("compress", gpt2, "out", "--method", "low_rank", "--rank", 5, "--text", text) == 0
    report = shell.read("out/report.json")
    ids = torch.tensor(AutoTokenizer.from_pretrained(gpt2)(shell.sentences * 12)["input_ids"] + [0])
    start = len(ids) * 9 // 10
    assert report["text"] == {"counted": start, "measured": len(ids) - start, "block_size": 64}
    assert len(ids) - start > 3 * 64
    assert report["token_counts"] is None, "the method weights nothing"
    for folder, value in ((gpt2, "dense"), ("out", "compressed")):
        with torch.no_grad():
            reference = _reference_perplexity(AutoModelForCausalLM.from_pretrained(folder), ids, start, 64)
        assert report["perplexity"][value] == pytest.approx(reference, rel=1e-6)


def test_without_text_counts_are_assumed_and_it_is_said(shell: Any, gpt2: Path) -> None:
    assert shell("compress", gpt2, "out", "--method", "weighted_low_rank", "--size", "0.02MB") == 0
    assert "Token counts are assumed by Zipf's law in the order of the ids" in shell.printed()
    report = shell.read("out/report.json")
    assert report["token_counts"] == "zipf by id"
    assert report["text"] is None
    assert report["perplexity"] == {**dict.fromkeys(("dense", "compressed", "final", "split")), "refined": []}
    dense = GPT2LMHeadModel.from_pretrained(gpt2)
    compress(dense, "weighted_low_rank", size="0.02MB", token_counts=1 / torch.arange(1.0, _VOCAB + 1).double())
    assert torch.equal(GPT2LMHeadModel.from_pretrained("out")(_IDS).logits, dense(_IDS).logits)


def test_tokens_that_the_text_lacks(shell: Any, gpt2: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["--method", "group_reduce", "--ratio", 1.4, "--text", text, "--counts_only"]
    assert shell("compress", gpt2, "out", *words, "--keep_rows", 1, 2) == 0
    # The end of the text is at its end, in the part that is measured.
    assert "0 (bos, eos), 1 (named)" in caplog.text
    shell.capsys.readouterr()
    assert shell("compress", gpt2, "other", *words, "--keep_rows", _VOCAB) != 0
    assert "keep_rows must be ids from 0 to 299" in shell.error()
    assert not Path("other").exists()


def test_options_of_methods_and_dtype(shell: Any, gpt2: Path) -> None:
    words = ["--method=tensor_train", "--max-rank=1", "--shape", 8, 4, "--dtype", "bfloat16"]
    assert shell("compress", *words, gpt2, "out", "--tie=untie") == 0
    first, second = Plan.from_dict(shell.read("out/config.json")["quantization_config"]).tables
    assert (first.options, first.dtype) == ({"max_rank": 1, "shape": [8, 4]}, "bfloat16")
    assert (first.modules, second.modules) == (("transformer.wte",), ("lm_head",))
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values()} == {torch.bfloat16}


def test_a_hugging_face_directory_is_made_dense_and_compressed_anew(shell: Any, gpt2: Path) -> None:
    assert shell("compress", gpt2, "small", "--method", "low_rank", "--rank", 4) == 0
    assert shell("compress", "small", "again", "--method", "low_rank", "--rank", 3) == 0
    assert "Starting from compressed tables, whose loss remains: transformer.wte (low_rank, " in shell.printed()
    assert shell("densify", "small", "dense") == 0
    assert "Made dense: transformer.wte = lm_head" in shell.printed()
    assert "quantization_config" not in shell.read("dense/config.json")
    assert load_file("dense/model.safetensors").keys() == load_file(gpt2 / "model.safetensors").keys()
    small, dense = GPT2LMHeadModel.from_pretrained("small"), GPT2LMHeadModel.from_pretrained("dense")
    assert type(dense.transformer.wte) is nn.Embedding
    assert dense.lm_head.weight is dense.transformer.wte.weight
    assert torch.allclose(dense(_IDS).logits, small(_IDS).logits, atol=1e-5)
    assert (Path("dense") / "tokenizer.json").is_file()
    again = GPT2LMHeadModel.from_pretrained("again")
    compress(dense, "low_rank", rank=3)
    assert torch.allclose(again(_IDS).logits, dense(_IDS).logits, atol=1e-5)
    assert not (Path("dense") / "report.json").exists()
    shell.refuses("densify", "dense", "denser", says="'dense' has no compressed tables")


def test_factors_that_are_not_finite_are_refused(shell: Any, gpt2: Path) -> None:
    assert shell("compress", gpt2, "small", "--method", "low_rank", "--rank", 3) == 0
    weights = Path("small/model.safetensors")
    tensors = load_file(weights)
    (name,) = [name for name in tensors if name.endswith("factorization.basis")]
    tensors[name][0, 0] = torch.inf
    weights.write_bytes(save(tensors, {"format": "pt"}))
    for words in (["inspect", "small"], ["densify", "small", "out"], ["compress", "small", "out", "--ratio", 2]):
        shell.refuses(*words, says=f"'small' has NaN or infinite values in {name!r}")


def test_inspect_a_hugging_face_directory(shell: Any, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell("compress", gpt2, "small", "--ratio", 1.4) == 0

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", never)
    inspected, report = shell.inspected("small"), shell.read("small/report.json")
    share = report["tables"][0]["stored_bytes"] / report["model"]["stored_bytes"]
    assert inspected == {
        "source": "small",
        "kind": "pretrained",
        "compressed": True,
        "tables": [{**report["tables"][0], "share": share}],
        "model": report["model"],
        "note": None,
    }
    dense = shell.inspected(gpt2)
    (table,) = dense["tables"]
    assert (table["modules"], table["method"], table["shape"]) == (["transformer.wte", "lm_head"], None, [_VOCAB, 32])
    assert table["stored_bytes"] == 4 * _VOCAB * 32
    assert dense["model"]["stored_bytes"] == report["model"]["dense_bytes"]
    assert table["share"] == table["stored_bytes"] / dense["model"]["stored_bytes"]
    for path, title in (("small", "Compressed tables"), (gpt2, "Tables to compress")):
        assert shell("inspect", path) == 0
        shown = shell.printed()
        for part in (title, "transformer.wte = lm_head", "300 x 32", "whole model", "share", "%"):
            assert part in shown


def test_shards_and_older_weights(shell: Any, gpt2: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(gpt2)
    model.save_pretrained("shards", max_shard_size="30KB")
    shutil.copytree(gpt2, "older")
    os.remove("older/model.safetensors")
    torch.save(model.state_dict(), "older/pytorch_model.bin")
    whole = shell.inspected(gpt2)
    for folder in ("shards", "older"):
        assert shell.inspected(folder) == {**whole, "source": folder}
        assert shell("compress", folder, f"{folder}-small", "--method", "low_rank", "--rank", 4) == 0
    assert shell.inspected("older-small") == {**shell.inspected("shards-small"), "source": "older-small"}
    shards = sorted(Path("shards").glob("*.safetensors"))
    shards[1].unlink()
    for words in (["compress", "shards", "out", "--ratio", 2], ["inspect", "shards"], ["densify", "shards", "out"]):
        shell.refuses(*words, says=f"'shards' is not a whole model: {shards[1].name} of its {len(shards)} files")


def test_tensors_that_are_no_part_of_the_model_are_named(shell: Any, gpt2: Path) -> None:
    shutil.copytree(gpt2, "source")
    tensors = load_file("source/model.safetensors") | {"value_head.weight": torch.ones(3)}
    save_file(tensors, "source/model.safetensors", {"format": "pt"})
    assert shell("compress", "source", "out", "--method=low_rank", "--rank=2") == 0
    assert "No part of a GPT2LMHeadModel, and not written: 1 tensors (value_head.weight)" in shell.printed()


def test_models_of_other_heads(shell: Any, text: Path) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=_VOCAB, **sizes)).save_pretrained("bert")
    GPT2Model(shell.config()).save_pretrained("headless")
    for name, table, kind in (
        ("bert", "bert.embeddings.word_embeddings", "BertForSequenceClassification"),
        ("headless", "wte", "GPT2Model"),
    ):
        assert [entry["modules"] for entry in shell.inspected(name)["tables"]] == [[table]]
        assert shell("compress", name, f"{name}-small", "--ratio", 1.4) == 0
        small = Plan.from_dict(shell.read(f"{name}-small/config.json")["quantization_config"])
        assert [entry.modules for entry in small.tables] == [(table,)]
        words = ["compress", name, "out", "--ratio", 1.4, "--text", text, "--tokenizer", "absent"]
        shell.refuses(*words, says=f"because a {kind} is no causal language model")
    small = BertForSequenceClassification.from_pretrained("bert-small")
    assert isinstance(small.bert.embeddings.word_embeddings, CompressedEmbedding)
