"""The scripts and measures of the benchmarks themselves, at small sizes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import obw
import pytest
import torch
from made import VOCABULARY_FILE, fill_table, make_corpus, zipf_metric
from measure import PeakMemory, Side, in_turns

from lightning_embcompress.data import OneBillionWord
from lightning_embcompress.methods.registry import LowRank


def test_tables_of_the_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "obw.json"
    small = {"vocab_size": 3000, "dim": 32, "cells": 64, "ratio": 12.0, "rows": 3000}
    found = obw.tables(**small, options={"groups": 2, "refine_rounds": 1}, report=file)
    assert json.loads(file.read_text()) == found
    assert found["recurrent_parameters"] == sum(p.numel() for p in torch.nn.LSTM(32, 64, 2, proj_size=32).parameters())
    for entry in found["tables"]:
        assert entry["ratio"] == 3000 * 32 * 4 / entry["stored_bytes"] >= 12
        assert entry["predicted_loss"] == pytest.approx(entry["measured_loss"], rel=0.1)
    rest = found["recurrent_parameters"] + 3000
    beside = found["model"]["stored_bytes"] - sum(entry["stored_bytes"] for entry in found["tables"])
    assert 2 * rest <= beside <= 2 * rest + 2000
    # The loss that is measured row by row is that of the metric.
    entry = obw.tables(**small, method="weighted_low_rank")["tables"][0]
    table, (metric, counts) = fill_table(torch.empty(3000, 32)), zipf_metric(3000, 32)
    factors = LowRank.decompose(table, table.nbytes // 12, counts, metric=metric)
    assert entry["measured_loss"] == pytest.approx(metric.loss(table, factors.materialize()), rel=1e-4)


def test_made_tables_have_a_falling_spectrum_of_each_frequency() -> None:
    table = fill_table(torch.empty(20_000, 64))
    first, last = table[:1000].std(dim=0), table[-1000:].std(dim=0)
    for deviations in (first, last):
        assert deviations[:8].mean() / deviations[-8:].mean() > 10
    # Other directions lead for rare words.
    assert (first / last).max() > 1.12


def test_made_text_is_read_by_the_data_module(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "corpus"
    make_corpus(folder, 300, 30_000)
    data = OneBillionWord(folder, vocabulary_file=VOCABULARY_FILE, cache_dir=tmp_path / "cache", batch_size=4)
    assert data.vocab_size == 300
    counts = data.token_counts
    # Sentences are ended by the token that begins them, and no word is unknown.
    assert counts[1] == 0
    assert int(counts.sum()) == pytest.approx(30_000, rel=0.01)
    words = counts[2:].double()
    zipf = 1 / torch.arange(1, 299, dtype=torch.float64)
    zipf *= words.sum() / zipf.sum()
    assert bool(((words - zipf).abs() < 6 * zipf.sqrt() + 1).all())
    data.setup("fit")
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (4, 20)
    with pytest.raises(ValueError, match="folder"):
        make_corpus(folder, 300, 30_000)


def test_ratios_are_of_the_same_round_and_memory_is_beyond_gradients() -> None:
    leaf = torch.zeros(10_000_000, requires_grad=True)

    def work() -> None:
        # More than a process that has run other tests keeps of what it freed, which would not count.
        temporary = torch.ones(40_000_000)
        leaf.grad = torch.ones(10_000_000)
        del temporary

    # Products, which take time of the processor: waiting does not count.
    square = torch.randn(512, 512)
    products = {"four": Side(lambda: [square @ square for _ in range(4)]), "one": Side(lambda: square @ square)}
    sides = {**products, "work": Side(work, [leaf])}
    found = in_turns(sides, 3)
    assert found["four"].ratio == 1
    assert 2 < found["one"].ratio < 8
    assert 150e6 < found["work"].peak_bytes < 170e6
    assert leaf.grad is None
    product = in_turns({"product": Side(lambda: torch.ones(100, 200) @ torch.ones(200, 300), exponentials=10)}, 1)
    assert product["product"].flops == 2 * 100 * 200 * 300
    assert product["product"].bound_seconds > product["product"].exponential_seconds > 0


@pytest.mark.parametrize("mapped", [True, False])
def test_mapped_files_count_where_they_are_to(mapped: bool, tmp_path: Path) -> None:
    with PeakMemory(mapped) as memory:
        torch.from_file(str(tmp_path / "table"), True, 5_000_000).fill_(1)
        time.sleep(0.02)
    assert (memory.bytes > 15e6) == mapped
