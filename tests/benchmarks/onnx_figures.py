"""Tables of 50,000 x 512 in ONNX Runtime: bytes, what a session takes, and times, beside a dense one.

python tests/benchmarks/onnx_figures.py            # all, each in a process of its own
python tests/benchmarks/onnx_figures.py int4       # one
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_embcompress.methods.full_table import FullTable
from lightning_embcompress.methods.registry import LowRank, Quantization, SharedBasisBlocks, TransformCodingConfig

_ROWS, _COLUMNS, _RANK, _IDS = 50_000, 512, 128, 32
_NAMES = ("dense", "int8", "int4", "low rank 128, int4", "transform_coding, 3 bits")


class _Tied(nn.Module):
    """Rows and logits of one table."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.table.rows(ids), self.table.logits(hidden)


class _Rows(_Tied):
    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        rows: Tensor = self.table.rows(ids)
        return rows


class _Head(_Tied):
    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        logits: Tensor = self.table.logits(hidden)
        return logits


def table_of(name: str) -> Any:
    """A table by its name in the results."""
    torch.manual_seed(0)
    weight = torch.randn(_ROWS, _COLUMNS) * torch.logspace(0, -1, _COLUMNS) * 0.05
    if name == "dense":
        return FullTable.of(nn.Parameter(weight))
    if name in ("int8", "int4"):
        return FullTable.of(nn.Parameter(weight)).quantized(Quantization(bits=int(name[3:])))
    if name.startswith("low rank"):
        low = LowRank(_ROWS, _COLUMNS, _RANK)
        nn.init.normal_(low.coefficients)
        nn.init.normal_(low.basis, std=0.01)
        return low.quantized(Quantization(bits=4))
    counts = 1 / torch.arange(1.0, _ROWS + 1)
    return SharedBasisBlocks.decompose(weight, int(weight.numel() * 3 / 8), counts, TransformCodingConfig())


def measure(name: str) -> str:
    """A line of the table of results."""
    import onnxruntime

    table = table_of(name).requires_grad_(False)
    dense = table.materialize().double()
    given = {"ids": torch.randint(_ROWS, (_IDS,)), "hidden": torch.randn(1, _COLUMNS)}
    wanted = {"ids": dense[given["ids"]], "hidden": given["hidden"].double() @ dense.T}
    cells = []
    for kind, names in ((_Tied, ("ids", "hidden")), (_Rows, ("ids",)), (_Head, ("hidden",))):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "table.onnx"
            free = tuple({0: torch.export.Dim(one, min=1, max=4096)} for one in names)
            example = {"ids": torch.arange(5), "hidden": torch.randn(3, _COLUMNS)}
            arguments = tuple(example[one] for one in names)
            options: Any = {"dynamo": True, "optimize": False, "verbose": False, "dynamic_shapes": free}
            program: Any = torch.onnx.export(kind(table), arguments, input_names=list(names), **options)
            program.save(file)
            nbytes = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
            del program
            chosen = onnxruntime.SessionOptions()
            chosen.intra_op_num_threads = 1
            before = _resident()
            session = onnxruntime.InferenceSession(file, chosen, providers=["CPUExecutionProvider"])
            taken = _resident() - before
        inputs = {one: given[one].numpy() for one in names}
        found = session.run(None, inputs)
        for one, values in zip(names, found, strict=True):
            np.testing.assert_allclose(values, wanted[one].numpy(), rtol=1e-4, atol=1e-5)
        if kind is _Tied:
            cells += [f"{table.stored_bytes() / 1e6:.2f} MB", f"{nbytes / 1e6:.2f} MB", f"{taken / 1e6:.0f} MB"]
            continue
        times = []
        for _ in range(30):
            start = time.perf_counter()
            session.run(None, inputs)
            times.append(time.perf_counter() - start)
        cells.append(f"{1e3 * statistics.median(times):.3g} ms")
    return f"| {name} | {' | '.join(cells)} |"


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    if len(sys.argv) > 1:
        print(measure(sys.argv[1]), flush=True)
    else:
        print("| table | bytes | in the graph | session | 32 rows | logits of one state |\n|---|---|---|---|---|---|")
        for each in _NAMES:
            subprocess.run([sys.executable, __file__, each], check=True)
