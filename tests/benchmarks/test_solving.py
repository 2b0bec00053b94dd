"""Time and memory of finding the codes of the tables of language models.

`pytest tests/benchmarks/test_solving.py -s --benchmark-only`: some minutes for the smaller table, three times as many
for the larger one.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch
from made import fill_table, zipf_metric
from measure import PeakMemory, threads

from lightning_embcompress.methods.registry import get_method

pytestmark = pytest.mark.timeout(3600)

# Minutes of two cores, by the sizes of the tables.
SIZES = {(49_152, 576): 3, (262_144, 640): 12}


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("method", ["transform_coding", "product_quantization"])
def test_table_of_a_language_model(benchmark: Any, method: str, shape: tuple[int, int]) -> None:
    table = fill_table(torch.empty(shape))
    metric, counts = zipf_metric(*shape)
    bits = 4.5 if method == "product_quantization" else 3.0
    kind = get_method(method)
    taken: list[float] = []
    memory = PeakMemory()

    def run() -> None:
        start = time.perf_counter()
        with memory:
            kind.factorization.decompose(table, int(table.numel() * bits / 8), counts, kind.config(), metric=metric)
        taken.append(time.perf_counter() - start)

    with threads():
        benchmark.pedantic(run, rounds=1)
    sys.stdout.write(
        f"\n  {method} of {shape[0]:,} x {shape[1]} at {bits} bits per weight: {taken[0]:.0f} s, "
        f"{memory.bytes / table.nbytes:.2f} tables at the peak\n"
    )
    assert taken[0] < 60 * SIZES[shape]
    assert memory.bytes < table.nbytes
