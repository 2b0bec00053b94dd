"""Which tables of a model become what: decided, carried out, recorded as JSON, and rebuilt empty. No Lightning."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_embcompress.factorizations import Factorization, Method, factorization_from_spec, get_method
from lightning_embcompress.factorizations.base import dense_bytes
from lightning_embcompress.layers import CompressedLayer
from lightning_embcompress.progress import progress_bar
from lightning_embcompress.solvers.gram import row_weights
from lightning_embcompress.tables import (
    Table,
    all_modules,
    check_finite,
    find_tables,
    replace_table,
    restore_dense,
)

PLAN_VERSION = 1
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?B?)\s*", re.IGNORECASE)
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class TablePlan:
    """One table of a plan.

    Attributes:
        modules: Paths of the modules that read it; several if they are tied.
        method: Name in `METHODS`.
        options: Options that were given for the method.
        spec: Structure of the factorization, see `Factorization.spec`.
        dtype: Dtype of the factors (`"float32"`).
        stored_bytes: Bytes of the factorization on disk.
        weighted_error: Relative weighted error when it was solved last; None if that is not known.
    """

    modules: tuple[str, ...]
    method: str
    options: dict[str, Any]
    spec: dict[str, Any]
    dtype: str
    stored_bytes: int
    weighted_error: float | None

    @property
    def name(self) -> str:
        """Path of the first module."""
        return self.modules[0]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the table before it was compressed."""
        itemsize = getattr(torch, self.dtype).itemsize
        return dense_bytes(self.spec["vocab_size"], self.spec["dim"], itemsize)

    @property
    def ratio(self) -> float:
        """Dense bytes over stored bytes."""
        return self.dense_bytes / self.stored_bytes


@dataclass(frozen=True)
class Plan:
    """What was done to the tables of a model: versioned JSON from which the structure can be rebuilt empty.

    Attributes:
        tables: One entry a table.
        version: Version of the format.
    """

    tables: tuple[TablePlan, ...] = field(default_factory=tuple)
    version: int = PLAN_VERSION

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tables before compression."""
        return sum(table.dense_bytes for table in self.tables)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tables on disk."""
        return sum(table.stored_bytes for table in self.tables)

    @property
    def ratio(self) -> float:
        """Dense bytes over stored bytes of all tables together."""
        return self.dense_bytes / self.stored_bytes if self.tables else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {
            "version": self.version,
            "tables": [{**vars(table), "modules": list(table.modules)} for table in self.tables],
        }

    @classmethod
    def from_dict(cls, record: Any) -> Plan:
        """Read a plan that `to_dict` wrote.

        Raises:
            ValueError: If it is not a plan, or one of a newer version.
        """
        if not isinstance(record, Mapping) or not isinstance(record.get("tables"), list):
            raise ValueError(f"not a compression plan: expected a mapping with 'version' and 'tables', got {record!r}")
        version = record.get("version")
        if not isinstance(version, int) or not 1 <= version <= PLAN_VERSION:
            raise ValueError(
                f"the compression plan has version {version!r}, this package reads versions up to {PLAN_VERSION}: "
                "upgrade lightning-embcompress"
            )
        names = set(TablePlan.__dataclass_fields__)
        tables = []
        for entry in record["tables"]:
            if not isinstance(entry, Mapping) or set(entry) != names:
                raise ValueError(f"a table of the compression plan must have the keys {sorted(names)}, got {entry!r}")
            modules, dtype = entry["modules"], getattr(torch, str(entry["dtype"]), None)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise ValueError(f"the compression plan names an unknown dtype {entry['dtype']!r}")
            if not isinstance(modules, list | tuple) or not modules or not all(isinstance(m, str) for m in modules):
                raise ValueError(f"'modules' of the compression plan must be a list of paths, it is {modules!r}")
            for name in ("options", "spec"):
                if not isinstance(entry[name], Mapping):
                    raise ValueError(f"{name!r} of the compression plan must be a mapping, it is {entry[name]!r}")
            tables.append(TablePlan(**{**entry, "modules": tuple(modules)}))
        return cls(tuple(tables), version)


