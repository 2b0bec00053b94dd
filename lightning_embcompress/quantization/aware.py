"""Factors of a whole model in few bits: while it trains, once it is trained, or without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from lightning_embcompress.calibration.loss_metric import metric_of
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.compression.backbone import (
    backbone_of,
    backbone_weights,
    check_backbone_preparation,
    convert_backbone,
    converted_backbone,
    prepare_backbone,
)
from lightning_embcompress.compression.plan import Plan, plan_of
from lightning_embcompress.layers.parametrized_weights import Storage, parametrized_bytes, storage_of
from lightning_embcompress.layers.sizes import Placed, compressed_tables, model_bytes
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.quantizers.factors import matrix_shape
from lightning_embcompress.methods.quantizers.integer_quantizer import group_scales
from lightning_embcompress.methods.registry import Factorization, FullTable, Quantization
from lightning_embcompress.tables.replacement import Table, check_finite, find_tables, put_back, replace_table
from lightning_embcompress.utils.storage import check_whole


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
        backbone: Dtype in which linear and recurrent weights beside the tables will be stored, `int8`, `int4`, ... in
            the same groups, or `float16`, `bfloat16`; None to leave them as they are.

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
    check_whole(model, "prepared for quantization")
    quantization = quantization or Quantization()
    check_preparation(model, quantization, tables, backbone)
    changes = prepared_tables(model, quantization, tables) if backbone is None or tables else []
    if backbone is not None:
        prepare_backbone(model, backbone_storage(backbone, quantization))
    return _carry_out(model, changes)


def check_preparation(
    model: nn.Module, quantization: Quantization, tables: str | Sequence[str] = "auto", backbone: str | None = None
) -> None:
    """Check what `prepare_qat` would be called with; the model is not changed.

    Raises:
        ValueError: As `prepare_qat`.
    """
    if backbone is not None:
        check_backbone_preparation(model, backbone_storage(backbone, quantization))
    if backbone is None or tables:
        _check_numbers(*tables_to_prepare(model, tables), quantization)


def backbone_storage(backbone: str, quantization: Quantization) -> Storage:
    """How weights beside the tables are stored: with groups, scales and ranges of the tables."""
    return storage_of(backbone, quantization.group_size, quantization.scale_dtype, quantization.ranges)


def tables_to_prepare(model: nn.Module, tables: str | Sequence[str]) -> tuple[list[Placed], list[Table]]:
    """Compressed and dense tables that can be prepared; none of them is changed.

    Raises:
        ValueError: As `prepare_qat`.
    """
    compressed = compressed_tables(model)
    names = [tables] if isinstance(tables, str) else list(tables)
    chosen = compressed if names == ["auto"] else [one for one in compressed if set(one[0]) & set(names)]
    known = {path for modules, _ in compressed for path in modules}
    dense = [] if names == ["auto"] else [name for name in names if name not in known]
    if not chosen and not dense:
        raise ValueError(
            "the model has no compressed tables to quantize: compress them first, or name dense ones, as in "
            f"tables={[table.name for table in find_tables(model)]}"
        )
    for modules, factors in chosen:
        _check_trainable(modules[0], factors)
    found = find_tables(model, dense) if dense else []
    for table in found:
        check_finite(table)
    return chosen, found


def _check_numbers(compressed: Sequence[Placed], dense: Sequence[Table], quantization: Quantization) -> None:
    """Look whether all numbers of tables can be quantized.

    Raises:
        ValueError: If one is not finite, or too large for the scales.
    """
    numbers = [(paths[0], list(factors.parameters())) for paths, factors in compressed if not factors.is_packed]
    numbers += [(table.name, [cast(nn.Parameter, table.weight)]) for table in dense]
    for name, parameters in numbers:
        for parameter in parameters:
            matrix = parameter.detach().reshape(matrix_shape(parameter.shape))
            scales = group_scales(matrix, quantization.bits, quantization.group_size, quantization.scales)
            if not bool(matrix.isfinite().all()):
                raise ValueError(
                    f"table {name!r} has NaN or infinite values, and cannot be quantized: look for what made training "
                    "diverge"
                )
            if not bool(scales.isfinite().all()):
                raise ValueError(
                    f"table {name!r} has values that are too large for scales in {quantization.scale_dtype}: use "
                    "scale_dtype='bfloat16'"
                )


def prepared_tables(model: nn.Module, quantization: Quantization, tables: str | Sequence[str]) -> list[Placed]:
    """What `prepare_qat` puts in the place of tables; all are checked before the first is prepared.

    Raises:
        ValueError: As `prepare_qat`.
    """
    chosen, found = tables_to_prepare(model, tables)
    changes = [(modules, factors.prepared(quantization)) for modules, factors in chosen]
    for table in found:
        changes.append((table.modules, FullTable.of(cast(nn.Parameter, table.weight)).prepared(quantization)))
    return changes


def _check_trainable(name: str, factors: Factorization[Any]) -> None:
    if factors.is_prepared:
        raise ValueError(f"table {name!r} is prepared for quantization already: convert it, or go on training")
    if factors.quantization is not None:
        raise ValueError(
            f"table {name!r} is packed in {factors.quantization.bits} bits, and has no numbers left to train: start "
            "from a checkpoint of before it was converted, or make the table dense with densify(model)"
        )


def convert_qat(model: nn.Module) -> Plan:
    """Pack what was prepared, in place: afterwards tables and weights beside them are integers, and do not train.

    Returns:
        The plan of the model.

    Raises:
        ValueError: If nothing is prepared: it was converted already, or never prepared.
    """
    check_whole(model, "converted")
    changes, backbone = _conversions(model), backbone_of(model)
    if backbone is not None and backbone.state != "packed":
        convert_backbone(model)
    elif not changes:
        packed = [modules[0] for modules, factors in compressed_tables(model) if factors.is_packed]
        state = f"{', '.join(map(repr, packed))} packed already" if packed else "nothing is prepared"
        raise ValueError(f"there is nothing to convert: {state}; call prepare_qat(model) before training")
    return _carry_out(model, changes)


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


def quantize_tables(
    model: nn.Module,
    quantization: Quantization | None = None,
    tables: str | Sequence[str] = "auto",
    statistics: Statistics | None = None,
) -> Plan:
    """Quantize tables without training, in place.

    Factors whose product is the table are balanced, and rounded so that what one component loses the next ones make
    up for (`solvers.error_feedback`, after GPTQ), with statistics in the metric of the loss; others are rounded to the
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
    check_whole(model, "quantized")
    quantization = quantization or Quantization()
    if tables == "auto":
        tables = [modules[0] for modules, factors in compressed_tables(model) if not factors.is_packed] or tables
    chosen, dense = tables_to_prepare(model, tables)
    for paths, factors in chosen:
        if factors.is_packed:
            raise ValueError(f"table {paths[0]!r} is stored in codes already: leave it out of tables")
    _check_numbers(chosen, dense, quantization)
    chosen += [(table.modules, FullTable.of(cast(nn.Parameter, table.weight))) for table in dense]
    metrics: list[Metric | None] = [None] * len(chosen)
    if statistics is not None:
        # Of a compressed table only its shape is asked for.
        shapes = [Table(paths, torch.empty(one.vocab_size, one.dim, device="meta")) for paths, one in chosen]
        metrics = [metric_of(model, table, statistics) for table in shapes]
    pairs = zip(chosen, metrics, strict=True)
    return _carry_out(model, [(paths, factors.quantized(quantization, metric)) for (paths, factors), metric in pairs])


