"""What statistics cost beside the passes through the model that they need, both sides in turns in one process.

Run `pytest tests/benchmarks -k statistics -s --benchmark-only`.
"""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
from measure import PeakMemory
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import collect_statistics

pytestmark = pytest.mark.timeout(1800)

VOCAB_SIZE, DIM, SEQUENCES, STEPS, ROUNDS, BATCHES = 33_278, 256, 20, 35, 4, 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCAB_SIZE, DIM)
        self.lstm = nn.LSTM(DIM, DIM, 2, batch_first=True)
        self.decoder = nn.Linear(DIM, VOCAB_SIZE)


def loss_fn(model: Model, ids: Tensor, rows: Tensor | None = None) -> Tensor:
    rows = model.encoder(ids[:, :-1]) if rows is None else rows
    logits = model.decoder(model.lstm(rows)[0])
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def test_the_cost_of_statistics(benchmark) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = Model().eval()
    batches = torch.randint(VOCAB_SIZE, (BATCHES, SEQUENCES, STEPS + 1))

    def passes() -> None:
        for ids in batches:
            rows = model.encoder(ids[:, :-1]).detach().requires_grad_()
            torch.autograd.grad(loss_fn(model, ids, rows), rows)

    sides = {"passes": passes, "statistics": lambda: collect_statistics(model, batches, loss_fn)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, int] = {}

    def run() -> None:
        for name, side in sides.items():
            with PeakMemory() as memory:
                side()
            peaks[name] = memory.bytes
        for _ in range(ROUNDS):
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                seconds[name].append((time.perf_counter() - start) / BATCHES)

    benchmark.pedantic(run, rounds=1)
    torch.set_num_threads(threads)
    for name in sides:
        sys.stdout.write(f"\n{name}: {min(seconds[name]):.3f} s a batch, {peaks[name] / 1e6:.0f} MB at most\n")
    assert min(seconds["statistics"]) < 1.3 * min(seconds["passes"])
    # Sums over the vocabulary and the dimensions, and logits in small pieces; the logits alone take 93 MB.
    assert peaks["statistics"] < peaks["passes"] + 40e6
