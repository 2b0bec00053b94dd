"""`embcompress inspect`: what the tables of a model in files are, without building the model in memory."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_embcompress.cli.usage import in_shell_terms
from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.compression.report import show_inspection, table_report
from lightning_embcompress.integrations.contents import model_class, quiet_transformers, read_contents
from lightning_embcompress.integrations.skeleton import build_skeleton, choose_tables
from lightning_embcompress.integrations.sources import Source
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.tables.finding import Table, find_tables

if TYPE_CHECKING:
    from lightning_embcompress.cli.commands import Inspect


def run_inspect(given: Inspect, source: Source) -> None:
    """Show a model.

    Args:
        given: The command line.
        source: The model.

    Raises:
        ValueError: If it cannot be read.
    """
    report = inspect_source(source, given.trust_source)
    if given.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        show_inspection(report)


def inspect_source(source: Source, trust: bool = False) -> dict[str, Any]:
    """Describe a model in files; its tensors are mapped into memory, and only factors are read.

    Args:
        source: The model.
        trust: Whether a checkpoint may hold objects that can run code when they are loaded.

    Returns:
        `tables` and `model` as in `report.json`, every table with its `share` of the model's stored bytes; `source`,
        `kind`, whether it is `compressed`, and a `note` where no tables could be chosen.

    Raises:
        ValueError: If it cannot be read.
    """
    contents = read_contents(source, trust)
    model = build_skeleton(contents.tensors, contents.plan, repr(source.name))
    compressed, note = bool(plan_of(model).tables), None
    if compressed:
        tables = table_report(model)
    else:
        try:
            tables = _dense_tables(source, model)
        except ValueError as error:
            tables, note = [], in_shell_terms(str(error))
    whole = model_bytes(model)
    for table in tables:
        table["share"] = table["stored_bytes"] / whole["stored_bytes"]
    return {
        "source": source.name,
        "kind": source.kind,
        "compressed": compressed,
        "tables": tables,
        "model": whole,
        "note": note,
    }


def _dense_tables(source: Source, skeleton: nn.Module) -> list[dict[str, Any]]:
    """What would be compressed."""
    found = _chosen_by_transformers(source) if source.kind == "pretrained" else None
    if found is None:
        found = find_tables(skeleton, choose_tables(skeleton))
    tables = []
    for table in found:
        dtype = _stored_dtype(skeleton, table)
        stored = table.weight.numel() * dtype.itemsize
        tables.append(
            {
                "name": table.name,
                "modules": list(table.modules),
                "method": None,
                "shape": list(table.shape),
                "dtype": str(dtype).removeprefix("torch."),
                "dense_bytes": stored,
                "stored_bytes": stored,
                "ratio": 1.0,
                "bits_per_weight": 8.0 * dtype.itemsize,
                "parameter_ratio": 1.0,
                "weighted_error": None,
                "structure": "",
            }
        )
    return tables


def _chosen_by_transformers(source: Source) -> list[Table] | None:
    """The tables that the class of a model says it has; None if it cannot be built without its weights."""
    import transformers

    automatic: Any = transformers.AutoModelForCausalLM
    kind = model_class(source)
    try:
        with quiet_transformers(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(str(source.path), local_files_only=True)
            model = automatic.from_config(config) if kind is automatic else kind(config)
            model.tie_weights()
    # Whatever keeps a model from being built on the meta device, its files still tell most of it.
    except Exception:
        return None
    return find_tables(model)


def _stored_dtype(skeleton: nn.Module, table: Table) -> torch.dtype:
    """The dtype of a table as it is stored: under its name, with or without that of the base model."""
    state: dict[str, Tensor] = skeleton.state_dict()
    names = [f"{path}.weight" for path in table.modules]
    names += [f"{path.partition('.')[2]}.weight" for path in table.modules]
    stored = [state[name] for name in names if name in state and state[name].shape == table.weight.shape]
    stored += [tensor for tensor in state.values() if tensor.shape == table.weight.shape]
    return stored[0].dtype if stored else table.weight.dtype
