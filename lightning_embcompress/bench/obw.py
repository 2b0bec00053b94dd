"""How small the language model of the One Billion Word benchmark becomes, without its data: tables of its size.

The bigLSTM (Jozefowicz et al. 2016, arXiv 1602.02410) has an embedding and a softmax of 793,471 x 1,024 and two layers
of 8,192 cells that are projected to 1,024. Its bytes depend on the sizes alone; how long it takes to find the factors,
and how much memory, on sizes and spectrum. Tables are made with a spectrum that falls as that of trained ones, other
directions leading for frequent words than for rare ones, and counts by Zipf's law. One table is in memory at a time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as ScreenTable
from safetensors.torch import save_file
from torch import Tensor

from lightning_embcompress.bench.cases import Subject, cases_of
from lightning_embcompress.bench.machine import Machine, machine_facts
from lightning_embcompress.bench.made_tables import bytes_allowed, drawn_ids, made_states
from lightning_embcompress.bench.made_tables import fill_table as fill_table
from lightning_embcompress.bench.made_tables import zipf_metric as zipf_metric
from lightning_embcompress.bench.measure import measure
from lightning_embcompress.bench.peak_memory import PeakMemory
from lightning_embcompress.bench.report import show_machine, show_rows, threads_of
from lightning_embcompress.cli.compare import print_table
from lightning_embcompress.compression.report import say
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.numerics.sampling import draw
from lightning_embcompress.methods.registry import Factorization, get_method
from lightning_embcompress.methods.specs import TENSOR_HEADER_BYTES, dense_bytes
from lightning_embcompress.modules.lstm import LSTMLanguageModel
from lightning_embcompress.utils.progress import progress_bar

_TABLES = ("embedding", "softmax")
# Of a product that is added up.
_GRAM_ROWS = 2**13


@dataclass(frozen=True)
class ObwBench:
    """What is made, and what of it.

    Attributes:
        vocab_size: Words.
        dim: Width of both tables, to which the layers are projected.
        cells: Cells of a layer.
        layers: Recurrent layers.
        method: Name of the method, see `embcompress list`.
        options: Its options.
        ratio: Dense bytes over stored bytes of each table.
        rows: Rows of a table on which the loss is measured, drawn by their weight.
        tokens: Of the loss that is computed with the compressed softmax.
        rounds: How often logits and this loss are computed in turn.
        seed: Of the tables.

    Raises:
        ValueError: If one is out of its range, or the method or an option is unknown.
    """

    vocab_size: int = 793_471
    dim: int = 1024
    cells: int = 8192
    layers: int = 2
    method: str = "transform_coding"
    options: dict[str, Any] = field(default_factory=dict)
    ratio: float = 26.0
    rows: int = 20_000
    tokens: int = 1024
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges, and whether the method can do it, before anything large is made."""
        for name in ("vocab_size", "dim", "cells", "layers", "rows", "tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, it is {getattr(self, name)}")
        if self.cells <= self.dim:
            raise ValueError(
                f"cells must be more than dim={self.dim}, to which they are projected, they are {self.cells}"
            )
        self.max_bytes  # noqa: B018

    @property
    def dense_bytes(self) -> int:
        """Of a table in float32."""
        return dense_bytes(self.vocab_size, self.dim, 4)

    @property
    def max_bytes(self) -> int:
        """Most bytes that a table may be stored in."""
        return bytes_allowed(self.method, self.options, self.vocab_size, self.dim, self.ratio)


