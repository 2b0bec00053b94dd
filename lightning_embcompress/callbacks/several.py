"""Several compressing callbacks in one run: of different tables, or of the same ones one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.tables.replacement import all_modules, restore_dense


class Turn(NamedTuple):
    """When one of the callbacks compresses and refines which modules, and where it keeps what they were."""

    at_epoch: int
    refine_at_epochs: Sequence[int]
    modules: frozenset[str]
    reference: Path | None = None


def check_order(turns: Sequence[Turn]) -> None:
    """Refuse callbacks that would compress a table at the same time, or refine one that another has compressed since.

    Raises:
        ValueError: Naming the table and the epochs.
    """
    ordered = sorted(turns, key=lambda turn: turn.at_epoch)
    for index, first in enumerate(ordered):
        for second in ordered[index + 1 :]:
            if not first.modules & second.modules:
                continue
            name = min(first.modules & second.modules)
            if first.at_epoch == second.at_epoch:
                raise ValueError(
                    f"two callbacks compress table {name!r} at epoch {first.at_epoch}: give them different tables, or "
                    "one of them a later at_epoch"
                )
            if late := [epoch for epoch in first.refine_at_epochs if epoch >= second.at_epoch]:
                raise ValueError(
                    f"table {name!r} is to be refined at epoch {late[0]}, but another callback compresses it anew at "
                    f"epoch {second.at_epoch}: let refine_at_epochs end before it"
                )
            if first.reference is not None and first.reference == second.reference:
                raise ValueError(
                    f"keep_reference={str(first.reference)!r} of two callbacks would keep table {name!r} as it is at "
                    f"epochs {first.at_epoch} and {second.at_epoch} in the same file: name two folders"
                )


def make_dense(model: nn.Module, tables: str | Sequence[str]) -> dict[str, nn.Module]:
    """Turn compressed layers that are to be compressed again into dense ones.

    Args:
        model: The model.
        tables: As for `find_tables`.

    Returns:
        All compressed layers the model had, by their paths, for `put_back`; none if it stays as it is.
    """
    layers = {path: layer for path, layer in all_modules(model).items() if isinstance(layer, CompressedLayer)}
    names = [tables] if isinstance(tables, str) else tables
    if not layers or (tables != "auto" and not layers.keys() & set(names)):
        return {}
    restore_dense(model)
    return dict(layers)


def merged_perplexity(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The perplexities of a run for `report.json`, of callbacks in the order in which they compress."""
    merged = dict(steps[0])
    for later in steps[1:]:
        merged["compressed"] = later["compressed"]
        merged["refined"] = [*merged["refined"], *later["refined"]]
        merged["final"] = merged["final"] if later["final"] is None else later["final"]
    return merged
