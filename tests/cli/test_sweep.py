"""Perplexity against stored bytes, point by point in a folder."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_embcompress import compress
from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.cli.sweep import Measured, Point, pareto_front, sweep
from lightning_embcompress.cli.sweep_report import draw_sweep, show_sweep, write_sweep
from lightning_embcompress.layers.sizes import compressed_tables
from lightning_embcompress.methods.registry import FullTable, Quantization
from lightning_embcompress.quantization.aware import quantize_tables

VOCAB_SIZE, DIM = 300, 16
COUNTS = (10_000 / torch.arange(1, VOCAB_SIZE + 1)).long()
METHODS = ("low_rank", "group_reduce:groups=3,refine_rounds=1", "tensor_train:max_rank=1")
RATIOS = (2.0, 3.0)
KEYS = {
    "dense",
    "int8",
    "int4",
    "low_rank at 2.0x",
    "low_rank at 3.0x",
    "group_reduce:groups=3,refine_rounds=1 at 2.0x",
    "group_reduce:groups=3,refine_rounds=1 at 3.0x",
    "tensor_train:max_rank=1",
}


def make_model(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCAB_SIZE, DIM, generator=generator) * torch.logspace(0, -2, DIM)
    model = nn.Sequential(nn.Embedding(VOCAB_SIZE, DIM, _weight=table), nn.Linear(DIM, VOCAB_SIZE, bias=False))
    model[1].weight = model[0].weight
    return model


def measure(model: Any) -> Measured:
    """Something that is 1 for the table as it was, and grows with what is lost of it; the last band has no targets."""
    rows = model[0](torch.arange(VOCAB_SIZE)).detach()
    lost = (rows - make_model()[0].weight.detach()).norm(dim=1)  # type: ignore[index]
    return Measured(1 + float(lost.mean()), {"rank_1-100": 1 + float(lost[:100].mean()), "rest": 2.0, "none": math.nan})


def run(folder: Path, evaluate: Any = measure, **changes: Any) -> list[Point]:
    options: dict[str, Any] = {
        "methods": METHODS,
        "ratios": RATIOS,
        "bits": (8, 4),
        "token_counts": COUNTS,
        "data": {"text": "a1"},
    }
    return sweep(changes.pop("model", make_model()), evaluate, folder, **options | changes)


def never(_: nn.Module) -> Measured:
    raise AssertionError("measured")


def timeless(points: list[Point]) -> list[Point]:
    return [replace(point, seconds=None) for point in points]


def test_every_point_is_measured_and_kept(tmp_path: Path) -> None:
    model = make_model()
    before = model[0].weight.detach().clone()  # type: ignore[index]
    seen: list[Point] = []
    points = run(tmp_path, model=model, on_point=seen.append)
    assert torch.equal(model[0].weight, before)  # type: ignore[index]
    assert points[0].method == "dense"
    assert (points[0].perplexity, points[0].loss, points[0].ratio) == (1, 0, 1)
    assert sorted(point.method for point in points) == sorted(point.method for point in seen)
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert set(record["points"]) == KEYS
    # By hand, what one of them is.
    compress(model, "group_reduce", ratio=3, token_counts=COUNTS, groups=3, refine_rounds=1)
    kept = Point(**record["points"]["group_reduce:groups=3,refine_rounds=1 at 3.0x"])
    assert kept.perplexity == measure(model).perplexity
    assert kept.loss == pytest.approx(math.log(measure(model).perplexity))
    assert kept.bands == {**measure(model).bands, "none": None}
    assert kept in points
    # 8 bits a value, 16 for each row of 16 or two of them, and what names them in a file.
    (int8,) = [point for point in points if point.method == "int8"]
    assert int8.stored_bytes == quantize_tables(make_model(), Quantization(8, 32), ["0"]).stored_bytes
    assert 0 < int8.stored_bytes - VOCAB_SIZE * (DIM + 1) < 500
    assert {point.predicted_loss for point in points} == {0.0, None}


def test_a_second_start_measures_only_what_is_new(tmp_path: Path) -> None:
    points = run(tmp_path)
    assert run(tmp_path, never) == points
    seen: list[Point] = []
    more = run(tmp_path, ratios=(2.0, 2.5), bits=(8, 3), on_point=seen.append)
    assert sorted(point.method for point in seen) == ["group_reduce:groups=3,refine_rounds=1", "int3", "low_rank"]
    assert len(more) == len(points) + 3
    # Options in another order are the same options.
    assert run(tmp_path, never, methods=["group_reduce:refine_rounds=1,groups=3"]) == more


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    worker = Path(__file__).parent / "workers" / "killed_sweep.py"
    done = subprocess.run([sys.executable, str(worker), str(folder), __file__], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = json.loads((folder / "sweep.json").read_text())["points"]
    assert len(left) == 2
    measured: list[nn.Module] = []

    def evaluate(model: nn.Module) -> Measured:
        measured.append(model)
        return measure(model)

    points = run(folder, evaluate)
    assert len(measured) == len(KEYS) - 2
    assert timeless(points) == timeless(run(tmp_path / "whole"))


def test_an_error_leaves_what_was_measured(tmp_path: Path) -> None:
    def fail(model: nn.Module) -> Measured:
        if compressed_tables(model) and not isinstance(compressed_tables(model)[0][1], FullTable):
            raise KeyboardInterrupt
        return measure(model)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fail)
    assert set(json.loads((tmp_path / "sweep.json").read_text())["points"]) == {"dense", "int8", "int4"}
    # The lock was given back.
    assert timeless(run(tmp_path)) == timeless(run(tmp_path / "whole"))


def test_two_sweeps_at_once_are_refused(tmp_path: Path) -> None:
    def start_another(_: nn.Module) -> Measured:
        with pytest.raises(ValueError, match="another sweep is writing into"):
            run(tmp_path, never)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(tmp_path, start_another)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": make_model(1)}, r"something else \(different: weights\).*choose another folder"),
        ({"data": {"text": "b2"}}, r"something else \(different: text\)"),
        ({"token_counts": COUNTS + 1}, r"\(different: token counts\)"),
        ({"tables": ["0"], "model": make_model().double()}, r"\(different: tables, weights\)"),
        ({"data": {"text": "a1", "bands": [1]}}, r"\(different: bands\)"),
    ],
)
def test_points_of_something_else_are_not_added_to(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run(tmp_path, methods=["low_rank"], ratios=[2.0], bits=())
    before = (tmp_path / "sweep.json").read_text()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, never, **changes)
    assert (tmp_path / "sweep.json").read_text() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged: it is no mapping"),
        ("{}", "is not of a sweep: choose another folder"),
        ('{"format": "lightning-embcompress sweep", "version": 2}', "has version 2.*upgrade"),
        ('{"format": "lightning-embcompress sweep", "version": 1}', "lacks 'subject' or 'points'"),
    ],
)
def test_files_that_are_no_sweep_are_left_alone(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, never)
    assert (tmp_path / "sweep.json").read_text() == content


def test_damaged_points_are_refused(tmp_path: Path) -> None:
    run(tmp_path, methods=["low_rank"], ratios=[2.0], bits=())
    record = json.loads((tmp_path / "sweep.json").read_text())
    record["points"]["dense"]["unknown"] = 1
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is damaged: .*unknown.*choose another folder"):
        run(tmp_path, never)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["group_reduse"]}, "did you mean 'group_reduce'"),
        ({"methods": ["group_reduce:group=3"]}, "unknown option 'group'"),
        ({"ratios": [2.0, 1.0]}, "ratios must be above 1"),
        ({"bits": [9]}, "bits must be"),
        ({"token_counts": None}, "give token_counts"),
        ({"token_counts": COUNTS[1:]}, "one entry for each of the 300 rows"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "folder", never, **changes)
    assert not (tmp_path / "folder").exists()


def test_what_cannot_be_done_is_a_line_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreached = run(tmp_path, methods=["tensor_train"], ratios=[2.0, 9.0], bits=())[-1]
    assert (unreached.asked_ratio, unreached.perplexity, unreached.stored_bytes) == (9.0, None, None)
    assert "cannot be stored in" in unreached.note
    kept = json.loads((tmp_path / "sweep.json").read_text())["points"]["tensor_train at 9.0x"]
    assert kept["note"] == unreached.note

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no factors were found")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_embcompress.cli.trials.compress", fail)
        failed = run(tmp_path, never, methods=["low_rank"], ratios=[2.0], bits=())
    assert [point.note for point in failed if point.method == "low_rank"] == ["no factors were found"]
    # It is tried anew.
    again = run(tmp_path, methods=["low_rank"], ratios=[2.0], bits=())
    assert [point.note for point in again if point.method == "low_rank"] == [""]


def test_perplexities_that_are_not_finite(tmp_path: Path) -> None:
    def diverge(model: nn.Module) -> Measured:
        dense = type(model[0]) is nn.Embedding  # type: ignore[index]
        return Measured(2.0 if dense else math.inf, {"rank_1-1": 2.0 if dense else math.inf})

    points = run(tmp_path, diverge, methods=["low_rank"], ratios=[2.0], bits=())
    assert (points[-1].perplexity, points[-1].note) == (None, "the perplexity is inf")
    assert not points[-1].pareto
    assert points[-1].stored_bytes is not None
    show_sweep(points)
    # It was measured: not again.
    assert run(tmp_path, never, methods=["low_rank"], ratios=[2.0], bits=()) == points
    with pytest.raises(ValueError, match="the perplexity of the model as it is is nan"):
        run(tmp_path / "other", lambda _: Measured(math.nan), methods=["low_rank"], ratios=[2.0])


def test_statistics_are_asked_for_once_where_they_are_used(tmp_path: Path) -> None:
    model = make_model()
    calls = []

    def loss_fn(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

    def statistics() -> Statistics:
        calls.append(1)
        ids = torch.arange(VOCAB_SIZE).reshape(10, -1)
        return collect_statistics(model, [ids], loss_fn, token_counts=COUNTS)

    run(tmp_path, statistics=statistics, methods=["low_rank", "group_reduce:variant=paper"], ratios=[2.0], bits=(8,))
    assert calls == []
    methods = ["weighted_low_rank", "transform_coding"]
    points = run(tmp_path, statistics=statistics, methods=methods, ratios=[2.0], bits=(8,))
    assert calls == [1]
    by_method = {point.method: point for point in points}
    plan = compress(model, "transform_coding", ratio=2, statistics=statistics())
    found = by_method["transform_coding"]
    assert (found.stored_bytes, found.predicted_loss) == (plan.stored_bytes, plan.predicted_loss)
    assert by_method["weighted_low_rank"].predicted_loss is not None
    assert by_method["low_rank"].predicted_loss is None


def test_what_needs_statistics_says_so(tmp_path: Path) -> None:
    points = run(tmp_path, methods=["group_reduce:variant=loss"], ratios=[2.0], bits=())
    assert points[-1].stored_bytes is None
    assert "give statistics=collect_statistics" in points[-1].note


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1.0, 1.5, 2.0, 7.0])), max_size=12))
def test_the_pareto_front_is_what_nothing_beats(points: list[tuple[int, float]]) -> None:
    def beats(one: tuple[int, float], other: tuple[int, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    expected = [not any(beats(other, point) for other in points) for point in points]
    assert pareto_front(points) == expected


def test_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = run(tmp_path, methods=[*METHODS, "tensor_train"], ratios=[2.0, 9.0])
    show_sweep(points, {"rank_1-100": 1234, "rest": 0, "none": 0})
    shown = capsys.readouterr().out
    assert "cannot be reached" in shown
    assert "1,234 tokens" in shown
    files = write_sweep(tmp_path, points)
    with (tmp_path / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [point.method for point in points]
    assert [line["pareto"] == "True" for line in lines] == [point.pareto for point in points]
    assert [line["perplexity_rank_1-100"] for line in lines] == [
        str(point.bands["rank_1-100"]) if point.bands else "" for point in points
    ]
    assert {line["perplexity_none"] for line in lines} == {""}
    sizes = [(point.stored_bytes, point.perplexity) for point in points if point.perplexity is not None]
    front = pareto_front(sizes)  # type: ignore[arg-type]
    assert [point.pareto for point in points if point.perplexity is not None] == front
    assert any(front)
    pytest.importorskip("matplotlib", reason="the plot needs it: pip install matplotlib")
    assert [file.name for file in files] == ["sweep.csv", "sweep.png"]
    assert files[-1].read_bytes().startswith(b"\x89PNG")
    # The front and the dense line are where they belong.
    axes = draw_sweep(points).axes[0]
    lines_by_label = {line.get_label(): line for line in axes.lines}
    marked = [(point.stored_bytes / 1e6, point.perplexity) for point in points if point.pareto and point.stored_bytes]
    drawn = lines_by_label["Pareto front"]
    assert list(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)) == sorted(marked)
    assert list(lines_by_label["dense"].get_ydata()) == [1, 1]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
