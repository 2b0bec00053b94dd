"""Compressed models in files of their own, and the structure inside Lightning checkpoints."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core import saving
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_embcompress.compression.plan import Plan, compress, densify, plan_of
from lightning_embcompress.integrations import saved
from lightning_embcompress.integrations.checkpoint import (
    keep_structure,
    load_from_checkpoint,
    restore_structure,
    write_record,
)
from lightning_embcompress.integrations.instantiators import INSTANTIATORS
from lightning_embcompress.integrations.saved import load_compressed, save_compressed
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from toys import LanguageModel, compress_toy, quiet_trainer

_IDS = torch.tensor([[1, 5, 799], [0, 5, 17]])


class _Model(LanguageModel):
    """With buffers, of which two have no elements, and hooks of its own."""

    def __init__(self, vocab_size: int = 800, tied: bool = False, seed: int = 0) -> None:
        super().__init__(vocab_size, tied=tied, seed=seed, padding_idx=2)
        self.register_buffer("scale", torch.tensor(float(seed + 1)))
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("nothing_either", torch.empty(0))
        self.note = ""

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * super().forward(ids)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["note"] = "written by hand"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.note = checkpoint["note"]


def _compressed(method: str = "group_reduce", ratio: float = 3, **given: Any) -> _Model:
    model = _Model(**given)
    compress_toy(model, method, ratio)
    return model


def _assert_refused(model: nn.Module, message: str, load: Callable[[], Any]) -> None:
    """An error, after which the model is as it was."""
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load()
    assert dict(model.named_modules()) == modules
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["product_quantization", "transform_coding"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(method: str, tied: bool, tmp_path: Path) -> None:
    model, fresh, folder = _compressed(method, tied=tied), _Model(tied=tied, seed=1), tmp_path / "new" / "folder"
    model.encoder.factorization.provenance["weighted_error"] = 0.125
    save_compressed(model, folder)
    # The second time over what is loaded already.
    for _ in range(2):
        plan = load_compressed(folder, fresh)
        assert torch.equal(fresh(_IDS), model(_IDS))
    assert plan == plan_of(model) == plan_of(fresh)
    assert (fresh.encoder.factorization is fresh.decoder.factorization) == tied
    assert fresh.encoder.padding_idx == 2
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    # Nothing that is unpickled, nothing left over.
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_file_holds_every_tensor_once_and_no_more_than_the_plan_says(tmp_path: Path) -> None:
    sizes = []
    for tied in (True, False):
        model = _compressed(tied=tied, ratio=1.3)
        save_compressed(model, tmp_path)
        unique = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values() if tensor.numel()}
        sizes.append((tmp_path / "model.safetensors").stat().st_size)
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values()) == sum(
            unique.values()
        )
        assert sizes[-1] < sum(unique.values()) + 200 * len(unique) + 400
        rest = sum(tensor.nbytes for name, tensor in model.state_dict().items() if "factorization" not in name)
        assert sizes[-1] - rest <= plan_of(model).stored_bytes * 1.02 + 900
    assert sizes[1] > 1.6 * sizes[0]


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


def test_what_is_loaded_keeps_the_dtype_of_the_model_and_stays_frozen(tmp_path: Path) -> None:
    save_compressed(_compressed().bfloat16(), tmp_path)
    model, half = _Model(seed=1), _Model(seed=1).bfloat16()
    model.encoder.weight.requires_grad_(False)
    for one in (model, half):
        load_compressed(tmp_path, one)
    assert model(_IDS).dtype == torch.float32
    assert half(_IDS).dtype == torch.bfloat16
    torch.testing.assert_close(half(_IDS).float(), model(_IDS), rtol=0.05, atol=0.05)
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


def _cut(part: float, folder: Path, name: str = "model.safetensors") -> None:
    os.truncate(folder / name, int((folder / name).stat().st_size * part))


def _config(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: _edit_config(folder, edit)


def _tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: _edit_tensors(folder, edit)


def _file(name: str, content: bytes) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_bytes(content)


_CUT, _NO_JSON = r"model.safetensors' is damaged or cut short", r"config.json' is damaged"
# What is done to a directory, and the words of the error.
_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"it has none of model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"it has no config.json"),
    "weights cut short": (partial(_cut, 0.9), _CUT),
    "weights cut in the header": (partial(_cut, 0.001), _CUT),
    "weights of another kind": (_file("model.safetensors", b"PK\x03\x04" * 1000), _CUT),
    "config cut short": (lambda folder: _cut(0.5, folder, "config.json"), _NO_JSON),
    "config that is no text": (_file("config.json", b"\xff\xfe\x00\x80"), _NO_JSON),
    "config that is a list": (_file("config.json", b"[]"), _NO_JSON),
    "foreign config": (_file("config.json", b'{"model_type": "gpt2"}'), r"was not written by save_compressed"),
    "no plan": (_config(lambda config: config.pop("plan")), r"not a compression plan"),
    "another rank": (
        _config(lambda config: config["plan"]["tables"][0]["spec"].update(rank=1)),
        r"'encoder.factorization.basis'",
    ),
    "an alias of nothing": (_config(lambda config: config["aliases"].update(scale="nosuch")), r"'nosuch' is missing"),
    "aliases of another kind": (_config(lambda config: config.update(aliases=["scale"])), r"'aliases' is \['scale'\]"),
    "a tensor is missing": (_tensors(lambda tensors: tensors.pop("mix.bias")), r"'mix.bias' is missing"),
    "a tensor too many": (_tensors(lambda tensors: tensors.update(more=torch.ones(3))), r"'more' is \(3,\)"),
    "a tensor of another shape": (
        _tensors(lambda tensors: tensors.update({"mix.bias": torch.ones(17)})),
        r"'mix.bias' is \(17,\) in the file and \(16,\) in the model",
    ),
}


@pytest.mark.parametrize("name", sorted(_DAMAGES))
def test_damaged_files_are_refused_and_the_model_is_as_it_was(name: str, tmp_path: Path) -> None:
    damage, message = _DAMAGES[name]
    save_compressed(_compressed("low_rank", ratio=4), tmp_path)
    damage(tmp_path)
    for model in (_compressed("group_reduce", seed=1), _Model(seed=1)):
        _assert_refused(model, message, partial(load_compressed, tmp_path, model))


def test_a_damaged_second_table_and_another_vocabulary_leave_the_model_as_it_was(tmp_path: Path) -> None:
    save_compressed(_compressed("group_reduce"), tmp_path)
    model = _Model(vocab_size=700)
    _assert_refused(model, "'encoder' is 800 x 16, the model's is 700 x 16", partial(load_compressed, tmp_path, model))
    # When the first table would have been loaded already.
    _edit_tensors(tmp_path, lambda tensors: tensors["decoder.factorization.packed_block_index"].fill_(255))
    model = _Model(seed=1)
    _assert_refused(model, r"(?s)is damaged: .*block index", partial(load_compressed, tmp_path, model))


def test_an_interrupted_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def contents() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupted(tensors: Any, file: Path) -> None:
        Path(file).write_bytes(b"half of it")
        raise KeyboardInterrupt

    save_compressed(_compressed(), tmp_path)
    before, new = contents(), _compressed(seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(saved, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_compressed(new, tmp_path)
    assert contents() == before
    save_compressed(new, tmp_path)
    assert contents() != before


def test_tensors_that_are_views_of_each_other_and_state_that_is_no_tensor(tmp_path: Path) -> None:
    model, fresh = _Model(), _Model()
    for one in (model, fresh):
        one.register_buffer("whole", torch.arange(12.0).view(3, 4))
        one.register_buffer("turned", one.whole.T)
    fresh.whole.zero_()
    save_compressed(model, tmp_path)
    load_compressed(tmp_path, fresh)
    assert torch.equal(fresh.whole, model.whole)
    assert torch.equal(fresh.turned, model.turned)
    model.__class__ = type("Extra", (_Model,), {"get_extra_state": lambda self: {"steps": 3}})
    with pytest.raises(ValueError, match="'_extra_state'"):
        save_compressed(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _write_checkpoint(module: _Model, path: Path, weights_only: bool = False) -> None:
    keep_structure(module)
    trainer = quiet_trainer(path.parent)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=weights_only)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
def test_foreign_module_loads_from_a_compressed_checkpoint(tied: bool, weights_only: bool, tmp_path: Path) -> None:
    module = _compressed(tied=tied)
    _write_checkpoint(module, tmp_path / "last.ckpt", weights_only)
    # The record is plain enough to be read without unpickling.
    record = torch.load(tmp_path / "last.ckpt", weights_only=True)["embcompress"]
    assert Plan.from_dict(json.loads(json.dumps(record))) == plan_of(module)
    before = dict(vars(_Model))
    loaded = load_from_checkpoint(_Model, tmp_path / "last.ckpt")
    assert type(loaded) is _Model
    assert dict(vars(_Model)) == before
    assert loaded.note == "written by hand"
    assert loaded.hparams["tied"] == tied
    assert isinstance(loaded.encoder, CompressedEmbedding)
    assert isinstance(loaded.decoder, CompressedLinear)
    assert (loaded.encoder.factorization is loaded.decoder.factorization) == tied
    assert torch.equal(loaded(_IDS), module(_IDS))
    assert plan_of(loaded) == plan_of(module)
    with pytest.raises(ValueError, match="'encoder' is 800 x 16, the model's is 700 x 16"):
        load_from_checkpoint(_Model, tmp_path / "last.ckpt", vocab_size=700)
    dense = _Model(tied=tied)
    _write_checkpoint(dense, tmp_path / "dense.ckpt", weights_only)
    loaded = load_from_checkpoint(_Model, tmp_path / "dense.ckpt", map_location="cpu")
    assert torch.equal(loaded(_IDS), dense(_IDS))
    assert plan_of(loaded) == Plan()


class _Bare(LightningModule):
    """Without hyper-parameters, or with some that are one argument."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(800, 16), nn.Linear(16, 800)
        if config is not None:
            self.save_hyperparameters(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.encoder(ids))


