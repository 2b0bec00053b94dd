"""How fast a compressed table is read, beside the dense one and what other packages offer, at sizes of one's own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_embcompress.bench.cases import WHAT, Subject, cases_of
from lightning_embcompress.bench.machine import Machine, machine_facts
from lightning_embcompress.bench.made_tables import bytes_allowed, drawn_ids, fill_table, made_states, zipf_metric
from lightning_embcompress.bench.measure import Case, measure, threads
from lightning_embcompress.bench.peak_memory import available_memory
from lightning_embcompress.bench.peers import installed_peers, peer_cases
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.registry import Factorization, get_method
from lightning_embcompress.utils.progress import progress_bar


@dataclass(frozen=True)
class SpeedBench:
    """What is measured.

    Attributes:
        vocab_size: Words.
        dim: Width of the table.
        method: Name of the method, see `embcompress list`.
        options: Its options.
        ratio: Dense bytes over stored bytes.
        what: Some of `WHAT`.
        ids: How many are looked up.
        draw: How ids are drawn: by Zipf's law (`zipf`), as words come in text, or all alike (`uniform`).
        tokens: Of the loss.
        states: Of logits, best tokens and samples.
        k: How many of the best tokens.
        threads: Numbers of threads, each measured by itself.
        rounds: How often everything is run in turn.
        peers: Whether other packages are measured that are installed.
        max_memory: Bytes that a row may take beside the table; None for those that are free.
        seed: Of the table.

    Raises:
        ValueError: If one is out of its range, or the method or an option is unknown.
    """

    vocab_size: int = 50_257
    dim: int = 768
    method: str = "group_reduce"
    options: dict[str, Any] = field(default_factory=dict)
    ratio: float = 4.0
    what: Sequence[str] = WHAT
    ids: int = 2048
    draw: str = "zipf"
    tokens: int = 1024
    states: int = 1
    k: int = 10
    threads: Sequence[int] = (1,)
    rounds: int = 7
    peers: bool = True
    max_memory: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges, and whether the method can do it, before anything large is made."""
        for name in ("vocab_size", "dim", "ids", "tokens", "states", "k", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, it is {getattr(self, name)}")
        if not self.threads or min(self.threads) < 1:
            raise ValueError(f"threads must be 1 or more, they are {list(self.threads)}")
        if self.k > self.vocab_size:
            raise ValueError(f"k must be at most the {self.vocab_size} words, it is {self.k}")
        if self.draw not in ("zipf", "uniform"):
            raise ValueError(f"draw must be 'zipf' or 'uniform', it is {self.draw!r}")
        if unknown := [what for what in self.what if what not in WHAT]:
            raise ValueError(f"unknown {unknown[0]!r}; what can be measured is {', '.join(WHAT)}")
        if not self.what:
            raise ValueError(f"nothing to measure: give some of {', '.join(WHAT)}")
        self.max_bytes  # noqa: B018

    @property
    def max_bytes(self) -> int:
        """Most bytes that the table may be stored in."""
        return bytes_allowed(self.method, self.options, self.vocab_size, self.dim, self.ratio)


def run_speed_bench(bench: SpeedBench, on_entry: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """Make a table, compress it, and measure what is done with it.

    Args:
        bench: What to do.
        on_entry: Called with every row as soon as it is known.

    Returns:
        JSON: `bench`, as it was asked for; `machine`, see `machine_facts`; `peers` that are installed, with their
        versions; `table`, with `dense_bytes`, `stored_bytes`, `ratio`, and the `seconds` of compressing it; `rates` of
        the machine for every number of `threads`; and `rows`, see `speed_measure.measure`, with `threads`, and beside
        the times: `error`, relative of rows and logits against the dense table, of a loss the difference to the naive
        one of the same factors, in nats; and `recall` of the best tokens of the same factors.

    Example:
        >>> bench = SpeedBench(500, 16, "low_rank", ids=8, tokens=8, rounds=1, what=("logits",), peers=False)
        >>> [row["name"] for row in run_speed_bench(bench)["rows"]][:2]
        ['dense torch', 'compressed']
    """
    table, factors, seconds = _compressed(bench)
    found = measure_table(bench, table, factors, on_entry=on_entry)
    stored = factors.stored_bytes()
    sizes = {"dense_bytes": table.nbytes, "stored_bytes": stored, "ratio": table.nbytes / stored, "seconds": seconds}
    return {**found, "table": sizes}


def measure_table(
    bench: SpeedBench,
    table: Tensor,
    factors: Factorization[Any],
    *,
    approximates: bool = True,
    only: Callable[[str], bool] = lambda _: True,
    on_entry: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure what is done with a table and the factors that there are for it.

    Args:
        bench: What to do; how to compress is not read.
        table: `[vocab_size, dim]` float32, the most frequent rows first.
        factors: Of the same shape.
        approximates: Whether they are those of the table: if they are not, they have no errors against it.
        only: Whether a row of this name is wanted.
        on_entry: Called with every row as soon as it is known.

    Returns:
        What `run_speed_bench` returns, but the `table`.
    """
    subject = _subject(bench, table, factors, approximates)
    machine = Machine()
    free = available_memory() if bench.max_memory is None else bench.max_memory
    rows: list[dict[str, Any]] = []
    with progress_bar("Measuring", total=len(bench.what) * len(bench.threads)) as advance:
        for what in bench.what:
            cases = [case for case in cases_of(subject, what) if only(case.name)]
            left_out: list[dict[str, Any]] = []
            for peer in peer_cases(subject, what, free) if bench.peers else ():
                if isinstance(peer, Case):
                    cases.append(peer)
                else:
                    left_out.append(peer)
            for count in bench.threads:
                with threads(count):
                    entries = [*measure(cases, machine, bench.rounds, free, advance), *left_out]
                for entry in entries:
                    rows.append({"threads": count, **entry})
                    on_entry(rows[-1])
    rates = {}
    for count in bench.threads:
        with threads(count):
            rates[str(count)] = machine.median_rates(bench.rounds)._asdict()
    return {
        "bench": asdict(bench),
        "machine": machine_facts(),
        "peers": installed_peers() if bench.peers else {},
        "rates": rates,
        "rows": rows,
    }


def run_scaling_bench(bench: SpeedBench, vocab_sizes: Sequence[int]) -> dict[str, Any]:
    """Measure the compressed table alone as the vocabulary grows, all sizes in turn.

    One table is in memory at a time, and the factors of all.

    Args:
        bench: What to do, with every size in the place of its `vocab_size`.
        vocab_sizes: Two or more.

    Returns:
        JSON: `bench`, `machine`, as of `run_speed_bench`; `tables`, for every size `vocab_size`, `dense_bytes`,
        `stored_bytes`, `ratio` and `seconds`; and `lines`, for every number of `threads` and each of `bench.what`, with
        `points` of all sizes (rows as of `run_speed_bench`), `exponent`, the slope of the logarithm of the time over
        that of the stored bytes, which is 1 where time is in proportion to bytes, and `seconds_per_gigabyte`, the slope
        of a line through the points.

    Raises:
        ValueError: If there are fewer than two sizes, or the method cannot do it for one of them.

    Example:
        >>> bench = SpeedBench(500, 16, "low_rank", rounds=1, what=("logits",))
        >>> line, *_ = run_scaling_bench(bench, [500, 1000])["lines"]
        >>> [point["vocab_size"] for point in line["points"]]
        [500, 1000]
    """
    benches = scaling_benches(bench, vocab_sizes)
    subjects: list[Subject] = []
    tables: list[dict[str, Any]] = []
    for one in benches:
        table, factors, seconds = _compressed(one)
        stored = factors.stored_bytes()
        sizes = {"dense_bytes": table.nbytes, "stored_bytes": stored, "ratio": table.nbytes / stored}
        tables.append({"vocab_size": one.vocab_size, **sizes, "seconds": seconds})
        # A table of the same shape that takes no memory: no case reads it.
        subjects.append(_subject(one, torch.empty(table.shape, device="meta"), factors, approximates=False))
        del table
    machine = Machine()
    free = available_memory() if bench.max_memory is None else bench.max_memory
    lines: list[dict[str, Any]] = []
    with progress_bar("Measuring", total=len(bench.what) * len(bench.threads)) as advance:
        for what in bench.what:
            cases = [case for subject in subjects for case in cases_of(subject, what, dense=False)]
            for count in bench.threads:
                with threads(count):
                    entries = measure(cases, machine, bench.rounds, free, advance)
                lines += [{"threads": count, **line} for line in _lines(entries, tables)]
    return {
        "bench": {**asdict(bench), "vocab_size": None, "vocab_sizes": list(vocab_sizes)},
        "machine": machine_facts(),
        "tables": tables,
        "lines": lines,
    }


def scaling_benches(bench: SpeedBench, vocab_sizes: Sequence[int]) -> list[SpeedBench]:
    """One bench for every size, the smallest first.

    Raises:
        ValueError: If there are fewer than two sizes, or the method cannot do it for one of them.
    """
    sizes = sorted(set(vocab_sizes))
    if len(sizes) < 2:
        raise ValueError(f"vocab_sizes must be two or more different ones, they are {list(vocab_sizes)}")
    given = {name: getattr(bench, name) for name in asdict(bench)}
    return [SpeedBench(**{**given, "vocab_size": size}) for size in sizes]


def _lines(entries: Sequence[dict[str, Any]], tables: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured of all sizes, by what and how."""
    by_bytes = {table["stored_bytes"]: table["vocab_size"] for table in tables}
    lines: list[dict[str, Any]] = []
    for what, name in dict.fromkeys((entry["what"], entry["name"]) for entry in entries):
        points = [
            {"vocab_size": by_bytes[entry["parameter_bytes"]], **entry}
            for entry in entries
            if (entry["what"], entry["name"]) == (what, name)
        ]
        known = [(point["parameter_bytes"], point["seconds"]) for point in points if "seconds" in point]
        line: dict[str, Any] = {"what": what, "name": name, "points": points}
        if len(known) > 1:
            line["exponent"] = slope([(math.log(size), math.log(taken)) for size, taken in known])
            line["seconds_per_gigabyte"] = slope(known) * 1e9
        lines.append(line)
    return lines


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the line through some points, by least squares.

    Example:
        >>> slope([(0, 1), (1, 3), (2, 5)])
        2.0
    """
    x = sum(one for one, _ in points) / len(points)
    y = sum(one for _, one in points) / len(points)
    return sum((one - x) * (other - y) for one, other in points) / sum((one - x) ** 2 for one, _ in points)


def _compressed(bench: SpeedBench) -> tuple[Tensor, Factorization[Any], float]:
    """A made table, its factors, and the seconds that they took."""
    method = get_method(bench.method)
    options = method.options(**bench.options)
    table = torch.empty(bench.vocab_size, bench.dim)
    with progress_bar("Making the table", total=1) as advance:
        fill_table(table, bench.seed, advance)
    metric, counts = zipf_metric(bench.vocab_size, bench.dim, bench.seed)
    known: dict[str, Metric] = {"metric": metric} if method.factorization.uses_metric else {}
    with progress_bar("Compressing the table", total=1) as advance, threads(max(bench.threads)):
        start = time.perf_counter()
        factors = method.factorization.decompose(table, bench.max_bytes, counts, options, advance, **known)
        seconds = time.perf_counter() - start
    return table, factors, seconds


def _subject(bench: SpeedBench, table: Tensor, factors: Factorization[Any], approximates: bool) -> Subject:
    generator = torch.Generator().manual_seed(bench.seed)
    ids = drawn_ids(bench.ids, bench.vocab_size, generator, bench.draw == "zipf")
    targets = drawn_ids(bench.tokens, bench.vocab_size, generator)
    states, hidden = (made_states(count, bench.dim, generator) for count in (bench.states, bench.tokens))
    return Subject(table, factors, ids, states, hidden, targets, bench.k, approximates)
