"""Compressed models of transformers, loaded into another class than the one that was saved, as dense ones are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import EncoderDecoderModel
from transformers.models.auto import modeling_auto

from lightning_embcompress import convert_qat, densify, load_compressed, prepare_qat
from lightning_embcompress.compression.plan import plan_of
from small_models import VOCAB_SIZE, build, small_model
from toys import compress_toy

# The classes that are saved, and more that are loaded.
_FAMILIES: dict[str, tuple[str, str]] = {
    "Bert": ("Model ForMaskedLM ForPreTraining", "ForSequenceClassification ForTokenClassification"),
    "DistilBert": ("Model ForMaskedLM", "ForSequenceClassification ForQuestionAnswering"),
    "ModernBert": ("Model ForMaskedLM", "ForTokenClassification"),
    "Electra": ("Model ForPreTraining ForMaskedLM", "ForSequenceClassification"),
    # The head is registered before the model whose embedding it is tied to.
    "XLMRoberta": ("Model ForMaskedLM", "ForSequenceClassification ForTokenClassification"),
    "GPT2": ("Model LMHeadModel", "ForSequenceClassification ForTokenClassification"),
    "Llama": ("Model ForCausalLM", "ForSequenceClassification"),
    "T5": ("Model ForConditionalGeneration", "EncoderModel ForTokenClassification"),
    "Bart": ("Model ForConditionalGeneration", "ForSequenceClassification"),
}


@pytest.fixture(autouse=True)
def _memory_is_dirty() -> Iterator[None]:
    """What nobody initialises is NaN, as it may be in a process that has run for a while."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _build(family: str, name: str, **given: Any) -> Any:
    model = build(family + name, **given)
    for parameter_name, parameter in model.named_parameters():
        # Otherwise biases are zero, and a lost one shows nowhere.
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    # As that of the padding.
    torch.nn.init.normal_(model.get_input_embeddings().weight.detach()[0])
    return model.eval()


def _load(family: str, name: str, folder: Path) -> tuple[Any, dict[str, set[str]]]:
    torch.manual_seed(1)
    model, report = getattr(transformers, family + name).from_pretrained(folder, output_loading_info=True)
    # Factors stand for the weight of their layer.
    return model, {
        key: {str(name).partition(".factorization.")[0].removesuffix(".weight") for name in names}
        for key, names in report.items()
    }


@pytest.mark.parametrize("family", sorted(_FAMILIES))
def test_every_class_loads_what_another_saved(family: str, tmp_path: Path) -> None:
    saved, loaded = _FAMILIES[family]
    for source in saved.split():
        model = _build(family, source)
        compress_toy(model, "low_rank", 1.3)
        model.save_pretrained(tmp_path / "compressed")
        densify(model)
        model.save_pretrained(tmp_path / "dense")
        for target in f"{saved} {loaded}".split():
            expected, dense_report = _load(family, target, tmp_path / "dense")
            found, report = _load(family, target, tmp_path / "compressed")
            assert report == dense_report, (source, target)
            assert plan_of(found).tables, (source, target)
            densify(found)
            state = found.state_dict()
            assert state.keys() == expected.state_dict().keys()
            for name, tensor in expected.state_dict().items():
                torch.testing.assert_close(state[name], tensor, msg=f"{source} as {target}: {name}")
            assert found.all_tied_weights_keys == expected.all_tied_weights_keys


_MAPPINGS = [
    getattr(modeling_auto, f"MODEL{name}_MAPPING_NAMES")
    for name in ("", "_FOR_MASKED_LM", "_FOR_CAUSAL_LM", "_FOR_SEQ_TO_SEQ_CAUSAL_LM", "_FOR_SEQUENCE_CLASSIFICATION")
]
# A model whose tables are two, in a class that ties them to one: transformers keeps one of the values, another than we.
_AMBIGUOUS = {("BigBirdPegasusForCausalLM", "BigBirdPegasusForConditionalGeneration")}
# Its own dense files are not found by the other class: the name of its base model is that of another part.
_AMBIGUOUS |= {("Llama4TextModel", "Llama4ForCausalLM")}

# What cannot be built small.
_LARGE = {"vibevoice_asr"}


