"""Perplexity against stored bytes, for many methods, ratios and bit widths; goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.cli.sweep_record import Point, SweepRecord, locked_folder
from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.compression.tasks import plan
from lightning_embcompress.compression.weighing import check_counts
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.methods.registry import FullTable, Quantization, get_config
from lightning_embcompress.quantization.aware import quantize_tables
from lightning_embcompress.tables.finding import Table, check_finite, find_tables
from lightning_embcompress.utils.progress import progress_bar

DEFAULT_METHODS = (
    "low_rank",
    "weighted_low_rank",
    "transform_coding",
    "shared_basis",
    *(f"group_reduce:groups={groups},refine_rounds={rounds}" for groups in (5, 10, 20) for rounds in (0, 5)),
    "group_reduce:grouping=kmeans",
    "tensor_train",
    *(f"tensor_train:max_rank={rank}" for rank in (1, 4)),
    *(f"tensor_train_matrix:num_cores={count}" for count in (2, 3)),
    "product_quantization",
    "tucker",
)
"""GroupReduce in all the settings that its paper leaves open, of which the best is what others have to beat, and from
groups by k-means as in later work; TensorGPT at its published ranks too. `cp`, which takes very long at low ratios,
only where it is asked for."""


class Measured(NamedTuple):
    """What is measured of a model.

    Attributes:
        perplexity: On the text.
        bands: Perplexity by the names of bands of token frequency, or of other texts; NaN where there is no text.
        losses: Mean loss of every block of the text, or of several texts by name, in nats; from those of the dense
            model follows how sure a difference is.
    """

    perplexity: float
    bands: Mapping[str, float] = {}
    losses: Mapping[str, Sequence[float]] = {}


Evaluate: TypeAlias = Callable[[nn.Module], Measured | tuple[float, Mapping[str, float]]]
"""Measures a model."""

Store: TypeAlias = Callable[[nn.Module, Sequence[Table]], int]
"""Replaces the values of tables of a model by what another way to store them gives; returns the bytes that it takes."""

# Of a tensor so many values are looked at to tell models apart: training changes all of them.
_SAMPLED_VALUES = 1024


@dataclass(frozen=True)
class Trial:
    """One way to store the tables.

    Attributes:
        name: The method with its options, `int8` or `int4` for plain integers, `dense` for the model as it is, or the
            name of another way.
        method: Name in `METHODS`; None for all but methods.
        options: Of the method.
        ratio: Dense bytes over stored bytes that are asked for, or that plain integers give. None for the dense model,
            for options that fix the size and for other ways.
        bits_per_weight: Stored bits over numbers, where the size is asked for so; `ratio` follows from it.
        bits: Width of plain integers.
        store: Another way.
        note: Why it cannot be done; nothing if it can.
    """

    name: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    ratio: float | None = None
    bits_per_weight: float | None = None
    bits: int | None = None
    store: Store | None = None
    note: str = ""

    @classmethod
    def parse(cls, text: str) -> Trial:
        """Read `method` or `method:option=value,option=value`.

        Raises:
            ValueError: If there is no such method or option, or a value is out of its range.

        Example:
            >>> Trial.parse("group_reduce:groups=5,refine_rounds=0").options
            {'groups': 5, 'refine_rounds': 0}
        """
        method, _, rest = text.partition(":")
        # As a YAML mapping in flow style: lists and nested values need no rules of our own.
        options = yaml.safe_load("{" + rest.replace("=", ": ") + "}") if rest else {}
        get_config(method, **options)
        return cls(_named(method, options), method, options)

    @property
    def uses_loss(self) -> bool:
        """Whether it is solved in the metric of the loss, where statistics are known."""
        return self.method is not None and not self.note and get_config(self.method, **self.options).uses_metric

    @property
    def key(self) -> str:
        """The same for the same trial, in whatever order its options are given.

        Example:
            >>> replace(Trial.parse("group_reduce:refine_rounds=0,groups=5"), ratio=8.0).key
            'group_reduce:groups=5,refine_rounds=0 at 8.0x'
        """
        if self.method is None:
            return self.name
        name = _named(self.method, dict(sorted(self.options.items())))
        if self.bits_per_weight is not None:
            return f"{name} at {float(self.bits_per_weight)} bits"
        return name if self.ratio is None else f"{name} at {float(self.ratio)}x"

    @property
    def budget(self) -> dict[str, Any]:
        """The size, as `compress` takes it."""
        return {"ratio": self.ratio} if self.bits_per_weight is None else {"bits_per_weight": self.bits_per_weight}


def sweep(
    model: nn.Module,
    evaluate: Evaluate,
    folder: Path,
    methods: Sequence[str] = DEFAULT_METHODS,
    ratios: Sequence[float] = (4.0, 8.0, 16.0, 32.0),
    *,
    bits_per_weight: Sequence[float] = (),
    bits: Sequence[int] = (8, 4, 3, 2),
    match_bits: bool = False,
    stores: Mapping[str, Store] | None = None,
    tables: str | Sequence[str] = "auto",
    token_counts: Any = None,
    data: Mapping[str, Any] | None = None,
    statistics: Callable[[], Statistics] | None = None,
    on_point: Callable[[Point], None] = lambda _: None,
) -> list[Point]:
    """Compress copies of a model by many methods to many sizes, and measure them, without training.

    Every point is in `folder/sweep.json` as soon as it is known. A second call with the same model and data solves
    only what is not there yet: it goes on with a sweep that was interrupted, or adds methods, ratios and widths to it.

    Args:
        model: The trained model; it is not changed.
        evaluate: Measures a model.
        folder: Where the points are kept; made if it is missing.
        methods: Each as `Trial.parse` reads it.
        ratios: Dense bytes over stored bytes of the tables.
        bits_per_weight: The same sizes in other words: stored bits over numbers of the tables.
        bits: Widths of plain quantization of the tables, to integers in groups of 32 with 16-bit scales, 2 to 8; none
            for a sweep without it.
        match_bits: Whether every method is also tried at the very bytes of plain quantization.
        stores: Other ways to store the tables, such as the formats of other programs, by name; no name of a method.
        tables: See `lightning_embcompress.tables.finding.find_tables`.
        token_counts: `[vocab_size]` how often every token occurs in the training data, or such counts by the paths of
            tables.
        data: What `evaluate` measures on, as JSON, by the names that an error may use (`{"text": checksum}`): points of
            other data are not added to.
        statistics: Called before the first method is solved that weighs errors by what the loss grows by; gives the
            statistics of the model. They have to follow from the model and the data.
        on_point: Called with every new point as soon as it is known.

    Returns:
        All points in the folder: the dense model first, then by ratio, the best perplexity first; what cannot be
        reached comes last.

    Raises:
        ValueError: If a method, an option, a ratio or the counts cannot be used, the folder has a sweep of another
            model or other data, or another sweep is writing into it; nothing is solved then. If the perplexity of the
            dense model is not finite.
        OSError: If the folder cannot be written.

    Example:
        >>> import tempfile
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100, bias=False))
        >>> def evaluate(model):
        ...     ids = torch.arange(100)
        ...     return nn.functional.cross_entropy(model(ids), ids).exp().item(), {}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     points = sweep(model, evaluate, Path(folder), ["low_rank"], [1.5], bits=[8])
        >>> [point.method for point in points]
        ['dense', 'low_rank', 'int8']
    """
    trials = _trials(model, methods, ratios, bits_per_weight, bits, match_bits, tables, token_counts)
    trials += [Trial(name, store=store) for name, store in (stores or {}).items()]
    given = token_counts.values() if isinstance(token_counts, Mapping) else [token_counts]
    counted = None if token_counts is None else checksum(*map(torch.as_tensor, given))
    subject = {**_fingerprint(model, tables), "token counts": counted, **(data or {})}
    with locked_folder(folder):
        record = SweepRecord(folder, subject)
        # What was not possible may be now, and takes no time to find out.
        there = {key for key, point in record.points.items() if point.stored_bytes is not None}
        waiting = [trial for trial in trials if trial.key not in there]
        solvable = sum(not trial.note for trial in waiting)
        if there:
            rank_zero_info(
                f"{record.file}: {len(there)} points are there already, {solvable} of what is asked for now are to be "
                "measured"
            )
        known: Statistics | None = None
        with progress_bar("Sweeping", total=solvable) as advance:
            for trial in waiting:
                if known is None and statistics is not None and trial.uses_loss:
                    known = statistics()
                options = {"tables": tables, "token_counts": token_counts, "statistics": known}
                point = _measured(trial, model, evaluate, record.points.get("dense"), options)
                record.add(trial.key, point)
                on_point(record.points[trial.key])
                advance(0 if trial.note else 1)
    return sorted(record.points.values(), key=lambda point: point.order)


def _trials(
    model: nn.Module,
    methods: Sequence[str],
    ratios: Sequence[float],
    bits_per_weight: Sequence[float],
    bits: Sequence[int],
    match_bits: bool,
    tables: str | Sequence[str],
    token_counts: Any,
) -> list[Trial]:
    """The dense model, plain integers, and every method at every ratio, each of them once.

    What a method cannot do is one of them too, with the reason.
    """
    named = [Trial.parse(text) for text in methods]
    found = find_tables(model, tables)
    for table in found:
        check_finite(table)
    if bad := [ratio for ratio in ratios if not 1 < ratio < float("inf")]:
        raise ValueError(f"ratios must be above 1 (dense bytes over stored bytes), one is {bad[0]!r}")
    dense = 8 * sum(table.weight.nbytes for table in found) / sum(table.weight.numel() for table in found)
    if bad := [one for one in bits_per_weight if not 0 < one < dense]:
        raise ValueError(f"bits_per_weight must be above 0 and below {dense:g}, those of the tables, one is {bad[0]!r}")
    integers = {width: _integer_ratio(found, width) for width in bits}
    trials = [Trial("dense"), *(Trial(f"int{width}", ratio=ratio, bits=width) for width, ratio in integers.items())]
    sizes = [{"ratio": ratio} for ratio in sorted({*ratios, *(integers.values() if match_bits else ())})]
    sizes += [{"ratio": dense / one, "bits_per_weight": one} for one in sorted(bits_per_weight, reverse=True)]
    for trial in named:
        assert trial.method is not None
        config = get_config(trial.method, **trial.options)
        for size in [{}] if config.fixes_size else sizes:
            sized, note = replace(trial, **size), ""
            try:
                budget = Budget.of(config, **sized.budget)
                tasks = plan(model, config, budget, tables, is_preview=True)
            except ValueError as error:
                note = str(error)
            else:
                check_counts([task.table for task in tasks], config, token_counts)
            trials.append(replace(sized, note=note))
    return list({trial.key: trial for trial in trials}.values())


def checksum(*tensors: Tensor) -> str:
    """A checksum of tensors: of their values, shapes and dtypes.

    Example:
        >>> checksum(torch.arange(3)) == checksum(torch.arange(3)), checksum(torch.arange(3)) == checksum(torch.ones(3))
        (True, False)
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        # As bytes: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _fingerprint(model: nn.Module, tables: str | Sequence[str]) -> dict[str, Any]:
    """What tells a model from others: its tables, and a checksum of a sample of all its weights."""
    found = [
        f"{' = '.join(table.modules)} {table.shape[0]} x {table.shape[1]} {str(table.weight.dtype).split('.')[-1]}"
        for table in find_tables(model, tables)
    ]
    sums = []
    for name, tensor in model.state_dict().items():
        # Layers may keep what is no tensor (`get_extra_state`).
        if isinstance(tensor, Tensor):
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLED_VALUES)]
            sums.append(f"{name} {tuple(tensor.shape)} {checksum(sample)}")
    return {"tables": found, "weights": hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]}


