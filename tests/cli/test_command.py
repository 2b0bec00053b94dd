"""The ``lightning`` command: recipes are ours, all else is lightning-sdk's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_embcompress.cli import command
from lightning_embcompress.cli import main as cli

# Stands for lightning-sdk: tells what it was called with, and whether torch had been loaded by then.
SDK = """
import json
import sys


def main_cli():
    print(json.dumps({"argv": sys.argv, "torch": "torch" in sys.modules}))
    return 7
"""
TO_THE_SDK = [
    [],
    ["--help"],
    ["login"],
    ["run", "job", "--name", "x"],
    ["run", "mmt", "--help"],
    ["run", "model", "a b.py", ""],
    ["studio", "run", "quickstart"],
]


def install_sdk(folder: Path, *scripts: str) -> None:
    (folder / "lightning_sdk").mkdir(parents=True)
    (folder / "lightning_sdk" / "__init__.py").touch()
    (folder / "lightning_sdk" / "entrypoint.py").write_text(SDK)
    metadata = folder / "lightning_sdk-2099.1.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning_sdk\nVersion: 2099.1.1\n")
    lines = [f"{script} = lightning_sdk.entrypoint:main_cli\n" for script in scripts]
    (metadata / "entry_points.txt").write_text("[console_scripts]\n" + "".join(lines))


@pytest.mark.parametrize("scripts", [("lightning", "lightning-sdk"), ("lightning",), ("lightning-sdk",)])
def test_everything_else_goes_to_the_sdk_unchanged(scripts: tuple[str, ...], tmp_path: Path) -> None:
    install_sdk(tmp_path, *scripts)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from lightning_embcompress.cli.command import main
for arguments in {TO_THE_SDK!r}:
    sys.argv = ["lightning", *arguments]
    assert main() == 7
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told == [{"argv": ["lightning", *arguments], "torch": False} for arguments in TO_THE_SDK]


@pytest.mark.parametrize("script", ["lightning", "lightning-sdk"])
def test_the_result_is_that_of_the_sdk(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points = [EntryPoint(script, "os:getpid", "console_scripts"), EntryPoint("other", "os:getcwd", "plugins")]
    monkeypatch.setattr(command, "distribution", lambda _: SimpleNamespace(entry_points=entry_points))
    monkeypatch.setattr(sys, "argv", ["lightning", "login"])
    assert command.main() == os.getpid()


def test_one_line_without_the_sdk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(command, "distribution", absent)
    for arguments in TO_THE_SDK:
        monkeypatch.setattr(sys, "argv", ["lightning", *arguments])
        assert command.main() == 2
        out, error = capsys.readouterr()
        assert (out, error.count("\n")) == ("", 1)
        assert "pip install lightning-sdk" in error
        assert ("`fabric run`" in error) == (arguments[:2] == ["run", "model"])


def test_recipes_are_run_as_by_embcompress(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(cli, "_dispatch", lambda given: calls.append(given) or 5)
    recipes = ["run model.yaml", "run ./job", "run quickstart --x 1", "run --config a.yaml"]
    for words in recipes:
        monkeypatch.setattr(sys, "argv", ["lightning", *words.split()])
        assert command.main() == 5
    assert calls == [words.split() for words in recipes]


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("-h", "--help"):
        monkeypatch.setattr(sys, "argv", ["lightning", "run", option])
        assert command.main() == 0
        text = capsys.readouterr().out
        assert text.startswith("Usage: lightning run RECIPE.yaml|NAME [options]\n")
    monkeypatch.setattr(sys, "argv", ["lightning", "run"])
    assert command.main() == 2
    assert capsys.readouterr() == ("", text)