def is_prepared(model: nn.Module) -> bool:
    """Whether any table of a model, or weight beside them, trains for fewer bits, and can be converted."""
    backbone = backbone_of(model)
    beside = backbone is not None and backbone.state != "packed"
    return beside or any(factors.is_prepared for _, factors in compressed_tables(model))


def converted_plan(model: nn.Module) -> Plan:
    """The plan of a model as it will be once it is converted: what is stored then, and how small it is."""
    with converted(model):
        return plan_of(model)


def conversion_report(model: nn.Module) -> dict[str, Any]:
    """What is quantized in a model, and the bytes that it takes once it is converted, as in `report.json`.

    Returns:
        `tables`, an entry a table that is prepared or packed, `backbone` for weights beside them, or None, and `model`.

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
                }
            )
    beside = None
    if backbone is not None:
        of_backbone = backbone.storage
        beside = {
            "weights": len(backbone.weights),
            "dtype": f"int{of_backbone.bits}" if isinstance(of_backbone, Quantization) else of_backbone,
            "group_size": of_backbone.group_size if isinstance(of_backbone, Quantization) else None,
            "stored_bytes": sizes[1],
            "ratio": sizes[0] / sizes[1],
        }
    return {"tables": entries, "backbone": beside, "model": whole}


def layers_to_prepare(
    model: nn.Module, tables: str | Sequence[str], backbone: str | None
) -> tuple[list[str], list[str]]:
    """Paths of the layers in which `prepare_qat` will change parameters: of tables, and of weights beside them."""
    chosen: list[str] = []
    if backbone is None or tables:
        compressed, dense = tables_to_prepare(model, tables)
        chosen = [path for modules, _ in compressed for path in modules]
        chosen += [path for table in dense for path in table.modules]
    weights = [] if backbone is None else [name.rpartition(".")[0] for name in backbone_weights(model)]
    return chosen, list(dict.fromkeys(weights))


def _conversions(model: nn.Module) -> list[Placed]:
    return [(modules, factors.converted()) for modules, factors in compressed_tables(model) if factors.is_prepared]


def _carry_out(model: nn.Module, changes: Sequence[Placed]) -> Plan:
    for modules, factors in changes:
        replace_table(model, modules, factors)
    return plan_of(model)
