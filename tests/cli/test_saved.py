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
from lightning_embcompress.compression.plan import Plan, apply_plan, compress, densify, plan_of
from lightning_embcompress.integrations.checkpoint import RECORD_KEY, write_record
from lightning_embcompress.integrations.skeleton import build_skeleton, choose_tables
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.methods.registry import METHODS, factorization_from_spec
from lightning_embcompress.tables.replacement import replace_table

_VOCAB = 300
_IDS = torch.randint(_VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


class _Model(nn.Module):
    def __init__(self, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Embedding(_VOCAB, 16)
        self.hidden = nn.Linear(16, 16)
        self.decoder = nn.Linear(16, _VOCAB)
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("nothing_either", torch.empty(0))
        self.register_buffer("steps", torch.tensor(seed))
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.hidden(self.encoder(ids)).tanh())
        return logits


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(tied: bool, shell: Any) -> None:
    save_compressed(_Model(tied), "source")
    assert shell("compress", "source", "small", "--method", "low_rank", "--rank", 3) == 0
    assert sorted(path.name for path in Path("small").iterdir()) == ["config.json", "model.safetensors", "report.json"]
    dense, model = _Model(tied), _Model(tied, seed=1)
    compress(dense, "low_rank", rank=3)
    load_compressed("small", model)
    assert torch.equal(model(_IDS), dense(_IDS))
    assert (model.encoder.factorization is model.decoder.factorization) == tied
    report, inspected = json.loads(Path("small/report.json").read_text()), shell.inspected("small")
    assert inspected["kind"] == "saved"
    assert inspected["model"] == report["model"] == model_bytes(dense)
    assert {table["name"] for table in inspected["tables"]} == {table["name"] for table in report["tables"]}
    # Once more, from compressed tables.
    assert shell("compress", "small", "smaller", "--method", "low_rank", "--rank", 2) == 0
    assert "Starting from compressed tables, whose loss remains: " in shell.printed()
    again = _Model(tied, seed=2)
    assert [table.spec["rank"] for table in load_compressed("smaller", again).tables] == [2] * (1 if tied else 2)
    # Back to an ordinary state dict, of which every tensor is stored once.
    assert shell("densify", "small", "dense") == 0
    stored, config = load_file("dense/model.safetensors"), json.loads(Path("dense/config.json").read_text())
    assert config["plan"]["tables"] == []
    state = stored | {name: stored[source] for name, source in config["aliases"].items()}
    assert len(config["aliases"]) == tied
    restored = _Model(tied, seed=3)
    restored.load_state_dict(state)
    assert torch.allclose(restored(_IDS), dense(_IDS), atol=1e-6)
    from_package = _Model(tied, seed=4)
    assert load_compressed("dense", from_package) == Plan()
    assert torch.equal(from_package(_IDS), restored(_IDS))
    assert [table["stored_bytes"] for table in shell.inspected("dense")["tables"]] == [64 * _VOCAB] * (1 if tied else 2)


def test_untied_although_one_layer_has_a_bias(shell: Any) -> None:
    save_compressed(_Model(tied=True), "source")
    assert shell("compress", "source", "small", "--method", "low_rank", "--rank", 3, "--tie", "untie") == 0
    model = _Model(tied=True)
    tables = load_compressed("small", model).tables
    assert [table.modules for table in tables] == [("encoder",), ("decoder",)]
    assert model.encoder.factorization is not model.decoder.factorization


def test_perplexity_of_an_unknown_model_is_refused(shell: Any, text: Path, gpt2: Path) -> None:
    save_compressed(_Model(), "source")
    words = ["compress", "source", "small", "--ratio", 2, "--text", text, "--tokenizer", gpt2]
    assert shell(*words) == 1
    assert "measure in Python after load_compressed(TARGET, model)" in shell.error()
    assert not Path("small").exists()
    assert shell(*words, "--counts_only") == 0


def test_damaged_directories(shell: Any) -> None:
    model = _Model(tied=True)
    compress(model, "low_rank", rank=3)
    save_compressed(model, "source")
    weights, config = Path("source/model.safetensors"), Path("source/config.json")
    whole, record = weights.read_bytes(), json.loads(config.read_text())
    before = shell.files()

    def message() -> str:
        errors = set()
        for words in (["compress", "source", "out", "--ratio", 2], ["inspect", "source"], ["densify", "source", "out"]):
            assert shell(*words) == 1
            errors.add(shell.error())
        assert shell.files() == before
        (error,) = errors
        return str(error)

    weights.write_bytes(whole[:-10])
    assert "model.safetensors' is damaged or cut short" in message()
    weights.write_bytes(whole)
    newer = {**record, "plan": {**record["plan"], "version": 99}}
    config.write_text(json.dumps(newer))
    assert (
        "'source' cannot be read: the compression plan has version 99, this package reads versions up to" in message()
    )
    table = record["plan"]["tables"][0]
    for spec, said in (
        ({**table["spec"], "rank": 2}, "'source' does not fit its plan: 'encoder.factorization."),
        ({**table["spec"], "vocab_size": 301}, "'source' does not fit its plan: 'encoder.factorization."),
        ({**table["spec"], "vocab_size": 10**12}, "'source' does not fit its plan: 'encoder.factorization."),
        ({**table["spec"], "dim": None}, "'source' cannot be read: 'spec' of table 'encoder' in the compression plan"),
        ({**table["spec"], "kind": "magic"}, "unknown kind of factorization 'magic'"),
    ):
        config.write_text(json.dumps({**record, "plan": {**record["plan"], "tables": [{**table, "spec": spec}]}}))
        assert said in message()
    for aliases, said in (
        ({"other": "absent"}, "'source' is damaged: 'absent' is missing from model.safetensors"),
        ({"other": []}, "config.json' is damaged: 'aliases' is {'other': []}"),
        (["other"], "config.json' is damaged: 'aliases' is ['other']"),
    ):
        config.write_text(json.dumps({**record, "aliases": aliases}))
        assert said in message()
    renamed = [{**table, "modules": ["somewhere"]}]
    config.write_text(json.dumps({**record, "plan": {**record["plan"], "tables": renamed}}))
    assert "'source' is damaged: it has no factors of table 'somewhere'" in message()
    # Whole by itself, and not what was written.
    config.write_text(json.dumps(record))
    tensors = load_file(weights)
    tensors["encoder.factorization.basis"][0, 0] = torch.nan
    weights.write_bytes(save(tensors))
    assert "is not the one that config.json beside it was written with" in message()
    del record["sha256"]
    config.write_text(json.dumps(record))
    assert "'source' has NaN or infinite values in 'encoder.factorization." in message()


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
    before = shell.files()
    for source in ("source", "source.ckpt"):
        (table,) = shell.inspected(source)["tables"]
        assert table["shape"] == [10**12, 16]
        for words in (["densify", source, "out"], ["compress", source, "out", "--method", "low_rank", "--rank", 2]):
            assert shell(*words) == 1
            assert "table 'encoder' cannot be made dense: its 1000000000000 x 16 numbers would take 64,000 GB" in (
                shell.error()
            )
    assert shell.files() == before
    with pytest.raises(ValueError, match="table 'encoder' cannot be made dense"):
        densify(model)
    assert model["encoder"].factorization is factors


def test_checkpoints_that_their_plan_does_not_fit(shell: Any) -> None:
    model = _Model()
    compress(model, "low_rank", rank=3)
    write_record(model, checkpoint := {"state_dict": model.state_dict()})
    table = checkpoint[RECORD_KEY]["tables"][1]
    table["spec"]["vocab_size"] = 10**12
    torch.save(checkpoint, "source.ckpt")
    for words in (["inspect"], ["densify", "out.ckpt"], ["compress", "out.ckpt", "--ratio", 2]):
        assert shell(words[0], "source.ckpt", *words[1:]) == 1
        assert (
            "'source.ckpt' does not fit its plan: 'decoder.factorization.coefficients' has the shape" in shell.error()
        )
    assert shell.files() == {"source.ckpt"}


# Skeletons


@pytest.mark.parametrize("method", ["transform_coding", "tensor_train_matrix"])
def test_a_skeleton_has_the_state_of_its_model(method: str) -> None:
    model = _Model(tied=True)
    for plan in (Plan(), None):
        if plan is None:
            chosen = METHODS[method]
            # Not every method reaches every ratio.
            smallest = chosen.factorization.smallest_bytes(_VOCAB, 16, 4, chosen.config())
            ratio = min(2, 64 * _VOCAB / smallest)
            plan = compress(model, method, ratio=ratio, token_counts=torch.arange(_VOCAB, 0, -1))
        skeleton = build_skeleton(model.state_dict(), plan, "it")
        assert plan_of(skeleton) == plan
        state = model.state_dict()
        assert skeleton.state_dict().keys() == state.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in skeleton.state_dict().items())
        assert model_bytes(skeleton) == model_bytes(model)
        fresh = _Model(tied=True, seed=1)
        apply_plan(fresh, plan)
        fresh.load_state_dict(skeleton.state_dict())
        assert torch.equal(fresh(_IDS), model(_IDS))