def run_obw_bench(
    bench: ObwBench, *, mapped_in: Path | None = None, on_table: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Make both tables, one after the other, compress them, and count the bytes of the whole model.

    Everything beside the tables, the recurrent weights and the bias of the softmax, is stored as float16. Bytes are
    those on disk, with headers and structure; to see that, factors are written to a file for a moment.

    Args:
        bench: What to do.
        mapped_in: Folder for a table in a mapped file in place of memory, for machines with less than about 8 GB.
        on_table: Called with the entry of a table as soon as it is known.

    Returns:
        JSON: `bench`, as it was asked for; `machine`, see `machine_facts`, with `threads`; `tables`, for each `name`,
        `dense_bytes`, `stored_bytes`, `file_bytes` (of a file of the factors alone), `ratio`, `seconds`, `peak_bytes`
        (most memory beyond that before the solver; Linux only, else null), `predicted_loss` (by the solver, null if it
        has none) and `measured_loss` (on some rows), in nats; `gram_seconds`, the time of one product `W^T W` in
        float32, `gram_flops` a second in it, and `gram_products`, `seconds` over that; `logits` of one state and, of
        the softmax, the `loss` of `tokens` with its gradients, see `speed_measure.measure`, and `rates` of the machine;
        `both` tables together; `recurrent`, with `parameters`, `dense_bytes` and `stored_bytes`; and `model`, all
        together.

    Example:
        >>> bench = ObwBench(vocab_size=3000, dim=32, cells=64, method="low_rank", ratio=10, rows=500)
        >>> report = run_obw_bench(bench)
        >>> report["both"]["ratio"] >= 10, report["recurrent"]["parameters"]
        (True, 37888)
    """
    tables = []
    for index, name in enumerate(_TABLES):
        with _empty_table(bench, mapped_in) as table:
            tables.append({"name": name, **_compress(bench, name, table, bench.seed + index)})
        on_table(tables[-1])
    parameters = recurrent_parameters(bench)
    beside = parameters + bench.vocab_size
    model = {
        "dense_bytes": sum(entry["dense_bytes"] for entry in tables) + 4 * beside,
        "stored_bytes": sum(entry["stored_bytes"] for entry in tables)
        + 2 * beside
        + (bench.layers * 5 + 1) * TENSOR_HEADER_BYTES,
    }
    both = {name: sum(entry[name] for entry in tables) for name in ("dense_bytes", "stored_bytes", "file_bytes")}
    return {
        "bench": asdict(bench),
        "machine": {**machine_facts(), "threads": torch.get_num_threads()},
        "tables": tables,
        "both": {**both, "ratio": both["dense_bytes"] / both["stored_bytes"]},
        "recurrent": {"parameters": parameters, "dense_bytes": 4 * parameters, "stored_bytes": 2 * parameters},
        "model": {**model, "ratio": model["dense_bytes"] / model["stored_bytes"]},
    }


def recurrent_parameters(bench: ObwBench) -> int:
    """Weights and biases of the recurrent layers, counted on the model itself, which takes no memory.

    Example:
        >>> recurrent_parameters(ObwBench())
        151126016
    """
    with torch.device("meta"):
        model = LSTMLanguageModel(
            bench.vocab_size,
            embedding_dim=bench.dim,
            hidden_size=bench.cells,
            projection_size=bench.dim,
            num_layers=bench.layers,
        )
    return sum(parameter.numel() for parameter in model.lstm.parameters())


def _compress(bench: ObwBench, name: str, table: Tensor, seed: int) -> dict[str, Any]:
    method = get_method(bench.method)
    options = method.options(**bench.options)
    with progress_bar(f"Making the {name}", total=1) as advance:
        fill_table(table, seed, advance)
    metric, counts = zipf_metric(bench.vocab_size, bench.dim, seed)
    known = {"metric": metric} if method.factorization.uses_metric else {}
    gram_seconds = _gram_seconds(table)
    with progress_bar(f"Compressing the {name}", total=1) as advance, PeakMemory(mapped=False) as memory:
        start = time.perf_counter()
        factors = method.factorization.decompose(table, bench.max_bytes, counts, options, advance, **known)
        seconds = time.perf_counter() - start
    # Before and after: what else the machine does changes.
    gram_seconds = (gram_seconds + _gram_seconds(table)) / 2
    stored = _file_bytes(factors)
    return {
        "dense_bytes": bench.dense_bytes,
        "stored_bytes": factors.stored_bytes(),
        "file_bytes": stored,
        "ratio": bench.dense_bytes / factors.stored_bytes(),
        "seconds": seconds,
        "gram_seconds": gram_seconds,
        "gram_products": seconds / gram_seconds,
        "gram_flops": 2 * bench.vocab_size * bench.dim**2 / gram_seconds,
        "peak_bytes": memory.bytes,
        "predicted_loss": factors.predicted_loss,
        "measured_loss": _measured_loss(factors, table, metric, bench.rows),
        **_speed(bench, name, factors, table, seed),
    }


@torch.no_grad()
def _gram_seconds(table: Tensor) -> float:
    """Time of `W^T W` in float32: what the least work of a solver that looks at every number is compared with."""
    total = torch.zeros(table.shape[1], table.shape[1])
    # Not of the time: what the first product of a shape prepares.
    torch.addmm(total, table[:_GRAM_ROWS].T, table[:_GRAM_ROWS])
    start = time.perf_counter()
    for rows in torch.split(table, _GRAM_ROWS):
        torch.addmm(total, rows.T, rows, out=total)
    return time.perf_counter() - start


def _speed(bench: ObwBench, name: str, factors: Factorization[Any], table: Tensor, seed: int) -> dict[str, Any]:
    """Times of the logits of one state, beside the dense table, and of a softmax those of a loss."""
    generator = torch.Generator().manual_seed(seed)
    state, hidden = (made_states(count, bench.dim, generator) for count in (1, bench.tokens))
    targets = drawn_ids(bench.tokens, bench.vocab_size, generator)
    subject = Subject(table, factors, targets[:1], state, hidden, targets)
    machine = Machine()
    # There is one table in memory: no copy of it is laid out.
    logits = [case for case in cases_of(subject, "logits") if case.needs < table.nbytes]
    found = {"logits": measure(logits, machine, bench.rounds)}
    if name == "softmax":
        # Gradients of the dense table take as much memory as the table.
        losses = [case for case in cases_of(subject, "loss", dense=False) if case.name.endswith("fused_cross_entropy")]
        found["loss"] = measure(losses, machine, bench.rounds)
    return {**found, "rates": machine.median_rates(bench.rounds)._asdict()}


@torch.no_grad()
def _measured_loss(factors: Factorization[Any], table: Tensor, metric: Metric, rows: int) -> float:
    """`½ Σ_i q_i δ_iᵀ M δ_i` of rows that are read back, with the weights with which they stand for all."""
    ids, weights = draw(metric.weights, rows)
    lost = 0.0
    for part, q in zip(torch.split(ids, 4096), torch.split(weights, 4096), strict=True):
        error = (table[part] - factors.rows(part)).double() @ metric.root
        lost += 0.5 * float((error.square().sum(dim=1) * q).sum())
    return lost


def _file_bytes(factors: Factorization[Any]) -> int:
    """Size of a file that holds the factors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "factors.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in factors.state_dict().items()}, file)
        return file.stat().st_size


@contextmanager
def _empty_table(bench: ObwBench, folder: Path | None) -> Iterator[Tensor]:
    shape = bench.vocab_size, bench.dim
    if folder is None:
        yield torch.empty(shape)
        return
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        yield torch.from_file(str(Path(inside, "table")), True, bench.vocab_size * bench.dim).view(shape)


def show_obw_bench(report: dict[str, Any]) -> None:
    """Print what `run_obw_bench` returned."""
    bench = report["bench"]
    title = f"{bench['method']}, two tables of {bench['vocab_size']:,} x {bench['dim']:,}"
    columns = ("", "MB dense", "MB stored", "ratio", "seconds", "Gram products", "MB at the peak", "predicted loss")
    screen = ScreenTable(*columns, "measured loss", title=title)
    for entry in report["tables"]:
        peak, predicted = entry["peak_bytes"], entry["predicted_loss"]
        screen.add_row(
            entry["name"],
            *_sizes(entry["dense_bytes"], entry["stored_bytes"]),
            f"{entry['seconds']:.1f}",
            f"{entry['gram_products']:.1f} of {entry['gram_seconds']:.3g} s",
            "" if peak is None else f"{peak / 1e6:.0f}",
            "" if predicted is None else f"{predicted:.5f}",
            f"{entry['measured_loss']:.5f}",
        )
    screen.add_section()
    screen.add_row("both tables", *_sizes(report["both"]["dense_bytes"], report["both"]["stored_bytes"]))
    rest = report["recurrent"]
    screen.add_row("recurrent weights, float16", *_sizes(rest["dense_bytes"], rest["stored_bytes"]))
    screen.add_row("whole model", *_sizes(report["model"]["dense_bytes"], report["model"]["stored_bytes"]))
    print_table(screen)
    show_machine(report["machine"])
    threads = threads_of(report["machine"]["threads"])
    for what, title in (
        ("logits", "logits of 1 state"),
        ("loss", f"loss of {bench['tokens']:,} tokens, forward and backward"),
    ):
        for entry in report["tables"]:
            if what in entry:
                show_rows(entry[what], f"{entry['name']}: {title}, {threads}")
                for row in entry[what]:
                    if what == "loss":
                        say(f"{row['exponentials'] / 1e9:.2f} G exponentials take {row['bound']['exponentials']:.2f} s")


def _sizes(dense: int, stored: int) -> tuple[str, str, str]:
    return f"{dense / 1e6:,.2f}", f"{stored / 1e6:,.2f}", f"{dense / stored:.2f}x"
