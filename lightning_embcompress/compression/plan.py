"""Compression plans: apply, serialize, rebuild."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

from lightning_embcompress.calibration.special_tokens import KeepRows
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.compression.backbone import (
    Backbone,
    apply_backbone,
    backbone_of,
    check_backbone,
    restore_backbone,
)
from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.records import by_method_of_now, check_tables, dtype_of, shown
from lightning_embcompress.compression.search import search
from lightning_embcompress.compression.solution import Solution, put_in_place, solve
from lightning_embcompress.compression.tasks import Tie, plan
from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.layers.sizes import compressed_tables, table_shape
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.registry import DEFAULT_METHOD, Factorization, factorization_from_spec, get_config
from lightning_embcompress.methods.specs import dense_bytes
from lightning_embcompress.tables.finding import all_modules, large_and_dense
from lightning_embcompress.tables.replacement import check_replaceable, replace_table, restore_dense
from lightning_embcompress.utils.inference import outside_inference_mode
from lightning_embcompress.utils.progress import say_line
from lightning_embcompress.utils.storage import check_in_memory, check_whole

PLAN_VERSION = 6
"""Version 2 added `untied`, version 3 `predicted_loss`, version 4 `quantization` in structures and `body`; version 5
calls that `backbone`; version 6 has variants of methods as methods."""
_ADDED: dict[str, Any] = {"untied": None, "predicted_loss": None}


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
        untied: Name of the dense table that this one and another were made of; None for a table of its own.
        predicted_loss: What the mean loss was predicted to grow by for the errors of this table, in nats; None if that
            is not known.
    """

    modules: tuple[str, ...]
    method: str
    options: dict[str, Any]
    spec: dict[str, Any]
    dtype: str
    stored_bytes: int
    weighted_error: float | None
    untied: str | None = None
    predicted_loss: float | None = None

    @property
    def name(self) -> str:
        """Path of the first module."""
        return self.modules[0]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the table before it was compressed; a table that became two is counted half in each."""
        itemsize = dtype_of(self.dtype).itemsize
        return dense_bytes(self.spec["vocab_size"], self.spec["dim"], itemsize) // (1 if self.untied is None else 2)

    @property
    def ratio(self) -> float:
        """Dense bytes over stored bytes."""
        return self.dense_bytes / self.stored_bytes

    @property
    def weights(self) -> int:
        """Numbers of the dense table; half of them of a table that became two."""
        return self.dense_bytes // dtype_of(self.dtype).itemsize

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over numbers of the dense table."""
        return 8 * self.stored_bytes / self.weights

    @property
    def provenance(self) -> dict[str, Any]:
        """How the factors were found, as a factorization keeps it."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "weighted_error": self.weighted_error,
            "predicted_loss": self.predicted_loss,
            "untied": self.untied,
        }


@dataclass(frozen=True)
class Plan:
    """What was done to the tables of a model: versioned JSON from which the structure can be rebuilt empty.

    Attributes:
        tables: One entry a table.
        version: Version of the format.
        backbone: Which weights beside the tables are quantized; None if none is.
    """

    tables: tuple[TablePlan, ...] = field(default_factory=tuple)
    version: int = PLAN_VERSION
    backbone: Backbone | None = None

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

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits over numbers of all dense tables together; None where there are none."""
        return 8 * self.stored_bytes / sum(table.weights for table in self.tables) if self.tables else None

    @property
    def predicted_loss(self) -> float | None:
        """What the mean loss was predicted to grow by, in nats; None if that is not known of every table."""
        known = [table.predicted_loss for table in self.tables if table.predicted_loss is not None]
        return sum(known) if known and len(known) == len(self.tables) else None

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        tables = [{**vars(table), "modules": list(table.modules)} for table in self.tables]
        backbone = {} if self.backbone is None else {"backbone": self.backbone.to_dict()}
        return {"version": self.version, "tables": tables, **backbone}

    @classmethod
    def from_dict(cls, record: Any) -> Plan:
        """Read a plan that `to_dict` wrote.

        Raises:
            ValueError: If it is not a plan, one of a newer version, or one that no model can have; nothing is
                allocated for it.
        """
        if not isinstance(record, Mapping) or not {"version", "tables"} <= record.keys():
            raise ValueError(
                f"not a compression plan: expected a mapping with 'version' and 'tables', got {shown(record)}"
            )
        version, tables = record["version"], record["tables"]
        if type(version) is not int or not 1 <= version <= PLAN_VERSION:
            raise ValueError(
                f"the compression plan has version {shown(version)}, this package reads versions up to {PLAN_VERSION}: "
                "upgrade lightning-embcompress"
            )
        if version < 5 and "body" in record:
            record = {"backbone": record["body"], **{key: value for key, value in record.items() if key != "body"}}
        # The configuration of a model of transformers says beside the plan by whom it is read.
        if unknown := record.keys() - {"version", "tables", "backbone", "quant_method"}:
            raise ValueError(f"the compression plan has unknown keys {shown(sorted(map(str, unknown)))}: it is damaged")
        names = set(TablePlan.__dataclass_fields__)
        if not isinstance(tables, list):
            raise ValueError(f"not a compression plan: 'tables' must be a list, it is {shown(tables)}")
        entries = []
        for entry in tables:
            if version < 4 and isinstance(entry, Mapping):
                entry = {**_ADDED, **entry}
            if version < 6:
                entry = by_method_of_now(entry)
            if not isinstance(entry, Mapping) or set(entry) != names:
                raise ValueError(
                    f"a table of the compression plan must have the keys {sorted(names)}, got {shown(entry)}"
                )
            entries.append(entry)
        check_tables(entries)
        backbone = None if record.get("backbone") is None else Backbone.from_dict(record["backbone"])
        return cls(
            tuple(TablePlan(**{**entry, "modules": tuple(entry["modules"])}) for entry in entries), backbone=backbone
        )


