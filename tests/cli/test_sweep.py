"""Perplexity against stored bytes, point by point in a folder: `sweep` and `embcompress sweep`."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_embcompress import compress
from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.cli.sweep import DEFAULT_METHODS, Measured, Trial, sweep
from lightning_embcompress.cli.sweep_record import Point, pareto_front
from lightning_embcompress.cli.sweep_report import draw_sweep, show_sweep, write_sweep
from lightning_embcompress.data.blocks import TokenBlocks
from lightning_embcompress.layers.sizes import compressed_tables
from lightning_embcompress.methods.registry import METHODS as ALL_METHODS
from lightning_embcompress.methods.registry import FullTable, Quantization
from lightning_embcompress.metrics.frequency_bands import band_of_tokens
from lightning_embcompress.quantization.aware import quantize_tables
from toys import falling_counts, falling_table
from toys import gpt2 as gpt2_model

VOCAB_SIZE, DIM = 300, 16
COUNTS = falling_counts(VOCAB_SIZE)
METHODS = ("low_rank", "group_reduce:groups=3,refine_rounds=1", "tensor_train:max_rank=1")
RATIOS = (2.0, 3.0)
KEYS = {"dense", "int8", "int4", "tensor_train:max_rank=1"}
KEYS |= {f"{method} at {ratio}x" for method in METHODS[:2] for ratio in RATIOS}
Values = tuple[float, Mapping[str, float]]


def make_model(seed: int = 0) -> nn.Module:
    table = falling_table(VOCAB_SIZE, DIM, 0.01, seed)
    model = nn.Sequential(nn.Embedding(VOCAB_SIZE, DIM, _weight=table), nn.Linear(DIM, VOCAB_SIZE, bias=False))
    model[1].weight = model[0].weight
    return model


def measure(model: Any) -> Values:
    """Something that is 1 for the table as it was, and grows with what is lost of it; the last band has no targets."""
    rows = model[0](torch.arange(VOCAB_SIZE)).detach()
    lost = (rows - make_model()[0].weight.detach()).norm(dim=1)  # type: ignore[index]
    return 1 + float(lost.mean()), {"rank_1-100": 1 + float(lost[:100].mean()), "rest": 2.0, "none": math.nan}


def run(folder: Path, evaluate: Any = measure, **changes: Any) -> list[Point]:
    options: dict[str, Any] = {"methods": METHODS, "ratios": RATIOS, "bits": (8, 4), "token_counts": COUNTS}
    options["data"] = {"text": "a1"}
    return sweep(changes.pop("model", make_model()), evaluate, folder, **options | changes)


def never(_: nn.Module) -> Values:
    raise AssertionError("measured")


def kept(folder: Path = Path("out")) -> dict[str, Any]:
    points: dict[str, Any] = json.loads((folder / "sweep.json").read_text())["points"]
    return points


def timeless(points: list[Point]) -> list[Point]:
    return [replace(point, seconds=None) for point in points]


def test_every_point_is_measured_and_kept(tmp_path: Path) -> None:
    model = make_model()
    before = model[0].weight.detach().clone()  # type: ignore[index]
    seen: list[Point] = []
    points = run(tmp_path, model=model, on_point=seen.append)
    assert torch.equal(model[0].weight, before)  # type: ignore[index]
    assert points[0].method == "dense"
    assert (points[0].perplexity, points[0].loss, points[0].ratio, points[0].bits_per_weight) == (1, 0, 1, 32)
    assert sorted(point.method for point in points) == sorted(point.method for point in seen)
    assert set(kept(tmp_path)) == KEYS
    # By hand, what one of them is.
    compress(model, "group_reduce", ratio=3, token_counts=COUNTS, groups=3, refine_rounds=1)
    point = Point(**kept(tmp_path)["group_reduce:groups=3,refine_rounds=1 at 3.0x"])
    assert (point.perplexity, point.loss) == (measure(model)[0], pytest.approx(math.log(measure(model)[0])))
    assert point.bands == {**measure(model)[1], "none": None}
    assert point in points
    # 8 bits a value, 16 for each row of 16 or two of them, and what names them in a file.
    (int8,) = [point for point in points if point.method == "int8"]
    assert int8.stored_bytes == quantize_tables(make_model(), Quantization(8, 32), ["0"]).stored_bytes
    assert 0 < int8.stored_bytes - VOCAB_SIZE * (DIM + 1) < 500
    assert int8.bits_per_weight == 8 * int8.stored_bytes / (VOCAB_SIZE * DIM)
    assert int8.model_ratio == int8.ratio
    assert {point.predicted_loss for point in points} == {0.0, None}


def test_every_method_at_the_bytes_of_plain_integers(tmp_path: Path) -> None:
    methods = ["low_rank", "tensor_train:max_rank=1"]
    points = run(tmp_path, methods=methods, ratios=[2.0], bits=(8,), match_bits=True)
    (int8,) = [point for point in points if point.method == "int8"]
    rivals = [point for point in points if point.asked_ratio == int8.asked_ratio]
    assert [point.method for point in rivals] == ["int8", "low_rank"]
    assert rivals[1].stored_bytes <= int8.stored_bytes  # type: ignore[operator]
    (fixed,) = [point for point in points if point.method == "tensor_train:max_rank=1"]
    # A train of rank 1 takes 8 of 16 values.
    assert (fixed.asked_ratio, fixed.ratio) == (None, pytest.approx(2, rel=0.05))


def test_sizes_in_bits_per_weight(tmp_path: Path) -> None:
    points = run(tmp_path, methods=["low_rank", "tensor_train:max_rank=1"], ratios=[8.0], bits_per_weight=[16, 3.0])
    found = {point.asked_bits_per_weight: point for point in points if point.method == "low_rank"}
    assert set(found) == {None, 16, 3.0}
    assert 14 < found[16].bits_per_weight <= 16
    assert found[16].asked_ratio == 2
    compress(model := make_model(), "low_rank", bits_per_weight=16)
    assert found[16].perplexity == measure(model)[0]
    assert {"low_rank at 16.0 bits", "low_rank at 8.0x", "tensor_train:max_rank=1"} < set(kept(tmp_path))
    assert run(tmp_path, never, methods=["low_rank"], ratios=(), bits_per_weight=[16.0]) == points
    for bad in (0, 32.0):
        with pytest.raises(ValueError, match="bits_per_weight"):
            run(tmp_path, never, ratios=(), bits_per_weight=[bad])


def test_other_ways_to_store_stand_beside_methods(tmp_path: Path) -> None:
    def halves(_: nn.Module, tables: Any) -> int:
        (table,) = tables
        with torch.no_grad():
            table.weight.copy_(table.weight.half())
        return 2 * int(table.weight.numel())

    model = make_model()
    before = model[0].weight.detach().clone()  # type: ignore[index]
    points = run(tmp_path, model=model, methods=(), bits=(), stores={"halves": halves})
    assert torch.equal(model[0].weight, before)  # type: ignore[index]
    (other,) = [point for point in points if point.method == "halves"]
    assert (other.ratio, other.bits_per_weight, other.model_ratio) == (2, 16, 2)
    assert 1 < other.perplexity < 1.001
    assert run(tmp_path, never, methods=(), bits=(), stores={"halves": halves}) == points


def test_losses_of_blocks_say_how_sure_a_difference_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def evaluate(model: Any) -> Measured:
        value = measure(model)[0]
        return Measured(value, {}, {"news": [math.log(value), 2 * math.log(value) + 1]})

    points = run(tmp_path, evaluate, methods=["low_rank"], ratios=[4.0], bits=())
    assert points == run(tmp_path, never, methods=["low_rank"], ratios=[4.0], bits=())
    change, error = points[1].change(points[0], "news")
    assert (change, error) == (pytest.approx(1.5 * points[1].loss), pytest.approx(0.5 * points[1].loss))
    show_sweep(points)
    assert f"± {error:.4f}" in capsys.readouterr().out


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
    code = """
