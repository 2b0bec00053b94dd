"""What all configs of methods have in common."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from typing_extensions import Self

from lightning_embcompress.methods.specs import plain

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
"""Bits of a number that are chosen from; with 8, what is lost is a ten-thousandth of the energy."""


@dataclass(frozen=True)
class MethodConfig:
    """A way to compress a table: what it can be told, and what generic code has to know of it.

    Every method has a subclass in the `config.py` of its folder: typed fields with defaults, whose ranges are checked
    when it is made. The fields are the keyword arguments of `compress(model, method, ...)` and of the callbacks.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class HalfConfig(MethodConfig):
        ...     method = "half"
        ...     rounds: int = 3
        >>> HalfConfig(rounds=5).options
        {'rounds': 5}
    """

    method: ClassVar[str]
    """Name in callbacks, recipes and `compress`."""
    description: ClassVar[str] = ""
    """One line for lists."""
    needs_counts: ClassVar[bool] = False
    """Whether rows are weighted by token counts."""
    uses_metric: ClassVar[bool] = False
    """Whether `decompose` and `refined` take a `metric`, what an error costs (see `methods.numerics.metric`)."""
    needs_metric: ClassVar[bool] = False
    """Whether it can only be followed where a metric is known."""
    keeps_floats: ClassVar[bool] = False
    """Whether the bytes of a number are those of the table, so that only their count is to be decided."""
    size_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that say how large the factors are, in place of a budget."""
    formerly: ClassVar[str] = ""
    """Name of the method of which it was a variant in plans and checkpoints of older versions."""

    def __post_init__(self) -> None:
        """Check the ranges of fields."""

    @property
    def fixes_size(self) -> bool:
        """Whether the config leaves nothing for a budget to decide."""
        return any(getattr(self, name) is not None for name in self.size_fields)

    @property
    def options(self) -> dict[str, Any]:
        """Fields that differ from their defaults, as JSON: what plans record."""
        return {one.name: plain(value) for one in fields(self) if (value := getattr(self, one.name)) != one.default}

    @property
    def candidates(self) -> tuple[MethodConfig, ...]:
        """Configs of which the one of the least predicted loss is taken for a table; the config alone for most."""
        return (self,)

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Make a config of fields by name, as a command line or a file has them.

        Raises:
            ValueError: If there is no field of a given name, or a value is out of its range.
        """
        names = [one.name for one in fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(
                    f"unknown option {name!r}{nearest(name, names)}; {cls.method!r} has {', '.join(names) or 'none'}"
                )
        return cls(**plain(options))


@dataclass(frozen=True)
class MetricConfig(MethodConfig):
    """A method that weighs errors by what the loss grows by, where that is known.

    Attributes:
        unseen_weight: How much the tokens that the counted text lacks weigh together, above 0 and below 1: more for
            text of other kinds, less for more of the same. None for twice what the statistics expect of them, the
            model's own predictions included, or for what follows from the counts alone where there are none.

    Raises:
        ValueError: If it is out of its range.
    """

    uses_metric: ClassVar[bool] = True
    weighs_by_counts: ClassVar[bool] = False
    """Whether rows have the weights of the metric, from counts alone, where nothing is known of the loss."""

    unseen_weight: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if self.unseen_weight is not None and not 0 < self.unseen_weight < 1:
            raise ValueError(f"unseen_weight must be above 0 and below 1, it is {self.unseen_weight}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The part of an error message that proposes what was probably meant, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=2)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
