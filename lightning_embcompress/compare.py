"""All methods on one trained model, at equal stored bytes."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table as ScreenTable
from torch import Tensor, nn

from lightning_embcompress.budget import check_counts, plan_requests
from lightning_embcompress.factorizations import get_method
from lightning_embcompress.plan import compress, model_bytes
from lightning_embcompress.progress import progress_bar
from lightning_embcompress.solvers.round_to_nearest import round_to_nearest, rounded_bytes
from lightning_embcompress.tables import check_finite, find_tables

DEFAULT_METHODS = (
    "low_rank",
    "weighted_low_rank",
    *(f"group_reduce:groups={groups},refine_rounds={rounds}" for groups in (5, 10, 20) for rounds in (0, 5)),
    "tensor_train",
    *(f"tensor_train:max_rank={rank}" for rank in (1, 4)),
    *(f"tensor_train_matrix:num_cores={count}" for count in (2, 3)),
    "product_quantization",
    "tucker",
)
"""GroupReduce in all the settings that its paper leaves open, of which the best is what others have to beat; TensorGPT
at its published ranks too. `cp`, which takes very long at low ratios, only where it is asked for."""


@dataclass(frozen=True)
class Candidate:
    """A method with its options.

    Attributes:
        method: Name in `METHODS`.
        options: Its options.
    """

    method: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Read `method` or `method:option=value,option=value`.

        Raises:
            ValueError: If there is no such method or option, or a value is out of its range.

        Example:
            >>> Candidate.parse("group_reduce:groups=5,refine_rounds=0")
            Candidate(method='group_reduce', options={'groups': 5, 'refine_rounds': 0})
        """
        method, _, rest = text.partition(":")
        # As a YAML mapping in flow style: lists and nested values need no rules of our own.
        options = yaml.safe_load("{" + rest.replace("=", ": ") + "}") if rest else {}
        get_method(method).options(**options)
        return cls(method, options)

    @property
    def fixes_size(self) -> bool:
        """Whether the options say how large the factors are: then ratios have no say."""
        return bool(get_method(self.method).options(**self.options).fixes_size)

    def __str__(self) -> str:
        """As it is parsed."""
        rest = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method}:{rest}" if rest else self.method


@dataclass(frozen=True)
class Result:
    """One line of a comparison.

    Attributes:
        method: The candidate, `int8` or `int4` for plain quantization of the tables, `dense` for the model as it is.
        asked_ratio: Dense bytes over stored bytes that were asked for; of the lines with the same one, none has more
            bytes. None for the dense model and for options that fix the size.
        ratio: Dense bytes over stored bytes of the tables, as stored, all metadata included.
        stored_bytes: Bytes of the tables.
        model_ratio: Dense bytes over stored bytes of the whole model.
        perplexity: What was measured; None if the ratio cannot be reached.
        seconds: How long the tables took to solve.
        note: Why there is no perplexity.
    """

    method: str
    asked_ratio: float | None
    ratio: float | None
    stored_bytes: int | None
    model_ratio: float | None
    perplexity: float | None
    seconds: float | None = None
    note: str = ""


