"""Every shipped recipe runs, and says what each of its keys means."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import yaml

from lightning_embcompress.cli import main
from lightning_embcompress.recipes_index import available_recipes

RECIPES = available_recipes()
SHARED = Path(__file__).parents[2] / "shared" / "data"

SMALL_OBW = [
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false",
    "--model.embedding_dim=32",
    "--model.hidden_size=48",
    "--model.projection_size=32",
    "--model.num_layers=1",
    "--model.num_sampled=64",
    "--data.num_workers=0",
    "--data.batch_size=8",
    "--data.eval_batch_size=8",
]


@pytest.fixture
def benchmark_folder(tmp_path: Path) -> Path:
    """A corpus in the layout of the benchmark, of words drawn by Zipf's law."""
    words = [f"word{i}" for i in range(1500)]
    chance = random.Random(0)
    weights = [1 / (i + 1) for i in range(len(words))]
    folder = tmp_path / "corpus"
    for name, lines in {
        "training-monolingual.tokenized.shuffled/news.en-00001-of-00100": 1500,
        "training-monolingual.tokenized.shuffled/news.en-00002-of-00100": 1500,
        "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050": 100,
        "heldout-monolingual.tokenized.shuffled/news.en.heldout-00001-of-00050": 100,
    }.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(" ".join(chance.choices(words, weights, k=12)) + "\n" for _ in range(lines)))
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_commented(name: str) -> None:
    lines = RECIPES[name].read_text().splitlines()
    assert lines[0].startswith("# ")
    for number, line in enumerate(lines):
        # A key with a value, as opposed to one that only opens a group.
        if re.match(r"\s*[a-z_]+: \S", line) and not re.match(r"\s*(class_path|save_dir|name):", line):
            above = number - 1
            while above >= 0 and re.match(r"\s*[a-z_]+: \S", lines[above]):
                above -= 1  # keys that share a comment
            assert lines[above].lstrip().startswith("#"), f"{name}: {line.strip()!r} has no comment"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_a_plain_configuration(name: str) -> None:
    recipe = yaml.safe_load(RECIPES[name].read_text())
    assert {"seed_everything", "trainer", "model", "data"} <= set(recipe)


def test_quickstart_runs(tmp_path: Path) -> None:
    assert main(["run", "quickstart", "--trainer.fast_dev_run=true", f"--data.cache_dir={tmp_path / 'cache'}"]) == 0


def test_one_billion_word_recipe_runs(benchmark_folder: Path, tmp_path: Path) -> None:
    options = [*SMALL_OBW, f"--data.data_dir={benchmark_folder}", f"--data.cache_dir={tmp_path / 'cache'}"]
    assert main(["run", "lstm_obw", "--trainer.fast_dev_run=true", *options]) == 0


def test_one_billion_word_recipe_compresses_and_resumes(
    benchmark_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        *SMALL_OBW,
        f"--data.data_dir={benchmark_folder}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--trainer.limit_train_batches=4",
        "--trainer.limit_val_batches=2",
        "--trainer.callbacks.ratio=3",
        "--trainer.callbacks.groups=5",
    ]
    assert main(["run", "lstm_obw", *options]) == 0
    folder = tmp_path / "embcompress_runs" / "lstm_obw" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert [table["name"] for table in report["tables"]] == ["encoder", "decoder"]
    assert all(table["ratio"] >= 3 for table in report["tables"])
    assert [entry["epoch"] for entry in report["perplexity"]["refined"]] == [6]
    last = folder / "checkpoints" / "last.ckpt"
    assert main(["test", "--config", "lstm_obw", *options, "--ckpt_path", str(last)]) == 0
    capsys.readouterr()
    last.write_bytes(last.read_bytes()[:-1000])
    assert main(["run", "lstm_obw", *options, "--ckpt_path", str(last)]) == 1
    assert "last.ckpt' is not a whole checkpoint" in capsys.readouterr().err


def test_one_billion_word_recipe_on_real_text(tmp_path: Path) -> None:
    data = SHARED / "lm1b"
    if not data.is_dir():
        pytest.skip(f"no text of the benchmark at {data}")
    shards = "heldout-monolingual.tokenized.shuffled/news.en.heldout-"
    options = [
        *SMALL_OBW,
        f"--data.data_dir={data}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        f"--data.train_files={shards}dev",
        f"--data.valid_files={shards}test",
        f"--data.test_files={shards}test",
        "--data.vocabulary_file=vocab-counts.top1000.txt",
        "--trainer.limit_train_batches=3",
        "--trainer.limit_val_batches=2",
        "--trainer.limit_test_batches=2",
        "--trainer.callbacks.ratio=2.5",
        "--trainer.callbacks.groups=5",
    ]
    assert main(["run", "lstm_obw", *options]) == 0


def test_what_a_callback_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", "--trainer.callbacks.at_epoch=9"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("embcompress: error: refine_at_epochs [3] must all come after at_epoch=9")
