"""Perplexity against stored bytes, for many methods, ratios and bit widths; goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.cli.sweep_record import SweepRecord, locked_folder
from lightning_embcompress.cli.trials import DEFAULT_METHODS, Result, Solved, Trial, carry_out, plan_trials
from lightning_embcompress.tables.replacement import find_tables
from lightning_embcompress.utils.progress import progress_bar

DEFAULT_RATIOS = (4.0, 8.0, 16.0, 32.0)
DEFAULT_BITS = (8, 4, 3, 2)
# Of a tensor so many values are looked at to tell models apart: training changes all of them.
_SAMPLED_VALUES = 1024


class Measured(NamedTuple):
    """What a model has on some text.

    Attributes:
        perplexity: Of all target tokens.
        bands: Name of a band of token frequency to the perplexity of its targets; NaN for a band without any.
    """

    perplexity: float
    bands: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Point(Result):
    """One point of a sweep.

    Attributes:
        predicted_loss: By how many nats the mean loss was expected to grow when the tables were solved; None where that
            is not known.
        loss: By how many nats it has grown: `log(perplexity / dense perplexity)`.
        pareto: Whether no other point has fewer bytes and no higher perplexity, or a lower perplexity and no more
            bytes.
        bands: Name of a band of token frequency to the perplexity of its targets; None for a band without any.
    """

    predicted_loss: float | None = None
    loss: float | None = None
    pareto: bool = False
    bands: dict[str, float | None] = field(default_factory=dict)


def sweep(
    model: nn.Module,
    evaluate: Callable[[nn.Module], Measured],
    folder: Path,
    methods: Sequence[str] = DEFAULT_METHODS,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    *,
    bits: Sequence[int] = DEFAULT_BITS,
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
        methods: Candidates, see `lightning_embcompress.cli.trials.Candidate.parse`.
        ratios: Dense bytes over stored bytes of the tables.
        bits: Widths of plain quantization of the dense tables, 2 to 8; none for a sweep without it.
        tables: See `lightning_embcompress.tables.replacement.find_tables`.
        token_counts: `[vocab_size]` how often every token occurs in the training data.
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
        ...     return Measured(nn.functional.cross_entropy(model(ids), ids).exp().item())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     points = sweep(model, evaluate, Path(folder), ["low_rank"], [1.5], bits=[8])
        >>> [point.method for point in points]
        ['dense', 'low_rank', 'int8']
    """
    trials = plan_trials(model, methods, ratios, bits, tables=tables, token_counts=token_counts)
    subject = {**_fingerprint(model, tables), "token counts": _counts_checksum(token_counts), **(data or {})}
    with locked_folder(folder):
        record = SweepRecord(folder, subject)
        points = _read_points(record)
        # What was not possible may be now, and takes no time to find out.
        measured_already = {key for key, point in points.items() if point.stored_bytes is not None}
        waiting = [trial for trial in trials if trial.key not in measured_already]
        solvable = sum(not trial.note for trial in waiting)
        if measured_already:
            rank_zero_info(
                f"{record.file}: {len(measured_already)} points are there already, {solvable} of what is asked for "
                "now are to be measured"
            )
        known: Statistics | None = None
        with progress_bar("Sweeping", total=solvable) as advance:
            for trial in waiting:
                if known is None and statistics is not None and trial.uses_loss:
                    known = statistics()
                solved = carry_out(trial, model, tables=tables, token_counts=token_counts, statistics=known)
                measured = None if solved.model is None else evaluate(solved.model)
                points[trial.key] = _point(trial, solved, measured, points.get("dense"))
                points = marked(points)
                record.write({key: asdict(point) for key, point in points.items()})
                on_point(points[trial.key])
                advance(0 if trial.note else 1)
    return sorted(points.values(), key=lambda point: point.order)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: none is better in one coordinate and at least as good in the other.

    Args:
        points: Two numbers each of which less is better, such as bytes and perplexity.

    Returns:
        One entry a point; equal points share the same.

    Example:
        >>> pareto_front([(100, 90.0), (25, 95.0), (25, 97.0), (50, 96.0)])
        [True, True, False, False]
    """
    front: set[tuple[float, float]] = set()
    lowest = math.inf
    for point in sorted(set(points)):
        if point[1] < lowest:
            front.add(point)
            lowest = point[1]
    return [point in front for point in points]


def marked(points: Mapping[str, Point]) -> dict[str, Point]:
    """The same points, with the Pareto front of stored bytes and perplexity marked anew."""
    sizes = {
        key: (float(point.stored_bytes), point.perplexity)
        for key, point in points.items()
        if point.stored_bytes is not None and point.perplexity is not None
    }
    front = dict(zip(sizes, pareto_front(list(sizes.values())), strict=True))
    return {key: replace(point, pareto=front.get(key, False)) for key, point in points.items()}


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


def _counts_checksum(token_counts: Any) -> str | None:
    return None if token_counts is None else checksum(torch.as_tensor(token_counts))


def _read_points(record: SweepRecord) -> dict[str, Point]:
    try:
        return {key: Point(**entry) for key, entry in record.points.items()}
    except TypeError as error:
        raise ValueError(f"{str(record.file)!r} is damaged: {error}; choose another folder, or remove it") from error


def _point(trial: Trial, solved: Solved, measured: Measured | None, dense: Point | None) -> Point:
    sizes = solved.ratio, solved.stored_bytes, solved.model_ratio
    if measured is None:
        return Point(trial.name, trial.ratio, *sizes, None, solved.seconds, solved.note)
    bands = {name: value if math.isfinite(value) else None for name, value in measured.bands.items()}
    value = measured.perplexity
    if not math.isfinite(value):
        if dense is None:
            raise ValueError(
                f"the perplexity of the model as it is is {value}: nothing can be compared with it; look at the model "
                "and the text"
            )
        note = f"the perplexity is {value}"
        return Point(trial.name, trial.ratio, *sizes, None, solved.seconds, note, solved.predicted_loss, bands=bands)
    loss = math.log(value / (value if dense is None or dense.perplexity is None else dense.perplexity))
    return Point(trial.name, trial.ratio, *sizes, value, solved.seconds, "", solved.predicted_loss, loss, False, bands)