def test_what_counts_as_a_layer() -> None:
    ids, shared = torch.arange(24), torch.randn(12, 4)
    skeleton = build_skeleton(
        {
            "weight": torch.randn(50, 4),  # of the model itself
            "tokens.weight": shared,
            "softmax.weight": shared,
            "head.weight": torch.randn(9, 4),
            "head.bias": torch.randn(9),
            "conv.weight": torch.randn(4, 9),  # a bias of another length
            "conv.bias": torch.randn(9),
            "norm.weight": torch.randn(4),
            "kernel.weight": torch.randn(60, 4, 3),
            "integers.weight": ids.reshape(12, 2),
            "scaled.weight": torch.randn(70, 4),  # something beside it
            "scaled.scale": torch.randn(70),
            "outer.weight": torch.randn(80, 4),  # a module inside it
            "outer.lora.weight": torch.randn(2, 4),
        },
        Plan(),
        "it",
    )
    kinds = {
        path: type(module) for path, module in skeleton.named_modules() if isinstance(module, nn.Embedding | nn.Linear)
    }
    assert kinds == {
        "tokens": nn.Embedding,
        "softmax": nn.Linear,
        "head": nn.Linear,
        "outer.lora": nn.Embedding,
    }
    assert skeleton.get_submodule("tokens").weight is skeleton.get_submodule("softmax").weight
    assert choose_tables(skeleton) == ["tokens", "softmax"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"norm.weight": torch.ones(3)}, "found no table: the model has no matrix"),
        (
            {f"layers.{i}.weight": torch.zeros(5, i + 2) for i in range(7)},
            r"cannot be told from the 7 layers with the most rows \('layers.0' \(5, 2\); .*; \.\.\.\); name the "
            "modules to compress, as in tables=",
        ),
        (
            {f"{name}.{part}": torch.zeros(5, 2)[:, : 2 if part == "weight" else 1].squeeze() for name in "ab"
             for part in ("weight", "bias")},
            r"cannot be told from the 2 layers with the most rows \('a' \(5, 2\); 'b' \(5, 2\)\); ",
        ),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_chosen(state: dict[str, Tensor], message: str, shell: Any) -> None:
    state = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(ValueError, match=message):
        choose_tables(build_skeleton(state, Plan(), "it"))
    torch.save({"state_dict": state}, "source.ckpt")
    assert shell("compress", "source.ckpt", "out.ckpt", "--ratio", 2) == 1
    shell.error()
    inspected = shell.inspected("source.ckpt")
    assert inspected["tables"] == []
    assert inspected["note"].startswith(("found no table", "the tables cannot be told"))
    assert shell("inspect", "source.ckpt") == 0
    assert f"No tables are chosen: {inspected['note']}" in shell.printed()
    assert shell.files() == {"source.ckpt"}


def test_equal_tables_are_tied_and_others_are_not() -> None:
    table = torch.randn(12, 4)
    for other, tied in ((table.clone(), True), (table + 1, False)):
        skeleton = build_skeleton({"a.weight": table, "b.weight": other}, Plan(), "it")
        assert choose_tables(skeleton) == ["a", "b"]
        assert (skeleton.get_submodule("a").weight is skeleton.get_submodule("b").weight) == tied
