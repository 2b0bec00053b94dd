"""`embcompress sweep`: perplexity against stored bytes of a model in files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from lightning_embcompress.metrics.frequency_bands import band_of_tokens

OPTIONS = ("--methods", "low_rank", "group_reduce:groups=3", "--ratios", 1.5, 3, "--bits", 8, "--bands", 10, 100)


def test_points_are_those_of_the_model_by_hand(shell: Any, gpt2: Path, text: Path) -> None:
    assert shell("sweep", gpt2, "out", "--text", text, *OPTIONS) == 0
    printed = shell.printed()
    assert "Perplexity by how frequent the token is" in printed
    assert "Written: out/sweep.json, out/sweep.csv" in printed
    assert {"sweep.json", "sweep.csv"} <= {path.name for path in Path("out").iterdir()}
    record = json.loads(Path("out/sweep.json").read_text())
    dense = record["points"]["dense"]
    # The last tenth of the text, by transformers' own logits.
    ids = [*AutoTokenizer.from_pretrained(gpt2)(text.read_text()).input_ids, 0]
    counted = len(ids) * 9 // 10
    band, names = band_of_tokens(torch.bincount(torch.tensor(ids[:counted]), minlength=300), (10, 100))
    losses, targets = _losses(AutoModelForCausalLM.from_pretrained(gpt2), ids[counted - 1 :])
    assert dense["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert record["subject"]["tokens measured"] == len(ids) - counted
    for index, name in enumerate(names):
        inside = band[targets] == index
        assert record["subject"]["targets by band"][name] == int(inside.sum())
        expected = math.exp(losses[inside].mean()) if inside.any() else None
        assert dense["bands"][name] == (expected and pytest.approx(expected, rel=1e-5))
    with Path("out/sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(record["points"]) == 6
    assert float(lines[0]["perplexity_rank_1-10"]) == dense["bands"]["rank_1-10"]


def _losses(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of the model's 64 positions, of which neighbours share a token."""
    losses = []
    for start in range(0, len(ids) - 1, 63):
        block = torch.tensor(ids[start : start + 64])
        with torch.no_grad():
            logits = model(block[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.double(), block[1:], reduction="none"))
    return torch.cat(losses), torch.tensor(ids[1:])


def test_a_second_start_goes_on_and_adds(shell: Any, gpt2: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is there when a sweep was killed at its start.
    Path("out").mkdir()
    Path("out/.lock").touch()
    assert shell("sweep", gpt2, "out", "--text", text, *OPTIONS) == 0
    first = json.loads(Path("out/sweep.json").read_text())["points"]
    shell.printed()
    with monkeypatch.context() as patch:
        patch.setattr("lightning_embcompress.cli.text.TokenizedText.perplexity", None)
        assert shell("sweep", gpt2, "out", "--text", text, *OPTIONS) == 0
    assert "Written: out/sweep.json" in shell.printed()
    assert json.loads(Path("out/sweep.json").read_text())["points"] == first
    assert shell("sweep", gpt2, "out", "--text", text, *OPTIONS, "--bits", 4, "--ratios", 2) == 0
    printed = shell.printed()
    assert "int4 at 6.67x: " in printed
    assert "int8 at " not in printed
    later = json.loads(Path("out/sweep.json").read_text())["points"]
    assert later.keys() - first.keys() == {"int4", "low_rank at 2.0x", "group_reduce:groups=3 at 2.0x"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "low_rang"], "unknown method 'low_rang' (did you mean 'low_rank'"),
        (["--ratios", "0.5"], "ratios must be above 1"),
        (["--bits", "1"], "bits must be"),
        (["--bands", "10", "5"], "increasing ranks"),
        (["--max_tokens", "0"], "--max_tokens 0: must be 1 or more"),
        (["--tables", "lm_heat"], "no module 'lm_heat'"),
        (["--text", "nothing.txt"], "nothing.txt"),
    ],
)
def test_mistakes_write_nothing(shell: Any, gpt2: Path, text: Path, options: list[str], message: str) -> None:
    assert shell("sweep", gpt2, "out", "--text", text, *options) in (1, 2)
    assert message in shell.error()
    assert not Path("out").exists()


def test_other_folders_models_and_texts_are_refused(shell: Any, gpt2: Path, text: Path) -> None:
    Path("full").mkdir()
    Path("full/letter.txt").write_text("Dear all")
    for command in ("sweep", "compare"):
        assert shell(command, gpt2, "full", "--text", text) == 2
        assert shell.error() == "FOLDER 'full' is not empty: choose another"
    assert shell("sweep", gpt2, "text.txt", "--text", text) == 2
    assert "is a file" in shell.error()
    small = ("--methods", "low_rank", "--ratios", 2, "--bits", 8)
    assert shell("sweep", gpt2, "out", "--text", text, *small) == 0
    shell.printed()
    before = Path("out/sweep.json").read_text()
    torch.manual_seed(1)
    GPT2LMHeadModel(shell.config()).save_pretrained("other")
    Path("short.txt").write_text(shell.sentences[:600])
    for words, what in [
        (["other", "out", "--text", text, "--tokenizer", gpt2], "(different: weights)"),
        (
            [gpt2, "out", "--text", "short.txt", "--counts_text", text],
            "(different: token counts, text, tokens measured, targets by band)",
        ),
        ([gpt2, "out", "--text", text, "--max_tokens", 20], "(different: text, tokens measured, targets by band)"),
        ([gpt2, "out", "--text", text, "--bands", 7], "(different: targets by band)"),
    ]:
        assert shell("sweep", *words, *small) == 1
        error = shell.error()
        assert what in error
        assert "choose another folder" in error
    assert Path("out/sweep.json").read_text() == before


def test_a_compressed_model_is_refused(shell: Any, gpt2: Path, text: Path) -> None:
    assert shell("compress", gpt2, "small", "--ratio", 1.4, "--method", "low_rank") == 0
    assert shell("sweep", "small", "out", "--text", text) == 1
    assert "is compressed already (transformer.wte): sweep over the model it was made of" in shell.error()
