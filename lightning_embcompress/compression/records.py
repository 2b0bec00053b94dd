"""Plans and factors as they come from files: all of it is checked before anything is made of them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_embcompress.layers.state_entry import is_table_entry
from lightning_embcompress.methods.quantizers.factors import PackedFactor
from lightning_embcompress.methods.registry import METHODS, check_spec, factorization_from_spec
from lightning_embcompress.utils.storage import place_of

if TYPE_CHECKING:
    from lightning_embcompress.compression.plan import TablePlan

DTYPES = ("float16", "bfloat16", "float32", "float64")
"""Dtypes that factors can have."""

# More than any model has, and few enough to be looked at one after the other.
_MOST_TABLES = 10_000
_MOST_VALUES = 10_000
_MOST_DEPTH = 8
_MOST_BYTES = 2**62


def check_tables(tables: Sequence[Mapping[str, Any]]) -> None:
    """Check the entries of the tables of a plan, each with the keys it must have, and that no module is in two.

    Raises:
        ValueError: Naming what is wrong.
    """
    if len(tables) > _MOST_TABLES:
        raise ValueError(f"the compression plan has {len(tables)} tables: more than {_MOST_TABLES} are not read")
    seen: set[str] = set()
    for entry in tables:
        check_table(entry)
        for path in entry["modules"]:
            if path in seen:
                raise ValueError(
                    f"the compression plan names module {shown(path)} twice: it is damaged, because a module has one "
                    "table"
                )
            seen.add(path)


def check_table(entry: Mapping[str, Any]) -> None:
    """Check the entry of one table, whose keys are those it must have.

    Raises:
        ValueError: Naming what is wrong.
    """
    modules, spec, method = entry["modules"], entry["spec"], entry["method"]
    if not isinstance(modules, list | tuple) or not modules or not all(isinstance(path, str) for path in modules):
        raise ValueError(f"'modules' of the compression plan must be a list of paths, it is {shown(modules)}")
    where = f"of table {shown(modules[0])} in the compression plan"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {shown(entry['dtype'])} {where}: known are {', '.join(DTYPES)}")
    for name in ("options", "spec"):
        if not isinstance(entry[name], Mapping):
            raise ValueError(f"{name!r} of the compression plan must be a mapping, it is {shown(entry[name])}")
    try:
        check_spec(spec)
    except ValueError as error:
        raise ValueError(f"'spec' {where}: {error}") from error
    kind = spec["kind"]
    # Factors that were made by hand go by the name of their class.
    if not isinstance(method, str) or method not in METHODS.keys() | {kind}:
        raise ValueError(f"unknown method {shown(method)} {where}: known are {', '.join(METHODS)}")
    if method in METHODS and kind not in METHODS[method].kinds:
        stored = " or ".join(map(repr, METHODS[method].kinds))
        raise ValueError(f"method {method!r} {where} stores tables as {stored}, not as {kind!r}")
    if not all(isinstance(name, str) for name in entry["options"]) or not _is_json(entry["options"]):
        raise ValueError(f"'options' {where} must be plain values by names, they are {shown(entry['options'])}")
    size, untied = entry["stored_bytes"], entry["untied"]
    if type(size) is not int or not 1 <= size <= _MOST_BYTES:
        raise ValueError(f"'stored_bytes' {where} must be a positive integer, it is {shown(size)}")
    for name in ("weighted_error", "predicted_loss"):
        lost = entry[name]
        if lost is not None and not (_is_number(lost) and lost >= 0):
            raise ValueError(f"{name!r} {where} must be a number that is not negative, it is {shown(lost)}")
    if untied is not None and not (isinstance(untied, str) and untied):
        raise ValueError(f"'untied' {where} must be the name of a table or null, it is {shown(untied)}")


def by_method_of_now(entry: Any) -> Any:
    """A table of an older plan, where a method was a variant of another one, by the name that it has now."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("spec"), Mapping):
        return entry
    former, kind, options = entry.get("method"), entry["spec"].get("kind"), entry.get("options")
    for name, method in METHODS.items():
        if method.config.formerly and method.config.formerly == former and kind in method.kinds:
            known = {field.name for field in fields(method.config)}
            kept = (
                {key: value for key, value in options.items() if key in known} if isinstance(options, Mapping) else {}
            )
            return {**entry, "method": name, "options": kept}
    return entry


