"""What can be said of the arguments of a fine-tuning before a file is read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any


def check_arguments(
    weights: Mapping[str, float], rates: Mapping[str, float | None], freeze: str | None, rows: int | None, shares: bool
) -> None:
    """Refuse arguments that are out of range, or do not fit each other.

    Args:
        weights: Of the terms of the loss, by their names.
        rates: Learning rates by their names; None for those of the optimizer.
        freeze: The part that is not trained.
        rows: Rows that are drawn for the reconstruction.
        shares: Whether the teacher's tables are read over the model's own backbone.

    Raises:
        ValueError: Naming the argument, its value and the remedy.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}_weight={weight} must be 0 or more, and finite.")
    if not any(weights.values()):
        raise ValueError("All weights are 0, so that there is no loss: set cross_entropy_weight=1.")
    for name, rate in rates.items():
        if rate is not None and not 0 <= rate < math.inf:
            raise ValueError(f"{name}={rate} must be 0 or more; leave it out for that of the optimizer.")
    if freeze not in (None, "backbone", "factors"):
        raise ValueError(f"freeze={freeze!r} must be 'backbone', 'factors' or None.")
    if weights["reconstruction"] and freeze == "factors":
        raise ValueError(
            "reconstruction_weight trains factors, but freeze='factors' leaves them as they are: set one of them to"
            " 0 or None."
        )
    if rows is not None and rows < 1:
        raise ValueError(f"reconstruction_rows={rows} must be at least 1; None takes the tokens of the batch.")
    if shares and freeze != "backbone":
        raise ValueError(
            f"teacher_shares_backbone=True with freeze={freeze!r}: the teacher is the dense tables over the model's own"
            " backbone, and if that is trained the teacher moves with its student, to where both agree and neither is"
            " right. Set freeze='backbone', or teacher_shares_backbone=False to keep the whole teacher."
        )


def check_effect(weights: Mapping[str, float], teacher: Any, shares: bool, rows: int | None, statistics: Any) -> None:
    """Refuse arguments that nothing would be done with.

    Args:
        weights: Of the terms of the loss, by their names.
        teacher: The dense original; None for none.
        shares: Whether its tables are read over the model's own backbone.
        rows: Rows that are drawn for the reconstruction.
        statistics: By which it is measured; None for none.

    Raises:
        ValueError: Naming the argument, its value and the remedy.
    """
    if teacher is not None and not weights["distillation"] and not weights["reconstruction"]:
        raise ValueError(
            f"teacher={_short(teacher)} has no effect with distillation_weight=0 and reconstruction_weight=0: set one"
            " of them, as in distillation_weight=1, or leave the teacher out."
        )
    if shares and teacher is None:
        raise ValueError(
            "teacher_shares_backbone=True has no effect with teacher=None: give the dense original as teacher, or "
            "leave it"
            " out."
        )
    for name, value in (("reconstruction_rows", rows), ("statistics", statistics)):
        if value is not None and not weights["reconstruction"]:
            raise ValueError(
                f"{name}={_short(value)} has no effect with reconstruction_weight=0: set that, as in"
                f" reconstruction_weight=1, or leave {name} out."
            )


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, str | int) else type(value).__name__


def plain_path(given: Any) -> Any:
    """A path as a string, which checkpoints can keep; anything else as it is."""
    return os.fspath(given) if isinstance(given, os.PathLike) else given
