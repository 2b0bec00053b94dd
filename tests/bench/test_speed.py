"""The bench of speed at tiny sizes: what is run, what of it is counted, and what is said before anything is made."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_embcompress.bench import machine, peak_memory, peers, speed
from lightning_embcompress.bench.cases import WHAT
from lightning_embcompress.bench.machine import Machine, Rates, Work
from lightning_embcompress.bench.made_tables import drawn_ids, fill_table, made_states, zipf_metric
from lightning_embcompress.bench.measure import Case, measure
from lightning_embcompress.bench.peak_memory import PeakMemory
from lightning_embcompress.bench.peers import PACKAGES, installed_peers
from lightning_embcompress.bench.speed import SpeedBench, run_scaling_bench, run_speed_bench
from lightning_embcompress.cli import main as cli
from lightning_embcompress.methods.registry import BlockLowRank, GroupReduceOptions

VOCAB_SIZE, DIM, IDS, TOKENS = 600, 32, 50, 20
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "dim": DIM,
    "ratio": 3.0,
    "ids": IDS,
    "tokens": TOKENS,
    "k": 5,
    "rounds": 1,
}
DENSE_BYTES = VOCAB_SIZE * DIM * 4
ON_LINUX = sys.platform == "linux"


@pytest.fixture(scope="module", autouse=True)
def _small_machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_SIDE", 64)
        patch.setattr(machine, "_MEMORY_SIDE", 512)
        yield


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return run_speed_bench(SpeedBench(**SMALL, options={"groups": 3}, threads=(1, 2)))


def rows_of(report: dict[str, Any], what: str, threads: int = 1) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["rows"] if (row["what"], row["threads"]) == (what, threads)}


def test_every_row_is_measured_for_all_threads(report: dict[str, Any]) -> None:
    for what in WHAT:
        one, two = (rows_of(report, what, threads) for threads in (1, 2))
        assert list(one) == list(two)
        (base,) = (row for row in one.values() if row.get("ratio") == 1)
        assert base["name"].startswith("dense")
        for row in one.values():
            if "note" in row:
                continue
            assert row["seconds"] > 0
            assert row["ratio"] == pytest.approx(base["seconds"] / row["seconds"])
            assert row["times_bound"] == pytest.approx(row["seconds"] / row["bound_seconds"])
            assert (row["peak_bytes"] is not None) == ON_LINUX
    assert json.loads(json.dumps(report)) == json.loads(json.dumps(report, allow_nan=False))
    assert set(report["rates"]) == {"1", "2"}
    assert report["machine"]["torch"] == torch.__version__
    assert report["table"]["dense_bytes"] == DENSE_BYTES
    assert report["table"]["ratio"] >= 3


def test_work_is_that_of_the_products(report: dict[str, Any]) -> None:
    product = 2 * TOKENS * VOCAB_SIZE * DIM
    losses = rows_of(report, "loss")
    # Logits, the two gradients, and where they are computed in tiles, the logits once more.
    assert losses["dense, F.cross_entropy"]["flops"] == losses["dense, head_softmax_loss"]["flops"] == 3 * product
    assert losses["dense, fused_cross_entropy"]["flops"] == 4 * product
    assert losses["dense, fused_cross_entropy"]["exponentials"] == 2 * TOKENS * VOCAB_SIZE
    assert losses["compressed, fused_cross_entropy"]["flops"] < 4 * product / 2
    for row in losses.values():
        assert "note" in row or row["gradient_bytes"] >= TOKENS * DIM * 4
    logits = rows_of(report, "logits")
    assert logits["dense torch"]["flops"] == 2 * VOCAB_SIZE * DIM
    assert logits["dense torch, laid out for inference"]["flops"] == 2 * VOCAB_SIZE * DIM
    assert logits["dense torch, laid out for inference"]["error"] < 1e-6
    assert logits["dense torch"]["bytes"] == DENSE_BYTES + DIM * 4 + VOCAB_SIZE * 4
    assert logits["compressed"]["parameter_bytes"] == report["table"]["stored_bytes"]
    lookups = rows_of(report, "lookup_backward")
    assert lookups["dense torch"]["gradient_bytes"] == DENSE_BYTES
    assert lookups["dense torch, sparse gradients"]["gradient_bytes"] == IDS * (DIM * 4 + 8)
    sparse, whole = (lookups[name]["gradient_bytes"] for name in ("compressed, sparse gradients", "compressed"))
    assert sparse < whole < DENSE_BYTES


def test_errors_are_those_of_the_factors(report: dict[str, Any]) -> None:
    table = torch.empty(VOCAB_SIZE, DIM)
    fill_table(table, 0)
    metric, counts = zipf_metric(VOCAB_SIZE, DIM, 0)
    size = report["bench"] and SpeedBench(**SMALL).max_bytes
    factors = BlockLowRank.decompose(table, size, counts, GroupReduceOptions(groups=3), metric=metric)
    generator = torch.Generator().manual_seed(0)
    ids, _ = drawn_ids(IDS, VOCAB_SIZE, generator), drawn_ids(TOKENS, VOCAB_SIZE, generator)
    state = made_states(1, DIM, generator)
    wanted = {
        "lookup": ((table[ids] - factors.rows(ids)).norm() / table[ids].norm()).item(),
        "logits": (F.linear(state, table - factors.materialize()).norm() / F.linear(state, table).norm()).item(),
    }
    for what, error in wanted.items():
        rows = rows_of(report, what)
        assert rows["compressed"]["error"] == pytest.approx(error, rel=1e-3)
        assert 0.01 < error < 1
        assert rows["dense torch"]["error"] < 1e-6
    for row in rows_of(report, "loss").values():
        if "loss" in row:
            assert row["loss"] > 1
            assert row["error"] < 1e-4
    best = rows_of(report, "topk")
    assert best["compressed"]["recall"] == best["compressed, all logits"]["recall"] == 1
    assert best["compressed"]["error"] < 1e-5


def test_logits_of_made_states_have_the_spread_of_trained_ones() -> None:
    table = torch.empty(2000, 64)
    fill_table(table, 0)
    logits = made_states(100, 64, torch.Generator().manual_seed(1)) @ table.T
    assert float(logits.std()) == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("zipf", [True, False])
def test_ids_are_drawn_as_words_come(zipf: bool) -> None:
    ids = drawn_ids(20_000, 1000, torch.Generator().manual_seed(0), zipf)
    share = float((ids < 10).double().mean())
    # The ten most frequent of a thousand words: 2.93 / 7.49 of the text.
    assert share == pytest.approx(0.391 if zipf else 0.01, rel=0.2)
    assert int(ids.max()) < 1000


@pytest.mark.parametrize(
    ("method", "options"),
    [("transform_coding", {"groups": 2}), ("tensor_train", {"max_rank": 2}), ("product_quantization", {})],
)
def test_other_methods(method: str, options: dict[str, Any]) -> None:
    found = run_speed_bench(SpeedBench(**SMALL, method=method, options=options, peers=False))
    assert {row["what"] for row in found["rows"] if row["name"].startswith("compressed")} == set(WHAT)
    assert rows_of(found, "topk")["compressed"]["recall"] == 1
    for name in ("compressed, fused_cross_entropy", "compressed, head_softmax_loss"):
        assert rows_of(found, "loss")[name]["error"] < 1e-4


def test_what_does_not_fit_is_left_out_and_said() -> None:
    given = {**SMALL, "what": ("lookup_backward", "loss"), "peers": False}
    found = run_speed_bench(SpeedBench(**given, max_memory=DENSE_BYTES // 2))
    lookups, losses = (rows_of(found, what) for what in given["what"])
    assert "needs about" in lookups["dense torch"]["note"]
    assert "seconds" in lookups["compressed"]
    assert lookups["compressed"]["ratio"] is None
    assert "note" in losses["dense, F.cross_entropy"]
    assert "seconds" in losses["compressed, fused_cross_entropy"]


def test_a_case_that_does_not_fit_is_never_run() -> None:
    def never() -> None:
        raise AssertionError("it is run")

    case = Case("logits", "large", never, 10, needs=2_000_000_000, prepare=never)
    (entry,) = measure([case], Machine(), 1, 10**9)
    assert entry["note"] == "needs about 2.0 GB, 1.0 GB are free"


def test_ratios_are_of_the_same_round() -> None:
    cases = [
        Case("wait", "base", lambda: time.sleep(0.02), 1, is_base=True),
        Case("wait", "half", lambda: time.sleep(0.01), 1),
    ]
    shares: list[float] = []
    base, half = measure(cases, Machine(), 3, advance=shares.append)
    assert base["ratio"] == 1
    assert 1.2 < half["ratio"] < 3
    assert half["bound_seconds"] is half["times_bound"] is None
    assert sum(shares) == pytest.approx(1)


@pytest.mark.skipif(not ON_LINUX, reason="memory is seen on Linux only")
def test_peaks_are_beyond_parameters_and_gradients() -> None:
    leaf = torch.zeros(10_000_000, requires_grad=True)

    def run() -> None:
        work = torch.ones(5_000_000)
        leaf.grad = torch.ones(10_000_000)
        del work

    (entry,) = measure([Case("work", "it", run, leaf.nbytes, leaves=[leaf])], Machine(), 1)
    assert entry["gradient_bytes"] == 40_000_000
    assert 15e6 < entry["peak_bytes"] < 30e6
    assert leaf.grad is None


@pytest.mark.skipif(not ON_LINUX, reason="memory is seen on Linux only")
def test_memory_that_was_freed_before_is_seen_again() -> None:
    # Small pieces, which the allocator keeps when they are freed.
    def work() -> float:
        return sum(float(piece[0]) for piece in [torch.ones(10_000) for _ in range(1000)])

    work()
    with PeakMemory() as memory:
        work()
    assert memory.bytes is not None
    assert 30e6 < memory.bytes < 60e6


@pytest.mark.skipif(not ON_LINUX, reason="memory is seen on Linux only")
@pytest.mark.parametrize("mapped", [True, False])
def test_mapped_files_count_where_they_are_to(mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        torch.from_file(str(tmp_path / "table"), True, 5_000_000).fill_(1)
        time.sleep(0.02)

    for exact in (True, False):
        with PeakMemory(mapped) as memory:
            work()
        assert memory.bytes is not None
        assert (memory.bytes > 15e6) == mapped
        # Where the kernel cannot be asked.
        monkeypatch.setattr(peak_memory, "_forget_peak", lambda: False)
        assert exact or memory._thread is not None


def test_the_bound_is_the_slower_of_computing_and_memory() -> None:
    rates = Rates(flops=100.0, bytes=10.0, exponentials=50.0)
    assert Work(flops=200, exponentials=50).seconds(rates) == 3
    assert Work(flops=200, exponentials=50, bytes=100).seconds(rates) == 10


def test_peers_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch, report: dict[str, Any]) -> None:
    here = {package for package, module in PACKAGES.items() if importlib.util.find_spec(module)}
    assert set(report["peers"]) == set(installed_peers()) == here
    names = {row["name"] for row in report["rows"]}
    assert any(name.startswith("tensorly-torch") for name in names) == ("tensorly-torch" in here)
    losses = rows_of(report, "loss")
    assert 0 < losses["nn.AdaptiveLogSoftmaxWithLoss"]["exponentials"] < 2 * TOKENS * VOCAB_SIZE

    def broken(*_: object) -> Iterator[Case]:
        raise RuntimeError("no kernel\nfor this processor")
        yield

    monkeypatch.setattr(peers, "_adaptive", broken)
    found = run_speed_bench(SpeedBench(**SMALL, method="low_rank", what=("loss",)))
    row = rows_of(found, "loss")["nn.AdaptiveLogSoftmaxWithLoss"]
    assert row["note"] == "RuntimeError: no kernel"


def test_tensorized_embeddings_take_no_more_bytes(report: dict[str, Any]) -> None:
    pytest.importorskip("tltorch")
    for what in ("lookup", "lookup_backward"):
        (row,) = (row for name, row in rows_of(report, what).items() if name.startswith("tensorly"))
        assert row["parameter_bytes"] <= report["table"]["stored_bytes"]
        assert row["seconds"] > 0


def test_scaling_is_the_slope_of_time_over_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def proportional(cases: list[Case], *_: object) -> list[dict[str, Any]]:
        assert all(case.name.startswith("compressed") for case in cases)
        return [
            {"what": case.what, "name": case.name, "parameter_bytes": case.parameter_bytes}
            | {"seconds": 3e-9 * case.parameter_bytes}
            for case in cases
        ]

    bench = SpeedBench(**{**SMALL, "what": ("logits",)})
    monkeypatch.setattr(speed, "measure", proportional)
    found = run_scaling_bench(bench, [400, 1600, 800])
    assert [table["vocab_size"] for table in found["tables"]] == [400, 800, 1600]
    for line in found["lines"]:
        assert [point["vocab_size"] for point in line["points"]] == [400, 800, 1600]
        assert line["exponent"] == pytest.approx(1)
        assert line["seconds_per_gigabyte"] == pytest.approx(3)


def _words(name: str = "speed", **given: Any) -> list[str]:
    values = {**SMALL, "method": "low_rank", **given}
    return ["bench", name, *(f"--{key}={value}" for key, value in values.items())]


def test_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    words = [*_words(method="group_reduce", variant="paper", groups=4), "--option", "refine_rounds=1", "--no-peers"]
    words += ["--report", str(file), "--plot", str(plot), "--max-memory", "1GB", "--what", "logits", "loss"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    for said in ("logits of 1 state, 1 thread", "loss of 20 tokens, forward and backward", "GB/s from memory"):
        assert said in printed
    written = json.loads(file.read_text())
    assert written["bench"]["options"] == {"variant": "paper", "groups": 4, "refine_rounds": 1}
    assert written["bench"]["max_memory"] == 10**9
    assert written["machine"]["processor"] in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_command_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = [word for word in _words("scaling") if not word.startswith("--vocab_size")]
    file, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    words += ["--vocab_sizes", "400", "800", "--what", "logits", "--report", str(file), "--plot", str(plot)]
    assert cli.main(words) == 0
    assert "exponent" in capsys.readouterr().out
    assert {line["name"] for line in json.loads(file.read_text())["lines"]} >= {"compressed"}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (_words(method="low_rnk"), "low_rank"),
        (_words(ratio=1e6), "ask for less"),
        (_words(ratio=1), "ratio must be above 1"),
        (_words(group=5), "unknown option 'group'"),
        (_words(rounds=0), "rounds must be 1 or more"),
        (_words(k=601), "k must be at most the 600 words"),
        (_words(threads=0), "threads must be 1 or more"),
        (_words(what="logit"), "invalid choice"),
        (_words(draw="all"), "invalid choice"),
        (_words(max_memory="much"), "size must be a number of bytes"),
        ([*_words(), "--option", "groups"], "must be NAME=VALUE"),
        ([*_words(), "--report", "no/such/folder.json"], "there is no folder"),
        ([*_words(), "--plot", "no/such/folder.png"], "there is no folder"),
        ([*_words(), "--report", "."], "is a folder"),
        ([*_words(), "--plot", "speed.plot"], "must end in .png"),
        ([*_words("scaling"), "--vocab_sizes", "500"], "two or more"),
        (["bench", "sped"], "speed"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing is made")

    monkeypatch.setattr(speed, "fill_table", never)
    if "scaling" in words:
        words = [word for word in words if not word.startswith("--vocab_size=")]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_files_are_kept_unless_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--report", "--plot"):
        file = tmp_path / "there.png"
        file.write_text("kept")
        assert cli.main([*_words(), flag, str(file)]) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("name", "said"), [("obw", "--cells"), ("speed", "--max_memory"), ("scaling", "--vocab_sizes"), ("", "scaling")]
)
def test_help(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", *([name] if name else []), "--help"])
    assert left.value.code == 0
    assert said in capsys.readouterr().out
