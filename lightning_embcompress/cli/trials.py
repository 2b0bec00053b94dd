"""Ways to store the tables of a trained model, tried on copies of it: what comparisons and sweeps are made of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.compression.budget import check_counts, plan_requests
from lightning_embcompress.compression.loss_budget import uses_loss
from lightning_embcompress.compression.plan import compress
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.methods.registry import FullTable, Quantization, get_method
from lightning_embcompress.quantization.aware import quantize_tables
from lightning_embcompress.tables.replacement import check_finite, find_tables

DEFAULT_METHODS = (
    "low_rank",
    "weighted_low_rank",
    "transform_coding",
    "group_reduce:variant=loss",
    *(
        f"group_reduce:variant=paper,groups={groups},refine_rounds={rounds}"
        for groups in (5, 10, 20)
        for rounds in (0, 5)
    ),
    "group_reduce:variant=paper,grouping=kmeans",
    "tensor_train",
    *(f"tensor_train:max_rank={rank}" for rank in (1, 4)),
    *(f"tensor_train_matrix:num_cores={count}" for count in (2, 3)),
    "product_quantization",
    "tucker",
)
"""GroupReduce in all the settings that its paper leaves open, of which the best is what others have to beat, and from
groups by k-means as in later work; TensorGPT at its published ranks too. `cp`, which takes very long at low ratios,
only where it is asked for."""


@dataclass(frozen=True)
class Candidate:
    """A method with its options.

    Attributes:
        method: Name in `METHODS`.
        options: Its options.
    """

    method: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Read `method` or `method:option=value,option=value`.

        Raises:
            ValueError: If there is no such method or option, or a value is out of its range.

        Example:
            >>> Candidate.parse("group_reduce:groups=5,refine_rounds=0")
            Candidate(method='group_reduce', options={'groups': 5, 'refine_rounds': 0})
        """
        method, _, rest = text.partition(":")
        # As a YAML mapping in flow style: lists and nested values need no rules of our own.
        options = yaml.safe_load("{" + rest.replace("=", ": ") + "}") if rest else {}
        get_method(method).options(**options)
        return cls(method, options)

    @property
    def fixes_size(self) -> bool:
        """Whether the options say how large the factors are: then ratios have no say."""
        return bool(get_method(self.method).options(**self.options).fixes_size)

    def __str__(self) -> str:
        """As it is parsed."""
        rest = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method}:{rest}" if rest else self.method


@dataclass(frozen=True)
class Trial:
    """One way to store the tables, that is to be tried.

    Attributes:
        name: The candidate, `int8` or `int4` for plain quantization of the tables, `dense` for the model as it is.
        ratio: Dense bytes over stored bytes: what is asked for, or what plain quantization gives. None for the dense
            model and for options that fix the size.
        candidate: The method with its options; None for the dense model and for plain quantization.
        bits: Width of plain quantization; None for the others.
        note: Why it cannot be done; nothing if it can.
    """

    name: str
    ratio: float | None = None
    candidate: Candidate | None = None
    bits: int | None = None
    note: str = ""

    @property
    def uses_loss(self) -> bool:
        """Whether it is solved in the metric of the loss, where statistics are known."""
        return self.candidate is not None and not self.note and uses_loss(self.candidate.method, self.candidate.options)

    @property
    def key(self) -> str:
        """The same for the same trial, in whatever order its options are given.

        Example:
            >>> Trial("group_reduce", 8.0, Candidate.parse("group_reduce:refine_rounds=0,groups=5")).key
            'group_reduce:groups=5,refine_rounds=0 at 8.0x'
        """
        if self.candidate is None:
            return self.name
        name = str(Candidate(self.candidate.method, dict(sorted(self.candidate.options.items()))))
        return name if self.ratio is None else f"{name} at {float(self.ratio)}x"


@dataclass(frozen=True)
class Solved:
    """What came of a trial.

    Attributes:
        model: A copy of the model with the tables stored so, or the model itself for `dense`; None if it could not be
            done.
        ratio: Dense bytes over stored bytes of the tables, as stored, all metadata included.
        stored_bytes: Bytes of the tables.
        model_ratio: Dense bytes over stored bytes of the whole model.
        predicted_loss: By how many nats the mean loss is expected to grow, over all tables; None if it is not known.
        seconds: How long the tables took to solve.
        note: Why it could not be done.
    """

    model: nn.Module | None = None
    ratio: float | None = None
    stored_bytes: int | None = None
    model_ratio: float | None = None
    predicted_loss: float | None = None
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    """One line of a comparison or a sweep.

    Attributes:
        method: The candidate, `int8` or `int4` for plain quantization of the tables, `dense` for the model as it is.
        asked_ratio: Dense bytes over stored bytes that were asked for; of the lines with the same one, none has more
            bytes. None for the dense model and for options that fix the size.
        ratio: Dense bytes over stored bytes of the tables, as stored, all metadata included.
        stored_bytes: Bytes of the tables.
        model_ratio: Dense bytes over stored bytes of the whole model.
        perplexity: What was measured; None if the ratio cannot be reached.
        seconds: How long the tables took to solve.
        note: Why there is no perplexity.
    """

    method: str
    asked_ratio: float | None
    ratio: float | None
    stored_bytes: int | None
    model_ratio: float | None
    perplexity: float | None
    seconds: float | None = None
    note: str = ""

    @property
    def order(self) -> tuple[float, bool, float]:
        """Sorts the dense model first, then by ratio, the best perplexity first; what cannot be reached comes last."""
        asked = 0.0 if self.method == "dense" else self.asked_ratio or self.ratio or 0.0
        return asked, self.perplexity is None, self.perplexity or 0.0


