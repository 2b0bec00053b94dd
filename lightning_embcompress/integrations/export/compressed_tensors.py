"""compressed-tensors: embedding and head as packed integers in groups, as transformers and vLLM load them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_embcompress.calibration.loss_metric import metric_of_moments
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.integrations.contents import quiet_transformers
from lightning_embcompress.integrations.export.written import WrittenTable, fit_table
from lightning_embcompress.integrations.opening import copy_beside
from lightning_embcompress.methods.numerics.grid_rounding import GridCodes
from lightning_embcompress.methods.quantizers.grids import Grid
from lightning_embcompress.tables.finding import Table, find_tables
from lightning_embcompress.utils.files import explaining_failure, replacing

# By this class vLLM finds the scheme of an embedding, to which some models give no name.
_VLLM_EMBEDDING = "VocabParallelEmbedding"


def export_compressed_tensors(
    model: Any,
    target: str | os.PathLike[str],
    bits: Literal[4, 8] = 4,
    statistics: Statistics | None = None,
    *,
    group_size: int = 32,
    tie: Literal["keep", "untie"] = "keep",
    files: Mapping[str, Path] | None = None,
) -> list[WrittenTable]:
    """Save a model of transformers with its embedding and head as `pack-quantized` integers, found in the loss metric.

    Symmetric integers with a scale for every group of a row, in the dtype of the model (float16 for float32). The model
    itself stays as it is. `AutoModelForCausalLM.from_pretrained(target)` reads it where the package compressed-tensors
    is there, and makes the tables dense in memory.

    Args:
        model: A dense model of transformers, such as `AutoModelForCausalLM` gives.
        target: The directory to write; one that is there is replaced when the new one is complete.
        bits: Of an integer.
        statistics: Of the model, see `collect_statistics`; without them all columns count the same.
        group_size: Columns that share a scale.
        tie: Whether a table that embedding and head share is stored once, as transformers reads it. vLLM reads a packed
            embedding and a packed head, but not one for both: `untie` stores two, each found for its own role.
        files: Copied into the directory, by their places in it, such as those of the tokenizer.

    Raises:
        ValueError: If the model has no dense tables, a row is no whole number of groups, or the statistics are of
            another model. Nothing is written then.
        OSError: If the directory cannot be written; what was there before is as it was.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, it is {bits!r}")
    if tie not in ("keep", "untie"):
        raise ValueError(f"tie must be 'keep' or 'untie', it is {tie!r}")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model is quantized or compressed already: make it dense first, as with densify")
    roles = [Table((path,), table.weight) for table in find_tables(model) for path in table.modules]
    tables = roles if tie == "untie" else find_tables(model)
    dtype = torch.float16 if model.dtype == torch.float32 else model.dtype
    grid = Grid(tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1))), group_size, dtype=dtype)
    for table in tables:
        _check(table, group_size)
    tensors = dict(model.state_dict())
    written = []
    for table in tables:
        # A bias stays what it is, and does not make up for errors at the mean state.
        metric = None if statistics is None else metric_of_moments(table, statistics)
        before = str(table.weight.dtype).removeprefix("torch.")
        one, codes = fit_table(table.name, table.weight.detach(), before, f"int{bits}", grid, metric)
        written.append(one)
        for path in table.modules:
            tensors.pop(f"{path}.weight", None)
        # Once, under the name of the first module, as transformers keeps tied tensors.
        tensors |= {f"{table.name}.{name}": tensor for name, tensor in _tensors(codes, bits).items()}
    config = _config([path for table in tables for path in table.modules], bits, group_size)
    place = Path(target)
    with explaining_failure(place), replacing(place, directory=True) as folder:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=tensors)
        file = folder / "config.json"
        content = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": config}
        if tie == "untie":
            content["tie_word_embeddings"] = False
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        copy_beside(files or {}, folder)
    return written


def _check(table: Table, group_size: int) -> None:
    """Check that a table has a place in the format.

    Raises:
        ValueError: If it has none.
    """
    columns = table.shape[1]
    if group_size < 1 or columns % group_size or group_size % 8:
        raise ValueError(
            f"group_size must be a multiple of 8 that divides the {columns} columns of {table.name!r}, it is "
            f"{group_size}"
        )


def _tensors(found: GridCodes, bits: int) -> dict[str, Tensor]:
    """What the format keeps of a table: integers in the bits of int32, the first ones lowest, from 0."""
    codes = found.codes.cpu()
    packed = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
    return {
        "weight_packed": packed.contiguous().view(torch.int32),
        "weight_scale": found.scales.cpu(),
        "weight_shape": torch.tensor(codes.shape),
    }


def _config(paths: list[str], bits: int, group_size: int) -> dict[str, Any]:
    """The `quantization_config` of the format."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    targets = [*(f"re:^{re.escape(path)}$" for path in paths), _VLLM_EMBEDDING]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        # Of transformers: its packed layers know no embeddings.
        "dequantize": True,
        "config_groups": {"tables": {"targets": targets, "weights": weights}},
        "ignore": [],
    }
