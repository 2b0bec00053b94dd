"""`embcompress compress` and `densify`: a model in files as one of the same kind with other tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_embcompress.cli.memory import default_max_tokens, named_device, say_memory, what_to_lower
from lightning_embcompress.cli.statistics import WantedStatistics
from lightning_embcompress.cli.targets import report_path
from lightning_embcompress.cli.text import (
    TokenizedText,
    check_measurable,
    check_perplexity,
    read_text,
    tokenizer_of,
    vocab_size_of,
)
from lightning_embcompress.cli.usage import UsageError, in_shell_terms
from lightning_embcompress.compression.budget import BUDGETS, Budget
from lightning_embcompress.compression.plan import Plan, compress, densify, plan_of
from lightning_embcompress.compression.report import say, show_plan, show_tasks, write_report
from lightning_embcompress.compression.tasks import Task, plan
from lightning_embcompress.integrations.opening import OpenedModel, open_model
from lightning_embcompress.integrations.placement import Placement
from lightning_embcompress.integrations.sources import Source
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.methods.registry import get_config
from lightning_embcompress.utils.devices import explaining_out_of_memory
from lightning_embcompress.utils.files import explaining_failure, replacing

if TYPE_CHECKING:
    from lightning_embcompress.cli.commands import Compress, Densify


@dataclass(frozen=True)
class _Text:
    """What `--text` is for in this run."""

    tokens: TokenizedText
    block_size: int | None
    """None if no perplexity is measured."""
    placement: Placement

    def perplexity(self, model: Any, name: str) -> float | None:
        """Perplexity of a model that is called so, if one is measured."""
        return None if self.block_size is None else self.measure(model, f"Perplexity, {name}")

    def measure(self, model: Any, title: str = "Perplexity") -> float:
        assert self.block_size is not None
        with self.placement.running():
            return self.tokens.perplexity(model, self.block_size, title)

    def record(self) -> dict[str, Any]:
        measured = 0 if self.block_size is None else self.tokens.num_measured
        return {"counted": len(self.tokens.counted), "measured": measured, "block_size": self.block_size}


def run_compress(given: Compress, source: Source, target: Path) -> None:
    """Compress a model.

    Args:
        given: The command line.
        source: The model.
        target: What is made, which can be written.

    Raises:
        UsageError: If an option is out of its range, or the size is not given in one way.
        ValueError: If the request cannot be met. Nothing has been written then.
    """
    sizes = {name: getattr(given, name) for name in BUDGETS}
    try:
        config = get_config(given.method, **given.options)
        budget = Budget.of(config, **sizes)
    except ValueError as error:
        raise UsageError(str(error)) from error
    device = named_device(given.device)
    tokenizer = _check_text(given, source)
    wanted = WantedStatistics.of(given, config)
    folder = Path(given.tokenizer).expanduser() if given.tokenizer else None
    beside = folder if folder and folder.is_dir() else None  # not a name on the hub
    with explaining_out_of_memory(device, what_to_lower(given.batch_tokens)):
        opened = open_model(source, given.dtype, given.trust_source, beside)
        _say_opened(opened, given.dtype, device)
        try:
            tables = _start(opened, given.tables)
            preview: dict[str, Any] = {"keep_rows": given.keep_rows, "is_preview": True}
            tasks = plan(opened.model, config, budget, tables, given.tie, **preview)
        except ValueError as error:
            raise ValueError(in_shell_terms(str(error))) from error
        text = _read_text(opened, tokenizer, tasks, given, device)
        counts: Tensor | None = None
        token_counts: str | None = "statistics"
        if wanted is None or not wanted.is_there:
            counts, token_counts = _counts(text, tasks)
        perplexity: dict[str, Any] = dict.fromkeys(("dense", "compressed"))
        perplexity |= {"refined": [], "final": None, "split": None if text is None else "text"}
        if text is not None and text.block_size is not None:
            # Before all that takes longer: it also shows whether text, tokenizer and model belong together.
            perplexity["dense"] = text.measure(opened.model, "Perplexity, dense")
            check_perplexity(perplexity["dense"], vocab_size_of(opened.model), tokenizer)
        placement = Placement(opened.model, device, is_called=False) if text is None else text.placement
        statistics = None
        if wanted is not None:
            with placement.running() if not wanted.is_there else nullcontext():
                statistics = wanted.find(opened.model, None if text is None else text.tokens, counts, tables)
            statistics.check([task.table for task in tasks])
        show_tasks(tasks, budget, statistics is not None)
        evaluate = None if text is None else text.measure
        known: dict[str, Any] = {"token_counts": counts, "statistics": statistics, "evaluate": evaluate}
        known["keep_rows"] = _kept(given, text, tasks)
        with placement.solving([path for task in tasks for path in task.table.modules]):
            done = compress(opened.model, config, **sizes, tables=tables, tie=given.tie, **known)
        show_plan(opened.model, "Compressed")
        as_stored = _say_ratio_as_stored(opened, done)
        if text is not None:
            perplexity["compressed"] = perplexity["final"] = text.perplexity(opened.model, "compressed")
            _say_perplexity(perplexity, text, done.predicted_loss)
        opened.model.to("cpu")
    extra = {"source": source.name, "token_counts": token_counts, "text": text and text.record(), **as_stored}
    extra["statistics"] = None if statistics is None else {"targets": statistics.num_targets, "file": given.statistics}
    _write(source, target, opened, perplexity, extra)


def run_densify(given: Densify, source: Source, target: Path) -> None:
    """Make a model dense.

    Args:
        given: The command line.
        source: The model.
        target: What is made, which can be written.

    Raises:
        ValueError: If it is not compressed, or cannot be read. Nothing has been written then.
    """
    opened = open_model(source, trust=given.trust_source)
    compressed = plan_of(opened.model).tables
    if not compressed:
        raise ValueError(f"{source.name!r} has no compressed tables: it is an ordinary model already")
    before = model_bytes(opened.model)["stored_bytes"]
    densify(opened.model)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with explaining_failure(target), replacing(target, directory=source.is_directory) as path:
        opened.write(path)
    after = model_bytes(opened.model)["stored_bytes"]
    names = ", ".join(" = ".join(table.modules) for table in compressed)
    say(f"Made dense: {names}; {before / 1e6:,.3f} MB became {after / 1e6:,.3f} MB")
    _say_left_out(opened)
    say(f"Written: {target}")


def _say_opened(opened: OpenedModel, dtype: str | None, device: torch.device) -> None:
    as_cast = "" if dtype is None else f" in {dtype}"
    megabytes = model_bytes(opened.model)["stored_bytes"] / 1e6
    say(f"{opened.source.name}: {_type_name(opened)}, {megabytes:,.3f} MB{as_cast}, on {device}")


def _say_ratio_as_stored(opened: OpenedModel, plan: Plan) -> dict[str, Any]:
    """Compare the tables with what the files hold, where that is not what was compressed; for the report."""
    stored, used = opened.stored_dtype, getattr(torch, plan.tables[0].dtype)
    if stored is None or plan.ratio is None or stored == used:
        return {}
    ratio, name = plan.ratio * stored.itemsize / used.itemsize, str(stored).removeprefix("torch.")
    say(f"The source is stored in {name}: against that the tables are {ratio:.2f}x smaller")
    return {"stored_dtype": name, "ratio_as_stored": ratio}


def _type_name(opened: OpenedModel) -> str:
    """What a person calls the kind of a model."""
    if opened.source.kind == "pretrained":
        return type(opened.model).__name__
    return "a Lightning checkpoint" if opened.source.kind == "checkpoint" else "saved by save_compressed"


def _check_text(given: Compress, source: Source) -> str:
    """The tokenizer for the text, if there is a text and it can be used."""
    if given.text is None:
        if given.counts_only:
            raise UsageError("--counts_only says what --text is for: name the files with --text")
        return ""
    if not given.counts_only:
        check_measurable(source)
    return tokenizer_of(source, given.tokenizer)


def _kept(given: Compress, text: _Text | None, tasks: Sequence[Task]) -> list[int]:
    """Ids that are named, and those that the tokenizer of a text has for ends, masks and the like."""
    weighs = any(task.config.needs_counts or task.config.uses_metric for task in tasks)
    rows = min(task.table.shape[0] for task in tasks)
    special = text.tokens.special if text is not None and weighs else ()
    return sorted({*(given.keep_rows or ()), *(token for token in special if token < rows)})


def _start(opened: OpenedModel, named: Sequence[str] | None) -> str | list[str]:
    """Make tables dense that are compressed already, and say what is to be compressed.

    Returns:
        What `compress` takes as `tables`.
    """
    before = plan_of(opened.model)
    compressed = [path for table in before.tables for path in table.modules]
    if not compressed:
        return opened.default_tables() if named is None else list(named)
    methods = ", ".join(
        f"{table.name} ({table.method}, {table.ratio:.2f}x, {table.bits_per_weight:.2f} bits per weight)"
        for table in before.tables
    )
    if named is not None and not set(named) & set(compressed):
        say(f"Tables that are compressed already stay as they are: {methods}")
        return list(named)
    say(f"Starting from compressed tables, whose loss remains: {methods} are made dense and compressed anew")
    densify(opened.model)
    if named is None:
        return [table.name for table in before.tables]
    left = [table.name for table in before.tables if not set(named) & set(table.modules)]
    if left:
        say(f"Not named in --tables, and therefore dense from now on: {', '.join(left)}")
    return list(named)


def _read_text(
    opened: OpenedModel, tokenizer: str, tasks: Sequence[Task], given: Compress, device: torch.device
) -> _Text | None:
    if given.text is None:
        return None
    tokens = read_text(given.text, tokenizer).placed(device, given.batch_tokens)
    for task in tasks:
        tokens.check_ids(task.table.shape[0], tokenizer)
    if given.counts_only:
        return _Text(tokens, None, Placement(opened.model, device, is_called=False))
    block_size = tokens.block_size_of(opened.model)
    tokens.check_length(block_size)
    there = tokens.num_measured
    tokens = tokens.limited(default_max_tokens(device) if given.max_tokens is None else given.max_tokens)
    if tokens.num_measured < there:
        say(
            f"Perplexity is measured on the first {tokens.num_measured:,} of the {there:,} tokens in the last tenth of "
            "the text: more with --max_tokens"
        )
    workspace = tokens.workspace(block_size, vocab_size_of(opened.model))
    workspace = max(workspace, *(4 * task.table.weight.numel() for task in tasks))
    say_memory(opened.model, device, workspace)
    return _Text(tokens, block_size, Placement(opened.model, device, workspace))


def _counts(text: _Text | None, tasks: Sequence[Task]) -> tuple[Tensor | None, str | None]:
    """Token counts for the tables, and where they are from, as in the report."""
    if not any(task.config.needs_counts for task in tasks):
        return None, None
    sizes = {task.table.shape[0]: task.table.name for task in tasks}
    if len(sizes) > 1:
        listed = " and ".join(f"{name!r} ({size} rows)" for size, name in sizes.items())
        raise ValueError(
            f"tables {listed} have different vocabularies, so the same token counts do not fit both: compress one with "
            "--tables, then the other in what was made"
        )
    (vocab_size,) = sizes
    if text is not None:
        return text.tokens.counts(vocab_size), "text"
    say("Token counts are assumed by Zipf's law in the order of the ids: for real ones give a text with --text")
    return 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64), "zipf by id"


def _say_perplexity(perplexity: dict[str, Any], text: _Text, predicted_loss: float | None) -> None:
    dense, after = perplexity["dense"], perplexity["compressed"]
    if dense is not None and after is not None:
        say(
            f"Perplexity on the last tenth of the text, {text.tokens.num_measured:,} tokens: {dense:.2f} before, "
            f"{after:.2f} compressed ({after / dense - 1:+.1%})"
        )
        if predicted_loss is not None and math.isfinite(after):
            say(f"The loss was predicted to grow by {predicted_loss:.4f} nats: measured {math.log(after / dense):+.4f}")


def _say_left_out(opened: OpenedModel) -> None:
    if opened.left_out:
        say(f"Not copied, as weights of the model before: {', '.join(opened.left_out)}")


def _write(
    source: Source, target: Path, opened: OpenedModel, perplexity: dict[str, Any], extra: dict[str, Any]
) -> None:
    report = report_path(target, source)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with explaining_failure(target), replacing(target, directory=source.is_directory) as path:
        opened.write(path)
        if source.is_directory:
            write_report(path / report.name, opened.model, perplexity, extra)
    if not source.is_directory:
        write_report(report, opened.model, perplexity, extra)
    _say_left_out(opened)
    if opened.dropped:
        say(
            f"Not in {target}: {', '.join(opened.dropped)}. It is for load_from_checkpoint, validate, test and "
            "predict; training cannot be resumed from it"
        )
    say(f"Written: {target}, {report}")
    if source.kind == "pretrained":
        say("Python programs load it once they have imported lightning_embcompress, whichever library they use")