def plan_trials(
    model: nn.Module,
    methods: Sequence[str],
    ratios: Sequence[float],
    bits: Sequence[int],
    *,
    tables: str | Sequence[str] = "auto",
    token_counts: Any = None,
    at_sizes_of_bits: bool = False,
) -> list[Trial]:
    """Decide what to try, before anything is solved.

    Args:
        model: The trained model.
        methods: Candidates, see `Candidate.parse`.
        ratios: Dense bytes over stored bytes of the tables.
        bits: Widths of plain quantization, to integers in groups of 32 with 16-bit scales; 2 to 8.
        tables: See `lightning_embcompress.tables.replacement.find_tables`.
        token_counts: `[vocab_size]` how often every token occurs in the training data.
        at_sizes_of_bits: Whether the ratios of plain quantization are added to those asked for.

    Returns:
        The dense model, plain quantization, and every candidate at every ratio, each of them once. What a method
        cannot do is one of them too, with the reason.

    Raises:
        ValueError: If a method, an option, a ratio, a table or the counts cannot be used.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100, bias=False))
        >>> [trial.key for trial in plan_trials(model, ["low_rank"], [2.0], [8])]
        ['dense', 'int8', 'low_rank at 2.0x']
    """
    candidates = [Candidate.parse(text) for text in methods]
    found = find_tables(model, tables)
    for table in found:
        check_finite(table)
    if bad := [ratio for ratio in ratios if not 1 < ratio < float("inf")]:
        raise ValueError(f"ratios must be above 1 (dense bytes over stored bytes), one is {bad[0]!r}")
    dense = sum(table.weight.nbytes for table in found)
    rounded = {width: dense / sum(_packed_bytes(*table.shape, width) for table in found) for width in bits}
    trials = [Trial("dense"), *(Trial(f"int{width}", ratio, bits=width) for width, ratio in rounded.items())]
    every = sorted({*ratios, *(rounded.values() if at_sizes_of_bits else ())})
    for candidate in candidates:
        for ratio in [None] if candidate.fixes_size else every:
            note = ""
            try:
                requests = plan_requests(model, candidate.method, ratio, **{"tables": tables, **candidate.options})
            except ValueError as error:
                note = str(error)
            else:
                check_counts(token_counts, requests)
            trials.append(Trial(str(candidate), ratio, candidate, note=note))
    return list({trial.key: trial for trial in trials}.values())


def carry_out(
    trial: Trial,
    model: nn.Module,
    *,
    tables: str | Sequence[str] = "auto",
    token_counts: Any = None,
    statistics: Statistics | None = None,
) -> Solved:
    """Store the tables of a copy of a model in one of the ways.

    Args:
        trial: The way.
        model: The trained model; it is not changed.
        tables: See `lightning_embcompress.tables.replacement.find_tables`.
        token_counts: `[vocab_size]` how often every token occurs in the training data.
        statistics: Of the model, for methods that weigh errors by what the loss grows by.

    Returns:
        The copy with its sizes. If the method finds no factors, the reason in their place: what a method cannot do is a
        result too.
    """
    if trial.note:
        return Solved(note=trial.note)
    dense = sum(table.weight.nbytes for table in find_tables(model, tables))
    if trial.candidate is None and trial.bits is None:
        return Solved(model, 1.0, dense, 1.0, 0.0)
    copy = deepcopy(model)
    start = time.perf_counter()
    try:
        if trial.candidate is None:
            assert trial.bits is not None
            paths = [table.name for table in find_tables(copy, tables)]
            plan = quantize_tables(copy, _plain_integers(trial.bits), paths)
        else:
            options = {"tables": tables, "token_counts": token_counts, **trial.candidate.options}
            plan = compress(copy, trial.candidate.method, ratio=trial.ratio, statistics=statistics, **options)
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        return Solved(note=str(error))
    seconds = time.perf_counter() - start
    return Solved(copy, plan.ratio, plan.stored_bytes, model_bytes(copy)["ratio"], plan.predicted_loss, seconds)


def _plain_integers(bits: int) -> Quantization:
    return Quantization(bits, group_size=32)


def _packed_bytes(vocab_size: int, dim: int, bits: int) -> int:
    """Bytes of a table in plain integers."""
    table = FullTable(vocab_size, dim, device=torch.device("meta"))
    table.hold(_plain_integers(bits), "packed")
    return table.stored_bytes()
