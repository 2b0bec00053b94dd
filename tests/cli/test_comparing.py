"""`embcompress compare`: every method on one model in files."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_embcompress.calibration.statistics import collect_statistics
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.data.blocks import TokenBlocks


def test_every_line_is_a_measured_perplexity(shell: Any, gpt2: Path, text: Path) -> None:
    methods = ["low_rank", "group_reduce:variant=paper,groups=3", "tensor_train", "transform_coding"]
    assert shell("compare", gpt2, "out", "--text", text, "--methods", *methods, "--ratios", 1.5, "--bits", 4) == 0
    printed = shell.printed()
    assert "At equal stored bytes" in printed
    assert "Written: out/comparison.csv, out/comparison.json" in printed
    lines = json.loads(Path("out/comparison.json").read_text())
    found = {(line["method"], line["asked_ratio"] and round(line["asked_ratio"], 1)): line for line in lines}
    assert set(found) == {("dense", None), ("int4", 6.7)} | {
        (method, ratio) for method in methods for ratio in (1.5, 6.7)
    }
    # The last tenth of the text, by transformers' own loss.
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    ids = AutoTokenizer.from_pretrained(gpt2)(text.read_text()).input_ids
    ids.append(0)
    counted = len(ids) * 9 // 10
    counts = torch.bincount(torch.tensor(ids[:counted]), minlength=300)
    assert found["dense", None]["perplexity"] == pytest.approx(_perplexity(model, ids[counted - 1 :]), rel=1e-4)
    blocks = TokenBlocks(np.array(ids[:counted]), 64)
    batches = [{name: value[None] for name, value in blocks[index].items()} for index in range(len(blocks))]
    statistics = collect_statistics(model, batches, token_counts=counts)
    copy = deepcopy(model)
    compress(model, "group_reduce", ratio=1.5, groups=3, variant="paper", token_counts=counts)
    compress(copy, "transform_coding", ratio=1.5, statistics=statistics)
    for method, expected in (("group_reduce:variant=paper,groups=3", model), ("transform_coding", copy)):
        line = found[method, 1.5]
        assert line["perplexity"] == pytest.approx(_perplexity(expected, ids[counted - 1 :]), rel=1e-4)
        assert line["ratio"] >= 1.5


def _perplexity(model: Any, ids: list[int]) -> float:
    """Blocks of the model's 64 positions, of which neighbours share a token."""
    total = count = 0.0
    for start in range(0, len(ids) - 1, 63):
        block = torch.tensor([ids[start : start + 64]])
        with torch.no_grad():
            total += float(model(block, labels=block).loss) * (block.shape[1] - 1)
        count += block.shape[1] - 1
    return math.exp(total / count)


def test_a_text_to_count_leaves_all_of_the_other_to_measure(shell: Any, gpt2: Path, text: Path) -> None:
    Path("other.txt").write_text(shell.sentences[:400])
    options = ("--methods", "weighted_low_rank", "--ratios", 2, "--bits", "--max_tokens", 50)
    assert shell("compare", gpt2, "out", "--text", "other.txt", "--counts_text", text, *options) == 0
    assert "perplexity on 50 tokens" in shell.printed()
    assert len(json.loads(Path("out/comparison.json").read_text())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "low_rang"], "unknown method 'low_rang' (did you mean 'low_rank'"),
        (["--ratios", "0.5"], "ratios must be above 1"),
        (["--tables", "lm_heat"], "no module 'lm_heat'"),
        (["--text", "nothing.txt"], "nothing.txt"),
    ],
)
def test_mistakes_write_nothing(shell: Any, gpt2: Path, text: Path, options: list[str], message: str) -> None:
    assert shell("compare", gpt2, "out", "--text", text, *options) in (1, 2)
    assert message in shell.error()
    assert not Path("out").exists()


def test_a_compressed_model_is_refused(shell: Any, gpt2: Path, text: Path) -> None:
    assert shell("compress", gpt2, "small", "--ratio", 1.4, "--method", "low_rank") == 0
    assert shell("compare", "small", "out", "--text", text) == 1
    assert "is compressed already (transformer.wte)" in shell.error()
