"""Time and memory of two sides in one process, and factors to measure them with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lightning_embcompress.bench.peak_memory import PeakMemory as PeakMemory
from lightning_embcompress.bench.report import show_speed
from lightning_embcompress.bench.speed import SpeedBench, measure_table
from lightning_embcompress.methods.registry import SharedBasisBlocks


def seconds(run: Callable[[], Any], rounds: int = 3) -> float:
    """Least time of several rounds, after one that warms up."""
    run()
    return min(_once(run) for _ in range(rounds))


def _once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def made_factors(vocab_size: int, dim: int, ratio: float, groups: int = 20) -> SharedBasisBlocks:
    """Factors as GroupReduce finds them in the metric of the loss, but drawn at random, which is as fast to read.

    Blocks of equal size in the order of frequency but for a tenth of the words; each of 0.88 of the rank before it.
    """
    ends = [vocab_size * (group + 1) // groups for group in range(groups)]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    low, high = 1.0, 100.0 * dim
    while high - low > 1e-3:
        middle = (low + high) / 2
        if _empty(vocab_size, dim, sizes, middle, torch.device("meta")).stored_bytes() <= vocab_size * dim * 4 / ratio:
            low = middle
        else:
            high = middle
    factors = _empty(vocab_size, dim, sizes, low, None)
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -1.5, dim)
    for block in factors.coefficients:
        block.normal_(generator=generator).mul_(spectrum[: block.shape[1]])
    factors.basis.normal_(generator=generator).div_(dim**0.5)
    block_of_row = torch.arange(groups).repeat_interleave(torch.tensor(sizes))
    moved = torch.randperm(vocab_size, generator=generator)[: vocab_size // 10]
    block_of_row[moved] = block_of_row[moved[torch.randperm(len(moved), generator=generator)]]
    factors._index(block_of_row)
    return factors


def _empty(vocab_size: int, dim: int, sizes: list[int], scale: float, device: torch.device | None) -> SharedBasisBlocks:
    ranks = [max(1, min(dim, int(scale * 0.88**group))) for group in range(len(sizes))]
    return SharedBasisBlocks(vocab_size, dim, max(ranks), sizes, [[[0, rank]] for rank in ranks], False, device=device)


def speed_rows(
    bench: SpeedBench, ratio: float, only: Callable[[str], bool] = lambda _: True
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Rows of `measure_table` for a table and factors drawn at random, by what, name and threads; printed too."""
    table = torch.empty(bench.vocab_size, bench.dim).normal_()
    factors = made_factors(bench.vocab_size, bench.dim, ratio)
    report = measure_table(bench, table, factors, approximates=False, only=only)
    show_speed(report)
    return {(row["what"], row["name"], row["threads"]): row for row in report["rows"]}