@pytest.mark.parametrize("kind", [_Model, _Bare])
def test_lightning_itself_loads_a_compressed_checkpoint(kind: Any, tmp_path: Path) -> None:
    module = kind()
    compress_toy(module, "low_rank")
    _write_checkpoint(module, tmp_path / "last.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "last.ckpt")
    assert type(loaded) is kind
    assert torch.equal(loaded(_IDS), module(_IDS))
    assert plan_of(loaded) == plan_of(module)
    # What was loaded is saved with its structure again, and can be made dense.
    densify(loaded)
    _write_checkpoint(loaded, tmp_path / "dense.ckpt")
    assert plan_of(kind.load_from_checkpoint(tmp_path / "dense.ckpt")) == Plan()
    if kind is _Model:
        with pytest.raises(ValueError, match="'encoder' is 800 x 16, the model's is 700 x 16"):
            kind.load_from_checkpoint(tmp_path / "last.ckpt", vocab_size=700)


def test_lightning_in_a_process_without_this_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _compressed()
    _write_checkpoint(module, tmp_path / "last.ckpt")
    trusted = getattr(saving, "_ALLOWED_INSTANTIATORS", None)
    if trusted is None:
        pytest.skip("this Lightning trusts all instantiators")
    monkeypatch.setattr(saving, "_ALLOWED_INSTANTIATORS", {name for name in trusted if "embcompress" not in name})
    with pytest.raises(ValueError, match="lightning_embcompress"):
        _Model.load_from_checkpoint(tmp_path / "last.ckpt")


def test_instantiators_of_a_module_that_the_command_line_built(tmp_path: Path) -> None:
    module = _compressed(tied=True)
    keep_structure(module)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0"}
    known = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "tied": True, "vocab_size": 800}
    checkpoint["hyper_parameters"] = known
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["hyper_parameters"] == {**known, "_instantiator": INSTANTIATORS[known["_instantiator"]]}
    assert known["_instantiator"] == "lightning.pytorch.cli.instantiate_module"
    torch.save(checkpoint, tmp_path / "last.ckpt")
    loaded = _Model.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(loaded(_IDS), module(_IDS))
    # A class that takes all of them as one argument gets them as they are.
    bare = _Bare({"size": 3})
    compress_toy(bare, "low_rank")
    _write_checkpoint(bare, tmp_path / "bare.ckpt")
    assert torch.load(tmp_path / "bare.ckpt", weights_only=True)["hyper_parameters"] == {"size": 3}
    with pytest.raises(RuntimeError, match="encoder.weight"):
        _Bare.load_from_checkpoint(tmp_path / "bare.ckpt", strict=False)
    assert torch.equal(load_from_checkpoint(_Bare, tmp_path / "bare.ckpt")(_IDS), bare(_IDS))


