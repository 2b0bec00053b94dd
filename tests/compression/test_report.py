"""What is written and printed about a compressed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.plan import compress, plan_of
from lightning_embcompress.compression.report import show_plan, show_tasks, table_report, write_report
from lightning_embcompress.compression.tasks import plan
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.methods.registry import METHODS, GroupReduceConfig
from toys import LanguageModel


def _model(tied: bool = False) -> LanguageModel:
    return LanguageModel(1000, 16, tied=tied)


def _compressed(tied: bool = False, method: str = "group_reduce") -> LanguageModel:
    model = _model(tied)
    chosen = METHODS[method]
    # Not every method reaches every ratio.
    smallest = chosen.factorization.smallest_bytes(1000, 16, 4, chosen.config())
    compress(model, method, ratio=min(2, 64_000 / smallest), token_counts=torch.arange(1000, 0, -1))
    return model


@pytest.mark.parametrize("method", ["tensor_train", "transform_coding"])
def test_report_has_the_promised_keys(method: str, tmp_path: Path) -> None:
    model = _compressed(method=method)
    perplexity = {"dense": 9.5, "compressed": 10.0, "refined": [{"epoch": 2, "value": 9.75}], "final": None}
    path = tmp_path / "run" / "report.json"
    for given in ({}, {**perplexity, "split": "validation"}):
        # The second takes the place of the first.
        write_report(path, model, given)
    report = json.loads(path.read_text())
    assert set(report) == {"tables", "model", "perplexity"}
    assert report["perplexity"] == {**perplexity, "split": "validation"}
    assert report["model"] == model_bytes(model)
    assert [table["name"] for table in report["tables"]] == ["encoder", "decoder"]
    for table, planned in zip(report["tables"], plan_of(model).tables, strict=True):
        assert table["method"] == method
        assert table["shape"] == [1000, 16]
        assert table["dense_bytes"] == 64_000
        assert table["stored_bytes"] == planned.stored_bytes < 64_000
        assert table["ratio"] == pytest.approx(64_000 / planned.stored_bytes)
        assert table["bits_per_weight"] == pytest.approx(8 * planned.stored_bytes / 16_000)
        values = model.get_submodule(table["name"]).factorization.num_values
        assert table["parameter_ratio"] == pytest.approx(16_000 / values)
        assert table["weighted_error"] == planned.weighted_error
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_report_of_a_diverged_run_is_json(value: float, tmp_path: Path) -> None:
    write_report(tmp_path / "report.json", _compressed(), {"dense": 3.0, "refined": [{"epoch": 1, "value": value}]})

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert report["perplexity"] == {"dense": 3.0, "refined": [{"epoch": 1, "value": None}]}


def test_tables_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    model = _model(tied=True)
    show_tasks(plan(model, GroupReduceConfig(), Budget(ratio=2), is_preview=True))
    before = capsys.readouterr().out
    for part in ("encoder = decoder", "group_reduce", "1,000 x 16", "0.064", "0.032", "2.00x", "16.00"):
        assert part in before
    compress(model, "group_reduce", ratio=2, token_counts=torch.arange(1000, 0, -1), groups=8)
    (table,) = plan_of(model).tables
    (entry,) = table_report(model)
    assert (entry["name"], entry["modules"]) == ("encoder", ["encoder", "decoder"])
    show_plan(model, "Compressed at epoch 3")
    after = capsys.readouterr().out
    assert table.weighted_error is not None
    parts = ("Compressed at epoch 3", f"{table.ratio:.2f}x", "8 groups", "whole model", f"{table.weighted_error:.4f}")
    for part in parts:
        assert part in after
    ranks = table.spec["ranks"]
    shown = f"8 groups, ranks {', '.join(map(str, ranks[:6]))}, ... {ranks[-1]}"
    assert entry["structure"] == shown
    model = _compressed(method="low_rank")
    assert table_report(model)[0]["structure"] == f"rank {plan_of(model).tables[0].spec['rank']}"
    assert table_report(_model()) == []
