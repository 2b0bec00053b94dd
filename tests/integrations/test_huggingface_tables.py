"""Which tables of transformers' models are found, and what is said where that is not clear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_embcompress.compression.plan import compress
from lightning_embcompress.tables.finding import find_tables, large_and_dense

_VOCAB = 64
_GPT2 = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": _VOCAB, "vocab_size": _VOCAB}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_BERT |= {"vocab_size": _VOCAB, "max_position_embeddings": _VOCAB}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": _VOCAB}
_MARIAN = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads", "ffn_dim")}
_MARIAN |= {"d_model": 16, "vocab_size": _VOCAB, "decoder_vocab_size": 80, "share_encoder_decoder_embeddings": False}


def _build(name: str, **given: Any) -> Any:
    torch.manual_seed(0)
    config = {"GPT2": "GPT2Config", "Bert": "BertConfig", "T5": "T5Config", "Marian": "MarianConfig"}
    family = next(family for family in config if name.startswith(family))
    sizes = {"GPT2": _GPT2, "Bert": _BERT, "T5": _T5, "Marian": _MARIAN | {"pad_token_id": 0}}[family]
    return getattr(transformers, name)(getattr(transformers, config[family])(**{**sizes, **given}))


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        # As many positions as words.
        ("GPT2Model", {}, [("wte",)]),
        ("GPT2DoubleHeadsModel", {"num_labels": 1}, [("transformer.wte", "lm_head")]),
        # Two labels and two kinds of tokens.
        ("BertForSequenceClassification", {"num_labels": 2}, [("bert.embeddings.word_embeddings",)]),
        ("BertForPreTraining", {}, [("bert.embeddings.word_embeddings", "cls.predictions.decoder")]),
        ("BertModel", {}, [("embeddings.word_embeddings",)]),
        # 32 buckets of positions, and layers 32 wide.
        ("T5ForConditionalGeneration", {}, [("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")]),
        ("T5EncoderModel", {}, [("shared", "encoder.embed_tokens")]),
    ],
)
def test_models_say_which_tables_they_have(name: str, given: dict[str, Any], expected: list[tuple[str, ...]]) -> None:
    model = _build(name, **given)
    assert [table.modules for table in find_tables(model)] == expected
    # Inside of another module too.
    inside = nn.ModuleDict({"model": model})
    assert [table.modules for table in find_tables(inside)] == [
        tuple(f"model.{path}" for path in modules) for modules in expected
    ]


def test_a_head_outside_of_the_model_is_found() -> None:
    model = nn.ModuleDict({"backbone": _build("GPT2Model"), "head": nn.Linear(16, _VOCAB)})
    assert [table.modules for table in find_tables(model)] == [("backbone.wte",), ("head",)]


def test_an_encoder_and_a_decoder_have_a_vocabulary_each() -> None:
    found = find_tables(_build("MarianMTModel", tie_word_embeddings=False))
    assert [table.modules for table in found] == [
        ("model.encoder.embed_tokens",),
        ("model.decoder.embed_tokens",),
        ("lm_head",),
    ]


def test_two_models_are_not_chosen_between() -> None:
    pair = nn.ModuleDict({"student": _build("GPT2LMHeadModel"), "teacher": _build("GPT2LMHeadModel")})
    with pytest.raises(ValueError, match=r"models .*'student.transformer.wte'.*'teacher.transformer.wte'"):
        find_tables(pair)
    plan = compress(pair, "low_rank", ratio=1.2, tables=["student.lm_head"])
    assert plan.tables[0].modules == ("student.transformer.wte", "student.lm_head")


@pytest.mark.parametrize("tables", [["transformer.wte"], ["lm_head"]])
def test_what_is_compressed_already_is_not_guessed_around(tables: list[str]) -> None:
    model = _build("GPT2LMHeadModel", tie_word_embeddings=False)
    compress(model, "low_rank", ratio=1.2, tables=tables)
    with pytest.raises(ValueError, match=rf"tables '{tables[0]}' are compressed already: restore them with densify"):
        find_tables(model)


def test_an_embedding_that_is_tied_to_a_softmax_is_a_table_though_no_model_names_it() -> None:
    config = transformers.LukeConfig(entity_vocab_size=90, entity_emb_size=8, **_BERT)
    found = find_tables(transformers.LukeForMaskedLM(config))
    assert ("luke.entity_embeddings.entity_embeddings", "entity_predictions.decoder") in [one.modules for one in found]
    # Without the softmax nothing tells it from positions: it is said.
    base = transformers.LukeModel(config)
    [words] = find_tables(base)
    assert words.name == "embeddings.word_embeddings"
    assert "'entity_embeddings.entity_embeddings' (90, 8)" in large_and_dense(base, [words])


def test_models_of_images_have_the_tables_of_the_text_within() -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text |= {"vocab_size": _VOCAB, "num_key_value_heads": 2, "pad_token_id": 0}
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
    sizes = {"hidden_size": 32, "embedding_size": 16, "true_hidden_size": 32, "intra_bottleneck_size": 32}
    sizes |= {"vocab_size": _VOCAB, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(**sizes))
    with pytest.raises(ValueError, match=r"'cls.predictions.decoder' of table .*MobileBertLMPredictionHead"):
        compress(model, "low_rank", ratio=1.2)