import os, signal, sys
from pathlib import Path
import test_sweep

def evaluate(model, calls=[]):
    calls.append(model)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return test_sweep.measure(model)

test_sweep.run(Path(sys.argv[1]), evaluate)
"""
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, timeout=120, cwd=Path(__file__).parent)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(kept(folder)) == 2
    measured: list[nn.Module] = []

    def evaluate(model: nn.Module) -> Values:
        measured.append(model)
        return measure(model)

    points = run(folder, evaluate)
    assert len(measured) == len(KEYS) - 2
    assert timeless(points) == timeless(run(tmp_path / "whole"))


def test_an_error_leaves_what_was_measured(tmp_path: Path) -> None:
    def fail(model: nn.Module) -> Values:
        if compressed_tables(model) and not isinstance(compressed_tables(model)[0][1], FullTable):
            raise KeyboardInterrupt
        return measure(model)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fail)
    assert set(kept(tmp_path)) == {"dense", "int8", "int4"}
    # The lock was given back.
    assert timeless(run(tmp_path)) == timeless(run(tmp_path / "whole"))


def test_two_sweeps_at_once_are_refused(tmp_path: Path) -> None:
    def start_another(_: nn.Module) -> Values:
        with pytest.raises(ValueError, match="another sweep is writing into"):
            run(tmp_path, never)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(tmp_path, start_another)


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({"model": make_model(1)}, "weights"),
        ({"data": {"text": "b2"}}, "text"),
        ({"token_counts": COUNTS + 1}, "token counts"),
        ({"tables": ["0"], "model": make_model().double()}, "tables, weights"),
        ({"data": {"text": "a1", "bands": [1]}}, "bands"),
    ],
)
def test_points_of_something_else_are_not_added_to(tmp_path: Path, changes: dict[str, Any], different: str) -> None:
    run(tmp_path, methods=["low_rank"], ratios=[2.0], bits=())
    before = (tmp_path / "sweep.json").read_text()
    with pytest.raises(ValueError, match=rf"\(different: {different}\)"):
        run(tmp_path, never, **changes)
    assert (tmp_path / "sweep.json").read_text() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is not of a sweep"),
        ('{"format": "lightning-embcompress sweep", "version": 2}', "version 2"),
        ('{"format": "lightning-embcompress sweep", "version": 1}', "lacks 'subject' or 'points'"),
        ("", "unknown"),
    ],
)
def test_files_that_are_no_sweep_are_left_alone(tmp_path: Path, content: str, message: str) -> None:
    if message == "unknown":  # damaged points of the same model and data
        run(tmp_path, methods=["low_rank"], ratios=[2.0], bits=())
        record = json.loads((tmp_path / "sweep.json").read_text())
        record["points"]["dense"]["unknown"] = 1
        content = json.dumps(record)
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, never)
    assert (tmp_path / "sweep.json").read_text() == content


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"methods": ["group_reduse"]}, "group_reduce"),
        ({"methods": ["group_reduce:group=3"]}, "'group'"),
        ({"methods": ["group_reduce:groups=0"]}, "groups"),
        ({"ratios": [2.0, 1.0]}, "ratios"),
        ({"bits": [9]}, "bits"),
        ({"tables": ["nowhere"]}, "nowhere"),
        ({"token_counts": None}, "token_counts"),
        ({"token_counts": COUNTS[1:]}, "300"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        run(tmp_path / "folder", never, **changes)
    assert not (tmp_path / "folder").exists()


def test_what_cannot_be_done_is_a_line_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreached = run(tmp_path, methods=["tensor_train"], ratios=[2.0, 9.0], bits=())[-1]
    assert (unreached.asked_ratio, unreached.perplexity, unreached.stored_bytes) == (9.0, None, None)
    assert "cannot be stored in" in unreached.note
    assert kept(tmp_path)["tensor_train at 9.0x"]["note"] == unreached.note

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no factors were found")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_embcompress.cli.sweep.compress", fail)
        failed = run(tmp_path, never, methods=["low_rank"], ratios=[2.0], bits=())
    assert [point.note for point in failed if point.method == "low_rank"] == ["no factors were found"]
    # It is tried anew.
    again = run(tmp_path, methods=["low_rank"], ratios=[2.0], bits=())
    assert [point.note for point in again if point.method == "low_rank"] == [""]


def test_perplexities_that_are_not_finite(tmp_path: Path) -> None:
    def diverge(model: nn.Module) -> Values:
        value = 2.0 if type(model[0]) is nn.Embedding else math.inf  # type: ignore[index]
        return value, {"rank_1-1": value}

    points = run(tmp_path, diverge, methods=["low_rank"], ratios=[2.0], bits=())
    assert (points[-1].perplexity, points[-1].note) == (None, "the perplexity is inf")
    assert not points[-1].pareto
    assert points[-1].stored_bytes is not None
    show_sweep(points)
    # It was measured: not again.
    assert run(tmp_path, never, methods=["low_rank"], ratios=[2.0], bits=()) == points
    with pytest.raises(ValueError, match="perplexity of the model as it is is nan"):
        run(tmp_path / "other", lambda _: (math.nan, {}), methods=["low_rank"], ratios=[2.0])


def test_statistics_are_asked_for_once_where_they_are_used(tmp_path: Path) -> None:
    model = make_model()
    calls = []

    def loss_fn(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

    def statistics() -> Statistics:
        calls.append(1)
        ids = torch.arange(VOCAB_SIZE).reshape(10, -1)
        return collect_statistics(model, [ids], loss_fn, token_counts=COUNTS)

    run(tmp_path, statistics=statistics, methods=["low_rank", "group_reduce"], ratios=[2.0], bits=(8,))
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
    # What needs them says so where there are none.
    other = run(tmp_path / "other", methods=["auto"], ratios=[2.0], bits=())[-1]
    assert (other.stored_bytes, "statistics" in other.note) == (None, True)


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
    axes, dense = draw_sweep(points).axes[0], points[0]
    lines_by_label = {line.get_label(): line for line in axes.lines}
    marked = [(point.stored_bytes / 1e6, point.perplexity) for point in points if point.pareto and point.stored_bytes]
    drawn = lines_by_label["Pareto front"]
    assert list(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)) == sorted(marked)
    assert list(lines_by_label["dense"].get_ydata()) == [1, 1]
    # Float32 has 32 of them.
    (above,) = axes.child_axes
    assert above.get_xlabel() == "bits per weight"
    axes.set_xlim(dense.stored_bytes / 4e6, dense.stored_bytes / 1e6)
    axes.figure.draw_without_rendering()
    assert above.get_xlim() == pytest.approx((8, 32))


def test_methods_are_read_as_they_are_written() -> None:
    assert {Trial.parse(text).method for text in DEFAULT_METHODS} == set(ALL_METHODS) - {"cp"}
    for text in (*DEFAULT_METHODS, "tensor_train:shape=[4, 4, 2],max_rank=2"):
        assert Trial.parse(text).name == text
    assert Trial.parse("tensor_train:shape=[4, 4, 2],max_rank=2").options == {"shape": [4, 4, 2], "max_rank": 2}


OPTIONS = ("--methods", "low_rank", "group_reduce:groups=3", "transform_coding", "--ratios", 1.5, 3)
OPTIONS = (*OPTIONS, "--bits", 8, "--bands", 10, 100)


def losses_by_hand(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of blocks of the model's 64 positions, of which neighbours share a token, by transformers' own logits."""
    losses = []
    for start in range(0, len(ids) - 1, 63):
        block = torch.tensor(ids[start : start + 64])
        with torch.no_grad():
            logits = model(block[None]).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(logits.double(), block[1:], reduction="none"))
    return torch.cat(losses), torch.tensor(ids[1:])


