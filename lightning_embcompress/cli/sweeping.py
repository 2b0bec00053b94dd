"""`embcompress sweep`: perplexity against stored bytes, in a folder that a second start goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.cli.memory import named_device, say_memory, what_to_lower
from lightning_embcompress.cli.statistics import collect_from_text
from lightning_embcompress.cli.sweep import DEFAULT_METHODS, checksum, sweep
from lightning_embcompress.cli.sweep_record import SWEEP_FILE, Point
from lightning_embcompress.cli.sweep_report import show_sweep, write_sweep
from lightning_embcompress.cli.text import (
    check_measurable,
    check_perplexity,
    read_text,
    tokenizer_of,
)
from lightning_embcompress.cli.usage import in_shell_terms
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.compression.report import say
from lightning_embcompress.integrations.opening import open_model
from lightning_embcompress.integrations.placement import Placement
from lightning_embcompress.integrations.sources import Source
from lightning_embcompress.metrics.frequency_bands import PerplexityByFrequency
from lightning_embcompress.tables.automatic import is_one_vocabulary
from lightning_embcompress.tables.finding import find_tables
from lightning_embcompress.utils.devices import explaining_out_of_memory

if TYPE_CHECKING:
    from lightning_embcompress.cli.commands import Sweep


def run_sweep(given: Sweep, source: Source, folder: Path) -> None:
    """Measure many ways to store the tables of a model of transformers, and write the points into a folder.

    Args:
        given: The command line.
        source: The model.
        folder: Which is free, or has a sweep.

    Raises:
        ValueError: If the model cannot be measured or is compressed already, a method, a ratio, a band or the text
            cannot be used, or the folder has the points of something else or cannot be written.
    """
    device = named_device(given.device)
    with explaining_out_of_memory(device, what_to_lower(given.batch_tokens)):
        _run(given, source, folder, device)


def _run(given: Sweep, source: Source, folder: Path, device: torch.device) -> None:
    check_measurable(source)
    tokenizer = tokenizer_of(source, given.tokenizer)
    model: Any = open_model(source, given.dtype).model
    if compressed := plan_of(model).tables:
        names = ", ".join(table.name for table in compressed)
        raise ValueError(f"{source.name!r} is compressed already ({names}): sweep over the model it was made of")
    tables = "auto" if given.tables is None else list(given.tables)
    try:
        sizes = {table.name: table.shape[0] for table in find_tables(model, tables)}
    except ValueError as error:
        raise ValueError(in_shell_terms(str(error))) from error
    if not is_one_vocabulary(sizes.values()):
        listed = ", ".join(f"{name!r} {size}" for name, size in sizes.items())
        raise ValueError(
            f"the tables have different numbers of rows ({listed}), but the text has one vocabulary: name those of it, "
            f"as in --tables {next(iter(sizes))}"
        )
    # One of them may be padded.
    vocab_size = min(sizes.values())
    text = read_text(given.text, tokenizer, 9 if given.counts_text is None else 0)
    counted = text if given.counts_text is None else read_text(given.counts_text, tokenizer, 10)
    text, counted = (one.placed(device, given.batch_tokens) for one in (text, counted))
    counts, block_size = counted.counts(vocab_size), text.block_size_of(model)
    for one in (text, counted):
        one.check_ids(vocab_size, tokenizer)
        one.check_length(block_size)
    text = text.limited(given.max_tokens)
    workspace = text.workspace(block_size, vocab_size)
    say_memory(model, device, workspace)
    placement = Placement(model, device, workspace)
    if not (folder / SWEEP_FILE).is_file():
        with placement.running():
            first = text.limited(block_size).perplexity(model, block_size, "Perplexity of the first block")
        check_perplexity(first, vocab_size, tokenizer)
    say(
        f"{source.name}: {type(model).__name__} on {device}; perplexity on {text.num_measured:,} tokens, counts from "
        f"{int(counts.sum()):,}"
    )
    metric = PerplexityByFrequency(counts, given.bands)

    def evaluate(model: nn.Module) -> tuple[float, dict[str, float]]:
        metric.reset()
        with Placement(model, device, workspace).running():
            perplexity = text.perplexity(model, block_size, "Perplexity", metric)
        return perplexity, {name: float(value) for name, value in metric.compute().items()}

    def statistics() -> Statistics:
        """What the counted text says of the tables: collected once, and kept beside the points."""
        file = folder / "statistics.safetensors" if given.statistics is None else Path(given.statistics).expanduser()
        if file.is_file():
            return Statistics.load(file)
        with placement.running():
            found = collect_from_text(model, counted, block_size, counts, tables)
        found.save(file)
        return found

    ids = torch.from_numpy(text.measured.astype("int64"))
    targets = metric.band_of_token[ids[1:]].bincount(minlength=len(metric.names)).tolist()
    by_band = dict(zip(metric.names, targets, strict=True))
    data = {"text": checksum(ids), "tokens measured": len(ids) - 1, "block size": block_size}
    try:
        points = sweep(
            model,
            evaluate,
            folder,
            given.methods or DEFAULT_METHODS,
            given.sizes,
            bits_per_weight=given.bits_per_weight or (),
            bits=given.bits,
            match_bits=given.match_bits,
            tables=tables,
            token_counts=counts,
            data={**data, "targets by band": by_band},
            statistics=statistics,
            on_point=_say_point,
        )
        show_sweep(points, by_band)
        written = write_sweep(folder, points)
    except OSError as error:
        raise ValueError(str(error)) from error
    if len(written) < 2:
        say("No plot: it needs matplotlib (pip install matplotlib)")
    say(f"Written: {', '.join(map(str, [folder / SWEEP_FILE, *written]))}")


def _say_point(point: Point) -> None:
    asked = "" if point.asked_ratio is None else f" at {point.asked_ratio:.2f}x"
    if point.asked_bits_per_weight is not None:
        asked = f" at {point.asked_bits_per_weight:g} bits per weight"
    found = point.note
    if point.perplexity is not None:
        bits = "" if point.bits_per_weight is None else f" ({point.bits_per_weight:.2f} bits per weight)"
        found = f"{point.perplexity:.2f}{bits}"
    say(f"{point.method}{asked}: {found}")