@outside_inference_mode
def compress(
    model: nn.Module,
    method: MethodConfig | str = DEFAULT_METHOD,
    *,
    ratio: float | str | None = None,
    size: str | int | None = None,
    bits_per_weight: float | None = None,
    max_perplexity_increase: str | float | None = None,
    tables: str | Sequence[str] = "auto",
    tie: Tie = "keep",
    token_counts: Any = None,
    keep_rows: KeepRows = None,
    statistics: Statistics | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    **options: Any,
) -> Plan:
    """Compress the tables of any model, in place.

    Everything is checked and solved before the first layer is replaced: if an error is raised, the model is as it was.

    Args:
        model: Any `nn.Module` that holds `nn.Embedding`, `nn.EmbeddingBag` and `nn.Linear` layers, tied or not.
        method: Config of a method (`TransformCodingConfig(bits=4)`), or its name (`"transform_coding"`,
            `"group_reduce"`, `"tensor_train"`, ...); `"auto"` for the one of the least predicted loss, for every table.
        ratio: Dense bytes over stored bytes, for every table; with statistics, of all tables together. Some methods
            have an option that takes its place, such as `max_rank=4` of `tensor_train`.
        size: Instead of a ratio, bytes of all tables together: `"80MB"` (MB = 10⁶) or a number.
        bits_per_weight: Instead of a ratio, stored bits over the numbers of the dense tables: 4 is 8x of float32.
        max_perplexity_increase: Instead of a size, the most that the perplexity may grow by, `"1%"` or `0.01`: the
            smallest model within it is searched for. Needs `statistics` and `evaluate`.
        tables: `"auto"`, or paths of modules, see `find_tables`; what `"auto"` leaves dense though it is large is said
            on standard error.
        tie: What becomes of a table that embedding and softmax share. `"keep"`: one set of factors serves both.
            `"untie"`: each gets its own, of half the bytes. `"auto"`: whichever leaves the lower predicted loss at
            equal bytes; without statistics, when rows count the same in both roles, one set is never worse, and kept.
        token_counts: `[vocab_size]` how often every token occurs in the training data; needed by the methods that
            weight by frequency, where there are no statistics. Of tables with vocabularies of their own, such counts by
            the paths of the tables: `{"source": counts, "target": counts}`.
        keep_rows: Ids of tokens that are to be kept finely however seldom they occur: they are counted at least as
            often as a common word. Special tokens that a model of transformers or its tokenizer names (ends, masks,
            ...) are so anyway. By the paths of tables where these have vocabularies of their own.
        statistics: What `collect_statistics` has found for this model: methods that can, minimise what the loss grows
            by, all tables share one budget, and biases of heads make up for the mean error of their logits.
        evaluate: For `max_perplexity_increase`: measures the perplexity of the model on validation data.
        **options: Fields of the config, such as `groups=20`, where the method is given by its name.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: If the request cannot be met; the message names the table, the value and the remedy.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000))
        >>> plan = compress(model, "group_reduce", ratio=4, token_counts=torch.arange(2000, 0, -1))
        >>> [(table.name, table.ratio >= 4) for table in plan.tables]
        [('0', True), ('1', True)]
    """
    check_whole(model, "compressed")
    config = get_config(method, **options)
    budget = Budget.of(
        config,
        ratio=ratio,
        size=size,
        bits_per_weight=bits_per_weight,
        max_perplexity_increase=max_perplexity_increase,
    )
    if budget is not None and budget.is_searched and (statistics is None or evaluate is None):
        raise ValueError(
            "max_perplexity_increase needs statistics, as collect_statistics(model, batches) gives them, to predict "
            "sizes, and evaluate, a function of the model that gives its perplexity on validation data, to verify them"
        )
    known: dict[str, Any] = {"statistics": statistics, "token_counts": token_counts, "keep_rows": keep_rows}
    tasks = plan(model, config, budget, tables, tie, **known)
    if tables == "auto":
        say_line(large_and_dense(model, [task.table for task in tasks]))
    if budget is None or evaluate is None or not budget.is_searched:
        return apply(model, solve(tasks))
    return apply(model, search(model, tasks, budget, evaluate(model), evaluate))


