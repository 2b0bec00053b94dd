"""Directories of compressed models, read by other classes, `load_compressed` and other processes; and damaged ones."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from lightning_embcompress import densify, load_compressed, save_compressed
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.integrations import registration
from toys import compress_toy, gpt2

_VOCAB = 300
_IDS = torch.randint(3, _VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def _compressed(method: str = "group_reduce", **given: Any) -> Any:
    model = gpt2(**given)
    compress_toy(model, method, 1.5)
    return model


@torch.no_grad()
def _run(model: Any) -> Tensor:
    output: Tensor = model(_IDS)[0]
    return output


@pytest.mark.parametrize("shard", ["1GB", "15KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_way_to_load_gives_the_same_model(shard: str, tied: bool, tmp_path: Path) -> None:
    model = _compressed(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "15KB")
    built, fresh = load_compressed(tmp_path), gpt2(seed=1, tie_word_embeddings=tied)
    assert load_compressed(tmp_path, fresh) == plan_of(model)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), built, fresh):
        assert type(loaded) is GPT2LMHeadModel
        assert torch.equal(_run(loaded), _run(model))
        assert (loaded.transformer.wte.factorization is loaded.lm_head.factorization) == tied
        assert plan_of(loaded) == plan_of(model)


@pytest.mark.parametrize("method", ["group_reduce", "transform_coding"])
def test_into_a_model_that_is_compressed_otherwise(method: str, tmp_path: Path) -> None:
    model, other = _compressed(method), _compressed("low_rank", seed=1)
    model.save_pretrained(tmp_path)
    load_compressed(tmp_path, other)
    assert torch.equal(_run(other), _run(model))


def _without_entries(folder: Path) -> None:
    """As files were before compressed tables had an entry `weight`."""
    tensors = load_file(folder / "model.safetensors")
    assert any(tensor.shape == (0,) for name, tensor in tensors.items() if name.endswith(".weight"))
    kept = {name: tensor for name, tensor in tensors.items() if tensor.numel() or not name.endswith(".weight")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
def test_files_of_before_and_of_now_in_the_class_alone(tied: bool, tmp_path: Path) -> None:
    model = _compressed(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    # As where nobody has imported this package, which takes the method of the configuration for unknown.
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    (tmp_path / "dense" / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "dense")
    _without_entries(tmp_path)
    loaded, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    fresh = gpt2(seed=1, tie_word_embeddings=tied)
    load_compressed(tmp_path, fresh)
    for one in (loaded, fresh):
        assert torch.equal(_run(one), _run(model))


def test_into_a_module_around_the_model(tmp_path: Path) -> None:
    model, module = _compressed(), nn.ModuleDict({"model": gpt2(seed=1)})
    model.save_pretrained(tmp_path)
    load_compressed(tmp_path, module)
    assert torch.equal(_run(module["model"]), _run(model))
    assert plan_of(module).tables[0].modules == ("model.transformer.wte", "model.lm_head")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_device_maps(device_map: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = _compressed()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, low_cpu_mem_usage=True)
    assert torch.equal(_run(loaded), _run(model))


def test_other_classes_read_the_tables_that_they_have(tmp_path: Path) -> None:
    model = _compressed()
    model.save_pretrained(tmp_path / "whole")
    base, report = AutoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert type(base) is GPT2Model
    assert not any(report.values())
    assert torch.equal(_run(base), _run(model.transformer))
    classifier, report = GPT2ForSequenceClassification.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert report["missing_keys"] == {"score.weight"}
    assert torch.equal(_run(classifier.transformer), _run(model.transformer))
    # And the other way round: the head that is tied to the table reads it too.
    base.save_pretrained(tmp_path / "base")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(report.values())
    assert again.lm_head.factorization is again.transformer.wte.factorization
    assert torch.equal(_run(again), _run(model))


def _edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def _edit_plan(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return _edit_config(lambda config: change(config["quantization_config"]))


def _edit_factors(change: Callable[[dict[str, Tensor], str], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file = folder / index["weight_map"][f"{_FACTORS}.basis"]
        tensors = load_file(file)
        change(tensors, _FACTORS)
        save_file(tensors, file, metadata={"format": "pt"})

    return edit


_FACTORS = "transformer.wte.factorization"
# What is done to the directory, and what is named by `from_pretrained` and by `load_compressed` into a model.
_DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing shard": (
        lambda folder: next(folder.glob("model-00002-of-*.safetensors")).unlink(),
        r"model-00002-of-.*.safetensors",
    ),
    "a missing factor": (_edit_factors(lambda tensors, name: tensors.pop(f"{name}.basis")), f"'{_FACTORS}.basis'"),
    "a damaged block index": (
        _edit_factors(lambda tensors, name: tensors[f"{name}.packed_block_index"].fill_(255)),
        r"(?s)is damaged: .*block sizes differ from the plan",
    ),
    "no plan": (_edit_plan(lambda plan: plan.pop("tables")), "not a compression plan"),
    "a plan of another model": (_edit_plan(lambda plan: plan["tables"][0].update(modules=["nosuch"])), "'nosuch'"),
    "another vocabulary": (
        _edit_plan(lambda plan: plan["tables"][0]["spec"].update(vocab_size=400)),
        r"table 'transformer.wte' .* 400 rows",
    ),
}


@pytest.mark.parametrize("name", sorted(_DAMAGES))
def test_damaged_directories(name: str, tmp_path: Path) -> None:
    damage, message = _DAMAGES[name]
    _compressed().save_pretrained(tmp_path, max_shard_size="15KB")
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError)):
        load_compressed(tmp_path)
    model = gpt2(seed=1)
    before = _run(model)
    with pytest.raises((ValueError, OSError), match=message):
        load_compressed(tmp_path, model)
    assert torch.equal(_run(model), before)
    assert type(model.lm_head) is nn.Linear


def test_directories_of_other_kinds(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="save_compressed"):
        load_compressed(tmp_path / "dense")
    with pytest.raises(ValueError, match="model.save_pretrained"):
        save_compressed(_compressed(), tmp_path / "dense")
    save_compressed(_compressed(), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"load_compressed\(path, model\)"):
        load_compressed(tmp_path / "ours")
    _compressed().save_pretrained(tmp_path / "unknown")
    _edit_config(lambda config: config.update(architectures=["NoSuchModel"]))(tmp_path / "unknown")
    with pytest.raises(ValueError, match="'NoSuchModel'"):
        load_compressed(tmp_path / "unknown")
    _edit_config(lambda config: config.pop("architectures"))(tmp_path / "unknown")
    assert type(load_compressed(tmp_path / "unknown")) is GPT2LMHeadModel


_PACKAGE_FIRST = """
import sys
import lightning_embcompress
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.lm_head).__name__ == "CompressedLinear"
import torch, transformers.quantizers.auto as module
assert type(module.__spec__.loader).__name__ == type(module.__loader__).__name__ == "SourceFileLoader"
assert not any("embcompress" in type(finder).__module__ for finder in sys.meta_path)
ids = torch.load(sys.argv[3])
torch.save(model(ids).logits, sys.argv[4])
"""

_PACKAGE_LAST = """
import sys
import torch
from transformers import AutoModelForCausalLM
dense = AutoModelForCausalLM.from_pretrained(sys.argv[2])
assert "lightning_embcompress" not in sys.modules
assert {type(one).__module__.split(".")[0] for one in dense.modules()} <= {"torch", "transformers"}
ids = torch.load(sys.argv[3])
torch.save(dense(ids).logits, sys.argv[5])
import lightning_embcompress
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(ids).logits, sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [_PACKAGE_FIRST, _PACKAGE_LAST], ids=["package first", "package last"])
def test_in_another_process(program: str, tmp_path: Path) -> None:
    model, dense = _compressed(), _compressed()
    densify(dense)
    model.save_pretrained(tmp_path / "compressed")
    dense.save_pretrained(tmp_path / "dense")
    torch.save(_IDS, tmp_path / "ids")
    given = [tmp_path / name for name in ("compressed", "dense", "ids", "logits", "dense logits")]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, given)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits"), _run(model))
    if program is _PACKAGE_LAST:
        torch.testing.assert_close(torch.load(tmp_path / "dense logits"), _run(dense))


def test_registering_again_changes_nothing() -> None:
    finders = list(sys.meta_path)
    registration.register()
    assert sys.meta_path == finders


def test_a_package_that_is_imported_anew() -> None:
    program = """
import sys
import lightning_embcompress
for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_embcompress"]:
    del sys.modules[name]
import lightning_embcompress
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "embcompress" in AUTO_QUANTIZER_MAPPING
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_module_that_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("awaited", "ours"):
        (tmp_path / f"{name}_{tmp_path.name}.py").write_text("import sys\norder = list(sys.modules)\n")
    awaited, ours = f"awaited_{tmp_path.name}", f"ours_{tmp_path.name}"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "_AWAITED", {awaited: ours})
    finders = list(sys.meta_path)
    registration.register()
    registration.register()
    assert len(sys.meta_path) == len(finders) + 1
    # To look whether it is there is not to import it.
    assert importlib.util.find_spec(awaited) is not None
    assert importlib.util.find_spec("nosuch_module") is None
    assert ours not in sys.modules
    module = importlib.import_module(awaited)
    assert ours in sys.modules
    assert ours not in module.order
    assert sys.meta_path == finders
