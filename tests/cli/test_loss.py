"""`embcompress compress` by what the loss grows by: statistics of a text or from a file, limits of the perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_embcompress import compress, plan_of
from lightning_embcompress.calibration.statistics import Statistics
from toys import falling_table


def test_a_text_says_what_errors_cost(shell: Any, gpt2: Path, text: Path) -> None:
    assert shell("compress", gpt2, "out", "--ratio", 2, "--text", text, "--statistics", "cost.safetensors") == 0
    printed = shell.printed()
    assert "say what errors cost" in printed
    assert "The loss was predicted to grow by" in printed
    statistics = Statistics.load("cost.safetensors")
    assert statistics.num_targets > 200
    report = shell.read("out/report.json")
    assert report["statistics"] == {"targets": statistics.num_targets, "file": "cost.safetensors"}
    assert report["token_counts"] == "text"
    (table,) = report["tables"]
    assert table["predicted_loss"] > 0
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    compress(model, ratio=2, statistics=statistics)
    written = AutoModelForCausalLM.from_pretrained("out")
    assert plan_of(written) == plan_of(model)
    torch.testing.assert_close(dict(written.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    # Read the second time: the text is not needed, and neither is another method refused it.
    words = ("--method", "auto", "--ratio", 2, "--statistics", "cost.safetensors")
    assert shell("compress", gpt2, "again", *words) == 0
    assert "Zipf" not in shell.printed()
    assert shell.read("again/report.json")["token_counts"] == "statistics"
    # As it was before it was known what errors cost.
    assert shell("compress", gpt2, "paper", "--ratio", 2, "--text", text, "--method", "group_reduce") == 0
    assert shell.read("paper/report.json")["statistics"] is None
    assert shell.read("paper/report.json")["tables"][0]["predicted_loss"] is None


def test_the_smallest_within_a_limit(shell: Any, gpt2: Path, text: Path) -> None:
    words = ("--max_perplexity_increase", "1%", "--text", text)
    assert shell("compress", gpt2, "out", *words) == 0
    assert "perplexity +1.00%" in shell.printed()
    report = shell.read("out/report.json")
    perplexity = report["perplexity"]
    assert perplexity["compressed"] / perplexity["dense"] - 1 <= 0.01
    assert report["tables"][0]["ratio"] > 1.5


def test_a_checkpoint_with_a_file_of_statistics(shell: Any, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(200, 16), torch.nn.Linear(16, 200))
    table = model[0].weight.detach().copy_(falling_table(200, 16))
    moments = table.T.double() @ table.double() / 200
    statistics = Statistics(
        torch.arange(200, 0, -1),
        hidden={"1": moments},
        hidden_mean={"1": table.double().mean(dim=0)},
        gradients={"0": moments.clone()},
        num_targets=500,
    )
    statistics.save("cost.safetensors")
    torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0"}, "model.ckpt")
    assert shell("compress", "model.ckpt", "out.ckpt", "--size", "9kB", "--statistics", "cost.safetensors") == 0
    compress(model, size="9kB", statistics=statistics)
    written = torch.load("out.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(dict(written), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ratio 2 --max_perplexity_increase 1%", "give exactly one of ratio, size, bits_per_weight"),
        ("--max_perplexity_increase none", "max_perplexity_increase must be an increase of the perplexity"),
        ("--max_perplexity_increase 1%", "--max_perplexity_increase 1% measures the perplexity: give a text"),
        ("--max_perplexity_increase 1% --text text.txt --counts_only", "without --counts_only"),
        ("--max_perplexity_increase 1% --text text.txt --method low_rank", "predicted for method 'low_rank'"),
        ("--ratio 2 --method auto", "--method auto has to know what errors cost: give a text with --text"),
        ("--ratio 2 --statistics absent", "--statistics absent: there is no such file"),
        ("--ratio 2 --text text.txt --statistics no/folder", "--statistics no/folder: there is no folder 'no'"),
        ("--ratio 2 --method group_reduce --statistics text.txt", "--statistics is for methods that weigh errors"),
    ],
)
def test_a_wrong_command_line(words: str, message: str, shell: Any, gpt2: Path, text: Path) -> None:
    shell.refuses("compress", gpt2, "out", *words.split(), says=message, code=2)


def test_statistics_that_cannot_be_used(shell: Any, gpt2: Path, text: Path) -> None:
    Statistics(torch.arange(300), gradients={"wte": torch.eye(32, dtype=torch.float64)}).save("other")
    for file, message in (
        ("text.txt", "'text.txt' cannot be read as statistics"),
        ("other", "the statistics have no moments of table 'transformer.wte'"),
    ):
        shell.refuses("compress", gpt2, "out", "--ratio", 2, "--statistics", file, says=message)