@dataclass(frozen=True)
class Request:
    """A table that is to be compressed: what into, and in how many bytes."""

    table: Table
    method_name: str
    options: dict[str, Any]
    max_bytes: int

    @property
    def method(self) -> Method:
        """The entry of `METHODS`."""
        return get_method(self.method_name)

    def solve(
        self, weight: Tensor, token_counts: Tensor | None, start: Factorization[Any] | None = None
    ) -> Factorization[Any]:
        """Find the factors of a table, with a progress bar.

        Args:
            weight: `[vocab_size, dim]`, the table's weight or what it is to be refined to.
            token_counts: `[vocab_size]` counts.
            start: A factorization to refine instead of starting afresh.
        """
        solve = self.method.factorization.decompose if start is None else start.refined
        description = f"{'Compressing' if start is None else 'Refining'} {self.table.name} {tuple(weight.shape)}"
        with (
            torch.no_grad(),
            torch.autocast(weight.device.type, enabled=False),
            progress_bar(description, total=1.0) as advance,
        ):
            options = self.method.options(**self.options)
            factorization = solve(weight.detach(), self.max_bytes, token_counts, options, advance)
        trained = weight if start is None else next(start.parameters())
        return factorization.requires_grad_(trained.requires_grad)

    def record(self, factorization: Factorization[Any], weight: Tensor, token_counts: Tensor | None) -> None:
        """Note on a factorization how it was found and how far it is from the table."""
        weights = row_weights(token_counts if self.method.needs_counts else None, weight.shape[0])
        factorization.provenance = {
            "method": self.method_name,
            "options": dict(self.options),
            "weighted_error": factorization.weighted_error(weight.detach(), weights),
        }


def parse_size(size: str | int) -> int:
    """Bytes of a size such as `80MB` (MB = 10⁶ bytes) or `80000000`.

    Raises:
        ValueError: If it cannot be read or is not positive.

    Example:
        >>> parse_size("1.5MB")
        1500000
    """
    match = _SIZE.fullmatch(str(size))
    number = float(match.group(1)) * _UNITS[match.group(2).upper().rstrip("B") or ""] if match else 0
    if number < 1:
        raise ValueError(f"size must be a number of bytes such as '80MB', '1.5GB' or 80000000, it is {size!r}")
    return int(number)


def check_budget(ratio: float | None, size: str | int | None) -> None:
    """Check that a budget is given in exactly one way.

    Raises:
        ValueError: If none or both are given, or the value is out of its range.
    """
    if (ratio is None) == (size is None):
        raise ValueError(f"give either a ratio or a size, not both: ratio is {ratio!r}, size is {size!r}")
    if ratio is not None and not 1 < ratio < float("inf"):
        raise ValueError(f"ratio must be above 1 (dense bytes over stored bytes), it is {ratio!r}")
    if size is not None:
        parse_size(size)


def plan_requests(
    model: nn.Module,
    method: str,
    ratio: float | None = None,
    size: str | int | None = None,
    tables: str | Sequence[str] = "auto",
    **options: Any,
) -> list[Request]:
    """Decide what becomes of which table, and refuse what cannot be reached, before anything is solved or changed.

    Args:
        model: The model.
        method: Name in `METHODS`.
        ratio: Dense bytes over stored bytes, the same for every table.
        size: Bytes of all tables together, instead of a ratio.
        tables: See `find_tables`.
        **options: Options of the method.

    Raises:
        ValueError: If the tables, the budget or an option cannot be used; the nearest ratio that can be reached is
            named.
    """
    check_budget(ratio, size)
    chosen = get_method(method)
    all_options = chosen.options(**options)
    found = find_tables(model, tables)
    total = sum(table.weight.nbytes for table in found)
    if ratio is None:
        assert size is not None
        ratio = total / parse_size(size)
        if ratio <= 1:
            raise ValueError(
                f"size {size!r} is not below the {total / 1e6:.3f} MB that the tables "
                f"{', '.join(repr(table.name) for table in found)} have now: nothing to compress"
            )
    requests = []
    for table in found:
        max_bytes = int(table.weight.nbytes / ratio)
        smallest = chosen.factorization.smallest_bytes(*table.shape, table.weight.element_size(), all_options)
        if smallest > max_bytes:
            raise ValueError(
                f"table {table.name!r} {table.shape} cannot be stored in {max_bytes} bytes ({ratio:.4g}x) by "
                f"{method!r} with these options: the smallest it can be is {smallest} bytes "
                f"({_round_down(table.weight.nbytes / smallest)}x); ask for less, or use fewer groups or another method"
            )
        requests.append(Request(table, method, options, max_bytes))
    return requests


