"""Quantization of a whole model: while it trains, once it is trained, or without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lightning_embcompress.calibration.loss_metric import metric_of
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.compression.backbone import (
    Backbone,
    apply_backbone,
    backbone_of,
    convert_backbone,
    converted_backbone,
    plan_backbone,
)
from lightning_embcompress.compression.plan import Plan, plan_of
from lightning_embcompress.layers.parametrized_weights import parametrized_bytes
from lightning_embcompress.layers.sizes import Placed, compressed_tables, model_bytes
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.quantizers.factors import check_storable
from lightning_embcompress.methods.quantizers.quantization import name_of, storage_of
from lightning_embcompress.methods.registry import Factorization, FullTable, Quantization
from lightning_embcompress.tables.finding import Table, find_tables
from lightning_embcompress.tables.replacement import check_replaceable, put_back, replace_table
from lightning_embcompress.utils.inference import outside_inference_mode
from lightning_embcompress.utils.storage import check_in_memory, check_whole


@outside_inference_mode
def prepare_qat(
    model: nn.Module,
    quantization: Quantization | None = None,
    tables: str | Sequence[str] = "auto",
    backbone: str | None = None,
) -> Plan:
    """Let tables train as they will be once they are stored in fewer bits (quantization-aware training), in place.

    The factors stay numbers, and are read as the integers they will become; of an embedding only the rows that a step
    reads. Parameters stay the same objects, but get other values where factors are balanced first
    (`Factorization.balance`). Codes of `transform_coding` keep their own widths, and are trained from now
    on. Checkpoints are of the numbers; `convert_qat`, `save_compressed` and `save_pretrained` store the integers.

    Args:
        model: A model with compressed tables, or dense ones that are named in `tables`.
        quantization: How factors will be stored; None for 4 bits in groups of 64.
        tables: `"auto"` for all compressed tables, or paths of modules; dense tables among them are quantized as they
            are. With `backbone` there may be none, `[]`.
        backbone: Dtype in which all other linear and recurrent weights will be stored, `int8`, `int4`, ... in groups
            as above, or `float16`, `bfloat16`; None to leave them as they are.

    Returns:
        The plan of the model.

    Raises:
        ValueError: If there is nothing to prepare, or a table or weight is prepared or packed already. The model is as
            it was.

    Example:
        >>> from lightning_embcompress import compress
        >>> model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000))
        >>> _ = compress(model, "low_rank", ratio=4)
        >>> _ = prepare_qat(model, Quantization(bits=4))
        >>> plan = convert_qat(model)
        >>> plan.ratio > 25
        True
    """
    plan_qat(model, quantization or Quantization(), tables, backbone).carry_out(model)
    return plan_of(model)


@dataclass(frozen=True)
class Preparation:
    """What `prepare_qat` will do to a model: all of it is checked, and nothing is done yet.

    Attributes:
        quantization: How factors will be stored.
        compressed: Compressed tables.
        dense: Dense tables, to be quantized as they are.
        backbone: The other linear and recurrent weights; None to leave them as they are.
    """

    quantization: Quantization
    compressed: list[Placed]
    dense: list[Table]
    backbone: Backbone | None

    @property
    def tables(self) -> list[str]:
        """Paths of the layers that read tables."""
        placed = [modules for modules, _ in self.compressed] + [table.modules for table in self.dense]
        return [path for paths in placed for path in paths]

    @property
    def layers(self) -> set[str]:
        """Paths of all layers in which parameters change."""
        weights = () if self.backbone is None else self.backbone.weights
        return {*self.tables, *(name.rpartition(".")[0] for name in weights)}

    def factorizations(self) -> list[Placed]:
        """The factors of all tables, as they are."""
        dense: list[Placed] = [(table.modules, FullTable.of(cast(nn.Parameter, table.weight))) for table in self.dense]
        for table, (_, factors) in zip(self.dense, dense, strict=True):
            factors.keep_padding(table.padding, table.padding_rows)
        return self.compressed + dense

    def carry_out(self, model: nn.Module) -> None:
        """Let what was chosen train as it will be stored."""
        if self.backbone is not None:
            apply_backbone(model, self.backbone)
        _replace(model, [(paths, factors.prepared(self.quantization)) for paths, factors in self.factorizations()])


def plan_qat(
    model: nn.Module, quantization: Quantization, tables: str | Sequence[str] = "auto", backbone: str | None = None
) -> Preparation:
    """Decide what `prepare_qat` changes when it is called with these arguments; the model is not changed.

    Raises:
        ValueError: As `prepare_qat`.
    """
    check_whole(model, "quantized")
    if backbone is not None:
        check_in_memory(model, "the model")
    beside = None if backbone is None else plan_backbone(model, storage_of(backbone, quantization))
    if beside is not None and not tables:
        return Preparation(quantization, [], [], beside)
    compressed = compressed_tables(model)
    names = [tables] if isinstance(tables, str) else list(tables)
    chosen = compressed if names == ["auto"] else [one for one in compressed if set(one[0]) & set(names)]
    known = {path for modules, _ in compressed for path in modules}
    missing = [] if names == ["auto"] else [name for name in names if name not in known]
    if not chosen and not missing:
        raise ValueError(
            "the model has no compressed tables to quantize: compress them first, or name dense ones, as in "
            f"tables={[table.name for table in find_tables(model)]}"
        )
    for modules, factors in chosen:
        _check_trainable(modules[0], factors)
        check_replaceable(model, modules)
    dense = find_tables(model, missing) if missing else []
    preparation = Preparation(quantization, chosen, dense, beside)
    for modules, factors in preparation.factorizations():
        for parameter in () if factors.is_packed else factors.parameters():
            check_storable(f"table {modules[0]!r}", parameter, quantization)
    return preparation


def _check_trainable(name: str, factors: Factorization[Any]) -> None:
    if factors.is_prepared:
        raise ValueError(f"table {name!r} is prepared for quantization already: convert it, or go on training")
    if factors.quantization is not None:
        raise ValueError(
            f"table {name!r} is packed in {factors.quantization.bits} bits, and has no numbers left to train: start "
            "from a checkpoint of before it was converted, or make the table dense with densify(model)"
        )


@outside_inference_mode
def convert_qat(model: nn.Module) -> Plan:
    """Pack what was prepared, in place: afterwards tables and backbone are integers, and do not train.

    Returns:
        The plan of the model.

    Raises:
        ValueError: If nothing is prepared: it was converted already, or never prepared.
    """
    check_whole(model, "converted")
    if backbone_of(model) is not None:
        check_in_memory(model, "the model")
    changes = _conversions(model)
    for modules, _ in changes:
        check_replaceable(model, modules)
    if not convert_backbone(model) and not changes:
        packed = [modules[0] for modules, factors in compressed_tables(model) if factors.is_packed]
        state = f"{', '.join(map(repr, packed))} packed already" if packed else "nothing is prepared"
        raise ValueError(f"there is nothing to convert: {state}; call prepare_qat(model) before training")
    _replace(model, changes)
    return plan_of(model)


@contextmanager
def converted(model: nn.Module) -> Iterator[None]:
    """Pack what is prepared for a while: afterwards the model is as it was, and goes on training.

    For whatever writes a model in its final form; a model that is not prepared stays as it is.
    """
    changes = _conversions(model)
    before = {path: model.get_submodule(path) for modules, _ in changes for path in modules}
    with converted_backbone(model):
        try:
            for modules, factors in changes:
                replace_table(model, modules, factors, for_a_while=True)
            yield
        finally:
            put_back(model, before)


@outside_inference_mode
def quantize_tables(
    model: nn.Module,
    quantization: Quantization | None = None,
    tables: str | Sequence[str] = "auto",
    statistics: Statistics | None = None,
) -> Plan:
    """Quantize tables without training, in place.

    Factors whose product is the table are balanced, and rounded so that what one component loses the next ones make
    up for (`numerics.error_feedback`, after GPTQ), with statistics in the metric of the loss; others are rounded to the
    nearest integers.

    Args:
        model: As for `prepare_qat`.
        quantization: As for `prepare_qat`.
        tables: As for `prepare_qat`; with `"auto"` tables that are integers or codes already stay what they are.
        statistics: What `collect_statistics` has found for the model, dense or compressed; None where all errors are
            to count the same.

    Returns:
        The plan of the model.

    Raises:
        ValueError: As `prepare_qat`, or if the statistics are of another model. The model is as it was.

    Example:
        >>> from lightning_embcompress import compress
        >>> model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000))
        >>> _ = compress(model, "low_rank", ratio=4)
        >>> quantize_tables(model, Quantization(bits=8)).ratio > 14
        True
    """
    quantization = quantization or Quantization()
    if tables == "auto":
        tables = [modules[0] for modules, factors in compressed_tables(model) if not factors.is_packed] or tables
    chosen = plan_qat(model, quantization, tables).factorizations()
    for paths, factors in chosen:
        if factors.is_packed:
            raise ValueError(f"table {paths[0]!r} is stored in codes already: leave it out of tables")
    metrics: list[Metric | None] = [None] * len(chosen)
    if statistics is not None:
        # Of a compressed table only its shape is asked for.
        shapes = [Table(paths, torch.empty(one.vocab_size, one.dim, device="meta")) for paths, one in chosen]
        metrics = [metric_of(model, table, statistics) for table in shapes]
    pairs = zip(chosen, metrics, strict=True)
    _replace(model, [(paths, factors.quantized(quantization, metric)) for (paths, factors), metric in pairs])
    return plan_of(model)


def is_prepared(model: nn.Module) -> bool:
    """Whether any table of a model, or its backbone, trains for fewer bits, and can be converted."""
    backbone = backbone_of(model)
    return (backbone is not None and backbone.is_prepared) or any(
        factors.is_prepared for _, factors in compressed_tables(model)
    )


def conversion_report(model: nn.Module) -> dict[str, Any]:
    """What is quantized in a model, and the bytes that it takes once it is converted, as in `report.json`.

    Returns:
        `tables`, an entry a table that is prepared or packed, `backbone`, or None, and `model`.

    Example:
        >>> model = nn.Sequential(nn.Embedding(2000, 64), nn.LSTM(64, 64))
        >>> _ = prepare_qat(model, Quantization(bits=4), tables=["0"], backbone="int8")
        >>> report = conversion_report(model)
        >>> [(table["name"], table["dtype"]) for table in report["tables"]], report["backbone"]["dtype"]
        ([('0', 'int4')], 'int8')
    """
    quantized = {
        modules[0] for modules, factors in compressed_tables(model) if factors.is_prepared or factors.is_packed
    }
    with converted(model):
        plan, whole, backbone, sizes = plan_of(model), model_bytes(model), backbone_of(model), parametrized_bytes(model)
    entries = []
    for table in plan.tables:
        if table.name in quantized:
            of = table.spec.get("quantization")
            entries.append(
                {
                    "name": table.name,
                    "dtype": f"int{of['bits']}" if of else "codes",
                    "group_size": of and of["group_size"],
                    "stored_bytes": table.stored_bytes,
                    "ratio": table.ratio,
                    "bits_per_weight": table.bits_per_weight,
                }
            )
    beside = None
    if backbone is not None:
        beside = {
            "weights": len(backbone.weights),
            "dtype": name_of(backbone.storage),
            "group_size": backbone.storage.group_size if isinstance(backbone.storage, Quantization) else None,
            "stored_bytes": sizes[1],
            "ratio": sizes[0] / sizes[1],
        }
    return {"tables": entries, "backbone": beside, "model": whole}


def _conversions(model: nn.Module) -> list[Placed]:
    return [(modules, factors.converted()) for modules, factors in compressed_tables(model) if factors.is_prepared]


def _replace(model: nn.Module, changes: Sequence[Placed]) -> None:
    for modules, factors in changes:
        replace_table(model, modules, factors)