def _named(method: str, options: Mapping[str, Any]) -> str:
    rest = ",".join(f"{name}={value}" for name, value in options.items())
    return f"{method}:{rest}" if rest else method


def _plain_integers(bits: int) -> Quantization:
    return Quantization(bits, group_size=32)


def _integer_ratio(tables: Sequence[Table], bits: int) -> float:
    """Dense bytes over those of tables in plain integers."""
    stored = 0
    for table in tables:
        packed = FullTable(*table.shape, device=torch.device("meta"))
        packed.hold(_plain_integers(bits), "packed")
        stored += packed.stored_bytes()
    return sum(table.weight.nbytes for table in tables) / stored


def _measured(
    trial: Trial, model: nn.Module, evaluate: Evaluate, dense: Point | None, options: Mapping[str, Any]
) -> Point:
    """Store the tables of a copy of a model in one of the ways, and measure it.

    If the method finds no factors, the reason stands in the place of sizes: what a method cannot do is a result too.
    """
    point = Point(trial.name, trial.ratio, note=trial.note, asked_bits_per_weight=trial.bits_per_weight)
    if trial.note:
        return point
    tables = find_tables(model, options["tables"])
    smaller, start = model, time.perf_counter()
    size, numbers = sum(table.weight.nbytes for table in tables), sum(table.weight.numel() for table in tables)
    if trial.name == "dense" or trial.store is not None:
        stored, whole = size, model_bytes(model)["dense_bytes"]
        if trial.store is not None:
            smaller = deepcopy(model)
            stored = trial.store(smaller, find_tables(smaller, options["tables"]))
            point = replace(point, seconds=time.perf_counter() - start)
        point = replace(
            point,
            ratio=size / stored,
            stored_bytes=stored,
            bits_per_weight=8 * stored / numbers,
            model_ratio=whole / (whole - size + stored),
            predicted_loss=None if trial.store else 0.0,
        )
    else:
        smaller = deepcopy(model)
        try:
            if trial.method is None:
                assert trial.bits is not None
                plan = quantize_tables(smaller, _plain_integers(trial.bits), [table.name for table in tables])
            else:
                plan = compress(smaller, trial.method, **trial.budget, **{**options, **trial.options})
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            return replace(point, note=str(error))
        point = replace(
            point,
            ratio=plan.ratio,
            stored_bytes=plan.stored_bytes,
            bits_per_weight=plan.bits_per_weight,
            model_ratio=model_bytes(smaller)["ratio"],
            seconds=time.perf_counter() - start,
            predicted_loss=plan.predicted_loss,
        )
    value, bands, losses = Measured(*evaluate(smaller))
    point = replace(
        point,
        bands={name: found if math.isfinite(found) else None for name, found in bands.items()},
        losses={name: list(found) for name, found in losses.items()},
    )
    if not math.isfinite(value):
        if dense is None:
            raise ValueError(
                f"the perplexity of the model as it is is {value}: nothing can be compared with it; look at the model "
                "and the text"
            )
        return replace(point, note=f"the perplexity is {value}", losses={})
    base = value if dense is None or dense.perplexity is None else dense.perplexity
    return replace(point, perplexity=value, loss=math.log(value / base))
