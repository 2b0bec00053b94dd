"""Compressed checkpoints load in every way there is, into modules that know nothing of compression, or say why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_embcompress import EmbeddingCompression, compress, load_from_checkpoint
from lightning_embcompress.compression.plan import Plan, apply_plan, plan_of
from lightning_embcompress.integrations.checkpoint import (
    keep_structure,
    restore_structure,
    structure_from_checkpoint,
    write_record,
)
from lightning_embcompress.integrations.checkpoint_io import use_atomic_checkpoints
from toys import LanguageModel, loaders_of, model_of, token_ids

MakeTrainer = Callable[..., Trainer]


def _callback() -> EmbeddingCompression:
    return EmbeddingCompression("group_reduce", ratio=2, at_epoch=1, groups=3)


@pytest.fixture
def saved(make_trainer: MakeTrainer, tmp_path: Path) -> Callable[..., Any]:
    """Train a model, compress it on the way, and keep a checkpoint of every epoch."""

    def run(kind: str = "untied", weights_only: bool = False) -> tuple[Any, Path]:
        model = model_of(kind)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_weights_only=weights_only)
        trainer = make_trainer(_callback(), keep, max_epochs=2, enable_checkpointing=True)
        trainer.fit(model, **loaders_of(kind))
        return model.eval(), tmp_path / "epoch=1.ckpt"

    return run


def _inputs() -> Tensor:
    inputs: Tensor = token_ids()[:, :-1]
    return inputs


def _assert_same(module: Any, model: Any, inputs: Tensor) -> None:
    assert plan_of(module) == plan_of(model)
    torch.testing.assert_close(dict(module.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert torch.equal(module.eval()(inputs), model(inputs))


def _edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path.with_name("edited.ckpt"))
    return path.with_name("edited.ckpt")


def _to_version_1(checkpoint: dict[str, Any]) -> None:
    checkpoint["embcompress"]["version"] = 1
    for table in checkpoint["embcompress"]["tables"]:
        assert table.pop("untied") is None


def _enter(entry: str, trainer: Trainer, model: LightningModule, path: Path) -> Any:
    if entry == "fit":
        return trainer.fit(model, **loaders_of(), ckpt_path=path)
    quiet = {} if entry == "predict" else {"verbose": False}
    return getattr(trainer, entry)(model, loaders_of()["val_dataloaders"], ckpt_path=path, **quiet)


@pytest.mark.parametrize(
    ("kind", "weights_only", "version"), [("untied", False, 2), ("tied", True, 2), ("tied", False, 1)]
)
def test_every_way_of_loading(
    make_trainer: MakeTrainer,
    saved: Callable[..., Any],
    kind: str,
    weights_only: bool,
    version: int,
) -> None:
    model, path = saved(kind, weights_only)
    assert ("callbacks" in torch.load(path, weights_only=True)) != weights_only
    if version == 1:
        path = _edited(path, _to_version_1)
    inputs = _inputs()
    # Through the callback alone, in the Trainer's own ways.
    measured = {}
    for entry in ("validate", "test", "predict"):
        module = model_of(kind)
        assert module.strict_loading
        measured[entry] = _enter(entry, make_trainer(_callback()), module, path)
        _assert_same(module, model, inputs)
    assert measured["validate"] == measured["test"]
    predicted = torch.cat(measured["predict"])
    assert torch.equal(predicted, model(inputs[: len(predicted)]).argmax(dim=-1))
    # By our function, for the class as it is.
    _assert_same(load_from_checkpoint(LanguageModel, path, tied=kind == "tied"), model, inputs)
    # By the structure alone, which is given to the model before its weights are loaded.
    module = model_of(kind)
    plan = structure_from_checkpoint(path)
    assert plan.tables == plan_of(model).tables
    apply_plan(module, plan)
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    _assert_same(module, model, inputs)


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_structure_in_configure_model(make_trainer: MakeTrainer, saved: Callable[..., Any], epoch: int) -> None:
    model, path = saved()
    path = path.with_name(f"epoch={epoch}.ckpt")

    class Prepared(LanguageModel):
        def configure_model(self) -> None:
            if not plan_of(self).tables:
                apply_plan(self, structure_from_checkpoint(path))

    module = Prepared()
    # No callback, and Lightning's own way of loading.
    make_trainer().validate(module, loaders_of()["val_dataloaders"], ckpt_path=path, verbose=False)
    assert len(plan_of(module).tables) == (2 if epoch else 0)
    loaded = Prepared.load_from_checkpoint(path)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(module.state_dict()), rtol=0, atol=0)
    if epoch:
        _assert_same(module, model, _inputs())


def test_the_structure_of_a_sharded_checkpoint(saved: Callable[..., Any]) -> None:
    model, path = saved()
    checkpoint = torch.load(path, weights_only=True)
    for name in ("state_dict", "optimizer_states"):
        del checkpoint[name]
    folder = path.with_name("sharded.ckpt")
    folder.mkdir()
    torch.save(checkpoint, folder / "meta.pt")
    assert structure_from_checkpoint(folder) == plan_of(model)
    # Strategies that shard have loaded the weights when they hand over the rest.
    module = model_of()
    with pytest.raises(ValueError, match="'decoder', 'encoder' .*apply_plan"):
        restore_structure(module, checkpoint)
    assert type(module.encoder) is nn.Embedding
    restore_structure(model, checkpoint)
    apply_plan(module, structure_from_checkpoint(folder))
    parameters = list(module.parameters())
    restore_structure(module, checkpoint)
    assert all(one is other for one, other in zip(parameters, module.parameters(), strict=True))
    del checkpoint["embcompress"]
    with pytest.raises(ValueError, match=r"tables 'decoder', 'encoder' are stored otherwise"):
        restore_structure(module, checkpoint)
    restore_structure(model_of(), checkpoint)


def test_paths_within_wrappers_of_strategies() -> None:
    wrapped = nn.Module()
    wrapped._fsdp_wrapped_module = nn.Sequential(nn.Embedding(500, 8))
    model = nn.Sequential(wrapped)
    compress(model, "low_rank", ratio=2)
    checkpoint: dict[str, Any] = {"pytorch-lightning_version": "2.6.0"}
    write_record(model, checkpoint)
    assert checkpoint["embcompress"]["tables"][0]["modules"] == ["0.0"]
    restore_structure(model, checkpoint)


def test_reading_the_structure_reads_no_tensors(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    path = tmp_path / "large.ckpt"
    module = nn.Sequential(nn.Embedding(500, 8))
    compress(module, "low_rank", ratio=2)
    checkpoint = {"state_dict": {"others": torch.ones(2**24)}, "pytorch-lightning_version": "2.6.0"}
    write_record(module, checkpoint)
    torch.save(checkpoint, path)
    assert path.stat().st_size > 64e6
    before = resident()
    assert structure_from_checkpoint(path) == plan_of(module)
    assert resident() - before < 16e6


def test_what_has_no_structure(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "dense.ckpt")
    assert structure_from_checkpoint(tmp_path / "dense.ckpt") == Plan()
    for content in ({"model": {}}, [1, 2], torch.ones(2)):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match=r"other.ckpt' is not a checkpoint of Lightning's Trainer"):
            structure_from_checkpoint(tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "embcompress": {"version": 1}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt' .*not a compression plan"):
        structure_from_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        structure_from_checkpoint(tmp_path / "nosuch.ckpt")


def _ranks(checkpoint: dict[str, Any]) -> list[int]:
    return checkpoint["embcompress"]["tables"][1]["spec"]["ranks"]  # type: ignore[no-any-return]


FACTORS = "decoder.factorization."


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda saved: saved["state_dict"][FACTORS + "basis"].fill_(torch.nan), f"NaN .* '{FACTORS}basis'"),
        (lambda saved: saved["state_dict"][FACTORS + "packed_block_index"].fill_(255), "is damaged: .*the block index"),
        (lambda saved: _ranks(saved).append(_ranks(saved).pop() - 1), f"'{FACTORS}.* has the shape"),
    ],
)
def test_damaged_factors_are_refused_everywhere(
    make_trainer: MakeTrainer,
    saved: Callable[..., Any],
    damage: Callable[[dict[str, Any]], Any],
    message: str,
) -> None:
    _, path = saved()
    path = _edited(path, damage)
    for entry in ("fit", "validate", "test", "predict"):
        module = model_of()
        values = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match=message):
            _enter(entry, make_trainer(_callback()), module, path)
        assert type(module.decoder) is nn.Linear
        assert type(module.encoder) is nn.Embedding
        torch.testing.assert_close(module.state_dict(), values, rtol=0, atol=0)
    with pytest.raises(ValueError, match=message):
        load_from_checkpoint(LanguageModel, path)


def test_damaged_files_are_refused_everywhere(make_trainer: MakeTrainer, saved: Callable[..., Any]) -> None:
    _, path = saved()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for entry in ("fit", "validate", "test", "predict"):
        trainer = make_trainer(_callback())
        use_atomic_checkpoints(trainer)
        with pytest.raises(ValueError, match=r"epoch=1.ckpt' is damaged .*Bad CRC-32"):
            _enter(entry, trainer, model_of(), path)
    with pytest.raises(ValueError, match=r"epoch=1.ckpt' is damaged .*Bad CRC-32"):
        load_from_checkpoint(LanguageModel, path)


def test_factors_without_a_record(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def trained(keep: bool) -> Any:
        model = model_of()
        compress(model, "low_rank", ratio=2)
        if keep:
            keep_structure(model)
        trainer = make_trainer(max_epochs=1)
        trainer.fit(model, **loaders_of())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return model.eval()

    trained(keep=False)
    module = model_of()
    compress(module, "low_rank", ratio=2)
    keep_structure(module)
    with pytest.raises(ValueError, match=r"table '..coder'.*keep_structure\(model\)"):
        _enter("validate", make_trainer(), module, tmp_path / "last.ckpt")
    assert len(plan_of(module).tables) == 2
    model = trained(keep=True)
    _enter("validate", make_trainer(), module, tmp_path / "last.ckpt")
    _assert_same(module, model, _inputs())


def test_modules_that_rename_their_weights(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Own(LanguageModel):
        """Keeps its weights under other names in checkpoints, as some do."""

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {f"student.{name}": value for name, value in checkpoint["state_dict"].items()}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state: Mapping[str, Any] = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.removeprefix("student."): value for name, value in state.items()}

    model = Own()
    trainer = make_trainer(_callback(), max_epochs=2)
    trainer.fit(model, **loaders_of())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert "student.encoder.factorization.basis" in torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    module = Own()
    _enter("validate", make_trainer(_callback()), module, tmp_path / "last.ckpt")
    _assert_same(module, model.eval(), _inputs())
    _assert_same(load_from_checkpoint(Own, tmp_path / "last.ckpt"), model, _inputs())


def test_objects_are_loaded_only_where_that_is_asked_for(saved: Callable[..., Any]) -> None:
    model, path = saved()
    path = _edited(path, lambda checkpoint: checkpoint.update(hyper_parameters={"bias": Path("x")}))
    with pytest.raises(ValueError, match=r"edited.ckpt' holds more than tensors and plain values \(pathlib"):
        load_from_checkpoint(LanguageModel, path)
    for chosen in ({"weights_only": None}, {"weights_only": True}):
        with pytest.raises(Exception, match="pathlib"):
            load_from_checkpoint(LanguageModel, path, **chosen)
    _assert_same(load_from_checkpoint(LanguageModel, path, weights_only=False), model, _inputs())


def test_a_loader_that_would_run_code_is_not_reached(tmp_path: Path) -> None:
    """Versions of Lightning before 2.6 load objects, and have no argument that says otherwise."""

    class Older(LanguageModel):
        @classmethod
        def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = None) -> Any:
            module, checkpoint = cls(), torch.load(checkpoint_path, map_location, weights_only=False)
            module.on_load_checkpoint(checkpoint)
            module.load_state_dict(checkpoint["state_dict"])
            return module

    class Touches:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "marker",)

    model = model_of().eval()
    compress(model, "low_rank", ratio=2)
    checkpoint = {"state_dict": dict(model.state_dict())}
    write_record(model, checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    _assert_same(load_from_checkpoint(Older, tmp_path / "last.ckpt"), model, _inputs())
    torch.save({**checkpoint, "hyper_parameters": Touches()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt' holds more than tensors and plain values"):
        load_from_checkpoint(Older, tmp_path / "last.ckpt")
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert (tmp_path / "marker").exists()
