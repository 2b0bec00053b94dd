"""The ``embcompress`` command: run, overrides, resume, foreign modules, mistakes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from lightning_embcompress.cli import lightning_cli, recipes_index
from lightning_embcompress.cli import main as cli
from lightning_embcompress.methods.registry import METHODS

TOYS = '''
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

events = []


class Plain(BoringModel):
    """Knows nothing of vocabularies, and brings its own data."""

    def __init__(self, scale: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.scale = scale
        events.append(("scale", scale))

    def on_train_start(self):
        events.append(("fit", self.current_epoch))

    def on_fit_end(self):
        self.final = self.layer.weight.detach().clone()

    def test_step(self, batch, batch_idx):
        final = getattr(self, "final", None)
        events.append(("test", final is not None and torch.equal(self.layer.weight, final)))


class NoTestData(Plain):
    test_dataloader = LightningModule.test_dataloader


class NoTestStep(Plain):
    test_step = LightningModule.test_step


class Breaks(Plain):
    def training_step(self, batch, batch_idx):
        raise ValueError("a mistake of the user's own")


class Words(Plain):
    def __init__(self, vocab_size: int, scale: int = 3):
        super().__init__(scale)
        self.vocab_size = vocab_size
        events.append(("vocab_size", vocab_size))


class Inherits(Words):
    def __init__(self, vocab_size: int = 1000, **kwargs):
        super().__init__(vocab_size, **kwargs)


class Vague(Inherits):
    def __init__(self, depth: int = 1, **kwargs):
        super().__init__(**kwargs)


class Corpus(BoringDataModule):
    def __init__(self, tokens: int = 7):
        super().__init__()
        self.tokens = tokens

    @property
    def vocab_size(self) -> int:
        if self.tokens == 0:
            raise FileNotFoundError("the corpus is empty")
        events.append(("asked", self.tokens))
        return self.tokens
'''

RECIPE = """\
# A toy that trains in no time

seed_everything: 3
trainer:
  accelerator: cpu
  max_epochs: 2
  limit_train_batches: 2
  limit_val_batches: 1
  limit_test_batches: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: out
model:
  class_path: cli_toys.Plain
