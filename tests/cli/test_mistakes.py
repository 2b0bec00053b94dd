"""What is wrong with a command line, and that nothing is written then."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from lightning_embcompress.cli import compressing
from lightning_embcompress.integrations.opening import OpenedModel
from lightning_embcompress.utils import files as writing
from lightning_embcompress.utils.files import replacing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: source, target (embcompress compress --help)"),
        ("SOURCE out --ratio four", "--ratio 'four' must be float | None"),
        ("SOURCE out --tie never", "--tie 'never' must be Literal['keep', 'untie', 'auto']"),
        ("SOURCE out more", "unrecognized arguments: more"),
        ("SOURCE out", "give exactly one of ratio, size, bits_per_weight and max_perplexity_increase"),
        ("SOURCE out --ratio 0.5", "ratio must be above 1"),
        ("SOURCE out --size big", "size must be a number of bytes such as '80MB'"),
        ("SOURCE out --method group_reduse --ratio 2", "did you mean 'group_reduce'?"),
        ("SOURCE out --ration 2", "there is no option --ration; did you mean --ratio? (embcompress compress --help"),
        (
            "SOURCE out --ration 2",
            "of which the method's are --unseen_weight, --groups, --refine_rounds, --bits, --codes, --effort)",
        ),
        ("SOURCE out --ratio 2 --groups", "--groups: expected one argument"),
        ("SOURCE out --ratio 2 --groups --overwrite", "--groups: expected one argument"),
        ("SOURCE out --ratio 2 --groups 0", "groups must be 1 or more"),
        ("SOURCE out --ratio 2 --refine_rounds few", "--refine_rounds 'few' must be int"),
        ("SOURCE out --ratio 2 --groups [1", "--groups '[1' must be int"),
        ("SOURCE out --config absent.yaml", "absent.yaml"),
        ("SOURCE out --ratio 2 --counts_only", "--counts_only says what --text is for"),
        ("SOURCE SOURCE --ratio 2", "is not empty: choose another, or replace it with --overwrite"),
        ("SOURCE out.ckpt --ratio 2", "TARGET 'out.ckpt' is called like a file"),
        ("SOURCE file --ratio 2", "TARGET 'file' is a file"),
        ("SOURCE file/out --ratio 2", "TARGET 'file/out' cannot be written: '"),
        ("SOURCE . --ratio 2", "TARGET '.' is the current folder"),
    ],
)
def test_a_wrong_command_line(words: str, message: str, shell: Any, gpt2: Path) -> None:
    Path("file").write_text("mine")
    words = words.replace("SOURCE", str(gpt2))
    shell.refuses("compress", *words.split(), says=message, code=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ratio 1000", "cannot be stored in 38 bytes (1000x) by 'transform_coding' with these options: the smallest"),
        ("--ratio 2 --tables transformer.wtf", "the model has no module 'transformer.wtf'"),
        ("--ratio 2 --tables transformer.ln_f", "module 'transformer.ln_f' is a LayerNorm"),
        ("--ratio 2 --text absent*.txt", "--text='absent*.txt' matches no file"),
        ("--ratio 2 --text empty.txt", "every file it names is empty"),
        ("--ratio 2 --text text.txt --tokenizer /no/such", "tokenizer='/no/such' is not a directory"),
        ("--method weighted_low_rank --rank 2 --tables transformer.wte transformer.wpe", "have different vocabularies"),
    ],
)
def test_what_cannot_be_done(words: str, message: str, shell: Any, gpt2: Path, text: Path) -> None:
    Path("empty.txt").write_text("")
    shell.refuses("compress", gpt2, "out", *words.split(), says=message)


def test_a_text_needs_the_tokenizer_of_the_model(shell: Any, gpt2: Path, text: Path, endless_tokenizer: Path) -> None:
    GPT2LMHeadModel.from_pretrained(gpt2).save_pretrained("bare")
    words = ["compress", "bare", "out", "--method=low_rank", "--rank=2", "--text", text]
    shell.refuses(*words, says="--text needs a tokenizer, and there is none in 'bare'")
    # One without a token for the end of a text; its files then belong to the result.
    assert shell(*words, "--tokenizer", endless_tokenizer) == 0
    assert (Path("out") / "tokenizer.json").read_bytes() == (endless_tokenizer / "tokenizer.json").read_bytes()
    GPT2LMHeadModel(shell.config(vocab_size=40)).save_pretrained("small")
    words[1:3] = ["small", "other"]
    shell.refuses(*words, "--tokenizer", gpt2, says="but the table has only 40 rows: give the tokenizer")


def test_models_that_transformers_cannot_load(shell: Any, gpt2: Path) -> None:
    shutil.copytree(gpt2, "model")
    config = shell.read("model/config.json")
    changes = (
        ({"architectures": ["GPT9LMHeadModel"]}, "'model' is a 'GPT9LMHeadModel', which transformers "),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "'model' is not a whole GPT2DoubleHeadsModel: "),
        ({"n_embd": 48}, "'model' cannot be loaded: "),
        (
            {"quantization_config": {"quant_method": "embcompress", "version": 99, "tables": []}},
            "'model' cannot be read: the compression plan has version 99",
        ),
    )
    for change, message in changes:
        Path("model/config.json").write_text(json.dumps(config | change))
        shell.refuses("compress", "model", "out", "--ratio", 2, says=message)


def test_overwriting(shell: Any, gpt2: Path) -> None:
    words = ["compress", gpt2, "out", "--method=low_rank", "--rank=2"]
    Path("out").mkdir()
    assert shell(*words) == 0, "an empty directory is none"
    (Path("out") / "left_over.bin").write_text("")
    (Path("out") / "report.json").write_text("old")
    shell.refuses(*words, says="TARGET 'out' is not empty", code=2)
    assert (Path("out") / "report.json").read_text() == "old"
    assert shell(*words, "--overwrite") == 0
    assert shell.read("out/report.json")["tables"]
    assert not (Path("out") / "left_over.bin").exists()
    # In the place of the source itself.
    assert shell("densify", "out", "out", "--overwrite") == 0
    assert type(GPT2LMHeadModel.from_pretrained("out").lm_head) is torch.nn.Linear
    # What is more than a model is not removed.
    for name, files, message in (
        ("papers", ["thesis.txt"], "TARGET 'papers' is not only a model (it has no config.json)"),
        ("project", ["config.json", "src/code.py"], "TARGET 'project' is not only a model (it has the folder 'src')"),
    ):
        for file in files:
            (Path(name) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(name) / file).write_text("mine")
        words[2] = name
        shell.refuses(*words, "--overwrite", says=message, code=2)
        assert all((Path(name) / file).read_text() == "mine" for file in files)
    shutil.copytree("out", "outer/inner")
    words[1:3] = ["outer/inner", "outer"]
    shell.refuses(*words, "--overwrite", says="TARGET 'outer' holds SOURCE or the current folder", code=2)


def test_overwriting_a_checkpoint(shell: Any) -> None:
    torch.save({"state_dict": {"a.weight": torch.randn(50, 8)}}, "source.ckpt")
    words = ["compress", "source.ckpt", "out.ckpt", "--method=low_rank", "--rank=2"]
    Path("folder").mkdir()
    for taken in ("out.ckpt", "out.report.json"):
        Path(taken).write_text("mine")
        shell.refuses(*words, says=f"'{taken}' exists: choose another TARGET", code=2)
        Path(taken).unlink()
    shell.refuses(*words[:2], "folder", *words[3:], says="TARGET 'folder' is a directory: name the check", code=2)
    for _ in range(2):
        assert shell(*words, "--overwrite") == 0
    # In the place of the source itself, which is mapped into memory meanwhile.
    assert shell("densify", "out.ckpt", "out.ckpt", "--overwrite") == 0
    assert torch.load("out.ckpt", weights_only=True)["state_dict"]["a.weight"].shape == (50, 8)
    assert shell.files() == {"folder", "source.ckpt", "out.ckpt", "out.report.json"}


@pytest.mark.parametrize("when", ["solving", "writing", "reporting", "renaming"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interruption_leaves_what_was_there(
    when: str, error: type[BaseException], shell: Any, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(gpt2, "out")
    before = {path: (Path("out") / path).read_bytes() for path in os.listdir("out")}

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise error("stopped")

    write = OpenedModel.write

    def half(self: OpenedModel, path: Path) -> None:
        write(self, path)
        interrupted()

    if when == "writing":
        monkeypatch.setattr(OpenedModel, "write", half)
    else:
        places = {"solving": (compressing, "compress"), "reporting": (compressing, "write_report")}
        module, name = places.get(when, (writing, "put_in_place"))
        monkeypatch.setattr(module, name, interrupted)
    words = ["compress", gpt2, "out", "--method=low_rank", "--rank=2", "--overwrite"]
    if error is KeyboardInterrupt:
        assert shell(*words) == 130
    elif error is RuntimeError or when == "solving":  # a defect, with its traceback
        with pytest.raises(error, match="stopped"):
            shell(*words)
    else:
        assert shell(*words) == 1
        said = shell.error()
        assert "out' could not be written, and what was there before is as it was: " in said
        assert "stopped" in said
    assert {path: (Path("out") / path).read_bytes() for path in os.listdir("out")} == before
    assert os.listdir() == ["out"]


def test_a_directory_is_put_back_if_its_place_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename, calls = os.rename, []

    def second_fails(source: Any, destination: Any) -> None:
        calls.append(destination)
        if len(calls) == 2:
            raise OSError("full")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="full"), replacing(target, directory=True) as path:
        (path / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    code = """