def compare(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    methods: Sequence[str] = DEFAULT_METHODS,
    ratios: Sequence[float] = (16.0,),
    *,
    bits: Sequence[int] = (8, 4),
    tables: str | Sequence[str] = "auto",
    token_counts: Any = None,
    on_result: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Compress copies of a model by every method and measure them, without training.

    Plain quantization of the tables, to integers in groups of 32 with 16-bit scales, is part of it: its ratios are
    added to those asked for, so that every method is seen at the very bytes of int8 and int4.

    Args:
        model: The trained model; it is not changed.
        evaluate: Measures the perplexity of a model.
        methods: Candidates, see `Candidate.parse`.
        ratios: Dense bytes over stored bytes of the tables.
        bits: Widths of plain quantization, 2 to 8; none for a comparison without it.
        tables: See `lightning_embcompress.tables.find_tables`.
        token_counts: `[vocab_size]` how often every token occurs in the training data.
        on_result: Called with every line as soon as it is known: the whole may take long.

    Returns:
        The dense model first, then by ratio, the best perplexity first; what cannot be reached comes last.

    Raises:
        ValueError: If a method, an option, a ratio or the counts cannot be used; nothing is solved then.
    """
    candidates = [Candidate.parse(text) for text in methods]
    found = find_tables(model, tables)
    for table in found:
        check_finite(table)
    for width in bits:
        rounded_bytes(1, 1, width)
    if bad := [ratio for ratio in ratios if not 1 < ratio < float("inf")]:
        raise ValueError(f"ratios must be above 1 (dense bytes over stored bytes), one is {bad[0]!r}")
    dense = sum(table.weight.nbytes for table in found)
    rounded = {width: sum(rounded_bytes(*table.shape, width) for table in found) for width in bits}
    every = sorted({*ratios, *(dense / size for size in rounded.values())})
    jobs: list[tuple[Candidate, float | None]] = []
    for candidate in candidates:
        jobs += [(candidate, None)] if candidate.fixes_size else [(candidate, ratio) for ratio in every]
    reachable = []
    results: list[Result] = []

    def add(result: Result) -> None:
        results.append(result)
        on_result(result)

    for candidate, ratio in jobs:
        options = {"tables": tables, **candidate.options}
        try:
            requests = plan_requests(model, candidate.method, ratio, **options)
        except ValueError as error:
            # The line stays in the comparison, with the reason: what a method cannot do is a result too.
            add(Result(str(candidate), ratio, None, None, None, None, note=str(error)))
            continue
        check_counts(token_counts, requests)
        reachable.append((candidate, ratio, options))
    with progress_bar("Comparing methods", total=1 + len(rounded) + len(reachable)) as advance:
        whole = model_bytes(model)
        add(Result("dense", None, 1.0, dense, 1.0, evaluate(model)))
        advance(1)
        for width, size in rounded.items():
            copy = deepcopy(model)
            start = time.perf_counter()
            for table in find_tables(copy, tables):
                _quantize(table.weight, width)
            taken = time.perf_counter() - start
            model_ratio = whole["dense_bytes"] / (whole["stored_bytes"] - dense + size)
            results.append(Result(f"int{width}", dense / size, dense / size, size, model_ratio, evaluate(copy), taken))
            advance(1)
        for candidate, ratio, options in reachable:
            copy = deepcopy(model)
            start = time.perf_counter()
            plan = compress(copy, candidate.method, ratio=ratio, token_counts=token_counts, **options)
            taken = time.perf_counter() - start
            model_ratio = model_bytes(copy)["ratio"]
            add(Result(str(candidate), ratio, plan.ratio, plan.stored_bytes, model_ratio, evaluate(copy), taken))
            advance(1)
    return sorted(results, key=_order)


@torch.no_grad()
def _quantize(weight: Tensor, bits: int) -> None:
    weight.copy_(round_to_nearest(weight, bits))


def _order(result: Result) -> tuple[float, bool, float]:
    asked = 0.0 if result.method == "dense" else result.asked_ratio or result.ratio or 0.0
    return asked, result.perplexity is None, result.perplexity or 0.0


def show_comparison(results: Sequence[Result]) -> None:
    """Print a comparison, a section for each ratio."""
    dense = next(result.perplexity for result in results if result.method == "dense")
    assert dense is not None
    screen = ScreenTable(
        "asked",
        "method",
        "ratio",
        "MB",
        "model",
        "perplexity",
        "",
        "seconds",
        title="At equal stored bytes, no training",
    )
    before: float | None = None
    for result in results:
        asked = result.asked_ratio
        if asked != before:
            screen.add_section()
        before = asked
        if result.perplexity is None:
            screen.add_row("" if asked is None else f"{asked:.2f}x", result.method, "", "", "", "cannot be reached")
            continue
        screen.add_row(
            "" if asked is None else f"{asked:.2f}x",
            result.method,
            f"{result.ratio:.2f}x",
            f"{(result.stored_bytes or 0) / 1e6:.2f}",
            f"{result.model_ratio:.2f}x",
            f"{result.perplexity:.2f}",
            f"{result.perplexity / dense - 1:+.1%}",
            "" if result.seconds is None else f"{result.seconds:.1f}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=132)).print(screen)


def write_comparison(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write `comparison.csv`, `comparison.json` and, where matplotlib is installed, `comparison.png`.

    Returns:
        The files that were written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table, record = folder / "comparison.csv", folder / "comparison.json"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    record.write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return [table, record]
    # Not pyplot: no window system is asked for, and no global state is left behind.
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in _curves(results):
        style = {"marker": "o", "markersize": 4} if len(points) > 1 else {"marker": "s", "linestyle": ""}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    dense = next(result.perplexity for result in results if result.method == "dense")
    assert dense is not None
    axes.axhline(dense, color="black", linewidth=1, linestyle=":", label="dense")
    axes.set(xlabel="dense bytes / stored bytes of the tables", ylabel="perplexity", xscale="log", yscale="log")
    axes.legend(fontsize=7)
    plot = folder / "comparison.png"
    figure.savefig(plot, dpi=150)
    return [table, record, plot]


def _curves(results: Sequence[Result]) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    for name in dict.fromkeys(result.method for result in results if result.method != "dense"):
        points = [
            (result.ratio, result.perplexity)
            for result in results
            if result.method == name and result.ratio is not None and result.perplexity is not None
        ]
        if points:
            yield name, sorted(points)
