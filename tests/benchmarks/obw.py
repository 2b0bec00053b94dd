"""How small the language model of the One Billion Word benchmark becomes, without its data: tables of its size.

The bigLSTM (Jozefowicz et al. 2016, arXiv 1602.02410) has an embedding and a softmax of 793,471 x 1,024 and two layers
of 8,192 cells that are projected to 1,024. Its bytes depend on the sizes alone; how long it takes to find the factors,
and how much memory, on sizes and spectrum. One table is in memory at a time, about 5 GB at the full size.

    python tests/benchmarks/obw.py tables
    python tests/benchmarks/obw.py tables --method shared_basis --ratio 6.6 --options.groups 20
    python tests/benchmarks/obw.py corpus made_obw
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import CLI
from made import VOCABULARY_FILE, fill_table, make_corpus, zipf_metric
from measure import PeakMemory, threads
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.numerics.sampling import draw
from lightning_embcompress.methods.registry import Factorization, get_method
from lightning_embcompress.methods.specs import TENSOR_HEADER_BYTES, dense_bytes
from lightning_embcompress.modules.lstm import LSTMLanguageModel

_GRAM_ROWS = 2**13


def tables(
    vocab_size: int = 793_471,
    dim: int = 1024,
    cells: int = 8192,
    layers: int = 2,
    method: str = "transform_coding",
    ratio: float = 26.0,
    options: dict[str, Any] | None = None,
    rows: int = 20_000,
    seed: int = 0,
    report: Path | None = None,
) -> dict[str, Any]:
    """Make both tables, one after the other, compress them, and count the bytes of the whole model.

    Everything beside the tables, the recurrent weights and the bias of the softmax, counts as float16.

    Args:
        vocab_size: Words.
        dim: Width of both tables, to which the layers are projected.
        cells: Cells of a recurrent layer.
        layers: Recurrent layers.
        method: Name of the method.
        ratio: Dense bytes over stored bytes of each table.
        options: Of the method.
        rows: Rows of a table on which its loss is measured, drawn by their weight.
        seed: Of the tables.
        report: File that everything is written to as JSON.

    Returns:
        `tables`, for each `stored_bytes`, `ratio`, `seconds`, `gram_seconds` (of one product `W^T W` in float32),
        `peak_bytes` (beyond the table), and `predicted_loss` and `measured_loss` in nats; `recurrent_parameters`;
        and `model`, all together.
    """
    found = []
    for index, name in enumerate(("embedding", "softmax")):
        with threads():
            table = fill_table(torch.empty(vocab_size, dim), seed + index)
            entry = _compress(table, method, ratio, options or {}, zipf_metric(vocab_size, dim, seed + index), rows)
            del table
        print(
            f"{name}: {entry['stored_bytes'] / 1e6:,.2f} MB, {entry['ratio']:.2f}x, {entry['seconds']:.1f} s = "
            f"{entry['seconds'] / entry['gram_seconds']:.1f} Gram products of {entry['gram_seconds']:.3g} s, "
            f"{entry['peak_bytes'] / 1e6:,.0f} MB at the peak, loss {entry['measured_loss']:.5f} nats, predicted "
            f"{entry['predicted_loss']}"
        )
        found.append({"name": name, **entry})
    with torch.device("meta"):
        model = LSTMLanguageModel(vocab_size, dim, cells, projection_size=dim, num_layers=layers)
    recurrent = sum(parameter.numel() for parameter in model.lstm.parameters())
    dense = 2 * dense_bytes(vocab_size, dim, 4) + 4 * (recurrent + vocab_size)
    stored = sum(entry["stored_bytes"] for entry in found) + 2 * (recurrent + vocab_size)
    stored += (layers * 5 + 1) * TENSOR_HEADER_BYTES
    print(f"whole model, the rest in float16: {dense / 1e6:,.1f} MB in {stored / 1e6:,.1f} MB, {dense / stored:.2f}x")
    whole = {"dense_bytes": dense, "stored_bytes": stored, "ratio": dense / stored}
    result = {"tables": found, "recurrent_parameters": recurrent, "model": whole}
    if report is not None:
        report.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def corpus(folder: Path, vocab_size: int = 793_471, tokens: int = 2_000_000, seed: int = 0) -> None:
    """Write a text of numbered words in the layout of the benchmark: `lightning run lstm_obw` runs on it.

    Args:
        folder: Where; it must not exist, or be empty.
        vocab_size: Words.
        tokens: Of the training text.
        seed: Of the text.
    """
    make_corpus(folder, vocab_size, tokens, seed)
    print(f"lightning run lstm_obw --data.data_dir {folder} --data.vocabulary_file {VOCABULARY_FILE}")


def _compress(
    table: Tensor, name: str, ratio: float, given: dict[str, Any], zipf: tuple[Metric, Tensor], rows: int
) -> dict[str, Any]:
    method, (metric, counts) = get_method(name), zipf
    options = method.config.from_options(**given)
    known = {"metric": metric} if options.uses_metric else {}
    dense = dense_bytes(*table.shape, 4)
    before = _gram_seconds(table)
    with PeakMemory(mapped=False) as memory:
        start = time.perf_counter()
        factors = method.factorization.decompose(table, int(dense / ratio), counts, options, **known)
        seconds = time.perf_counter() - start
    return {
        "stored_bytes": factors.stored_bytes(),
        "ratio": dense / factors.stored_bytes(),
        "seconds": seconds,
        # Before and after: what else the machine does changes.
        "gram_seconds": (before + _gram_seconds(table)) / 2,
        "peak_bytes": memory.bytes,
        "predicted_loss": factors.predicted_loss,
        "measured_loss": _measured_loss(factors, table, metric, rows),
    }


@torch.no_grad()
def _gram_seconds(table: Tensor) -> float:
    """Time of `W^T W`: the least work of a solver that looks at every number."""
    total = torch.zeros(table.shape[1], table.shape[1])
    # Not of the time: what the first product of a shape prepares.
    torch.addmm(total, table[:_GRAM_ROWS].T, table[:_GRAM_ROWS])
    start = time.perf_counter()
    for rows in torch.split(table, _GRAM_ROWS):
        torch.addmm(total, rows.T, rows, out=total)
    return time.perf_counter() - start


@torch.no_grad()
def _measured_loss(factors: Factorization[Any], table: Tensor, metric: Metric, rows: int) -> float:
    """`½ Σ_i q_i δ_iᵀ M δ_i` of rows that are read back, with the weights with which they stand for all."""
    ids, weights = draw(metric.weights, rows)
    lost = 0.0
    for part, q in zip(torch.split(ids, 4096), torch.split(weights, 4096), strict=True):
        error = (table[part] - factors.rows(part)).double() @ metric.root
        lost += 0.5 * float((error.square().sum(dim=1) * q).sum())
    return lost


if __name__ == "__main__":
    CLI([tables, corpus], as_positional=True)
