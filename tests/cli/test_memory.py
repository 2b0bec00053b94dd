"""Devices, batches and memory of `compress` and `sweep`, and what is wrong with a text; nothing is written then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from lightning_embcompress.cli import compressing, sweeping
from toys import gpt2_config

# The least that each command is called with, but for the model and the text.
COMMANDS = {
    "compress": ("compress", "SOURCE", "out", "--method", "weighted_low_rank", "--rank", 3),
    "sweep": ("sweep", "SOURCE", "out", "--methods", "weighted_low_rank", "--ratios", 2, "--bits"),
}


@pytest.fixture(params=list(COMMANDS))
def command(request: pytest.FixtureRequest, gpt2: Path, text: Path) -> Callable[..., list[object]]:
    """Words of a command; those of later arguments override them."""

    def words(*more: object, source: object = gpt2) -> list[object]:
        found = [source if word == "SOURCE" else word for word in COMMANDS[request.param]]
        return [*found, *more] if "--text" in more else [*found, "--text", text, *more]

    return words


def test_a_device_that_is_not_there(shell: Any, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        shell.refuses(*command("--device", device), says=f"--device {device}", code=2)
    shell.refuses(*command("--device", "tpu"), says="--device 'tpu'", code=2)
    assert shell(*command("--device", "auto")) == 0
    assert " on cpu" in shell.printed()


def test_a_text_shorter_than_a_block(shell: Any, command: Any, gpt2: Path) -> None:
    Path("short.txt").write_text("a of the sea, and a.")
    shell.refuses(*command("--text", "short.txt"), says="fewer than a block of 64")
    assert shell(*command("--text", "short.txt", "--batch_tokens", 8)) == 0


def test_a_text_that_is_only_counted_may_be_short(shell: Any, gpt2: Path) -> None:
    Path("short.txt").write_text("a of the sea, and a.")
    words = ("compress", gpt2, "out", "--method", "weighted_low_rank", "--rank", 3, "--text", "short.txt")
    assert shell(*words, "--counts_only") == 0


@pytest.mark.parametrize("option", ["--batch_tokens", "--max_tokens"])
def test_numbers_of_tokens(option: str, shell: Any, command: Any) -> None:
    shell.refuses(*command(option, 0), says=f"{option} 0", code=2)


def test_batches_have_no_more_tokens_than_asked_for(
    shell: Any, command: Any, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text.write_text(shell.sentences * 10)
    shapes: set[tuple[int, ...]] = set()
    forward = GPT2LMHeadModel.forward

    def seen(self: Any, input_ids: Tensor, **keywords: Any) -> Any:
        shapes.add(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **keywords)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", seen)
    assert shell(*command("--batch_tokens", 130)) == 0
    assert (2, 64) in shapes
    assert max(rows * columns for rows, columns in shapes) == 128
    shapes.clear()
    Path("out").rename("before")
    assert shell(*command("--batch_tokens", 40)) == 0
    assert (1, 40) in shapes
    assert max(rows * columns for rows, columns in shapes) == 40


def test_no_more_tokens_are_measured_than_asked_for(shell: Any, gpt2: Path, text: Path) -> None:
    text.write_text(shell.sentences * 10)
    words = ("compress", gpt2, "out", "--method", "low_rank", "--rank", 3, "--text", text)
    assert shell(*words, "--max_tokens", 100) == 0
    assert "the first 100 of the " in shell.printed()
    assert shell.read("out/report.json")["text"]["measured"] == 100


def test_a_tokenizer_of_another_model(shell: Any, command: Any, gpt2: Path) -> None:
    model = GPT2LMHeadModel(gpt2_config(vocab_size=shell.vocab_size))
    with torch.no_grad():
        # It is sure of what never comes.
        model.transformer.ln_f.bias.fill_(10.0)
        model.transformer.wte.weight.normal_()
    model.save_pretrained("other")
    shell.refuses(*command("--tokenizer", gpt2, source="other"), says="--tokenizer")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_out_of_memory(error: Exception, shell: Any, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(compressing, "compress", full)
    monkeypatch.setattr(sweeping.Placement, "running", full)
    shell.refuses(*command(), says="--batch_tokens")
    shell.refuses(*command("--batch_tokens", 64), says="--batch_tokens 64")


def test_other_errors_of_torch_stay_what_they_are(
    shell: Any, gpt2: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(compressing, "compress", wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        shell("compress", gpt2, "out", "--method", "low_rank", "--rank", 3, "--text", text)


def test_memory_is_said_in_advance(shell: Any, command: Any) -> None:
    assert shell(*command()) == 0
    assert "GB for the model and at least " in shell.printed()


def test_a_ratio_against_what_the_files_hold(shell: Any, gpt2: Path) -> None:
    GPT2LMHeadModel.from_pretrained(gpt2, dtype=torch.bfloat16).save_pretrained("half")
    words = ("--method", "low_rank", "--rank", 3)
    assert shell("compress", "half", "wide", *words, "--dtype", "float32") == 0
    assert "stored in bfloat16" in shell.printed()
    report = shell.read("wide/report.json")
    assert report["ratio_as_stored"] == pytest.approx(report["tables"][0]["ratio"] / 2)
    assert shell("compress", "half", "out", *words) == 0
    assert "stored in" not in shell.printed()
    torch.save({"state_dict": {"a.weight": torch.randn(50, 8, dtype=torch.bfloat16)}}, "half.ckpt")
    assert shell("compress", "half.ckpt", "wide.ckpt", *words, "--dtype", "float32") == 0
    assert shell.read("wide.report.json")["stored_dtype"] == "bfloat16"


def test_a_dtype_is_computed_in(shell: Any, gpt2: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: set[torch.dtype] = set()
    forward = nn.LayerNorm.forward

    def seen(self: nn.LayerNorm, hidden: Tensor) -> Tensor:
        dtypes.add(hidden.dtype)
        return forward(self, hidden)

    monkeypatch.setattr(nn.LayerNorm, "forward", seen)
    words = ("compress", gpt2, "out", "--ratio", 1.4, "--text", text)
    assert shell(*words, "--dtype", "float16") == 0
    assert dtypes == {torch.float16}
    assert shell.read("out/report.json")["perplexity"]["compressed"] > 1
