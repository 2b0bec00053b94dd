"""`embcompress sweep`: perplexity against stored bytes, in a folder that a second start goes on with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.cli.arguments import Arguments
from lightning_embcompress.cli.comparing import say_result
from lightning_embcompress.cli.measuring import MeasurableModel, open_measurable
from lightning_embcompress.cli.statistics import collect_from_text
from lightning_embcompress.cli.sweep import Measured, checksum, sweep
from lightning_embcompress.cli.sweep_record import SWEEP_FILE
from lightning_embcompress.cli.sweep_report import show_sweep, write_sweep
from lightning_embcompress.cli.trials import DEFAULT_METHODS
from lightning_embcompress.compression.report import say
from lightning_embcompress.metrics.frequency_bands import PerplexityByFrequency


def run_sweep(arguments: Arguments) -> int:
    """Measure many ways to store the tables of a model of transformers, and write the points into a folder.

    Raises:
        ValueError: If the model cannot be measured, a method, a ratio, a band or the text cannot be used, or the folder
            has the points of something else or cannot be written.
    """
    given, folder = arguments.given, arguments.target
    opened = open_measurable(arguments, "sweep over the model it was made of")
    metric = PerplexityByFrequency(opened.token_counts, given.bands)

    def evaluate(model: nn.Module) -> Measured:
        metric.reset()
        perplexity = opened.text.perplexity(model, opened.block_size, "Perplexity", given.max_tokens, metric)
        return Measured(perplexity, {name: float(value) for name, value in metric.compute().items()})

    measured = opened.text.measured_ids(given.max_tokens)
    targets = _targets(opened, metric, given.max_tokens)
    data = {
        "text": checksum(torch.from_numpy(measured.astype("int64"))),
        "tokens measured": len(measured) - 1,
        "block size": opened.block_size,
        "targets by band": targets,
    }
    try:
        points = sweep(
            opened.model,
            evaluate,
            folder,
            given.methods or DEFAULT_METHODS,
            given.ratios,
            bits=given.bits,
            tables=opened.tables,
            token_counts=opened.token_counts,
            data=data,
            statistics=lambda: _statistics(opened, folder),
            on_point=say_result,
        )
        show_sweep(points, targets)
        written = write_sweep(folder, points)
    except OSError as error:
        raise ValueError(str(error)) from error
    if len(written) < 2:
        say("No plot: it needs matplotlib (pip install matplotlib)")
    say(f"Written: {', '.join(map(str, [folder / SWEEP_FILE, *written]))}")
    return 0


def _statistics(opened: MeasurableModel, folder: Path) -> Statistics:
    """What the counted text says of the tables: collected once, and kept beside the points."""
    file = folder / "statistics.safetensors"
    if file.is_file():
        return Statistics.load(file)
    statistics = collect_from_text(
        opened.model, opened.counted_text, opened.block_size, opened.token_counts, opened.tables
    )
    statistics.save(file)
    return statistics


def _targets(opened: MeasurableModel, metric: PerplexityByFrequency, max_tokens: int | None) -> dict[str, int]:
    """How many of the measured tokens are in each band."""
    targets = torch.from_numpy(opened.text.measured_ids(max_tokens)[1:].astype("int64"))
    return dict(
        zip(metric.names, metric.band_of_token[targets].bincount(minlength=len(metric.names)).tolist(), strict=True)
    )
