"""What a path or a name stands for, and what is wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lightning_embcompress.integrations.sources import find_source


def _write(folder: Path, config: dict[str, Any], *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in files:
        (folder / file).write_bytes(b"")
    return folder


def test_kinds(tmp_path: Path) -> None:
    compressed = {"model_type": "gpt2", "quantization_config": {"quant_method": "embcompress"}}
    for name, config, kind in (
        ("dense", {"model_type": "gpt2"}, "pretrained"),
        ("compressed", compressed, "pretrained"),
        ("saved", {"format": "lightning-embcompress"}, "saved"),
    ):
        folder = _write(tmp_path / name, config, "model.safetensors")
        source = find_source(str(folder))
        assert (source.name, source.path, source.kind) == (str(folder), folder, kind)
        assert source.config == config
        assert source.weights == (folder / "model.safetensors",)
        assert source.is_directory
    with zipfile.ZipFile(tmp_path / "last.ckpt", "w") as file:
        file.writestr("data", "")
    source = find_source(str(tmp_path / "last.ckpt"))
    assert (source.kind, source.is_directory, source.has_tokenizer) == ("checkpoint", False, False)


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; import lightning_embcompress.cli.main as cli; import lightning_embcompress.integrations.sources\n"
        "codes = [cli.main(words) for words in (['compress', 'a.ckpt', 'b'], ['inspect', '/no/model', '--json'])]\n"
        "print(codes, sorted({'torch', 'transformers', 'lightning'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[1, 1] []\n", done.stderr


def test_shards(tmp_path: Path) -> None:
    folder = _write(tmp_path / "model", {"model_type": "gpt2"}, "a.safetensors", "b.safetensors")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in find_source(str(folder)).weights] == ["a.safetensors", "b.safetensors"]
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.safetensors of its 2 files of weights is missing"):
        find_source(str(folder))
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.safetensors.index.json' .*'weight_map' is None"):
        find_source(str(folder))


_CONFIG = "model/config.json"
_TRANSFORMER = "model/0_Transformer/config.json"


@pytest.mark.parametrize(
    ("file", "content", "named", "message"),
    [
        (_CONFIG, "{", "model", "config.json' is damaged"),
        (_CONFIG, "[]", "model", "config.json' is damaged"),
        (_CONFIG, '{"hidden": 3}', "model", "'model_type'"),
        (_CONFIG, '{"model_type": "gpt2"}', "model", "none of model.safetensors, "),
        (_CONFIG, '{"quantization_config": {"quant_method": "gptq"}}', "model", "'gptq'"),
        ("model/epoch=1.ckpt", "", "model", "no config.json.* name the file, for example .*epoch=1.ckpt"),
        ("model/.metadata", "", "model", "no config.json.* python -m lightning.pytorch.utilities.consolidate_checkpoi"),
        ("model/adapter_config.json", "", "model", "no config.json.*merge_and_unload"),
        (
            _TRANSFORMER,
            '{"model_type": "bert"}',
            "model",
            "no config.json.* sentence-transformers.*model/0_Transformer",
        ),
        # A layer beside static embeddings.
        (_TRANSFORMER, '{"in_features": 3}', "model", r"no config.json.* sentence-transformers.*compress\(Sentence"),
        ("model/notes.txt", "", "model", "no config.json.* save_pretrained or save_compressed"),
        ("recipe.yaml", "text", "recipe.yaml", "embcompress run "),
        ("model.safetensors", "text", "model.safetensors", "give its directory"),
        ("last.ckpt", "text", "last.ckpt", r"\(4 bytes\)"),
    ],
)
def test_what_is_no_model(file: str, content: str, named: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / file).write_text(content)
    if file == _TRANSFORMER:
        (tmp_path / "model" / "modules.json").write_text('[{"path": "0_Transformer"}, {"path": "1_Pooling"}]')
    with pytest.raises((ValueError, FileNotFoundError), match=f"{named}.*{message}"):
        find_source(str(tmp_path / named))


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("asked the hub for what is a path")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    for name in ("last.ckpt", "./gpt2", "/no/such/model", "models/gpt2", "~no-one-of-this-name/x", "a/b/c", "x.json"):
        with pytest.raises(FileNotFoundError, match="there is no file or directory "):
            find_source(name)


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str], **kwargs: Any) -> str:
        asked.append(allow_patterns)
        files = ["pytorch_model.bin"] if any("bin" in pattern for pattern in allow_patterns) else []
        return str(_write(tmp_path / "cache", {"model_type": "gpt2"}, *files))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = find_source("someone/model")
    assert (source.name, source.path) == ("someone/model", tmp_path / "cache")
    assert source.weights[0].name == "pytorch_model.bin"
    assert len(asked) == 2, "other weights are only asked for where there are no safetensors"

    (tmp_path / "cache" / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    find_source("someone/sentences")
    assert asked[-1] == ["2_Dense/*"], "weights of other folders than those of modules are not asked for"

    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("no\nconnection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="'gpt3', .*: no connection"):
        find_source("gpt3")
