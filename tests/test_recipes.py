"""Every shipped recipe runs, and says what each of its keys means."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import yaml
from made import make_corpus
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM

from lightning_embcompress.cli.main import main
from lightning_embcompress.cli.recipes_index import available_recipes
from lightning_embcompress.modules import HuggingFaceCausalLM

RECIPES = available_recipes()

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
    folder = tmp_path / "corpus"
    make_corpus(folder, vocab_size=1500, tokens=36_000)
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


@pytest.mark.parametrize("name", ["quickstart", "qat"])
def test_recipes_on_the_documentation_run(tmp_path: Path, name: str) -> None:
    assert main(["run", name, "--trainer.fast_dev_run=true", f"--data.cache_dir={tmp_path / 'cache'}"]) == 0


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
    assert sum(table["dense_bytes"] for table in report["tables"]) >= 3 * sum(
        table["stored_bytes"] for table in report["tables"]
    )
    assert [entry["epoch"] for entry in report["perplexity"]["refined"]] == [6]
    last = folder / "checkpoints" / "last.ckpt"
    assert main(["test", "--config", "lstm_obw", *options, "--ckpt_path", str(last)]) == 0
    capsys.readouterr()
    last.write_bytes(last.read_bytes()[:-1000])
    assert main(["run", "lstm_obw", *options, "--ckpt_path", str(last)]) == 1
    assert "last.ckpt' is not a whole checkpoint" in capsys.readouterr().err


SMALL_GPT2 = [
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false",
    "--trainer.limit_train_batches=3",
    "--data.block_size=16",
]


@pytest.fixture
def packed_text(tmp_path: Path) -> None:
    """In the current folder: `train.txt`, `valid.txt`, `test.txt`, and GPT-2's two files in `TOKENIZER_FOLDER`."""
    chance = random.Random(0)
    words = [f"word{chance.choice('abcdef')}{number}" for number in range(40)]
    for name in ("train", "valid", "test"):
        lines = [" ".join(chance.choices(words, [1 / (i + 1) for i in range(40)], k=9)) for _ in range(20)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train([str(tmp_path / "train.txt")], trainer)
    (tmp_path / "TOKENIZER_FOLDER").mkdir()
    tokenizer.model.save(str(tmp_path / "TOKENIZER_FOLDER"))


def _documented(recipe: str, number: int) -> list[str]:
    """The options of one of the command lines in a recipe's header."""
    header = RECIPES[recipe].read_text().partition("\n\n")[0]
    commands = re.findall(
        rf"^#   lightning run {recipe}(.*?)\n#\n", re.sub(r" \\\n# +", " ", header + "\n#\n"), re.M | re.S
    )
    return shlex.split(re.sub(r"\n# +", " ", commands[number]))


@pytest.mark.usefixtures("packed_text")
def test_gpt2_recipe_by_its_documented_command_lines(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}
    small = [*SMALL_GPT2, "--model.config", json.dumps(config), f"--data.cache_dir={tmp_path / 'cache'}"]
    _, group_reduce, pretrained, scratch = (_documented("gpt2", number) for number in range(4))
    scratch += ["--trainer.callbacks.max_rank", "1"]
    assert main(["run", "gpt2", *scratch, *small]) == 0
    folder = tmp_path / "embcompress_runs" / "gpt2" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert [(table["method"], table["shape"][1]) for table in report["tables"]] == [("tensor_train", 16)]
    assert report["perplexity"].keys() >= {"dense", "compressed", "final"}
    assert all(report["perplexity"][step] > 1 for step in ("dense", "compressed", "final"))
    last = folder / "checkpoints" / "last.ckpt"
    longer = ["--trainer.max_epochs=3", "--ckpt_path", str(last)]
    assert main(["run", "gpt2", *scratch, *small, *longer]) == 0

    # Its checkpoint as a pretrained model, the table of which is compressed already and stays so.
    HuggingFaceCausalLM.load_from_checkpoint(last).save_pretrained(tmp_path / "COMPRESSED_FOLDER")
    options = [*SMALL_GPT2, f"--data.cache_dir={tmp_path / 'cache'}"]
    compressed = [option.replace("MODEL_FOLDER", "COMPRESSED_FOLDER") for option in pretrained]
    assert main(["run", "gpt2", *compressed, *options, "--trainer.callbacks=ModelCheckpoint"]) == 0

    HuggingFaceCausalLM(config=config, vocab_size=200).save_pretrained(tmp_path / "MODEL_FOLDER")
    assert main(["run", "gpt2", *pretrained, *options, *group_reduce, "--trainer.callbacks.ratio=1.2"]) == 0
    report = json.loads((tmp_path / "embcompress_runs" / "gpt2" / "version_3" / "report.json").read_text())
    assert [table["method"] for table in report["tables"]] == ["group_reduce"]


@pytest.mark.usefixtures("packed_text")
def test_gpt2_recipe_without_test_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = [*SMALL_GPT2, "--data.dataset=null", "--data.train_files=train.txt"]
    options += ["--data.tokenizer=TOKENIZER_FOLDER", f"--data.cache_dir={tmp_path / 'cache'}"]
    options += ["--model.pretrained=null", "--trainer.callbacks=ModelCheckpoint", "--trainer.max_epochs=1"]
    config = json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2})
    assert main(["run", "gpt2", *options, "--model.config", config]) == 0
    assert "Skipping the test: there is no test data" in caplog.text


