"""What `save_compressed` wrote, compressed, inspected and made dense again; and skeletons of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lightning_embcompress import load_compressed, save_compressed
from lightning_embcompress.compression.plan import Plan, compress, densify
from lightning_embcompress.integrations.checkpoint import RECORD_KEY, write_record
from lightning_embcompress.integrations.skeleton import build_skeleton, choose_tables
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.methods.registry import factorization_from_spec
from lightning_embcompress.tables.replacement import replace_table
from toys import LanguageModel

_VOCAB = 300
_IDS = torch.randint(_VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def _model(tied: bool = False, seed: int = 0) -> LanguageModel:
    model = LanguageModel(_VOCAB, tied=tied, seed=seed)
    for name, buffer in (("nothing", torch.empty(0)), ("nothing_either", torch.empty(0)), ("steps", torch.tensor(3))):
        model.register_buffer(name, buffer)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(tied: bool, shell: Any) -> None:
    save_compressed(_model(tied), "source")
    Path("source", "notes.txt").write_text("")
    assert shell("compress", "source", "small", "--method", "low_rank", "--rank", 3) == 0
    written = ["config.json", "model.safetensors", "notes.txt", "report.json"]
    assert sorted(path.name for path in Path("small").iterdir()) == written
    dense, model = _model(tied), _model(tied, seed=1)
    compress(dense, "low_rank", rank=3)
    load_compressed("small", model)
    # Not to the last bit: a table that is mapped from a file is aligned differently, and so solved differently.
    torch.testing.assert_close(model(_IDS), dense(_IDS), rtol=0, atol=1e-5)
    assert (model.encoder.factorization is model.decoder.factorization) == tied
    report, inspected = shell.read("small/report.json"), shell.inspected("small")
    assert inspected["kind"] == "saved"
    assert inspected["model"] == report["model"] == model_bytes(dense)
    assert {table["name"] for table in inspected["tables"]} == {table["name"] for table in report["tables"]}
    # Once more, from compressed tables.
    assert shell("compress", "small", "smaller", "--method", "low_rank", "--rank", 2) == 0
    assert "Starting from compressed tables, whose loss remains: " in shell.printed()
    again = load_compressed("smaller", _model(tied, seed=2))
    assert [table.spec["rank"] for table in again.tables] == [2] * (1 if tied else 2)
    # Back to an ordinary state dict, of which every tensor is stored once.
    assert shell("densify", "small", "dense") == 0
    stored, config = load_file("dense/model.safetensors"), shell.read("dense/config.json")
    assert len(config["aliases"]) == tied
    restored = _model(tied, seed=3)
    restored.load_state_dict(stored | {name: stored[source] for name, source in config["aliases"].items()})
    assert torch.allclose(restored(_IDS), dense(_IDS), atol=1e-6)
    from_package = _model(tied, seed=4)
    assert load_compressed("dense", from_package) == Plan()
    assert torch.equal(from_package(_IDS), restored(_IDS))
    assert [table["stored_bytes"] for table in shell.inspected("dense")["tables"]] == [64 * _VOCAB] * (1 if tied else 2)


def test_untied_although_one_layer_has_a_bias(shell: Any) -> None:
    save_compressed(_model(tied=True), "source")
    assert shell("compress", "source", "small", "--method", "low_rank", "--rank", 3, "--tie", "untie") == 0
    model = _model(tied=True)
    assert [table.modules for table in load_compressed("small", model).tables] == [("encoder",), ("decoder",)]
    assert model.encoder.factorization is not model.decoder.factorization


def test_perplexity_of_an_unknown_model_is_refused(shell: Any, text: Path, gpt2: Path) -> None:
    save_compressed(_model(), "source")
    words = ["compress", "source", "small", "--ratio", 2, "--text", text, "--tokenizer", gpt2]
    shell.refuses(*words, says="measure in Python after load_compressed(TARGET, model)")
    assert shell(*words, "--counts_only") == 0


def test_damaged_directories(shell: Any) -> None:
    model = _model(tied=True)
    compress(model, "low_rank", rank=3)
    save_compressed(model, "source")
    weights, config = Path("source/model.safetensors"), Path("source/config.json")
    whole, record = weights.read_bytes(), shell.read(config)
    (table,) = record["plan"]["tables"]

    def refused(says: str) -> None:
        for words in (["compress", "source", "out", "--ratio", 2], ["inspect", "source"], ["densify", "source", "out"]):
            shell.refuses(*words, says=says)

    def planned(**changes: Any) -> dict[str, Any]:
        return {"plan": {**record["plan"], "tables": [{**table, **changes}]}}

    weights.write_bytes(whole[:-10])
    refused("model.safetensors' is damaged or cut short")
    weights.write_bytes(whole)
    for changes, says in (
        ({"plan": {**record["plan"], "version": 99}}, "'source' cannot be read: the compression plan has version 99"),
        (planned(spec={**table["spec"], "vocab_size": 10**12}), "does not fit its plan: 'encoder.factorization."),
        (planned(spec={**table["spec"], "dim": None}), "'spec' of table 'encoder' in the compression plan"),
        (planned(modules=["somewhere"]), "'source' is damaged: it has no factors of table 'somewhere'"),
        ({"aliases": {"other": "absent"}}, "'source' is damaged: 'absent' is missing from model.safetensors"),
        ({"aliases": {"other": []}}, "config.json' is damaged: 'aliases' is {'other': []}"),
        ({"aliases": ["other"]}, "config.json' is damaged: 'aliases' is ['other']"),
    ):
        config.write_text(json.dumps({**record, **changes}))
        refused(says)
    # Whole by itself, and not what was written.
    config.write_text(json.dumps(record))
    tensors = load_file(weights)
    tensors["encoder.factorization.basis"][0, 0] = torch.nan
    weights.write_bytes(save(tensors))
    refused("is not the one that config.json beside it was written with")
    del record["sha256"]
    config.write_text(json.dumps(record))
    refused("'source' has NaN or infinite values in 'encoder.factorization.")


def test_tables_that_no_memory_can_hold(shell: Any) -> None:
    model = nn.ModuleDict({"encoder": nn.Embedding(_VOCAB, 16)})
    compress(model, "tensor_train_matrix", ratio=3)
    # A plan that its small factors fit.
    spec = {**model["encoder"].factorization.spec(), "vocab_size": 10**12, "vocab_shape": [10**4] * 3}
    factors = factorization_from_spec(spec, torch.float32)
    for core in factors.parameters():
        nn.init.constant_(core, 1e-3)
    factors.provenance = model["encoder"].factorization.provenance
    replace_table(model, ["encoder"], factors)
    save_compressed(model, "source")
    write_record(model, checkpoint := {"state_dict": model.state_dict()})
    torch.save(checkpoint, "source.ckpt")
    says = "table 'encoder' cannot be made dense: its 1000000000000 x 16 numbers would take 64,000 GB"
    for source in ("source", "source.ckpt"):
        (table,) = shell.inspected(source)["tables"]
        assert table["shape"] == [10**12, 16]
        shell.refuses("densify", source, "out", says=says)
        shell.refuses("compress", source, "out", "--method", "low_rank", "--rank", 2, says=says)
    with pytest.raises(ValueError, match="table 'encoder'"):
        densify(model)
    assert model["encoder"].factorization is factors


def test_checkpoints_that_their_plan_does_not_fit(shell: Any) -> None:
    model = _model()
    compress(model, "low_rank", rank=3)
    write_record(model, checkpoint := {"state_dict": model.state_dict()})
    checkpoint[RECORD_KEY]["tables"][1]["spec"]["vocab_size"] = 10**12
    torch.save(checkpoint, "source.ckpt")
    for words in (["inspect"], ["densify", "out.ckpt"], ["compress", "out.ckpt", "--ratio", 2]):
        says = "'source.ckpt' does not fit its plan: 'decoder.factorization.coefficients' has the shape"
        shell.refuses(words[0], "source.ckpt", *words[1:], says=says)


# Skeletons


def test_what_counts_as_a_layer() -> None:
    shared = torch.randn(12, 4)
    state = {
        "weight": torch.randn(50, 4),  # of the model itself
        "tokens.weight": shared,
        "softmax.weight": shared,
        "head.weight": torch.randn(9, 4),
        "head.bias": torch.randn(9),
        "conv.weight": torch.randn(4, 9),  # a bias of another length
        "conv.bias": torch.randn(9),
        "norm.weight": torch.randn(4),
        "kernel.weight": torch.randn(60, 4, 3),
        "integers.weight": torch.arange(24).reshape(12, 2),
        "scaled.weight": torch.randn(70, 4),  # something beside it
        "scaled.scale": torch.randn(70),
        "outer.weight": torch.randn(80, 4),  # a module inside it
        "outer.lora.weight": torch.randn(2, 4),
    }
    skeleton = build_skeleton(state, Plan(), "it")
    layers = {path: module for path, module in skeleton.named_modules() if isinstance(module, nn.Embedding | nn.Linear)}
    kinds = {"tokens": nn.Embedding, "softmax": nn.Linear, "head": nn.Linear, "outer.lora": nn.Embedding}
    assert {path: type(layer) for path, layer in layers.items()} == kinds
    assert layers["tokens"].weight is layers["softmax"].weight
    assert choose_tables(skeleton) == ["tokens", "softmax"]
    # Tied tables that were written twice, and others.
    for weight, tied in ((shared.clone(), True), (shared + 1, False)):
        skeleton = build_skeleton({"a.weight": shared, "b.weight": weight}, Plan(), "it")
        assert choose_tables(skeleton) == ["a", "b"]
        assert (skeleton.get_submodule("a").weight is skeleton.get_submodule("b").weight) == tied
    # Of which one is padded, beside a layer that is neither.
    state = {"words.weight": torch.randn(64, 4), "head.weight": torch.randn(60, 4), "head.bias": torch.randn(60)}
    state["hidden.weight"] = torch.randn(62, 5)
    assert choose_tables(build_skeleton(state, Plan(), "it")) == ["words", "head"]


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"norm.weight": torch.ones(3)}, "found no table"),
        ({f"layers.{i}.weight": torch.zeros(5, i + 2) for i in range(7)}, "the 7 layers .*'layers.0' \\(5, 2\\)"),
        (
            {"a.weight": torch.zeros(5, 2), "a.bias": torch.zeros(5), "b.weight": torch.ones(5, 2)}
            | {"b.bias": torch.zeros(5)},
            r"the 2 layers .*\('a' \(5, 2\); 'b' \(5, 2\)\)",
        ),
    ],
)
def test_tables_that_cannot_be_chosen(state: dict[str, Tensor], named: str, shell: Any) -> None:
    with pytest.raises(ValueError, match=named):
        choose_tables(build_skeleton(state, Plan(), "it"))
    torch.save({"state_dict": state}, "source.ckpt")
    assert shell("compress", "source.ckpt", "out.ckpt", "--ratio", 2) == 1
    shell.error()
    inspected = shell.inspected("source.ckpt")
    assert inspected["tables"] == []
    assert inspected["note"].startswith(("found no table", "the tables cannot be told"))
    assert shell("inspect", "source.ckpt") == 0
    assert f"No tables are chosen: {inspected['note']}" in shell.printed()