def check_factors(tables: Sequence[TablePlan], state: Mapping[str, Any], where: str, complete: bool = True) -> None:
    """Check the tensors of compressed tables before a model is changed for them.

    Args:
        tables: What is compressed.
        state: A state dict; tensors that are not of these tables are not looked at.
        where: What messages call it.
        complete: Whether all factors must be there. False where somebody may add those of a whole module.

    Raises:
        ValueError: If a tensor is missing or one too many, of another shape or dtype, or holds values that are not
            finite, or indices that are not possible.
    """
    owned: dict[str, dict[str, Any]] = {path: {} for table in tables for path in table.modules}
    for name, value in state.items():
        path, factors, rest = name.partition(".factorization.")
        if factors and path in owned:
            owned[path][rest] = value
    for table in tables:
        expected = factorization_from_spec(table.spec, dtype_of(table.dtype), torch.device("meta")).state_dict()
        for path in table.modules:
            found = owned[path]
            if found or complete:
                if (weight := state.get(f"{path}.weight")) is not None and not is_table_entry(weight):
                    raise ValueError(f"{where} is damaged: it has {path + '.weight'!r}, whose table is compressed")
                check_layout(expected, found, f"{path}.factorization.", where)
        # Tied layers have the same: the first is named.
        distinct = {
            place_of(value): (f"{path}.factorization.{name}", value)
            for path in reversed(table.modules)
            for name, value in owned[path].items()
        }
        check_values(dict(distinct.values()), where)
        _try(table, owned[table.name], where)


def check_layout(expected: Mapping[str, Tensor], found: Mapping[str, Any], prefix: str, where: str) -> None:
    """Compare tensors of a file with those that a structure has.

    Args:
        expected: Tensors of the structure, without values.
        found: What the file has in their place.
        prefix: With what the names of both begin in messages.
        where: What messages call the file.

    Raises:
        ValueError: If one is missing or one too many, of another shape, or has no numbers where it should, or no bytes.
    """
    for name in sorted(expected.keys() | found.keys()):
        shown_name, tensor = repr(prefix + name), found.get(name)
        if name not in expected:
            raise ValueError(f"{where} does not fit its plan: {shown_name} is no tensor of what is stored there")
        if name not in found:
            raise ValueError(f"{where} does not fit its plan: {shown_name} is missing")
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"{where} is damaged: {shown_name} is no plain tensor, but {type(tensor).__name__}")
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, by the plan {tuple(expected[name].shape)}"
            raise ValueError(f"{where} does not fit its plan: {shown_name} has the shape {shapes}")
        # Numbers may be cast to the dtype of the model, packed integers may not.
        is_number = expected[name].is_floating_point()
        if not (tensor.is_floating_point() if is_number else tensor.dtype == torch.uint8):
            wanted = "floating-point numbers" if is_number else "packed bytes (uint8)"
            raise ValueError(f"{where} is damaged: {shown_name} holds {tensor.dtype} instead of {wanted}")


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse floating-point tensors of a file, by their names, with values that are not finite.

    Raises:
        ValueError: Naming the first.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        # The least and the largest value: both are NaN if any is, and no copy is made.
        if not all(math.isfinite(float(value)) for value in torch.aminmax(tensor.detach())):
            raise ValueError(
                f"{where} has NaN or infinite values in {name!r}: training had diverged when it was written, or it is "
                "damaged; take an earlier one"
            )


def _try(table: TablePlan, found: Mapping[str, Tensor], where: str) -> None:
    """Load on trial: only the factorization itself knows which indices are possible."""
    if all(tensor.is_floating_point() or tensor.is_meta for tensor in found.values()):
        return
    with torch.device("cpu"):
        trial = factorization_from_spec(table.spec, dtype_of(table.dtype))
    try:
        # Assigned: nothing is copied, and the model's own tensors are not touched.
        trial.load_state_dict(dict(found), assign=True)
    except RuntimeError as error:
        raise ValueError(f"{where} is damaged: {' '.join(str(error).split())}") from error
    for name, module in trial.named_modules():
        if isinstance(module, PackedFactor) and not bool(module.group_scales().isfinite().all()):
            scales = f"{table.name}.factorization.{name}.scales"
            raise ValueError(f"{where} has NaN or infinite scales in {scales!r}: it is damaged; take an earlier one")


def shown(value: Any) -> str:
    """A value in a message, however large it is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 120
    return brief.repr(value)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name in `DTYPES`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _is_number(value: Any) -> bool:
    # NaN is not equal to itself: a plan with it would never be the one that a model has.
    return (type(value) is int and abs(value) <= _MOST_BYTES) or (type(value) is float and math.isfinite(value))


def _is_json(value: Any) -> bool:
    """Whether a value is of numbers, text, lists and mappings, not too many and not too deep."""
    left, level = [value], 0
    count = 0
    while left:
        parts: list[Any] = []
        for one in left:
            if isinstance(one, Mapping):
                if not all(isinstance(name, str) for name in one):
                    return False
                parts += one.values()
            elif isinstance(one, Sequence) and not isinstance(one, str):
                if not isinstance(one, list | tuple):
                    return False
                parts += one
            elif not (one is None or isinstance(one, str | bool) or _is_number(one)):
                return False
        count, level, left = count + len(parts), level + 1, parts
        if count > _MOST_VALUES or level > _MOST_DEPTH:
            return False
    return True
