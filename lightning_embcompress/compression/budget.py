"""How small the tables are to become: one of four budgets, or a config that fixes the size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_embcompress.methods.config import MethodConfig

_INCREASE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(%?)\s*", re.IGNORECASE)
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?B?)\s*", re.IGNORECASE)
# What may stand behind a number that is given as text.
_SUFFIXES = {"ratio": "x", "bits_per_weight": ""}
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# A larger number is most likely meant in percent: few models are of use with half their perplexity more.
_LARGEST_FRACTION = 0.5
# For tables whose size is searched for: none that is of use cannot be made smaller by so much.
_ANY_RATIO = 1.5


@dataclass(frozen=True)
class Budget:
    """How small the tables are to become, in exactly one way.

    Attributes:
        ratio: Dense bytes over stored bytes, for every table; with statistics, of all tables together.
        size: Bytes of all tables together: `"80MB"` (MB = 10⁶ bytes) or a number.
        bits_per_weight: Stored bits over the numbers of the dense tables, as `ratio`.
        max_perplexity_increase: The most that the perplexity may grow by, `"1%"` or `0.01`: the smallest tables within
            it are searched for.

    Raises:
        ValueError: If it is given in no way or in several, or the value is out of its range.

    Example:
        >>> Budget(size="1.5MB").bytes_of(dense=4_000_000, weights=1_000_000, all_dense=8_000_000)
        750000
    """

    ratio: float | None = None
    size: str | int | None = None
    bits_per_weight: float | None = None
    max_perplexity_increase: str | float | None = None

    def __post_init__(self) -> None:
        """Check that there is one, and its range."""
        _check_one(vars(self))
        if self.ratio is not None and not 1 < self.ratio < math.inf:
            raise ValueError(f"ratio must be above 1 (dense bytes over stored bytes), it is {self.ratio!r}")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight < math.inf:
            raise ValueError(f"bits_per_weight must be above 0, it is {self.bits_per_weight!r}")
        if self.size is not None:
            parse_size(self.size)
        if self.max_perplexity_increase is not None:
            parse_perplexity_increase(self.max_perplexity_increase)

    @classmethod
    def of(cls, config: MethodConfig, **given: Any) -> Budget | None:
        """The budget that is given beside a config; None where the config says how large the factors are.

        Raises:
            ValueError: If the size is given in no way or in several, a value is out of its range, or the method does
                not predict what `max_perplexity_increase` searches by.
        """
        given |= {name: _number(name, given[name]) for name in _SUFFIXES if isinstance(given.get(name), str)}
        fixed = {name: getattr(config, name) for name in config.size_fields}
        _check_one({**dict.fromkeys(BUDGETS), **given, **fixed})
        if config.fixes_size:
            return None
        budget = cls(**given)
        if budget.is_searched and not config.uses_metric:
            raise ValueError(
                f"max_perplexity_increase cannot be predicted for method {config.method!r}: use one that weighs errors "
                "by what the loss grows by, such as the default"
            )
        return budget

    @property
    def given(self) -> dict[str, Any]:
        """The one that is given, by its name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def is_searched(self) -> bool:
        """Whether the size is open until it is found by measuring."""
        return self.max_perplexity_increase is not None

    @property
    def max_loss(self) -> float:
        """Growth of the mean loss, in nats, that `max_perplexity_increase` is."""
        assert self.max_perplexity_increase is not None
        return parse_perplexity_increase(self.max_perplexity_increase)

    def bytes_of(self, dense: int, weights: int, all_dense: int) -> int:
        """Most bytes of a table.

        Args:
            dense: Bytes of the table as it is.
            weights: Its numbers.
            all_dense: Bytes of all tables.
        """
        if self.size is not None:
            # In whole numbers: a quotient of quotients may be a byte too low.
            return dense * parse_size(self.size) // all_dense
        if self.bits_per_weight is not None:
            return int(weights * self.bits_per_weight / 8)
        return int(dense / (self.ratio or _ANY_RATIO))


BUDGETS = tuple(field.name for field in fields(Budget))
"""Names of the ways in which a budget can be given."""


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


def parse_perplexity_increase(max_perplexity_increase: str | float) -> float:
    """Nats that a relative increase of the perplexity is: `1%` or `0.01` is `log 1.01`.

    Raises:
        ValueError: If it cannot be read, is not positive, or is above 0.5 without a percent sign.

    Example:
        >>> round(parse_perplexity_increase("1%"), 5)
        0.00995
    """
    match = _INCREASE.fullmatch(str(max_perplexity_increase))
    number = float(match.group(1)) / (100 if match.group(2) else 1) if match else 0.0
    if not 0 < number < math.inf:
        raise ValueError(
            "max_perplexity_increase must be an increase of the perplexity such as '1%' or 0.01, it is "
            f"{max_perplexity_increase!r}"
        )
    if match and number > _LARGEST_FRACTION and not match.group(2):
        raise ValueError(
            f"max_perplexity_increase={max_perplexity_increase!r} is an increase by {number:.0%}: write "
            f"'{number:.0%}' if that is meant, or '{number:g}%' for {number:g} percent"
        )
    return math.log1p(number)


def _number(name: str, value: str) -> float:
    """A number that is given as text, as in `6x`."""
    try:
        return float(value.strip().lower().removesuffix(_SUFFIXES[name]))
    except ValueError:
        example = f"6{_SUFFIXES[name]}"
        raise ValueError(f"{name} must be a number such as 6 or {example!r}, it is {value!r}") from None


def _check_one(given: Mapping[str, Any]) -> None:
    if len([value for value in given.values() if value is not None]) != 1:
        names = list(given)
        listed = ", ".join(f"{name} is {value!r}" for name, value in given.items())
        raise ValueError(f"give exactly one of {', '.join(names[:-1])} and {names[-1]}: {listed}")