def _round_down(ratio: float) -> float:
    """Two decimals that can be asked for: the nearest ones may be a little more than what can be reached."""
    return math.floor(ratio * 100) / 100


def check_counts(token_counts: Any, requests: Sequence[Request]) -> Tensor | None:
    """Check token counts against the tables that need them.

    Returns:
        `[vocab_size]` tensor, or None.

    Raises:
        ValueError: If they are needed and missing, of the wrong length, negative or not finite.
    """
    if token_counts is None:
        for request in requests:
            if request.method.needs_counts:
                raise ValueError(
                    f"method {request.method_name!r} weights the rows of table {request.table.name!r} by frequency: "
                    "give token_counts, how often every token occurs in the training data (torch.bincount(ids, "
                    "minlength=vocab_size)), or use 'low_rank', which needs none"
                )
        return None
    counts = torch.as_tensor(token_counts).detach().cpu()
    for request in requests:
        vocab_size = request.table.shape[0]
        if counts.shape != (vocab_size,):
            raise ValueError(
                f"token_counts must have one entry for each of the {vocab_size} rows of table {request.table.name!r}, "
                f"its shape is {tuple(counts.shape)}"
            )
    bad = (~torch.isfinite(counts.double()) | (counts < 0)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"token_counts must be finite and not negative; entry {bad[0]} is {counts[bad[0]].item()} "
            f"({len(bad)} such entries)"
        )
    return counts


def compress(
    model: nn.Module,
    method: str = "group_reduce",
    *,
    ratio: float | None = None,
    size: str | int | None = None,
    tables: str | Sequence[str] = "auto",
    token_counts: Any = None,
    **options: Any,
) -> Plan:
    """Compress the tables of any model, in place.

    Everything is checked and solved before the first layer is replaced: if an error is raised, the model is as it was.

    Args:
        model: Any `nn.Module` that holds `nn.Embedding` and `nn.Linear` layers, tied or not.
        method: `"group_reduce"`, `"weighted_low_rank"`, `"low_rank"`: a name in `METHODS`.
        ratio: Dense bytes over stored bytes, for every table.
        size: Instead of a ratio, bytes of all tables together: `"80MB"` (MB = 10⁶) or a number.
        tables: `"auto"`, or paths of modules, see `find_tables`.
        token_counts: `[vocab_size]` how often every token occurs in the training data; needed by the methods that
            weight by frequency.
        **options: Options of the method, such as `groups=20`.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: If the request cannot be met; the message names the table, the value and the remedy.

    Example:
        >>> model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000))
        >>> plan = compress(model, "group_reduce", ratio=4, token_counts=torch.arange(2000, 0, -1))
        >>> [(table.name, table.ratio >= 4) for table in plan.tables]
        [('0', True), ('1', True)]
    """
    requests = plan_requests(model, method, ratio, size, tables, **options)
    counts = check_counts(token_counts, requests)
    for request in requests:
        check_finite(request.table)
    solved = [(request, request.solve(request.table.weight, counts)) for request in requests]
    for request, factors in solved:
        request.record(factors, request.table.weight, counts)
    for request, factors in solved:
        replace_table(model, request.table.modules, factors)
    return plan_of(model)