import sys
from lightning_embcompress.cli.main import main
for words in (["compress", "a", "b", "--ratio", "four"], ["sweep", "a", "b"], ["compress", "--help"]):
    try:
        assert main(words) == 2
    except SystemExit as left:
        assert left.code == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help(shell: Any) -> None:
    for words, shown in (
        ("inspect", "--json"),
        ("densify", "--overwrite"),
        ("compress --method=tensor_train", "--max_rank"),
    ):
        with pytest.raises(SystemExit, match="0"):
            shell(*words.split(), "--help")
        assert shown in shell.printed()


def test_arguments_from_a_file(shell: Any, gpt2: Path) -> None:
    Path("small.yaml").write_text("target: out\nmethod: tensor_train\nmax_rank: 2\nshape: [8, 4]\ntie: untie\n")
    assert shell("compress", gpt2, "--config", "small.yaml", "--max_rank", 1) == 0
    first, second = shell.read("out/config.json")["quantization_config"]["tables"]
    assert first["options"] == second["options"] == {"max_rank": 1, "shape": [8, 4]}
    Path("wrong.yaml").write_text("methods: low_rank\n")
    shell.refuses("compress", gpt2, "other", "--config", "wrong.yaml", says="methods", code=2)


def test_from_a_real_shell(shell: Any, gpt2: Path) -> None:
    command = [sys.executable, "-m", "lightning_embcompress", "compress", str(gpt2), "out", "--ratio", "1.4"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    # Other packages that are installed, such as torchao, have warnings of their own.
    said = [line for line in done.stderr.splitlines() if line.startswith(("embcompress", "Traceback"))]
    assert (done.returncode, said) == (0, []), done.stderr
    assert "Written: out, out/report.json" in done.stdout
    assert shell.inspected("out")["tables"][0]["ratio"] >= 1.4