def test_points_of_the_shell_are_those_of_the_model_by_hand(shell: Any, gpt2: Path, text: Path) -> None:
    # What is there when a sweep was killed at its start.
    Path("out").mkdir()
    Path("out/.lock").touch()
    assert shell("sweep", gpt2, "out", "--text", text, *OPTIONS) == 0
    printed = shell.printed()
    assert "Perplexity by token frequency" in printed
    assert "Written: out/sweep.json, out/sweep.csv" in printed
    record = json.loads(Path("out/sweep.json").read_text())
    dense = record["points"]["dense"]
    # The last tenth of the text is measured.
    ids = [*AutoTokenizer.from_pretrained(gpt2)(text.read_text()).input_ids, 0]
    counted = len(ids) * 9 // 10
    counts = torch.bincount(torch.tensor(ids[:counted]), minlength=300)
    band, names = band_of_tokens(counts, (10, 100))
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    losses, targets = losses_by_hand(model, ids[counted - 1 :])
    assert dense["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert record["subject"]["tokens measured"] == len(ids) - counted
    for index, name in enumerate(names):
        inside = band[targets] == index
        assert record["subject"]["targets by band"][name] == int(inside.sum())
        expected = math.exp(losses[inside].mean()) if inside.any() else None
        assert dense["bands"][name] == (expected and pytest.approx(expected, rel=1e-5))
    with Path("out/sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(record["points"]) == 8
    assert float(lines[0]["perplexity_rank_1-10"]) == dense["bands"]["rank_1-10"]
    # What is compressed, with the statistics of the counted text.
    blocks = TokenBlocks(torch.tensor(ids[:counted]).numpy(), 64)
    batches = [{name: value[None] for name, value in blocks[index].items()} for index in range(len(blocks))]
    statistics = collect_statistics(model, batches, token_counts=counts)
    compress(model, "transform_coding", ratio=1.5, statistics=statistics)
    losses, _ = losses_by_hand(model, ids[counted - 1 :])
    found = record["points"]["transform_coding at 1.5x"]["perplexity"]
    assert found == pytest.approx(math.exp(losses.mean()), rel=1e-4)


def test_a_second_start_of_the_shell_goes_on_and_adds(
    shell: Any, gpt2: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell("sweep", gpt2, "out", "--text", text, *OPTIONS) == 0
    first = kept()
    with monkeypatch.context() as patch:
        patch.setattr("lightning_embcompress.cli.text.TokenizedText.perplexity", None)
        assert shell("sweep", gpt2, "out", "--text", text, *OPTIONS) == 0
    assert kept() == first
    shell.printed()
    assert shell("sweep", gpt2, "out", "--text", text, *OPTIONS, "--bits", 4, "--ratios", 2) == 0
    printed = shell.printed()
    assert "int4 at 6.67x: " in printed
    assert "int8 at " not in printed
    later = kept().keys() - first.keys()
    assert len(later) == 4
    assert later > {"int4", "low_rank at 2.0x"}


def test_a_text_to_count_leaves_all_of_the_other_to_measure(shell: Any, gpt2: Path, text: Path) -> None:
    Path("other.txt").write_text(shell.sentences[:400])
    options = ("--methods", "weighted_low_rank", "--ratios", 2, "--bits", "--max_tokens", 50)
    assert shell("sweep", gpt2, "out", "--text", "other.txt", "--counts_text", text, *options) == 0
    assert "perplexity on 50 tokens" in shell.printed()
    assert set(kept()) == {"dense", "weighted_low_rank at 2.0x"}


@pytest.mark.parametrize(
    ("options", "named", "code"),
    [
        (["--methods", "low_rang"], "did you mean 'low_rank'", 1),
        (["--bands", "10", "5"], "increasing ranks", 1),
        (["--max_tokens", "0"], "max_tokens", 2),
        (["--tables", "lm_heat"], "lm_heat", 1),
        (["--text", "nothing.txt"], "nothing.txt", 1),
    ],
)
def test_mistakes_write_nothing(shell: Any, gpt2: Path, text: Path, options: list[str], named: str, code: int) -> None:
    shell.refuses("sweep", gpt2, "out", "--text", text, *options, says=named, code=code)


def test_other_folders_models_and_texts_are_refused(shell: Any, gpt2: Path, text: Path) -> None:
    Path("full").mkdir()
    Path("full/letter.txt").write_text("Dear all")
    shell.refuses("sweep", gpt2, "full", "--text", text, says="'full' is not empty: choose another", code=2)
    shell.refuses("sweep", gpt2, "text.txt", "--text", text, says="is a file", code=2)
    small = ("--methods", "low_rank", "--ratios", 2, "--bits", 8)
    assert shell("sweep", gpt2, "out", "--text", text, *small) == 0
    before = Path("out/sweep.json").read_text()
    gpt2_model(seed=1).save_pretrained("other")
    Path("short.txt").write_text(shell.sentences[:600])
    for words, what in [
        (["other", "out", "--text", text, "--tokenizer", gpt2], "weights"),
        ([gpt2, "out", "--text", "short.txt", "--counts_text", text], "token counts, text, tokens measured"),
        ([gpt2, "out", "--text", text, "--max_tokens", 20], "text, tokens measured, targets by band"),
        ([gpt2, "out", "--text", text, "--bands", 7], "targets by band"),
    ]:
        shell.refuses("sweep", *words, *small, says=f"(different: {what}")
    assert Path("out/sweep.json").read_text() == before
    assert shell("compress", gpt2, "small", "--ratio", 1.4, "--method", "low_rank") == 0
    shell.refuses("sweep", "small", "out", "--text", text, says="is compressed already (transformer.wte)")
