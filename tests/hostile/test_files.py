"""Files that are damaged anywhere: refused with one error, or read as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lightning_embcompress import load_compressed, load_from_checkpoint, save_compressed
from lightning_embcompress.compression.plan import Plan
from lightning_embcompress.integrations.checkpoint import structure_from_checkpoint
from lightning_embcompress.methods.registry import METHODS

# What torch says of damaged pickles that it reads nevertheless.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore::DeprecationWarning")

_METHODS = sorted(METHODS)


def _header(hostile: Any, draw: Any, content: bytes) -> bytes:
    """A safetensors file with another header."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    place = draw(st.sampled_from(hostile.places(header)[1:]))
    change = draw(
        st.one_of(
            st.sampled_from([hostile.remove, hostile.double]),
            st.sampled_from(hostile.values).map(hostile.to),
            hostile.json.map(hostile.to),
        )
    )
    changed = json.dumps(hostile.changed(header, place, change)).encode()
    length = draw(st.sampled_from([len(changed)] * 6 + [0, 1, len(changed) + 1, 2**40, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + changed + content[8 + size :]


def test_any_damage_of_saved_directories(tmp_path: Path, hostile: Any, examples: settings) -> None:
    folder = tmp_path
    content = {}
    for method in _METHODS:
        save_compressed(hostile.models[method], folder)
        config = json.loads((folder / "config.json").read_text())
        content[method] = (config, (folder / "model.safetensors").read_bytes())

    @examples
    @given(st.data())
    def run(data: Any) -> None:
        method = data.draw(st.sampled_from(_METHODS))
        config, weights = content[method]
        # As directories were without a checksum: everything beyond it has to hold by itself.
        config = {name: value for name, value in config.items() if name != "sha256"}
        kind = data.draw(st.sampled_from(["weights", "header", "config", "aliases"]))
        text = json.dumps(config).encode()
        if kind == "weights":
            weights = hostile.damaged(data.draw, weights)
        elif kind == "header":
            weights = _header(hostile, data.draw, weights)
        elif kind == "config":
            text = hostile.damaged(data.draw, text)
        else:
            text = json.dumps({**config, "aliases": data.draw(hostile.json)}).encode()
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_bytes(text)
        module = hostile.Model()
        with hostile.harmless():
            with hostile.unchanged_if_refused(module):
                load_compressed(folder, module)
            module(torch.arange(hostile.vocab_size))

    run()


def test_a_checksum_finds_any_change(tmp_path: Path, hostile: Any) -> None:
    save_compressed(hostile.models["low_rank"], tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()

    @settings(hostile.quick, max_examples=50)
    @given(st.integers(0, len(content) - 1), st.integers(1, 255))
    def run(place: int, flipped: int) -> None:
        weights.write_bytes(content[:place] + bytes([content[place] ^ flipped]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"model.safetensors' is damaged"):
            load_compressed(tmp_path, hostile.Model())

    run()
    # Whole, and of another model.
    weights.write_bytes(save({"other": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"model.safetensors' is damaged"):
        load_compressed(tmp_path, hostile.Model())


def test_any_damage_of_checkpoints(tmp_path: Path, hostile: Any, examples: settings) -> None:
    path = tmp_path / "last.ckpt"
    content, expected = {}, {}
    for method in _METHODS:
        torch.save(hostile.checkpoint(method), path)
        content[method], expected[method] = path.read_bytes(), hostile.models[method].state_dict()

    @examples
    @given(st.data())
    def run(data: Any) -> None:
        method = data.draw(st.sampled_from(_METHODS))
        path.write_bytes(hostile.damaged(data.draw, content[method]))
        with hostile.harmless():
            loaded = load_from_checkpoint(hostile.Model, path)
            # Only what means nothing was hit, such as the padding between two records.
            torch.testing.assert_close(dict(loaded.state_dict()), dict(expected[method]), rtol=0, atol=0)
        with hostile.harmless():
            assert isinstance(structure_from_checkpoint(path), Plan)

    run()
