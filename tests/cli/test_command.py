"""The ``lightning`` command: recipes are ours, all else is lightning-sdk's."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

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


def install_sdk(folder: Path, *scripts: str) -> Path:
    (folder / "lightning_sdk").mkdir(parents=True)
    (folder / "lightning_sdk" / "__init__.py").touch()
    (folder / "lightning_sdk" / "entrypoint.py").write_text(SDK)
    metadata = folder / "lightning_sdk-2099.1.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning_sdk\nVersion: 2099.1.1\n")
    lines = [f"{script} = lightning_sdk.entrypoint:main_cli\n" for script in scripts]
    (metadata / "entry_points.txt").write_text("[console_scripts]\n" + "".join(lines))
    return folder


@pytest.fixture
def without_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(command, "distribution", absent)


def use(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    argv = ["/usr/bin/lightning", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    return argv


@pytest.mark.parametrize("scripts", [("lightning", "lightning-sdk"), ("lightning",), ("lightning-sdk",)])
@pytest.mark.parametrize("arguments", TO_THE_SDK)
def test_everything_else_goes_to_the_sdk_unchanged(
    arguments: list[str],
    scripts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(install_sdk(tmp_path, *scripts))
    for module in [name for name in sys.modules if name.split(".")[0] == "lightning_sdk"]:
        monkeypatch.delitem(sys.modules, module)
    argv = use(monkeypatch, *arguments)
    assert command.main() == 7
    assert json.loads(capsys.readouterr().out)["argv"] == argv
    for module in [name for name in sys.modules if name.split(".")[0] == "lightning_sdk"]:
        monkeypatch.delitem(sys.modules, module)


def test_the_sdk_does_not_wait_for_torch(tmp_path: Path) -> None:
    install_sdk(tmp_path, "lightning")
    script = "import sys; from lightning_embcompress.cli.command import main; sys.exit(main())"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {script}"
    done = subprocess.run([sys.executable, "-c", code, "run", "job"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout) == {"argv": ["-c", "run", "job"], "torch": False}


@pytest.mark.parametrize("arguments", TO_THE_SDK)
def test_one_line_without_the_sdk(
    arguments: list[str],
    without_sdk: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use(monkeypatch, *arguments)
    assert command.main() == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert "answers only `lightning run RECIPE.yaml|NAME`" in error
    assert "pip install lightning-sdk" in error
    assert ("`fabric run`" in error) == (arguments[:2] == ["run", "model"])


@pytest.mark.parametrize(
    "arguments",
    [["run", "model.yaml"], ["run", "./job"], ["run", "quickstart", "--x", "1"], ["run", "--config", "a.yaml"]],
)
def test_recipes_are_run_as_by_embcompress(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(cli, "_dispatch", lambda given: calls.append(given) or 5)
    use(monkeypatch, *arguments)
    assert command.main() == 5
    assert calls == [arguments]


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("-h", "--help"):
        use(monkeypatch, "run", option)
        assert command.main() == 0
        text = capsys.readouterr().out
        assert text.startswith("Usage: lightning run RECIPE.yaml|NAME [options]\n")
        assert "the same as `embcompress run`" in text
        assert "`lightning run model|job|mmt`, is handed to lightning-sdk where it is installed" in text
    use(monkeypatch, "run")
    assert command.main() == 2
    assert capsys.readouterr() == ("", text)
