"""Perplexity of a trained model at equal stored bytes: `pytest tests/benchmarks -k equal_bytes -s --benchmark-only`."""

from __future__ import annotations

import collections
import copy
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_embcompress.plan import compress

pytestmark = pytest.mark.timeout(1800)

SHARED = Path(__file__).parents[3] / "shared" / "data"
STREAMS, STEPS, WINDOWS = 40, 35, 40

METHODS = {
    "low_rank": ("low_rank", {}),
    "weighted_low_rank": ("weighted_low_rank", {}),
    **{
        f"group_reduce, {groups} groups, {rounds} rounds": (
            "group_reduce",
            {"groups": groups, "refine_rounds": rounds},
        )
        for groups in (5, 10, 20)
        for rounds in (0, 5)
    },
}


class Model(nn.Module):
    def __init__(self, vocab_size: int, dim: int, layers: int) -> None:
        super().__init__()
        self.encoder = nn.Embedding(vocab_size, dim)
        self.lstm = nn.LSTM(dim, dim, layers)
        self.decoder = nn.Linear(dim, vocab_size)


def words(split: str) -> Iterator[str]:
    with (SHARED / "wikitext-2" / f"{split}.txt").open(encoding="utf-8") as lines:
        for line in lines:
            yield from line.split()
            yield "<eos>"


@torch.no_grad()
def perplexity(model: Model, text: Tensor) -> float:
    state, total, count = None, 0.0, 0
    for start in range(0, len(text) - 1, STEPS):
        targets = text[start + 1 : start + 1 + STEPS]
        hidden, state = model.lstm(model.encoder(text[start : start + len(targets)]), state)
        logits = model.decoder(hidden)
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    return math.exp(total / count)


@pytest.mark.parametrize("ratio", [4.0, 8.0])
def test_perplexity_at_equal_bytes(benchmark, ratio: float) -> None:
    file = SHARED / "models" / "wikitext2_lstm256.pt"
    if not file.is_file():
        pytest.skip(f"no trained model at {file}")
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    saved = torch.load(file, weights_only=True)
    config = saved["config"]
    model = Model(config["vocab_size"], config["dim"], config["layers"]).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in saved["state_dict"].items()})

    occurrences = collections.Counter(words("train"))
    vocabulary = sorted(occurrences, key=lambda word: (-occurrences[word], word))
    counts = torch.tensor([occurrences[word] for word in vocabulary])
    index = {word: position for position, word in enumerate(vocabulary)}
    ids = torch.tensor([index[word] for word in words("valid")])
    text = ids[: len(ids) // STREAMS * STREAMS].view(STREAMS, -1).T.contiguous()[: STEPS * WINDOWS]

    dense = perplexity(model, text)
    sys.stdout.write(f"\n{ratio}x of both tables, {text.numel()} tokens of validation text, dense {dense:.2f}\n")
    results = {}

    def run() -> None:
        for name, (method, options) in METHODS.items():
            smaller = copy.deepcopy(model)
            plan = compress(smaller, method, ratio=ratio, token_counts=counts, **options)
            assert plan.ratio >= ratio
            results[name] = perplexity(smaller, text)
            sys.stdout.write(f"  {name}: {results[name]:.2f} ({results[name] / dense - 1:+.1%}), {plan.ratio:.3f}x\n")
            sys.stdout.flush()

    benchmark.pedantic(run, rounds=1)
    torch.set_num_threads(threads)
    best = min(value for name, value in results.items() if name.startswith("group_reduce"))
    assert best < results["weighted_low_rank"] < results["low_rank"]
