"""Compressed models in files of their own, and the structure inside Lightning checkpoints."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_embcompress.compression.plan import PLAN_VERSION, Plan, compress, densify, plan_of
from lightning_embcompress.integrations import saved
from lightning_embcompress.integrations.checkpoint import (
    keep_structure,
    load_from_checkpoint,
    restore_structure,
    write_record,
)
from lightning_embcompress.integrations.checkpoint_io import check_checkpoint_file
from lightning_embcompress.integrations.saved import load_compressed, save_compressed
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.methods.registry import METHODS

_IDS = torch.tensor([[1, 5, 799], [0, 5, 17]])


class _Model(nn.Module):
    def __init__(self, vocab_size: int = 800, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Embedding(vocab_size, 16, padding_idx=2)
        self.hidden = nn.Linear(16, 16)
        self.decoder = nn.Linear(16, vocab_size)
        self.register_buffer("scale", torch.tensor(float(seed + 1)))
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("nothing_either", torch.empty(0))
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * self.decoder(self.hidden(self.encoder(ids)).tanh())


def _compressed(method: str = "group_reduce", ratio: float = 3, **given: Any) -> _Model:
    model = _Model(**given)
    chosen = METHODS[method]
    # Not every method reaches every ratio.
    smallest = chosen.factorization.smallest_bytes(*model.encoder.weight.shape, 4, chosen.config())
    ratio = min(ratio, model.encoder.weight.nbytes / smallest)
    compress(model, method, ratio=ratio, token_counts=torch.arange(len(model.encoder.weight), 0, -1))
    return model


def _snapshot(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    return dict(model.named_modules()), copy.deepcopy(model.state_dict())


def _assert_unchanged(model: nn.Module, snapshot: tuple[dict[str, nn.Module], dict[str, Tensor]]) -> None:
    modules, state = snapshot
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(method: str, tied: bool, tmp_path: Path) -> None:
    model, fresh = _compressed(method, tied=tied), _Model(tied=tied, seed=1)
    model.encoder.factorization.provenance["weighted_error"] = 0.125
    save_compressed(model, tmp_path / "new" / "folder")
    plan = load_compressed(tmp_path / "new" / "folder", fresh)
    assert torch.equal(fresh(_IDS), model(_IDS))
    assert plan == plan_of(model) == plan_of(fresh)
    assert (fresh.encoder.factorization is fresh.decoder.factorization) == tied
    assert fresh.encoder.padding_idx == 2
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    # Nothing that is unpickled, nothing left over.
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    # A second time, over what is loaded already.
    load_compressed(tmp_path / "new" / "folder", fresh)
    assert torch.equal(fresh(_IDS), model(_IDS))


def test_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    model = _compressed(tied=True)
    save_compressed(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values() if tensor.numel()}
    size = (tmp_path / "model.safetensors").stat().st_size
    assert sum(tensor.nbytes for tensor in tensors.values()) == sum(unique.values())
    assert size < sum(unique.values()) + 200 * len(unique) + 400
    untied = _compressed(tied=False)
    save_compressed(untied, tmp_path / "untied")
    assert (tmp_path / "untied" / "model.safetensors").stat().st_size > 1.6 * size


def test_stored_bytes_of_the_plan_are_those_of_the_file(tmp_path: Path) -> None:
    model = _compressed(vocab_size=800, ratio=1.3)
    save_compressed(model, tmp_path)
    rest = sum(tensor.nbytes for name, tensor in model.state_dict().items() if "factorization" not in name)
    size = (tmp_path / "model.safetensors").stat().st_size - rest
    assert size <= plan_of(model).stored_bytes * 1.02 + 700


def test_a_dense_model_and_a_partly_compressed_one(tmp_path: Path) -> None:
    dense, partly = _Model(), _Model()
    compress(partly, "low_rank", ratio=3, tables=["decoder"])
    for name, model in (("dense", dense), ("partly", partly)):
        save_compressed(model, tmp_path / name)
    for start in (_Model(seed=1), _compressed("low_rank", seed=1)):
        assert load_compressed(tmp_path / "partly", start) == plan_of(partly)
        assert torch.equal(start(_IDS), partly(_IDS))
        # Also back to a dense one.
        assert load_compressed(tmp_path / "dense", start) == Plan()
        assert torch.equal(start(_IDS), dense(_IDS))


def test_load_keeps_the_dtype_of_the_model(tmp_path: Path) -> None:
    save_compressed(_compressed().bfloat16(), tmp_path)
    model = _Model(seed=1)
    load_compressed(tmp_path, model)
    assert model(_IDS).dtype == torch.float32
    half = _Model(seed=1).bfloat16()
    load_compressed(tmp_path, half)
    assert half(_IDS).dtype == torch.bfloat16
    torch.testing.assert_close(half(_IDS).float(), model(_IDS), rtol=0.05, atol=0.05)


def test_a_frozen_table_is_loaded_frozen(tmp_path: Path) -> None:
    save_compressed(_compressed(), tmp_path)
    model = _Model(seed=1)
    model.encoder.weight.requires_grad_(False)
    load_compressed(tmp_path, model)
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    _edit_config(folder, lambda config: config.pop("sha256"))


def _truncate(file: Path, part: float) -> None:
    os.truncate(file, int(file.stat().st_size * part))


_DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        FileNotFoundError,
        r"it has none of model.safetensors",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        FileNotFoundError,
        r"it has no config.json",
    ),
    "weights cut short": (
        lambda folder: _truncate(folder / "model.safetensors", 0.9),
        ValueError,
        r"model.safetensors' is damaged or cut short",
    ),
    "weights cut in the header": (
        lambda folder: _truncate(folder / "model.safetensors", 0.001),
        ValueError,
        r"model.safetensors' is damaged or cut short",
    ),
    "empty weights": (
        lambda folder: _truncate(folder / "model.safetensors", 0),
        ValueError,
        r"model.safetensors' is damaged or cut short",
    ),
    "weights of another kind": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"PK\x03\x04" * 1000),
        ValueError,
        r"model.safetensors' is damaged or cut short",
    ),
    "config cut short": (lambda folder: _truncate(folder / "config.json", 0.5), ValueError, r"config.json' is damaged"),
    "config that is no text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00\x80"),
        ValueError,
        r"config.json' is damaged",
    ),
    "foreign config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
        ValueError,
        r"was not written by save_compressed",
    ),
    "config that is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ValueError,
        r"config.json' is damaged: it is no mapping",
    ),
    "newer plan": (
        lambda folder: _edit_config(folder, lambda config: config["plan"].update(version=PLAN_VERSION + 1)),
        ValueError,
        rf"version {PLAN_VERSION + 1}, this package reads versions up to {PLAN_VERSION}: upgrade",
    ),
    "no plan": (
        lambda folder: _edit_config(folder, lambda config: config.pop("plan")),
        ValueError,
        r"not a compression plan",
    ),
    "another rank": (
        lambda folder: _edit_config(folder, lambda config: config["plan"]["tables"][0]["spec"].update(rank=1)),
        ValueError,
        r"does not fit its plan: 'encoder.factorization.basis'",
    ),
    "an alias of nothing": (
        lambda folder: _edit_config(folder, lambda config: config["aliases"].update({"scale": "nosuch"})),
        ValueError,
        r"is damaged: 'nosuch' is missing from model.safetensors",
    ),
    "aliases of another kind": (
        lambda folder: _edit_config(folder, lambda config: config.update(aliases=["scale"])),
        ValueError,
        r"config.json' is damaged: 'aliases' is \['scale'\]",
    ),
    "a tensor is missing": (
        lambda folder: _edit_tensors(folder, lambda tensors: tensors.pop("hidden.bias")),
        ValueError,
        r"does not fit the model: 'hidden.bias' is missing in the file and \(16,\) in the model",
    ),
    "a tensor too many": (
        lambda folder: _edit_tensors(folder, lambda tensors: tensors.update(more=torch.ones(3))),
        ValueError,
        r"does not fit the model: 'more' is \(3,\) in the file and missing in the model",
    ),
    "a tensor of another shape": (
        lambda folder: _edit_tensors(folder, lambda tensors: tensors.update({"hidden.bias": torch.ones(17)})),
        ValueError,
        r"does not fit the model: 'hidden.bias' is \(17,\) in the file and \(16,\) in the model",
    ),
    "a module of another name": (
        lambda folder: _edit_config(folder, lambda config: config["plan"]["tables"][0].update(modules=["embedder"])),
        ValueError,
        r"the plan compresses module 'embedder', but the model has no embedding or projection there",
    ),
}


@pytest.mark.parametrize("name", sorted(_DAMAGES))
@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_files_are_refused_and_the_model_is_as_it_was(name: str, compressed: bool, tmp_path: Path) -> None:
    damage, error, message = _DAMAGES[name]
    save_compressed(_compressed("low_rank", ratio=4), tmp_path)
    damage(tmp_path)
    model = _compressed("group_reduce", seed=1) if compressed else _Model(seed=1)
    before = _snapshot(model)
    with pytest.raises(error, match=message):
        load_compressed(tmp_path, model)
    _assert_unchanged(model, before)


def test_a_damaged_block_index_is_refused_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    save_compressed(_compressed("group_reduce"), tmp_path)
    # In the second table, when the first would have been loaded already.
    _edit_tensors(tmp_path, lambda tensors: tensors["decoder.factorization.packed_block_index"].fill_(255))
    model = _Model(seed=1)
    before = _snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)is damaged: .*block index .*block sizes differ"):
        load_compressed(tmp_path, model)
    _assert_unchanged(model, before)


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save_compressed(_compressed(), tmp_path)
    model = _Model(vocab_size=700)
    before = _snapshot(model)
    with pytest.raises(
        ValueError, match=r"'encoder' is 800 x 16, the model's is 700 x 16: build the model with the voc"
    ):
        load_compressed(tmp_path, model)
    _assert_unchanged(model, before)


def test_an_interrupted_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = _compressed()
    save_compressed(old, tmp_path)
    contents = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupted(tensors: Any, file: Path) -> None:
        Path(file).write_bytes(b"half of it")
        raise KeyboardInterrupt

    new = _compressed(seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(saved, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_compressed(new, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == contents
    save_compressed(new, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} != contents


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(_Model):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

    with pytest.raises(ValueError, match=r"'_extra_state' of the model's state is a dict: only tensors can be saved"):
        save_compressed(Extra(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_are_not_contiguous_and_views_of_each_other(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = _Model()
        model.register_buffer("whole", torch.arange(12.0).view(3, 4))
        model.register_buffer("turned", model.whole.T)
        return model

    model, fresh = build(), build()
    fresh.whole.zero_()
    save_compressed(model, tmp_path)
    load_compressed(tmp_path, fresh)
    assert torch.equal(fresh.whole, model.whole)
    assert torch.equal(fresh.turned, model.turned)


class _Foreign(LightningModule):
    """A module that knows nothing of compression and has hooks of its own."""

    def __init__(self, vocab_size: int = 800, tied: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = _Model(vocab_size, tied)
        self.note = ""

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch).flatten(0, 1), batch.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["note"] = "written by hand"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.note = checkpoint["note"]


def _write_checkpoint(module: LightningModule, path: Path, weights_only: bool = False) -> None:
    keep_structure(module)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=weights_only)


def _compressed_module(tied: bool = False) -> _Foreign:
    module = _Foreign(tied=tied)
    compress(module, "group_reduce", ratio=3, token_counts=torch.arange(800, 0, -1))
    return module


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_foreign_module_loads_from_a_compressed_checkpoint(tied: bool, weights_only: bool, tmp_path: Path) -> None:
    module = _compressed_module(tied)
    _write_checkpoint(module, tmp_path / "last.ckpt", weights_only)
    # The record is plain enough to be read without unpickling.
    record = torch.load(tmp_path / "last.ckpt", weights_only=True)["embcompress"]
    assert Plan.from_dict(json.loads(json.dumps(record))) == plan_of(module)
    before = dict(vars(_Foreign))
    loaded = load_from_checkpoint(_Foreign, tmp_path / "last.ckpt")
    assert type(loaded) is _Foreign
    assert dict(vars(_Foreign)) == before
    assert loaded.note == "written by hand"
    assert loaded.hparams["tied"] == tied
    assert isinstance(loaded.model.encoder, CompressedEmbedding)
    assert isinstance(loaded.model.decoder, CompressedLinear)
    assert (loaded.model.encoder.factorization is loaded.model.decoder.factorization) == tied
    assert torch.equal(loaded(_IDS), module(_IDS))
    assert plan_of(loaded) == plan_of(module)


def test_dense_checkpoint_loads_too(tmp_path: Path) -> None:
    module = _Foreign()
    _write_checkpoint(module, tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(_Foreign, tmp_path / "last.ckpt", map_location="cpu")
    assert torch.equal(loaded(_IDS), module(_IDS))
    assert plan_of(loaded) == Plan()


def test_hyper_parameters_can_be_given(tmp_path: Path) -> None:
    _write_checkpoint(_compressed_module(), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"'model.encoder' is 800 x 16, the model's is 700 x 16"):
        load_from_checkpoint(_Foreign, tmp_path / "last.ckpt", vocab_size=700)


def test_attaching_twice_is_attaching_once(tmp_path: Path) -> None:
    module = _compressed_module()
    keep_structure(module)
    saving, loading = module.on_save_checkpoint, module.on_load_checkpoint
    keep_structure(module)
    assert module.on_save_checkpoint is saving
    assert module.on_load_checkpoint is loading
    # A copy records its own structure, not that of the module it was copied from.
    other = copy.deepcopy(module)
    densify(other)
    checkpoint: dict[str, Any] = {}
    other.on_save_checkpoint(checkpoint)
    assert checkpoint == {"note": "written by hand"}
    module.on_save_checkpoint(checkpoint)
    assert "embcompress" in checkpoint


@pytest.mark.parametrize("start", ["dense", "same", "other"])
def test_structure_is_restored_whatever_the_module_was(start: str) -> None:
    module = _compressed()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    write_record(module, checkpoint)
    other = (
        _Model(seed=1) if start == "dense" else _compressed("group_reduce" if start == "same" else "low_rank", seed=1)
    )
    restore_structure(other, checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(other(_IDS), module(_IDS))
    restore_structure(other, {"state_dict": {}})
    assert type(other.encoder) is nn.Embedding


def test_the_same_structure_keeps_its_parameters() -> None:
    module = _compressed()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    write_record(module, checkpoint)
    parameters = list(module.parameters())
    restore_structure(module, checkpoint)
    assert all(one is other for one, other in zip(parameters, module.parameters(), strict=True))


def test_what_is_no_checkpoint_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"not a Lightning checkpoint: it has no 'state_dict', but the keys \['model'\]"
    ):
        restore_structure(_Model(), {"model": {}})
    model = _Model()
    before = _snapshot(model)
    with pytest.raises(ValueError, match="not a compression plan"):
        restore_structure(model, {"state_dict": {}, "embcompress": {"version": 1}})
    _assert_unchanged(model, before)


def test_files_that_are_no_whole_checkpoint_are_refused(tmp_path: Path) -> None:
    _write_checkpoint(_compressed_module(), tmp_path / "last.ckpt")
    check_checkpoint_file(tmp_path / "last.ckpt")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint '.*nosuch.ckpt'"):
        load_from_checkpoint(_Foreign, tmp_path / "nosuch.ckpt")
    size = (tmp_path / "last.ckpt").stat().st_size
    _truncate(tmp_path / "last.ckpt", 0.7)
    message = (
        rf"last.ckpt' is not a whole checkpoint: it was cut short .*\({int(size * 0.7)} bytes\)\. Resume from an ear"
    )
    with pytest.raises(ValueError, match=message):
        load_from_checkpoint(_Foreign, tmp_path / "last.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        check_checkpoint_file(str(tmp_path / "text.ckpt"))


def test_files_of_other_machines_are_left_to_lightning() -> None:
    check_checkpoint_file("s3://bucket/last.ckpt")
