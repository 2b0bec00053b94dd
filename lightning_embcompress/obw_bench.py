"""How small the language model of the One Billion Word benchmark becomes, without its data: tables of its size.

The bigLSTM (Jozefowicz et al. 2016, arXiv 1602.02410) has an embedding and a softmax of 793,471 x 1,024 and two layers
of 8,192 cells that are projected to 1,024. Its bytes depend on the sizes alone; how long it takes to find the factors,
and how much memory, on sizes and spectrum. Tables are made with a spectrum that falls as that of trained ones, other
directions leading for frequent words than for rare ones, and counts by Zipf's law. One table is in memory at a time.
"""

from __future__ import annotations

import os
import tempfile
import threading
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

from lightning_embcompress.compare import print_table
from lightning_embcompress.factorizations import Factorization, get_method
from lightning_embcompress.factorizations.specs import TENSOR_HEADER_BYTES, dense_bytes
from lightning_embcompress.modules.lstm import LSTMLanguageModel
from lightning_embcompress.progress import progress_bar
from lightning_embcompress.solvers.metric import Metric, smoothed_frequencies
from lightning_embcompress.solvers.sampling import draw

# Words of the training text.
_TOKENS = 829_250_940
# Groups of neighbouring frequency that have a spectrum of their own, and how far components trade places in them.
_RUNS, _MIXING = 20, 48 / 1024
# Ends of the spectra, as powers of ten: standard deviations of components, and of the hidden states or gradients.
_SPECTRUM, _STATES = -1.5, -1.0
_TABLES = ("embedding", "softmax")


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
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges, and whether the method can do it, before anything large is made."""
        for name in ("vocab_size", "dim", "cells", "layers", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, it is {getattr(self, name)}")
        if self.cells <= self.dim:
            raise ValueError(
                f"cells must be more than dim={self.dim}, to which they are projected, they are {self.cells}"
            )
        if not self.ratio > 1:
            raise ValueError(f"ratio must be above 1, it is {self.ratio}")
        method = get_method(self.method)
        least = method.factorization.smallest_bytes(self.vocab_size, self.dim, 4, method.options(**self.options))
        if least > self.max_bytes:
            raise ValueError(
                f"{self.method} needs {least} bytes for a table of {self.vocab_size} x {self.dim}, a ratio of "
                f"{self.dense_bytes / least:.2f}, not {self.ratio:g}: ask for less, or take another method"
            )

    @property
    def dense_bytes(self) -> int:
        """Of a table in float32."""
        return dense_bytes(self.vocab_size, self.dim, 4)

    @property
    def max_bytes(self) -> int:
        """Most bytes that a table may be stored in."""
        return int(self.dense_bytes / self.ratio)


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
        JSON: `bench`, as it was asked for; `tables`, for each `name`, `dense_bytes`, `stored_bytes`, `file_bytes` (of a
        file of the factors alone), `ratio`, `seconds`, `peak_bytes` (most memory beyond that before the solver; Linux
        only, else null), `predicted_loss` (by the solver, null if it has none) and `measured_loss` (on some rows), in
        nats; `both` tables together; `recurrent`, with `parameters`, `dense_bytes` and `stored_bytes`; and `model`, all
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


def fill_table(table: Tensor, seed: int, advance: Callable[[float], None] = lambda _: None) -> None:
    """Give a table values whose spectrum falls, in other directions for frequent rows than for rare ones.

    Args:
        table: `[vocab_size, dim]`, the most frequent rows first; it is written to.
        seed: Of the values.
        advance: Called with shares of the work that add up to 1.
    """
    vocab_size, dim = table.shape
    generator = torch.Generator().manual_seed(seed)
    parts = torch.split(table, -(-vocab_size // _RUNS))
    for rows in parts:
        order = (torch.arange(dim) + _MIXING * dim * torch.rand(dim, generator=generator)).argsort()
        rows.normal_(generator=generator).mul_(torch.logspace(0, _SPECTRUM, dim)[order])
        advance(1 / len(parts))


def zipf_metric(vocab_size: int, dim: int, seed: int) -> tuple[Metric, Tensor]:
    """What errors cost: counts by Zipf's law, and the second moment of states whose spectrum falls.

    Returns:
        The metric, and `[vocab_size]` counts.
    """
    frequencies = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    counts = (_TOKENS * frequencies / frequencies.sum()).long()
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4 * dim, dim, generator=generator) * torch.logspace(0, _STATES, dim)
    return Metric((states.T @ states / len(states)).double(), smoothed_frequencies(counts)), counts


def _compress(bench: ObwBench, name: str, table: Tensor, seed: int) -> dict[str, Any]:
    method = get_method(bench.method)
    options = method.options(**bench.options)
    with progress_bar(f"Making the {name}", total=1) as advance:
        fill_table(table, seed, advance)
    metric, counts = zipf_metric(bench.vocab_size, bench.dim, seed)
    known = {"metric": metric} if method.factorization.uses_metric else {}
    with progress_bar(f"Compressing the {name}", total=1) as advance, _PeakMemory() as memory:
        start = time.perf_counter()
        factors = method.factorization.decompose(table, bench.max_bytes, counts, options, advance, **known)
        seconds = time.perf_counter() - start
    stored = _file_bytes(factors)
    return {
        "dense_bytes": bench.dense_bytes,
        "stored_bytes": factors.stored_bytes(),
        "file_bytes": stored,
        "ratio": bench.dense_bytes / factors.stored_bytes(),
        "seconds": seconds,
        "peak_bytes": memory.peak,
        "predicted_loss": factors.predicted_loss,
        "measured_loss": _measured_loss(factors, table, metric, bench.rows),
    }


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


class _PeakMemory:
    """Most resident bytes beyond those at the start of the block, without pages of mapped files; None off Linux."""

    def __enter__(self) -> _PeakMemory:
        self._file = Path("/proc/self/statm")
        self.peak: int | None = 0 if self._file.is_file() else None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self.peak is not None:
            self._start = self._resident()
            self._thread.start()
        return self

    def _watch(self) -> None:
        assert self.peak is not None
        while True:
            self.peak = max(self.peak, self._resident() - self._start)
            if self._done.wait(0.01):
                return

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self.peak is not None:
            self._thread.join()

    def _resident(self) -> int:
        _, resident, shared = map(int, self._file.read_text().split()[:3])
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def show_obw_bench(report: dict[str, Any]) -> None:
    """Print what `run_obw_bench` returned."""
    bench = report["bench"]
    title = f"{bench['method']}, two tables of {bench['vocab_size']:,} x {bench['dim']:,}"
    columns = ("", "MB dense", "MB stored", "ratio", "seconds", "MB at the peak", "predicted loss", "measured loss")
    screen = ScreenTable(*columns, title=title)
    for entry in report["tables"]:
        peak, predicted = entry["peak_bytes"], entry["predicted_loss"]
        screen.add_row(
            entry["name"],
            *_sizes(entry["dense_bytes"], entry["stored_bytes"]),
            f"{entry['seconds']:.1f}",
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


def _sizes(dense: int, stored: int) -> tuple[str, str, str]:
    return f"{dense / 1e6:,.2f}", f"{stored / 1e6:,.2f}", f"{dense / stored:.2f}x"