@pytest.mark.usefixtures("packed_text")
def test_gpt2_recipe_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data.dataset=null", "--data.train_files=train.txt", f"--data.cache_dir={tmp_path / 'cache'}"]
    for options, message in (
        (["--data.tokenizer=./nowhere"], "tokenizer='./nowhere' is not a directory"),
        (["--data.tokenizer=TOKENIZER_FOLDER", "--model.pretrained=null"], "Exactly one of pretrained and config"),
        (["--data.tokenizer=TOKENIZER_FOLDER", "--model.pretrained=./no"], "pretrained='./no' is not a directory"),
    ):
        assert main(["run", "gpt2", *data, *options]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("embcompress: error: ")
        assert message in error


def test_what_a_callback_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", "--trainer.callbacks.at_epoch=9"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("embcompress: error: refine_at_epochs [3] must all come after at_epoch=9")


@pytest.mark.usefixtures("packed_text")
def test_gpt2_recipe_takes_any_pretrained_model_by_one_override(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of another architecture, untied, whose tokenizer has a token more than the table has rows."""
    sizes = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path / "TOKENIZER_FOLDER")
    rows = len(tokenizer)
    config = LlamaConfig(**sizes, vocab_size=rows, num_key_value_heads=2, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(tmp_path / "llama")
    texts = ["--data.dataset=null", *(f"--data.{name}_files={name}.txt" for name in ("train", "valid", "test"))]
    options = [*SMALL_GPT2, *texts, f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.limit_val_batches=2"]
    options += ["--trainer.callbacks.max_rank=1"]
    assert main(["run", "gpt2", "--model.pretrained", "llama", *options]) == 0
    folder = tmp_path / "embcompress_runs" / "gpt2" / "version_0"
    report = json.loads((folder / "report.json").read_text())
    assert [table["shape"] for table in report["tables"]] == [[rows, 64]] * 2
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["data"]["init_args"]["tokenizer"] == "llama"
    assert saved["data"]["init_args"]["max_vocab_size"] == rows
    # Text that has such a token, and a recipe without a model to take the tokenizer from.
    (tmp_path / "train.txt").write_text("<image> worda1 " * 100)
    assert main(["run", "gpt2", "--model.pretrained", "llama", *options]) == 1
    assert f"max_vocab_size={rows}" in capsys.readouterr().err
    assert main(["run", "gpt2", "--model.pretrained=null", "--model.config.model_type=gpt2", *options]) == 1
    assert "tokenizer is null" in capsys.readouterr().err
