"""Saved models whose embeddings stay in their files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_embcompress import compress, densify, load_compressed, plan_of, save_compressed
from lightning_embcompress.integrations.row_files import rows_on_disk
from lightning_embcompress.layers.prefetching import prefetched
from lightning_embcompress.methods.on_disk.table import RowsOnDisk
from lightning_embcompress.methods.registry import Quantization
from lightning_embcompress.quantization.aware import quantize_tables
from toys import compress_toy, falling_counts

VOCAB_SIZE, DIM = 600, 16


def untied() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB_SIZE, DIM), nn.Linear(DIM, VOCAB_SIZE))


def some_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["transform_coding", "shared_basis", "group_reduce", "low_rank"])
def test_model_reads_the_same(tmp_path: Path, method: str) -> None:
    model = untied()
    compress_toy(model, method)
    if method != "transform_coding":
        quantize_tables(model, Quantization(bits=8))
    save_compressed(model, tmp_path / "a")
    found = untied()
    load_compressed(tmp_path / "a", found, rows="mmap")
    assert isinstance(found[0].factorization, RowsOnDisk)
    assert not isinstance(found[1].factorization, RowsOnDisk)
    torch.testing.assert_close(found(some_ids()), model(some_ids()))
    assert plan_of(found).to_dict() == plan_of(model).to_dict()
    # It is saved as it was, and dense as any other.
    save_compressed(found, tmp_path / "b")
    again = untied()
    load_compressed(tmp_path / "b", again)
    assert torch.equal(again(some_ids()), model(some_ids()))
    densify(found)
    assert type(found[0]) is nn.Embedding


def test_model_on_the_meta_device(tmp_path: Path) -> None:
    model = untied()
    compress_toy(model, "transform_coding")
    save_compressed(model, tmp_path)
    with torch.device("meta"):
        found = untied()
    load_compressed(tmp_path, found, rows="mmap")
    torch.testing.assert_close(found(some_ids()), model(some_ids()))


def test_tied_tables_are_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, found = untied(), untied()
    model[1].weight, found[1].weight = model[0].weight, found[0].weight
    compress_toy(model, "transform_coding")
    save_compressed(model, tmp_path)
    load_compressed(tmp_path, found, rows="mmap")
    assert found[0].factorization is found[1].factorization
    assert torch.equal(found(some_ids()), model(some_ids()))
    assert "'0'" in capsys.readouterr().err


def test_bags(tmp_path: Path) -> None:
    def bag() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.EmbeddingBag(VOCAB_SIZE, DIM, mode="sum", padding_idx=2))

    model, found = bag(), bag()
    compress(model, "group_reduce", ratio=3, tables=["0"], token_counts=falling_counts(VOCAB_SIZE))
    save_compressed(model, tmp_path)
    load_compressed(tmp_path, found, rows="mmap")
    assert isinstance(found[0].factorization, RowsOnDisk)
    torch.testing.assert_close(found(some_ids()), model(some_ids()))


def test_rows_and_cache_that_are_wrong(tmp_path: Path) -> None:
    model = untied()
    compress_toy(model, "transform_coding")
    save_compressed(model, tmp_path)
    with pytest.raises(ValueError, match="rows"):
        load_compressed(tmp_path, untied(), rows="disk")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="'many'"):
        load_compressed(tmp_path, untied(), rows="mmap", row_cache="many")
    found = untied()
    load_compressed(tmp_path, found, rows="mmap", row_cache=0)
    torch.testing.assert_close(found(some_ids()), model(some_ids()))


def test_damage_is_told_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model, found = untied(), untied()
    compress_toy(model, "transform_coding")
    save_compressed(model, tmp_path)
    before = found(some_ids()).detach()
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(ValueError, match="model.safetensors"):
        load_compressed(tmp_path, found, rows="mmap")
    assert torch.equal(found(some_ids()), before)


def test_sums_of_what_was_there_before(tmp_path: Path) -> None:
    """A model that is saved over another one has none of its checksums."""
    from lightning_embcompress.utils.chunk_sums import ChunkSums

    model = untied()
    compress_toy(model, "transform_coding")
    save_compressed(model, tmp_path)
    ChunkSums.of(tmp_path / "model.safetensors").save(tmp_path / "model.safetensors.sums")
    other = untied()
    compress_toy(other, "low_rank")
    save_compressed(other, tmp_path)
    found = untied()
    load_compressed(tmp_path, found, rows="mmap")
    torch.testing.assert_close(found(some_ids()), other(some_ids()))


def llama(tie: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=DIM,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("how", ["load_compressed", "from_pretrained", "into a model"])
def test_models_of_transformers(tmp_path: Path, how: str) -> None:
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        if how == "load_compressed":
            return load_compressed(tmp_path / "a", rows="mmap")
        if how == "from_pretrained":
            with rows_on_disk(cache="1MB"):
                return AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        model = llama()
        load_compressed(tmp_path / "a", model, rows="mmap")
        return model

    model = llama()
    compress_toy(model, "transform_coding")
    model.save_pretrained(tmp_path / "a")
    found = load().eval()
    assert isinstance(found.model.embed_tokens.factorization, RowsOnDisk)
    torch.testing.assert_close(found(some_ids()).logits, model(some_ids()).logits)
    found.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    torch.testing.assert_close(again(some_ids()).logits, model(some_ids()).logits)
    assert again.generate(some_ids()[:1], max_new_tokens=2, pad_token_id=0).shape == (1, 22)


def test_base_model_of_transformers(tmp_path: Path) -> None:
    """Of another class than the one that was saved, with other paths."""
    from transformers import AutoModel

    model = llama()
    compress_toy(model, "transform_coding")
    model.save_pretrained(tmp_path)
    with rows_on_disk():
        found = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(found.embed_tokens.factorization, RowsOnDisk)
    expected = model.model(some_ids()).last_hidden_state
    torch.testing.assert_close(found(some_ids()).last_hidden_state, expected)


@pytest.mark.parametrize(
    "make",
    [lambda ids: ids, lambda ids: {"input_ids": ids}, lambda ids: (ids, ids)],
)
def test_prefetching_goes_one_batch_ahead(tmp_path: Path, make: Callable[[torch.Tensor], Any]) -> None:
    model = untied()
    compress_toy(model, "transform_coding")
    save_compressed(model, tmp_path)
    found = untied()
    load_compressed(tmp_path, found, rows="mmap")
    table = found[0].factorization
    batches = [make(some_ids(seed)) for seed in range(4)]
    for index, batch in enumerate(prefetched(batches, found)):
        assert batch is batches[index]
        table.cache._thread.submit(lambda: None).result()
        table.rows(some_ids(index))
    assert table.cache.hit_rate == 1.0
    with pytest.raises(ValueError, match="ids"):
        list(prefetched([{"other": 1}], found))
    with pytest.raises(ValueError, match="'9'"):
        list(prefetched(batches, found, {"9": lambda batch: batch}))
