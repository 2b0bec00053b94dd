"""What the processes of a run have collected, as one."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_embcompress.calibration.calls import never_called
from lightning_embcompress.calibration.collector import Collector
from lightning_embcompress.calibration.counts import fitted
from lightning_embcompress.utils.division import sum_over_processes


def summed(collector: Collector) -> dict[str, Any]:
    """What all processes have collected together, as the attributes of `Statistics`.

    Args:
        collector: All processes call this, with collectors of the same tables.

    Raises:
        ValueError: If there was no batch, or none with finite values, or a table was never called.
    """
    numbers = [collector.batches, collector.skipped, collector.num_targets]
    tallies = [collector.positions, collector.scored, collector.calls]
    numbers += [number for tally in tallies for number in tally.values()]
    sums = iter(sum_over_processes(torch.tensor(numbers)).tolist())
    batches, skipped, num_targets = (int(next(sums)) for _ in range(3))
    positions, scored, calls = ({path: int(next(sums)) for path in tally} for tally in tallies)
    if not batches:
        raise ValueError(
            "there is no data to collect statistics from: the dataloader yields nothing. Give one with batches; a "
            "generator that was read before is empty, make it anew"
        )
    if batches == skipped:
        raise ValueError(
            f"each of the {batches} batches has a NaN or infinite loss, gradient or hidden state: no statistics can be "
            "collected. The training diverged, or the loss is a mean over no targets; try precision='32-true'"
        )
    _check_called(collector, positions, calls)
    if skipped:
        rank_zero_warn(
            f"{skipped} of {batches} batches were left out of the statistics: a NaN or infinite loss, gradient or "
            "hidden state"
        )
    counts = _counts(collector)
    over = {"gradients": dict.fromkeys(calls, num_targets), "probabilities": scored}
    over |= {"gradient_energies": over["gradients"], "squared_probabilities": scored}
    over |= {"hidden": positions, "hidden_mean": positions}
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in over}
    for (kind, path), total in collector.sums.items():
        mean = sum_over_processes(total).cpu() / max(1, over[kind][path])
        if over[kind][path] and (not kind.startswith("gradient") or calls[path]):
            # Products are symmetric but for rounding.
            found[kind][path] = (mean + mean.T) / 2 if mean.dim() == 2 else mean
    return {**counts, **found, "num_targets": num_targets, "skipped_batches": skipped}


def _counts(collector: Collector) -> dict[str, Any]:
    """Those of the first vocabulary, and those of tables that have others."""
    given, sizes = collector.given_counts, collector.sizes
    if given is None:
        summed = {size: sum_over_processes(counted) for size, counted in collector.counted.items()}
        given = {path: fitted(summed[collector.vocabularies[path]], size) for path, size in sizes.items()}
    first = given[collector.tables[0][0]]
    others = {path: counts for path, counts in given.items() if not torch.equal(counts, first)}
    return {"token_counts": first, "table_counts": others}


def _check_called(collector: Collector, positions: dict[str, int], calls: dict[str, int]) -> None:
    for modules in collector.tables:
        for role, called, layers in (("embedding", calls, collector.embeddings), ("head", positions, collector.heads)):
            paths = [path for path in modules if path in layers]
            if paths and not any(called[path] for path in paths):
                raise ValueError(never_called(role, paths[0]))