@pytest.mark.full
@pytest.mark.parametrize("model_type", sorted({kind for mapping in _MAPPINGS[1:4] for kind in mapping} - _LARGE))
def test_every_class_of_transformers(model_type: str, tmp_path: Path) -> None:
    classes = {name: None for mapping in _MAPPINGS for name in [mapping.get(model_type)] if isinstance(name, str)}
    for source in [mapping[model_type] for mapping in _MAPPINGS[:4] if isinstance(mapping.get(model_type), str)]:
        try:
            model: Any = small_model(model_type, source)
            plan = compress_toy(model, "low_rank", 1.5)
        except Exception as error:  # what cannot be built small, or is refused, is named by another test
            print(f"{source}: {type(error).__name__}: {error}")
            continue
        model.save_pretrained(tmp_path / "compressed")
        densify(model)
        model.save_pretrained(tmp_path / "dense")
        for target in classes:
            if getattr(transformers, target).config_class is not type(model.config) or (source, target) in _AMBIGUOUS:
                continue
            try:
                expected, dense_report = _load("", target, tmp_path / "dense")
            except Exception as error:  # the trouble of the dense class
                print(f"{source} as {target}: {type(error).__name__}: {error}")
                continue
            found, report = _load("", target, tmp_path / "compressed")
            # A decoder by itself finds its table, which transformers stores under the name of the encoder's.
            tables = {path for one in (*plan.tables, *plan_of(found).tables) for path in one.modules}
            for key, names in dense_report.items():
                assert {name for name in set(names) ^ set(report[key]) if name not in tables} == set(), (source, target)
            densify(found)
            for name, tensor in expected.state_dict().items():
                # What is drawn at random may be drawn in another order.
                if name.removesuffix(".weight") not in dense_report["missing_keys"] or not tensor.any():
                    torch.testing.assert_close(found.state_dict()[name], tensor, msg=f"{source} as {target}: {name}")


@pytest.mark.parametrize("source", ["Model", "ForMaskedLM"])
def test_weights_in_few_bits_beside_the_tables(source: str, tmp_path: Path) -> None:
    model = _build("Bert", source)
    compress_toy(model, "low_rank", 1.3)
    prepare_qat(model, backbone="int8")
    model.save_pretrained(tmp_path / "compressed")
    convert_qat(model)
    densify(model)
    model.save_pretrained(tmp_path / "dense")
    for target in ("Model", "ForMaskedLM", "ForSequenceClassification"):
        (expected, dense_report), (found, report) = (
            _load("Bert", target, tmp_path / name) for name in ("dense", "compressed")
        )
        assert report["missing_keys"] == dense_report["missing_keys"]
        assert plan_of(found).backbone is not None
        densify(found)
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], tensor, msg=f"{source} as {target}: {name}")


def test_files_that_keep_the_factors_under_the_head(tmp_path: Path) -> None:
    model = _build("XLMRoberta", "ForMaskedLM")
    compress_toy(model, "low_rank", 1.3)
    model.save_pretrained(tmp_path)
    (table,) = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["tables"]
    assert table["modules"] == ["roberta.embeddings.word_embeddings", "lm_head.decoder"]
    # As earlier versions wrote them.
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["tables"][0]["modules"].reverse()
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("roberta.embeddings.word_embeddings.fa", "lm_head.decoder.fa"): tensors[name] for name in tensors
    }
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    table = model.roberta.embeddings.word_embeddings.factorization.materialize()
    for name in ("Model", "ForMaskedLM", "ForSequenceClassification"):
        loaded, report = _load("XLMRoberta", name, tmp_path)
        assert not any("word_embeddings" in key or "lm_head.decoder" in key for keys in report.values() for key in keys)
        assert torch.equal(loaded.get_input_embeddings().factorization.materialize(), table)
    fresh = _build("XLMRoberta", "ForMaskedLM")
    assert load_compressed(tmp_path, fresh) == plan_of(model)
    assert torch.equal(fresh.lm_head.decoder.factorization.materialize(), table)


def test_models_put_together_of_compressed_ones(tmp_path: Path) -> None:
    parts = [_build("Bert", "Model"), _build("Bert", "LMHeadModel", is_decoder=True, add_cross_attention=True)]
    for part in parts:
        compress_toy(part, "low_rank", 1.3)
    model = EncoderDecoderModel(encoder=parts[0], decoder=parts[1]).eval()
    model.save_pretrained(tmp_path / "compressed")
    loaded, report = EncoderDecoderModel.from_pretrained(tmp_path / "compressed", output_loading_info=True)
    assert not any(report.values())
    assert [len(table.modules) for table in plan_of(loaded).tables] == [1, 2]
    densify(model)
    model.save_pretrained(tmp_path / "dense")
    dense = EncoderDecoderModel.from_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    ids = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(1))
    logits = [one(input_ids=ids, decoder_input_ids=ids).logits for one in (loaded, model, dense)]
    torch.testing.assert_close(logits[0], logits[1])
    assert torch.equal(logits[1], logits[2])
