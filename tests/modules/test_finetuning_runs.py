"""Fine-tuning by the recipe that is shipped, and in several processes."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_embcompress.cli.main import main
from lightning_embcompress.cli.recipes_index import available_recipes
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.modules import CompressedLanguageModel


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Path]:
    chance = random.Random(0)
    words = [f"word{i}" for i in range(60)]
    files = {}
    for name, number in (("train", 24), ("valid", 8), ("test", 8)):
        lines = [" ".join(chance.choices(words, [1 / (i + 1) for i in range(len(words))], k=6)) for _ in range(number)]
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text("\n".join([*lines, " ".join(words)]) + "\n")
    return files


def test_processes_stay_equal_and_resume(torchrun: Callable[..., str], text: dict[str, Path]) -> None:
    worker = Path(__file__).parent / "workers" / "finetune.py"
    assert torchrun(worker, text["train"], text["valid"]).count("well") == 2


def test_the_recipe_by_its_documented_command_lines(
    text: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    header = available_recipes()["finetune_compressed"].read_text().partition("\n\n")[0].replace("\n#\n", "\n\n")
    lines = re.sub(r" \\\n# +", " ", header).splitlines()
    commands = [shlex.split(line[1:]) for line in lines if re.match(r"#   (lightning|embcompress) ", line)]
    assert [command[1] for command in commands] == ["run", "compress", "run", "run"]
    small = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    small += ["--data.class_path=TextFiles", f"--data.cache_dir={tmp_path / 'cache'}", "--data.batch_size=4"]
    small += ["--data.min_count=1", "--data.sequence_length=7"]
    small += [f"--data.{name}_files={path}" for name, path in text.items()]
    tiny = ["--model.embedding_dim=16", "--model.hidden_size=16"]
    assert main([*commands[0][1:], *small, *tiny]) == 0
    assert main([*commands[1][1:-1], "1.5"]) == 0
    assert main([*commands[2][1:], *small]) == 0
    last = tmp_path / "embcompress_runs" / "finetune_compressed" / "version_0" / "checkpoints" / "last.ckpt"
    tuned = CompressedLanguageModel.load_from_checkpoint(last)
    assert [table.name for table in plan_of(tuned).tables] == ["model.encoder", "model.decoder"]
    # Resumed; and from a directory, into a module that the command line names.
    assert main([*commands[2][1:], *small, "--trainer.max_epochs=3", "--ckpt_path", str(last)]) == 0
    tuned.save_compressed(tmp_path / "DIRECTORY")
    vocab_size = torch.load(last, weights_only=True)["vocabulary"]["size"]
    named = (
        commands[3][-1]
        .replace("my_package.MyModel", "LSTMLanguageModel")
        .replace('"hidden_size": 128', '"hidden_size": 16')
    )
    named = named.replace("{}", "").replace(
        '"hidden_size"', f'"vocab_size": {vocab_size}, "embedding_dim": 16, "hidden_size"'
    )
    assert main([*commands[3][1:-1], named, *small, "--trainer.fast_dev_run=true"]) == 0
