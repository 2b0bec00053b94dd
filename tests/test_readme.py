"""What the README shows works, and the commands it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lightning_embcompress.cli.recipes_index import available_recipes
from lightning_embcompress.methods.registry import METHODS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "readme"}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
    assert (tmp_path / "compressed" / "model.safetensors").is_file()
    assert list(tmp_path.rglob("report.json"))


def test_methods_and_recipes_are_listed() -> None:
    for name in [*METHODS, *available_recipes()]:
        assert f"| `{name}` |" in README
