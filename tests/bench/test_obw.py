"""The bench at the size of the One Billion Word benchmark, at small sizes, and what it counts at the full one."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_embcompress.bench import obw
from lightning_embcompress.bench.obw import ObwBench, fill_table, recurrent_parameters, run_obw_bench, zipf_metric
from lightning_embcompress.cli import main as cli
from lightning_embcompress.methods.registry import LowRank

SMALL: dict[str, Any] = {"vocab_size": 3000, "dim": 32, "cells": 64, "ratio": 12.0, "rows": 3000}
SMALL |= {"tokens": 50, "rounds": 1}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return run_obw_bench(ObwBench(**SMALL | {"options": {"groups": 2, "refine_rounds": 1}}))


def test_bytes_are_those_of_files_and_add_up(report: dict[str, Any]) -> None:
    for entry in report["tables"]:
        assert entry["dense_bytes"] == 3000 * 32 * 4
        # The structure beside the tensors makes the difference.
        assert entry["file_bytes"] <= entry["stored_bytes"] <= entry["file_bytes"] + 4000
        assert entry["ratio"] == entry["dense_bytes"] / entry["stored_bytes"] >= 12
    both, recurrent, model = report["both"], report["recurrent"], report["model"]
    assert both["stored_bytes"] == sum(entry["stored_bytes"] for entry in report["tables"])
    assert both["ratio"] == pytest.approx(2 * 3000 * 32 * 4 / both["stored_bytes"])
    lstm = torch.nn.LSTM(32, 64, 2, proj_size=32)
    assert recurrent["parameters"] == sum(parameter.numel() for parameter in lstm.parameters())
    assert model["dense_bytes"] == both["dense_bytes"] + 4 * (recurrent["parameters"] + 3000)
    beside = model["stored_bytes"] - both["stored_bytes"]
    assert 2 * (recurrent["parameters"] + 3000) <= beside <= 2 * (recurrent["parameters"] + 3000) + 2000
    assert json.loads(json.dumps(report)) == report


def test_loss_of_all_rows_is_that_of_the_metric() -> None:
    bench = ObwBench(**SMALL | {"method": "weighted_low_rank"})
    table = torch.empty(3000, 32)
    fill_table(table, 0)
    metric, counts = zipf_metric(3000, 32, 0)
    factors = LowRank.decompose(table, bench.max_bytes, counts, metric=metric)
    wanted = metric.loss(table, factors.materialize())
    (first, _) = run_obw_bench(bench)["tables"]
    assert first["measured_loss"] == pytest.approx(wanted, rel=1e-4)
    # Some rows stand for all.
    (drawn, _) = run_obw_bench(ObwBench(**SMALL | {"method": "weighted_low_rank", "rows": 500}))["tables"]
    assert drawn["measured_loss"] == pytest.approx(wanted, rel=0.1)


def test_predicted_loss_is_measured(report: dict[str, Any]) -> None:
    for entry in report["tables"]:
        assert entry["predicted_loss"] == pytest.approx(entry["measured_loss"], rel=0.1)
        assert entry["seconds"] > 0


def test_times_are_of_products_of_the_same_table(report: dict[str, Any]) -> None:
    embedding, softmax = report["tables"]
    for entry in (embedding, softmax):
        assert entry["gram_products"] == entry["seconds"] / entry["gram_seconds"]
        assert entry["gram_flops"] == 2 * 3000 * 32 * 32 / entry["gram_seconds"]
        rows = {row["name"]: row for row in entry["logits"]}
        assert rows["dense torch"]["flops"] == 2 * 3000 * 32
        assert rows["compressed"]["ratio"] == rows["dense torch"]["seconds"] / rows["compressed"]["seconds"]
        assert 0 < rows["compressed"]["error"] < 1
        assert entry["rates"]["exponentials"] > 0
    assert "loss" not in embedding
    (loss,) = softmax["loss"]
    assert loss["name"] == "compressed, fused_cross_entropy"
    assert loss["exponentials"] == 2 * 50 * 3000
    assert loss["error"] < 1e-4
    assert (loss["peak_bytes"] is None) == (sys.platform != "linux")
    assert report["machine"]["threads"] == torch.get_num_threads()


def test_tables_differ_and_can_be_made_again(tmp_path: Path) -> None:
    given = SMALL | {"method": "weighted_low_rank"}
    first, second = run_obw_bench(ObwBench(**given))["tables"]
    assert first["measured_loss"] != second["measured_loss"]
    again = run_obw_bench(ObwBench(**given), mapped_in=tmp_path)
    assert [entry["measured_loss"] for entry in again["tables"]] == [first["measured_loss"], second["measured_loss"]]
    assert list(tmp_path.iterdir()) == []
    other = run_obw_bench(ObwBench(**given | {"seed": 5}))
    assert other["tables"][0]["measured_loss"] != first["measured_loss"]


def test_tables_have_a_falling_spectrum_of_each_frequency_and_zipfs_counts() -> None:
    table = torch.empty(20_000, 64)
    shares: list[float] = []
    fill_table(table, 0, shares.append)
    assert sum(shares) == pytest.approx(1)
    first, last = table[:1000].std(dim=0), table[-1000:].std(dim=0)
    for found in (first, last):
        assert found[:8].mean() / found[-8:].mean() > 10
    # Other directions lead for rare words.
    assert (first / last).max() > 1.12
    metric, counts = zipf_metric(4000, 64, 0)
    assert float(counts[0]) / float(counts[99]) == pytest.approx(100, rel=1e-4)
    assert float(counts.sum()) == pytest.approx(829_250_940, rel=1e-4)
    assert float(metric.weights.sum()) == pytest.approx(1)


def test_the_full_size_is_as_published_and_fits_the_default() -> None:
    bench = ObwBench()
    # Two layers of four gates of 8,192 cells that read 1,024 inputs and 1,024 outputs, projections, and biases.
    weights = 2 * (4 * 8192 * 2048 + 8192 * 1024)
    assert recurrent_parameters(bench) == weights + 2 * 2 * 4 * 8192
    assert bench.dense_bytes / bench.max_bytes >= 26
    # What the tables take at 26x, and everything else as float16.
    beside = recurrent_parameters(bench) + bench.vocab_size
    assert (2 * bench.dense_bytes + 4 * beside) / (2 * bench.max_bytes + 2 * beside + 2000) > 12.8


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"vocab_size": 0}, "vocab_size must be 1 or more"),
        ({"cells": 32}, "cells must be more than dim=32"),
        ({"ratio": 1.0}, "ratio must be above 1"),
        ({"ratio": math.nan}, "ratio must be above 1"),
        ({"ratio": 1e6}, "ask for less"),
        ({"method": "transform_codng"}, "transform_coding"),
        ({"method": "weighted_low_rank", "options": {"groups": 5}}, "groups"),
        ({"rows": 0}, "rows must be 1 or more"),
        ({"tokens": 0}, "tokens must be 1 or more"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_made(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ObwBench(**SMALL | given)


def _words(**given: Any) -> list[str]:
    return ["bench", "obw", *(f"--{name}={value}" for name, value in (SMALL | given).items())]


def test_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "obw.json"
    words = [*_words(method="group_reduce", groups=3, variant="loss"), "--option", "refine_rounds=1"]
    words += ["--report", str(file)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    for said in ("whole model", "Gram products", "softmax: loss of 50 tokens", "G exponentials take"):
        assert said in printed
    assert f"Written: {file}" in printed
    written = json.loads(file.read_text())
    assert written["bench"]["options"] == {"groups": 3, "variant": "loss", "refine_rounds": 1}
    assert written["bench"]["method"] == "group_reduce"
    assert written["both"]["ratio"] >= 12
    assert f"{written['model']['ratio']:.2f}x" in printed
    # What there is is kept, unless it is said.
    before = file.stat().st_mtime_ns
    assert cli.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert file.stat().st_mtime_ns == before
    assert cli.main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench"], "NAME"),
        (["bench", "ptb"], "obw"),
        (_words(ratio=1e6), "ask for less"),
        (_words(varant="loss"), "unknown option 'varant'"),
        ([*_words(), "--report", "no/such/folder.json"], "there is no folder"),
        ([*_words(), "--mapped-in", "no/such"], "is no folder"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing is made")

    monkeypatch.setattr(obw, "fill_table", never)
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "obw", "--help"])
    assert left.value.code == 0
    assert "--vocab_size" in capsys.readouterr().out