def test_attaching_twice_is_attaching_once() -> None:
    module = _compressed()
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


def test_files_of_before_there_were_entries(tmp_path: Path) -> None:
    module = _compressed(tied=True)
    entries = {"encoder.weight", "decoder.weight"}
    save_compressed(module, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name not in entries}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config = {**config, "aliases": {k: v for k, v in config["aliases"].items() if k not in entries}}
    del config["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    fresh = _Model(seed=1, tied=True)
    load_compressed(tmp_path, fresh)
    assert torch.equal(fresh(_IDS), module(_IDS))
    _write_checkpoint(module, tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in entries}
    del checkpoint["hyper_parameters"]["_instantiator"]
    torch.save(checkpoint, tmp_path / "before.ckpt")
    assert torch.equal(load_from_checkpoint(_Model, tmp_path / "before.ckpt")(_IDS), module(_IDS))


def test_the_record_adds_the_entries_that_sharded_modules_leave_out() -> None:
    module = _compressed(tied=True)
    entries = {"encoder.weight", "decoder.weight"}
    checkpoint: dict[str, Any] = {"state_dict": {k: v for k, v in module.state_dict().items() if k not in entries}}
    write_record(module, checkpoint)
    assert checkpoint["state_dict"].keys() == module.state_dict().keys()
    with pytest.raises(ValueError, match="factors of table 'encoder', but does not say how"):
        restore_structure(_Model(), {"state_dict": checkpoint["state_dict"]})


@pytest.mark.parametrize("start", ["dense", "group_reduce", "low_rank"])
def test_structure_is_restored_whatever_the_module_was(start: str) -> None:
    module = _compressed()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    write_record(module, checkpoint)
    other = _Model(seed=1) if start == "dense" else _compressed(start, seed=1)
    restore_structure(other, checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(other(_IDS), module(_IDS))
    # The same structure keeps its parameters.
    parameters = list(other.parameters())
    restore_structure(other, checkpoint)
    assert all(one is before for one, before in zip(other.parameters(), parameters, strict=True))
    restore_structure(other, {"state_dict": {}})
    assert type(other.encoder) is nn.Embedding


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [({"model": {}}, "'state_dict'"), ({"state_dict": {}, "embcompress": {"version": 1}}, "not a compression plan")],
)
def test_what_is_no_checkpoint_is_refused(checkpoint: dict[str, Any], message: str) -> None:
    model = _Model()
    _assert_refused(model, message, partial(restore_structure, model, checkpoint))
