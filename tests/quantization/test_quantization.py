"""Factors of whole models in few bits: prepared, converted, saved, exported, and back."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_embcompress import collect_statistics, compress, densify, load_compressed, save_compressed
from lightning_embcompress.calibration.loss_metric import metric_of
from lightning_embcompress.compression.backbone import Backbone
from lightning_embcompress.compression.plan import Plan, apply_plan, plan_of
from lightning_embcompress.compression.records import check_factors
from lightning_embcompress.compression.report import table_report
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.methods.registry import LatentCodes, LowRank, Quantization, SharedBasisBlocks
from lightning_embcompress.quantization.aware import convert_qat, converted, prepare_qat, quantize_tables
from lightning_embcompress.tables.finding import find_tables
from toys import LanguageModel, falling_counts, gpt2

VOCAB_SIZE, DIM = 400, 24
COUNTS = falling_counts(VOCAB_SIZE)
IDS = torch.tensor([[1, 5, 399], [0, 1, 7]])


def _model(tied: bool = False) -> Any:
    return LanguageModel(VOCAB_SIZE, DIM, tied=tied, last=1.0)


@pytest.mark.parametrize(("method", "tied"), [("transform_coding", True), ("low_rank", False), ("group_reduce", False)])
def test_the_life_of_a_model(method: str, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _model(tied)
    compress(model, method, ratio=4, token_counts=COUNTS)
    prepare_qat(model, Quantization(bits=6, group_size=32))
    assert len(plan_of(model).tables) == (1 if tied else 2)
    if tied:
        assert model.encoder.factorization is model.decoder.factorization
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = model(IDS)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    # A checkpoint of the numbers, as they train.
    fresh = _model(tied)
    apply_plan(fresh, Plan.from_dict(plan_of(model).to_dict()))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(IDS), expected)

    # What is saved is packed; the model goes on training.
    save_compressed(model, tmp_path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(table.spec.get("kind") == "latent_codes" or "fake" in str(table.spec) for table in plan_of(model).tables)
    loaded = _model(tied)
    plan = load_compressed(tmp_path, loaded)
    torch.testing.assert_close(loaded(IDS), expected, rtol=1e-4, atol=1e-4)
    with converted(model):
        assert plan == plan_of(model)
    rest = sum(own.nbytes for own in (loaded.decoder.bias, *loaded.mix.parameters()))
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert abs(on_disk - plan.stored_bytes - rest) < 0.1 * on_disk
    assert model_bytes(loaded)["stored_bytes"] == plan.stored_bytes + rest
    for entry in table_report(loaded):
        assert entry["ratio"] > 4
        assert 0.8 < entry["parameter_ratio"] < entry["ratio"]
        assert "bits" in entry["structure"]

    # Dense again, for any other engine.
    densify(loaded)
    assert isinstance(loaded.encoder, nn.Embedding)
    assert loaded.encoder.weight.requires_grad
    torch.testing.assert_close(loaded(IDS), expected, rtol=1e-4, atol=1e-4)

    assert convert_qat(model).stored_bytes == plan.stored_bytes
    with pytest.raises(ValueError, match="packed already"):
        convert_qat(model)


def test_dense_tables_can_be_quantized_as_they_are(tmp_path: Path) -> None:
    model = _model()
    dense = copy.deepcopy(model)
    weight = model.decoder.weight
    with pytest.raises(ValueError, match=r"no compressed tables.*tables=\['encoder', 'decoder'\]"):
        prepare_qat(model, Quantization(4))
    prepare_qat(model, Quantization(8, 32), tables=["encoder", "decoder"])
    assert any(parameter is weight for parameter in model.parameters())
    torch.testing.assert_close(model(IDS), dense(IDS), rtol=0.05, atol=0.1)
    convert_qat(model)
    assert 3 < plan_of(model).ratio < 4
    save_compressed(model, tmp_path)
    loaded = _model()
    load_compressed(tmp_path, loaded)
    assert torch.equal(loaded(IDS), model(IDS))
    assert 6 < quantize_tables(dense, Quantization(4, 32), ["encoder", "decoder"]).ratio < 7.2


def test_without_training() -> None:
    torch.manual_seed(0)
    model = _model()
    compress(model, "low_rank", ratio=2, tables=["encoder"])
    compress(model, "transform_coding", ratio=8, token_counts=COUNTS, tables=["decoder"])
    before, codes = model(IDS), model.decoder.factorization
    plan = quantize_tables(model, Quantization(8))
    assert model.decoder.factorization is codes
    assert plan.tables[0].ratio > 7
    torch.testing.assert_close(model(IDS), before, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match=r"'encoder' is packed in 8 bits, and has no numbers left"):
        prepare_qat(model, Quantization(4), tables=["encoder"])
    prepare_qat(model, tables=["decoder"])
    assert isinstance(model.decoder.factorization, LatentCodes)
    with pytest.raises(ValueError, match=r"'decoder' is prepared for quantization already"):
        prepare_qat(model, tables=["decoder"])
    convert_qat(model)
    assert isinstance(model.decoder.factorization, SharedBasisBlocks)


def test_statistics_say_what_errors_cost() -> None:
    torch.manual_seed(0)
    model = _model()
    with torch.no_grad():
        model.encoder.weight.mul_(torch.logspace(0, -2, DIM))
    batches = [torch.randint(VOCAB_SIZE, (8, 10)) for _ in range(5)]

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    statistics = collect_statistics(model, batches, loss, token_counts=COUNTS)
    (decoder,) = find_tables(model, ["decoder"])
    metric = metric_of(model, decoder, statistics)
    compress(model, "low_rank", ratio=1.3, tables=["decoder"])
    dense = model.decoder.factorization.materialize()
    lost = []
    for known in (None, statistics):
        smaller = copy.deepcopy(model)
        quantize_tables(smaller, Quantization(3), tables=["decoder"], statistics=known)
        lost.append(metric.loss(dense, smaller.decoder.factorization.materialize()))
    assert lost[1] < 0.7 * lost[0]
    before = model.decoder.factorization
    other = nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 30))
    of_another = collect_statistics(other, [batches[0] % 30], loss)
    with pytest.raises(ValueError, match="statistics"):
        quantize_tables(model, statistics=of_another)
    assert model.decoder.factorization is before


def test_nothing_changes_where_one_of_several_tables_is_refused() -> None:
    model = _model()
    compress(model, "low_rank", ratio=2)
    prepare_qat(model, Quantization(4), tables=["decoder"])
    before = model.encoder.factorization
    with pytest.raises(ValueError, match="'decoder' is prepared"):
        prepare_qat(model, Quantization(4))
    assert model.encoder.factorization is before
    assert before.quantization is None


def test_what_is_frozen_stays_frozen() -> None:
    model = _model()
    compress(model, "low_rank", ratio=2)
    model.encoder.requires_grad_(False)
    prepare_qat(model, Quantization(4, ranges="learned"))
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())
    model = _model()
    compress(model, "transform_coding", ratio=8, token_counts=COUNTS)
    model.requires_grad_(False)
    for step in (prepare_qat, convert_qat):
        step(model)
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", ["group_reduce", "transform_coding"])
def test_transformers(method: str, tmp_path: Path) -> None:
    model = gpt2(vocab_size=VOCAB_SIZE, n_embd=DIM)
    compress(model, method, ratio=3, token_counts=COUNTS)
    prepare_qat(model, Quantization(bits=6))
    expected = model(IDS).logits
    with pytest.raises(ValueError, match="prepared for quantization, and a state_dict of numbers"):
        model.save_pretrained(tmp_path / "no", state_dict=model.state_dict())
    model.save_pretrained(tmp_path)
    assert model.lm_head.factorization.is_prepared
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.factorization is loaded.transformer.wte.factorization
    assert loaded.lm_head.factorization.is_packed
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    generated = loaded.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(IDS[:1], max_new_tokens=3, do_sample=False))
    narrow = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow(IDS).logits.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)


def test_export() -> None:
    layer = _model()
    compress(layer, "low_rank", ratio=2)
    quantize_tables(layer, Quantization(4, 16))
    with torch.no_grad():
        program = torch.export.export(layer.eval(), (IDS,))
        torch.testing.assert_close(program.module()(IDS), layer(IDS), rtol=1e-4, atol=1e-4)
    assert isinstance(layer.encoder.factorization, LowRank)


def test_numbers_that_cannot_be_quantized_are_named_before_anything_changes() -> None:
    model = _model()
    compress(model, "low_rank", ratio=2, tables=["encoder"])
    with torch.no_grad():
        model.decoder.weight[3, 0] = torch.nan
    before = model.encoder.factorization.coefficients.clone()
    with pytest.raises(ValueError, match="'decoder'"):
        prepare_qat(model, Quantization(4), tables=["encoder", "decoder"])
    assert torch.equal(model.encoder.factorization.coefficients, before)
    assert not model.encoder.factorization.is_prepared
    with torch.no_grad():
        model.encoder.factorization.coefficients[0, 0] = 1e7
    with pytest.raises(ValueError, match="'encoder'.*scale_dtype='bfloat16'"):
        prepare_qat(model, Quantization(4))
    prepare_qat(model, Quantization(4, scale_dtype="bfloat16"))
    model = _model()
    compress(model, "transform_coding", ratio=8, token_counts=COUNTS, tables=["decoder"])
    with pytest.raises(ValueError, match="'decoder' is stored in codes already"):
        quantize_tables(model, tables=["decoder"])


def test_damaged_files_are_refused_before_the_model_is_changed(tmp_path: Path) -> None:
    model = _model()
    compress(model, "low_rank", ratio=2)
    quantize_tables(model, Quantization(4))
    plan = plan_of(model)
    state = model.state_dict()
    state["encoder.factorization.coefficients.scales"] = torch.full_like(
        state["encoder.factorization.coefficients.scales"], 255
    )
    with pytest.raises(ValueError, match=r"NaN or infinite scales in 'encoder.factorization.coefficients.scales'"):
        check_factors(plan.tables, state, "the file")
    backbone = Backbone({"encoder.weight": (VOCAB_SIZE, DIM)}, Quantization(4), "packed")
    fresh = _model()
    with pytest.raises(ValueError, match="'encoder.weight' among the weights beside the tables"):
        apply_plan(fresh, replace(plan, backbone=backbone))
    assert isinstance(fresh.encoder, nn.Embedding)