def apply(model: nn.Module, solution: Solution) -> Plan:
    """Replace tables by what was found for them, in place; gives the plan that the model has now."""
    put_in_place(model, solution)
    return plan_of(model)


def plan_of(model: nn.Module) -> Plan:
    """Read the plan off a model: what its compressed layers are, and how they were found.

    Returns:
        One entry a table in the order of `model.named_modules()`; an empty plan for a model that is not compressed.
    """
    return Plan(
        tuple(
            TablePlan(
                modules=paths,
                method=factors.provenance.get("method", factors.kind),
                options=factors.provenance.get("options", {}),
                spec=factors.spec(),
                dtype=str(factors.dtype).removeprefix("torch."),
                stored_bytes=factors.stored_bytes(),
                weighted_error=factors.provenance.get("weighted_error"),
                untied=factors.provenance.get("untied"),
                predicted_loss=factors.provenance.get("predicted_loss"),
            )
            for paths, factors in compressed_tables(model)
        ),
        backbone=backbone_of(model),
    )


@outside_inference_mode
def densify(model: nn.Module) -> None:
    """Turn a compressed model back into one of ordinary layers, in place: every table is built from its factors.

    Weights beside the tables that are quantized become ordinary ones of the values that they are read with.

    Raises:
        ValueError: If the model is sharded, or there is no memory for a table. The model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000))
        >>> _ = compress(model, "low_rank", ratio=4)
        >>> densify(model)
        >>> type(model[0]).__name__, type(model[1]).__name__
        ('Embedding', 'Linear')
    """
    check_whole(model, "made dense")
    if backbone_of(model) is not None:
        check_in_memory(model, "the model")
    restore_dense(model)
    restore_backbone(model)


@outside_inference_mode
def apply_plan(model: nn.Module, plan: Plan, loaded: Mapping[str, Factorization[Any]] = MappingProxyType({})) -> None:
    """Give a model the structure of a plan, empty and ready to be loaded into.

    Layers that are compressed otherwise, or that the plan leaves dense, are rebuilt too: afterwards the model has the
    structure of the plan, whatever it had before. An empty plan makes it dense. As everywhere in torch, the model's
    dtype and device stay what they are, whatever those of the file.

    Args:
        model: The model that the plan was made for, of ordinary layers or compressed already.
        plan: The plan.
        loaded: Factorizations that are not empty, but there already, by the names of their tables.

    Raises:
        ValueError: If the plan does not fit the model. The model is as it was.
    """
    check_plan(model, plan)
    check_replaceable(model, (path for table in plan.tables for path in table.modules))
    named = all_modules(model)
    factorizations: list[Factorization[Any]] = []
    for table in plan.tables:
        if table.name in loaded:
            factorizations.append(loaded[table.name])
            continue
        layer: Any = named[table.name]
        place = layer.factorization if isinstance(layer, CompressedLayer) else layer.weight
        factorizations.append(factorization_from_spec(table.spec, place.dtype, place.device))
        if not (place.may_train if isinstance(layer, CompressedLayer) else place.requires_grad):
            factorizations[-1].requires_grad_(False)
        factorizations[-1].provenance = table.provenance
    restore_dense(model, fill=False)
    for table, factorization in zip(plan.tables, factorizations, strict=True):
        replace_table(model, table.modules, factorization)
    apply_backbone(model, plan.backbone)


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Check that a model has the tables of a plan, and its weights beside them.

    Raises:
        ValueError: If a module is missing, is of another kind or of another shape.
    """
    named = all_modules(model)
    owned = tuple(f"{path}." for table in plan.tables for path in table.modules)
    for name in plan.backbone.weights if plan.backbone is not None else ():
        if name.startswith(owned):
            raise ValueError(
                f"the plan is damaged: it names {shown(name)} among the weights beside the tables, but it is one of a "
                "table"
            )
    for table in plan.tables:
        shape = (table.spec.get("vocab_size"), table.spec.get("dim"))
        for path in table.modules:
            module = named.get(path)
            if not isinstance(module, AnyEmbedding | nn.Linear | CompressedLayer):
                raise ValueError(
                    f"the plan compresses module {shown(path)}, but the model has no embedding or projection there"
                )
            own = table_shape(module)
            if own != shape:
                raise ValueError(
                    f"the plan's table {path!r} is {shape[0]} x {shape[1]}, the model's is {own[0]} x {own[1]}: build "
                    "the model with the vocabulary and the sizes that the checkpoint was trained with"
                )
    check_backbone(model, plan.backbone)