ckpt_path: null
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A folder with a recipe and a module beside it, as a user has them; the current folder of the test."""
    (tmp_path / "cli_toys.py").write_text(TOYS)
    (tmp_path / "toy.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # set by a run, taken back with the test
        monkeypatch.setenv(variable, "0")
    monkeypatch.delenv("EMBCOMPRESS_TRACEBACK", raising=False)
    importlib.invalidate_caches()
    sys.modules.pop("cli_toys", None)
    yield importlib.import_module("cli_toys")
    sys.modules.pop("cli_toys", None)


def values(toys: ModuleType, kind: str) -> list[object]:
    return [value for name, value in toys.events if name == kind]


def test_run_is_fit_and_test_of_the_final_weights_and_can_be_repeated(toys: ModuleType) -> None:
    Path("on_top.yaml").write_text("model:\n  init_args:\n    scale: 11\n")
    for _ in range(2):  # the second run finds the configuration and the checkpoints of the first
        toys.events.clear()
        options = ["--config", "on_top.yaml", "--trainer.max_epochs", "3", "--seed_everything=5"]
        assert cli.main(["run", "toy.yaml", *options]) == 0
        assert toys.events == [("scale", 11), ("fit", 0), ("test", True)]
    saved = yaml.safe_load(Path("out/config.yaml").read_text())
    assert saved["trainer"]["max_epochs"] == 3
    assert saved["seed_everything"] == 5


def test_resume_keeps_what_recipe_and_command_line_say(toys: ModuleType) -> None:
    assert cli.main(["run", "toy.yaml"]) == 0
    (checkpoint,) = Path("out/checkpoints").iterdir()
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["scale"] == 3
    toys.events.clear()
    options = ["--trainer.max_epochs=4", "--ckpt_path", str(checkpoint), "--model.scale=8"]
    assert cli.main(["run", "toy.yaml", *options]) == 0
    # LightningCLI alone would take scale=3 from the checkpoint.
    assert toys.events == [("scale", 8), ("fit", 2), ("test", True)]


def test_the_same_recipe_serves_the_other_commands(toys: ModuleType) -> None:
    assert cli.main(["fit", "--config", "toy.yaml"]) == 0
    (checkpoint,) = Path("out/checkpoints").iterdir()
    before = Path("out/config.yaml").read_text()
    for command in ("validate", "test"):
        assert cli.main([command, "--config=toy.yaml", "--ckpt_path", str(checkpoint), "--model.scale=9"]) == 0
    assert toys.events == [("scale", 3), ("fit", 0), ("scale", 9), ("scale", 9), ("test", False)]
    assert Path("out/config.yaml").read_text() == before, "an evaluation leaves the configuration of the training"


@pytest.mark.parametrize(
    ("model", "reason"),
    [("NoTestData", "there is no test data"), ("NoTestStep", "NoTestStep has no `test_step`")],
)
def test_the_test_is_skipped_with_one_line_where_there_is_nothing_to_test(
    toys: ModuleType, model: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("lightning_embcompress.cli.lightning_cli.rank_zero_info", lines.append)
    assert cli.main(["run", "toy.yaml", "--model", f"cli_toys.{model}", "--trainer.fast_dev_run=1"]) == 0
    assert lines == [f"Skipping the test: {reason}."]
    assert values(toys, "test") == []


def test_text_files_without_a_test_part_count_as_no_test_data(tmp_path: Path) -> None:
    from lightning_embcompress.cli.lightning_cli import RecipeTrainer
    from lightning_embcompress.data import TextFiles

    toy = importlib.import_module("lightning.pytorch.demos").BoringModel()
    text = tmp_path / "text.txt"
    text.write_text("a word or two\n")
    without, with_test = TextFiles(str(text)), TextFiles(str(text), test_files=str(text))
    assert RecipeTrainer._missing_for_test(toy, without) == "there is no test data"
    assert RecipeTrainer._missing_for_test(toy, with_test) == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--model=cli_toys.Words --data=cli_toys.Corpus", 7),
        ("--model=cli_toys.Inherits --data=cli_toys.Corpus", 7),  # before the parameter's own default
        ("--model=cli_toys.Vague --data=cli_toys.Corpus", 7),  # the parameter goes through **kwargs
        ("--model=cli_toys.Words --model.vocab_size=8 --data=cli_toys.Corpus", 8),  # what the recipe says, rounded up
        ("--model=cli_toys.Words --model.vocab_size=5 --data=BoringDataModule", 5),
        ("--model=cli_toys.Words --model.vocab_size=5", 5),
        ("--model=cli_toys.Inherits --data=BoringDataModule", 1000),
        ("--model=cli_toys.Inherits", 1000),
    ],
)
def test_vocab_size_of_the_data_reaches_the_model(toys: ModuleType, options: str, expected: int) -> None:
    arguments = ["toy.yaml", *options.split(), "--trainer.max_epochs=1", "--trainer.enable_checkpointing=false"]
    assert cli.main(["run", *arguments]) == 0
    assert values(toys, "vocab_size") == [expected]
    saved = yaml.safe_load(Path("out/config.yaml").read_text())
    assert saved["model"]["init_args"]["vocab_size"] == expected, "the saved configuration says what ran"


def test_checkpoints_record_the_linked_vocab_size(toys: ModuleType) -> None:
    options = ["--model=cli_toys.Inherits", "--data=cli_toys.Corpus", "--trainer.max_epochs=1"]
    assert cli.main(["run", "toy.yaml", *options]) == 0
    (checkpoint,) = Path("out/checkpoints").iterdir()
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["vocab_size"] == 7
    assert cli.main(["run", "out/config.yaml", "--trainer.max_epochs=2"]) == 0  # the saved file is a recipe too
    toys.events.clear()
    assert cli.main(["run", "toy.yaml", "--data=cli_toys.Corpus", "--trainer.fast_dev_run=1"]) == 0
    assert values(toys, "asked") == [], "not counted for a model that takes none"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--model=cli_toys.Words --model.vocab_size=5 --data=cli_toys.Corpus",
            "model.init_args.vocab_size of Words is 5, but Corpus has 7 tokens",
        ),
        (
            "--model=cli_toys.Words --data=BoringDataModule",
            "Words needs a vocab_size and BoringDataModule has no `vocab_size`",
        ),
        ("--model=cli_toys.Words", "Words needs a vocab_size and there is no data module"),
        ("--ckpt_path=none.ckpt", "there is no checkpoint 'none.ckpt'"),
    ],
)
def test_a_recognised_mistake_is_one_line(
    toys: ModuleType,
    options: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cli.main(["run", "toy.yaml", *options.split()]) == 1
    assert f"embcompress: error: {message}" in capsys.readouterr().err
    monkeypatch.setenv("EMBCOMPRESS_TRACEBACK", "1")
    with pytest.raises((ValueError, FileNotFoundError), match=message.split()[0]):
        cli.main(["run", "toy.yaml", *options.split()])


def test_errors_of_the_users_own_code_keep_their_traceback(toys: ModuleType) -> None:
    with pytest.raises(ValueError, match="a mistake of the user's own"):
        cli.main(["run", "toy.yaml", "--model=cli_toys.Breaks"])
    with pytest.raises(FileNotFoundError, match="the corpus is empty"):  # not wrapped in words about links
        cli.main(["run", "toy.yaml", "--model=cli_toys.Words", "--data=cli_toys.Corpus", "--data.tokens=0"])


def test_a_configuration_that_a_person_wrote_is_not_overwritten(toys: ModuleType) -> None:
    Path("toy.yaml").rename("config.yaml")
    assert cli.main(["run", "config.yaml", "--trainer.default_root_dir=.", "--trainer.max_epochs=1"]) == 0
    assert Path("config.yaml").read_text() == RECIPE


def test_a_recipe_without_a_model_says_so(toys: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    Path("no_model.yaml").write_text("trainer:\n  max_epochs: 1\n")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "no_model.yaml"])
    assert "no model: the recipe needs a key `model` with a `class_path`" in capsys.readouterr().err


def test_own_classes_are_found_by_their_short_names(toys: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "toy.yaml", "--model=LSTMLanguageModel", "--data=PythonDocs", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"] == "lightning_embcompress.modules.LSTMLanguageModel"
    assert printed["data"]["class_path"] == "lightning_embcompress.data.PythonDocs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run quikstart", "no recipe 'quikstart'; did you mean quickstart? Shipped recipes, run by name: obw, quick"),
        ("run --trainer.max_epochs=1", "`run` needs a recipe"),
        (
            "fitt",
            "no command 'fitt'; did you mean fit? Commands: fit, validate, test, predict, run, compress, compress",
        ),
        ("quickstart", "quickstart is a recipe: embcompress run quickstart"),
        ("last.ckpt", "last.ckpt is a model: embcompress inspect last.ckpt, or compress or densify"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped(monkeypatch, tmp_path)
    assert cli.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"embcompress: error: {message}")
    assert error.count("\n") == 1


def shipped(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Path]:
    recipes = {name: folder / "shipped" / f"{name}.yaml" for name in ("obw", "quickstart")}
    (folder / "shipped").mkdir()
    for path in recipes.values():
        path.write_text(RECIPE)
    monkeypatch.setattr(recipes_index, "available_recipes", lambda: recipes)
    monkeypatch.setattr(cli, "available_recipes", lambda: recipes)
    return recipes


def test_names_of_shipped_recipes(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = shipped(monkeypatch, tmp_path)
    for option in (["--config", "quickstart"], ["--config=quickstart"], ["-c", "quickstart"]):
        assert cli._resolve_configs(option)[-1].endswith(str(recipes["quickstart"]))
    assert cli.main(["run", "quickstart", "--trainer.fast_dev_run=1"]) == 0
    assert values(toys, "test") == [True]


def test_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shipped(monkeypatch, tmp_path)
    methods = {"low_rank": METHODS["low_rank"]}
    monkeypatch.setattr("lightning_embcompress.methods.registry.METHODS", methods)
    assert cli.main(["list"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line] == [
        "Recipes",
        "obw A toy that trains in no time",
        "quickstart A toy that trains in no time",
        "Methods, with their options",
        f"low_rank {METHODS['low_rank'].config.description}",
        "--rank",
    ]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("-h", "--help"):
        assert cli.main([option]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Usage: embcompress COMMAND [options]")
    for command in ("run", "fit", "validate", "test", "predict", "compress", "inspect", "densify", "sweep", "list"):
        assert f"\n  {command} " in text
    assert cli.main([]) == 2
    assert capsys.readouterr().err * 2 == text
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    for part in ("usage: embcompress run RECIPE.yaml|NAME [options]", "--trainer.max_epochs", "--ckpt_path", "vocab_"):
        assert part in text


def test_torchrun_starts_two_processes(toys: ModuleType) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "lightning_embcompress", "run", "toy.yaml", "--trainer.strategy=ddp", "--trainer.devices=2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "Starting with 2 processes" in done.stderr + done.stdout
    assert Path("out/config.yaml").is_file()


def test_the_process_group_is_left_once(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    for _ in range(2):
        lightning_cli.leave_process_group()
        assert not torch.distributed.is_initialized()


def test_python_m_reports_the_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_embcompress", "run", "absent.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("embcompress: error: no recipe file 'absent.yaml'")