def plan_of(model: nn.Module) -> Plan:
    """Read the plan off a model: what its compressed layers are, and how they were found.

    Returns:
        One entry a table in the order of `model.named_modules()`; an empty plan for a model that is not compressed.
    """
    modules: dict[int, list[str]] = {}
    factorizations: dict[int, Factorization[Any]] = {}
    for path, module in all_modules(model).items():
        if isinstance(module, CompressedLayer):
            modules.setdefault(id(module.factorization), []).append(path)
            factorizations[id(module.factorization)] = module.factorization
    return Plan(
        tuple(
            TablePlan(
                modules=tuple(paths),
                method=factorizations[key].provenance.get("method", factorizations[key].kind),
                options=factorizations[key].provenance.get("options", {}),
                spec=factorizations[key].spec(),
                dtype=str(factorizations[key].dtype).removeprefix("torch."),
                stored_bytes=factorizations[key].stored_bytes(),
                weighted_error=factorizations[key].provenance.get("weighted_error"),
            )
            for key, paths in modules.items()
        )
    )


def densify(model: nn.Module) -> None:
    """Turn a compressed model back into one of ordinary layers, in place: every table is built from its factors.

    Example:
        >>> model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000))
        >>> _ = compress(model, "low_rank", ratio=4)
        >>> densify(model)
        >>> type(model[0]).__name__, type(model[1]).__name__
        ('Embedding', 'Linear')
    """
    restore_dense(model)


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Give a model the structure of a plan, empty and ready to be loaded into.

    Layers that are compressed otherwise, or that the plan leaves dense, are rebuilt too: afterwards the model has the
    structure of the plan, whatever it had before. An empty plan makes it dense. As everywhere in torch, the model's
    dtype and device stay what they are, whatever those of the file.

    Args:
        model: The model that the plan was made for, of ordinary layers or compressed already.
        plan: The plan.

    Raises:
        ValueError: If the plan does not fit the model. The model is as it was.
    """
    check_plan(model, plan)
    named = all_modules(model)
    factorizations = []
    for table in plan.tables:
        old = _table_parameters(named[table.modules[0]])
        factorizations.append(factorization_from_spec(table.spec, old[0].dtype, old[0].device))
        factorizations[-1].requires_grad_(any(parameter.requires_grad for parameter in old))
        factorizations[-1].provenance = {
            "method": table.method,
            "options": dict(table.options),
            "weighted_error": table.weighted_error,
        }
    restore_dense(model, fill=False)
    for table, factorization in zip(plan.tables, factorizations, strict=True):
        replace_table(model, table.modules, factorization)


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Check that a model has the tables of a plan.

    Raises:
        ValueError: If a module is missing, is of another kind or of another shape.
    """
    named = all_modules(model)
    for table in plan.tables:
        shape = (table.spec.get("vocab_size"), table.spec.get("dim"))
        for path in table.modules:
            module = named.get(path)
            if not isinstance(module, nn.Embedding | nn.Linear | CompressedLayer):
                raise ValueError(
                    f"the plan compresses module {path!r}, but the model has no embedding or projection there"
                )
            own = _table_shape(module)
            if own != shape:
                raise ValueError(
                    f"the plan's table {path!r} is {shape[0]} x {shape[1]}, the model's is {own[0]} x {own[1]}: build "
                    "the model with the vocabulary and the sizes that the checkpoint was trained with"
                )


def _table_shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, CompressedLayer):
        return module.factorization.vocab_size, module.factorization.dim
    assert isinstance(module, nn.Embedding | nn.Linear)
    return module.weight.shape[0], module.weight.shape[1]


def _table_parameters(module: nn.Module) -> list[Tensor]:
    if isinstance(module, CompressedLayer):
        return list(module.factorization.parameters())
    assert isinstance(module, nn.Embedding | nn.Linear)
    return [module.weight]
