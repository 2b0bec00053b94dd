"""Which tables of transformers' models are found, and what is said where that is not clear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_embcompress import collect_statistics, load_compressed
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.methods.on_disk.table import RowsOnDisk
from lightning_embcompress.tables.finding import find_tables
from small_models import VOCAB_SIZE, build
from toys import falling_counts


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        # As many positions as words.
        ("GPT2Model", {"n_positions": VOCAB_SIZE}, [("wte",)]),
        ("GPT2DoubleHeadsModel", {"num_labels": 1}, [("transformer.wte", "lm_head")]),
        # Two labels and two kinds of tokens.
        ("BertForSequenceClassification", {"num_labels": 2}, [("bert.embeddings.word_embeddings",)]),
        ("BertForPreTraining", {}, [("bert.embeddings.word_embeddings", "cls.predictions.decoder")]),
        ("BertModel", {"max_position_embeddings": VOCAB_SIZE}, [("embeddings.word_embeddings",)]),
        # 32 buckets of positions, and layers 32 wide.
        ("T5ForConditionalGeneration", {}, [("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")]),
        ("T5EncoderModel", {}, [("shared", "encoder.embed_tokens")]),
    ],
)
def test_models_say_which_tables_they_have(name: str, given: dict[str, Any], expected: list[tuple[str, ...]]) -> None:
    model = build(name, **given)
    assert [table.modules for table in find_tables(model)] == expected
    # Inside of another module too.
    inside = nn.ModuleDict({"model": model})
    assert [table.modules for table in find_tables(inside)] == [
        tuple(f"model.{path}" for path in modules) for modules in expected
    ]


def test_a_head_outside_of_the_model_is_found() -> None:
    model = nn.ModuleDict({"backbone": build("GPT2Model"), "head": nn.Linear(32, VOCAB_SIZE)})
    assert [table.modules for table in find_tables(model)] == [("backbone.wte",), ("head",)]


def test_an_encoder_and_a_decoder_have_a_vocabulary_each() -> None:
    apart = {"decoder_vocab_size": 80, "share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
    found = find_tables(build("MarianMTModel", **apart))
    assert [table.modules for table in found] == [
        ("model.encoder.embed_tokens",),
        ("model.decoder.embed_tokens",),
        ("lm_head",),
    ]


def test_two_models_are_not_chosen_between() -> None:
    pair = nn.ModuleDict({"student": build("GPT2LMHeadModel"), "teacher": build("GPT2LMHeadModel")})
    with pytest.raises(ValueError, match=r"models .*'student.transformer.wte'.*'teacher.transformer.wte'"):
        find_tables(pair)
    plan = compress(pair, "low_rank", ratio=1.2, tables=["student.lm_head"])
    assert plan.tables[0].modules == ("student.transformer.wte", "student.lm_head")


@pytest.mark.parametrize("tables", [["transformer.wte"], ["lm_head"]])
def test_what_is_compressed_already_is_not_guessed_around(tables: list[str]) -> None:
    model = build("GPT2LMHeadModel", tie_word_embeddings=False)
    compress(model, "low_rank", ratio=1.2, tables=tables)
    with pytest.raises(ValueError, match=rf"tables '{tables[0]}' are compressed already: restore them with densify"):
        find_tables(model)


def test_an_embedding_that_is_tied_to_a_softmax_is_a_table_though_no_model_names_it() -> None:
    sizes = {"entity_vocab_size": 90, "entity_emb_size": 8}
    found = find_tables(build("LukeForMaskedLM", **sizes))
    assert ("luke.entity_embeddings.entity_embeddings", "entity_predictions.decoder") in [one.modules for one in found]


def test_second_tables_that_are_known_are_compressed_with_the_words() -> None:
    """Looked up alone, each by statistics of its own vocabulary."""
    base = build("LukeModel", entity_vocab_size=90, entity_emb_size=8)
    assert [table.name for table in find_tables(base)] == [
        "embeddings.word_embeddings",
        "entity_embeddings.entity_embeddings",
    ]
    small = build("LukeModel", entity_vocab_size=3, entity_emb_size=8)
    assert [table.name for table in find_tables(small)] == ["embeddings.word_embeddings"]
    model = gemma3n()
    assert [table.modules for table in find_tables(model)] == [
        ("model.embed_tokens", "lm_head"),
        ("model.embed_tokens_per_layer",),
    ]
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 800, (2, 16), generator=generator)} for _ in range(4)]
    statistics = collect_statistics(model, batches)
    counts = statistics.counts_of(("model.embed_tokens_per_layer",))
    assert counts.shape == (900,)
    assert torch.equal(counts[:800], statistics.counts_of(("model.embed_tokens", "lm_head"))[:800])
    plan = compress(model, "transform_coding", bits_per_weight=8, statistics=statistics)
    second = plan.tables[1]
    assert (second.spec["vocab_size"], second.spec["dim"]) == (900, 48)
    assert second.predicted_loss > 0


def test_a_table_of_each_layer_stays_on_disk(tmp_path: Path) -> None:
    model, ids = gemma3n(), torch.arange(24).view(2, 12)
    compress(model, "group_reduce", ratio=2, groups=3, token_counts=counts_of_tables(model))
    model.save_pretrained(tmp_path)
    found = load_compressed(tmp_path, rows="mmap").eval()
    assert isinstance(found.model.embed_tokens_per_layer.factorization, RowsOnDisk)
    torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits)


def gemma3n() -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        vocab_size=1000,
        vocab_size_per_layer_input=900,
        hidden_size=16,
        hidden_size_per_layer_input=16,
        num_hidden_layers=3,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=None,
        layer_types=["full_attention"] * 3,
    )
    model = transformers.Gemma3nForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("correct_output_scale"):
            # Zero in a new model, whose loss does not depend on the second table.
            parameter.data.fill_(1.0)
    return model


def counts_of_tables(model: Any) -> dict[str, torch.Tensor]:
    return {table.name: falling_counts(table.shape[0]) for table in find_tables(model)}


def test_models_of_images_have_the_tables_of_the_text_within() -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text |= {"vocab_size": VOCAB_SIZE, "num_key_value_heads": 2, "pad_token_id": 0}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision)
    )
    found = find_tables(transformers.LlavaForConditionalGeneration(config))
    assert [table.name for table in found] == ["model.language_model.embed_tokens", "lm_head"]


def test_a_model_that_has_no_words() -> None:
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(ValueError, match=r"candidates.*'pooler.dense'"):
        find_tables(transformers.ViTModel(config))


def test_a_head_that_joins_the_numbers_of_its_weight_stays_dense() -> None:
    model = build("MobileBertForMaskedLM", embedding_size=16)
    with pytest.raises(ValueError, match=r"'cls.predictions.decoder' of table .*MobileBertLMPredictionHead"):
        compress(model, "low_rank", ratio=1.2)
