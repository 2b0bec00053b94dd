"""Time GroupReduce of one table by one process and by all of them, one thread each, in turn.

Arguments: vocabulary size, dimension, rounds, and the file that is written, as JSON: of every round the seconds and
those of them that the first process was computing, and the memory that it took beyond the table, as a share of it.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from measure import status
from torch import Tensor, nn

from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.solution import solve
from lightning_embcompress.compression.tasks import plan
from lightning_embcompress.methods.registry import GroupReduceConfig


def table(vocab_size: int, dim: int) -> Tensor:
    """Rows of low rank that differ between frequent and rare words, and noise."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(vocab_size, dim)
    for rows in weight.split(-(-vocab_size // 10)):
        basis = torch.randn(dim // 4, dim, generator=generator) * torch.linspace(1, 0.1, dim // 4).unsqueeze(1)
        for some in rows.split(8192):
            torch.mm(torch.randn(len(some), dim // 4, generator=generator), basis, out=some)
            some += torch.randn(some.shape, generator=generator)
    return weight


def main(vocab_size: int, dim: int, rounds: int, file: Path) -> None:
    """Measure, and write what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=900))
    rank = dist.get_rank()
    # Made once: the random numbers take as long as a part of the work.
    if rank == 0:
        torch.save(table(vocab_size, dim), file.with_suffix(".table"))
    dist.barrier()
    weight = torch.load(file.with_suffix(".table"))
    counts = (1e8 / torch.arange(1, vocab_size + 1)).long()
    model = nn.Sequential(nn.Linear(dim, vocab_size, bias=False, device="meta"))
    model[0].weight = nn.Parameter(weight)
    tasks = plan(model, GroupReduceConfig(), Budget(ratio=6.6), ["0"], token_counts=counts)
    measured: dict[str, list[float]] = {"one": [], "one_busy": [], "all": [], "all_busy": [], "memory": []}
    errors = []
    for _ in range(rounds):
        for side in ("one", "all"):
            # The peak starts again here; a thread that watches would take time from one side only.
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            dist.barrier()
            start, busy = time.perf_counter(), time.process_time()
            if side == "all" or rank == 0:
                (factors,) = solve(tasks, together=side == "all").factors
                measured[side].append(time.perf_counter() - start)
                measured[f"{side}_busy"].append(time.process_time() - busy)
                errors.append(factors.provenance["weighted_error"])
                # The factors that are the result are part of it.
                measured["memory"].append((status("VmHWM") - before) / weight.nbytes)
                del factors
            dist.barrier()
    assert len(set(errors)) == 1
    if rank == 0:
        file.write_text(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
