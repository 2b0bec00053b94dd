"""What tables are to become and in how many bytes: the request, checked before anything is solved or changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_embcompress.calibration.counts import checked_counts
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.numerics.gram import row_weights
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.registry import Factorization, get_config, get_method
from lightning_embcompress.tables.replacement import Table, check_finite, find_tables
from lightning_embcompress.utils.progress import progress_bar

_LOSS = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(%?)\s*", re.IGNORECASE)
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?B?)\s*", re.IGNORECASE)
Tie: TypeAlias = Literal["keep", "untie", "auto"]
"""What becomes of a table that embedding and softmax share, see `compress`."""

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Request:
    """A table that is to be compressed: what into, and in how many bytes."""

    table: Table
    config: MethodConfig
    max_bytes: int
    untied: str | None = None
    """Name of the table that it was a part of, if that is to become two."""
    metric: Metric | None = None
    """What an error costs, where that is known."""

    @property
    def factorization(self) -> type[Factorization[Any]]:
        """The class that solves the table."""
        return get_method(self.config.method).factorization

    @property
    def smallest_bytes(self) -> int:
        """Fewest bytes that the table can be stored in."""
        itemsize = self.table.weight.element_size()
        return self.factorization.smallest_bytes(*self.table.shape, itemsize, self.config.candidates[0])

    def solve(
        self, weight: Tensor, token_counts: Tensor | None, start: Factorization[Any] | None = None
    ) -> Factorization[Any]:
        """Find the factors of a table, with a progress bar.

        Args:
            weight: `[vocab_size, dim]`, the table's weight or what it is to be refined to.
            token_counts: `[vocab_size]` counts.
            start: A factorization to refine instead of starting afresh.
        """
        configs = self.config.candidates
        if start is not None and len(configs) > 1:
            configs = tuple(config for config in configs if config.method == start.provenance["method"])
        description = f"{'Compressing' if start is None else 'Refining'} {self.table.name} {tuple(weight.shape)}"
        best: Factorization[Any] | None = None
        with (
            torch.no_grad(),
            torch.autocast(weight.device.type, enabled=False),
            progress_bar(description, total=float(len(configs))) as advance,
        ):
            for config in configs:
                found = self._solve_by(config, weight.detach(), token_counts, start, advance)
                if len(configs) > 1 and self.metric is not None:
                    found.predicted_loss = found.loss_in(self.metric, weight.detach())
                if best is None or (found.predicted_loss or 0.0) < (best.predicted_loss or 0.0):
                    best = found
        assert best is not None
        trained = weight if start is None else next(start.parameters())
        return best.requires_grad_(trained.requires_grad)

    def _solve_by(
        self,
        config: MethodConfig,
        weight: Tensor,
        token_counts: Tensor | None,
        start: Factorization[Any] | None,
        advance: Callable[[float], None],
    ) -> Factorization[Any]:
        known = {"metric": self.metric} if config.uses_metric and self.metric is not None else {}
        solve = get_method(config.method).factorization.decompose if start is None else start.refined
        found = solve(weight, self.max_bytes, token_counts, config, advance, **known)
        found.provenance = {"method": config.method}
        return found

    def record(self, factorization: Factorization[Any], weight: Tensor, token_counts: Tensor | None) -> None:
        """Note on a factorization how it was found and how far it is from the table."""
        weights = row_weights(token_counts if self.config.needs_counts else None, weight.shape[0])
        factorization.provenance = {
            "method": factorization.provenance.get("method", self.config.method),
            "options": self.config.options,
            "weighted_error": factorization.weighted_error(weight.detach(), weights),
            # Of what is stored, rounding and all.
            "predicted_loss": None if self.metric is None else factorization.loss_in(self.metric, weight.detach()),
            "untied": self.untied,
        }


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
        ValueError: If it cannot be read or is not positive.

    Example:
        >>> round(parse_perplexity_increase("1%"), 5)
        0.00995
    """
    match = _LOSS.fullmatch(str(max_perplexity_increase))
    number = float(match.group(1)) / (100 if match.group(2) else 1) if match else 0.0
    if not 0 < number < math.inf:
        raise ValueError(
            f"max_perplexity_increase must be an increase of the perplexity such as '1%' or 0.01, it is "
            f"{max_perplexity_increase!r}"
        )
    return math.log1p(number)


def check_budget(
    ratio: float | None,
    size: str | int | None,
    config: MethodConfig,
    max_perplexity_increase: str | float | None = None,
) -> None:
    """Check that a budget is given in exactly one way.

    Args:
        ratio: Dense bytes over stored bytes.
        size: Bytes.
        config: Of the method: some of its fields say how large the factors are.
        max_perplexity_increase: Relative increase of the perplexity.

    Raises:
        ValueError: If it is given in no way or in several, or the value is out of its range.
    """
    given: dict[str, Any] = {"ratio": ratio, "size": size, "max_perplexity_increase": max_perplexity_increase}
    given |= {name: getattr(config, name) for name in config.size_fields}
    if len([value for value in given.values() if value is not None]) != 1:
        names = list(given)
        listed = ", ".join(f"{name} is {value!r}" for name, value in given.items())
        raise ValueError(f"give exactly one of {', '.join(names[:-1])} and {names[-1]}: {listed}")
    if ratio is not None and not 1 < ratio < float("inf"):
        raise ValueError(f"ratio must be above 1 (dense bytes over stored bytes), it is {ratio!r}")
    if size is not None:
        parse_size(size)
    if max_perplexity_increase is not None:
        parse_perplexity_increase(max_perplexity_increase)


def plan_requests(
    model: nn.Module,
    method: MethodConfig | str,
    ratio: float | None = None,
    size: str | int | None = None,
    tables: str | Sequence[str] = "auto",
    tie: Tie = "keep",
    **options: Any,
) -> list[Request]:
    """Decide what becomes of which table, and refuse what cannot be reached, before anything is solved or changed.

    Args:
        model: The model.
        method: Config of a method, or its name.
        ratio: Dense bytes over stored bytes, the same for every table.
        size: Bytes of all tables together, instead of a ratio.
        tables: See `find_tables`.
        tie: What becomes of a table that embedding and softmax share, see `compress`.
        **options: Options of the method; some methods have one that says how large the factors are, instead of a ratio.

    Raises:
        ValueError: If the tables, the budget or an option cannot be used; the nearest ratio that can be reached is
            named.
    """
    config = get_config(method, **options)
    factorization = get_method(config.method).factorization
    check_budget(ratio, size, config)
    if tie not in get_args(Tie):
        raise ValueError(f"tie must be one of {', '.join(map(repr, get_args(Tie)))}, it is {tie!r}")
    found = find_tables(model, tables)
    total = sum(table.weight.nbytes for table in found)
    if size is not None:
        ratio = total / parse_size(size)
        if ratio <= 1:
            raise ValueError(
                f"size {size!r} is not below the {total / 1e6:.3f} MB that the tables "
                f"{', '.join(repr(table.name) for table in found)} have now: nothing to compress"
            )
    requests = []
    for table in found:
        parts = _untied(model, table) if tie == "untie" else [table]
        # The bytes of a table that becomes two are shared between them.
        dense = table.weight.nbytes // len(parts)
        smallest = factorization.smallest_bytes(*table.shape, table.weight.element_size(), config.candidates[0])
        max_bytes = smallest if ratio is None else int(dense / ratio)
        if size is not None:
            # In whole numbers: a quotient of quotients may be a byte too low.
            max_bytes = dense * parse_size(size) // total
        if smallest > max_bytes:
            raise ValueError(
                f"table {table.name!r} {table.shape} cannot be stored in {max_bytes} bytes ({ratio:.4g}x) by "
                f"{config.method!r} with these options: the smallest it can be is {smallest} bytes "
                f"({_round_down(dense / smallest)}x); ask for less, or use other options or another method"
            )
        if smallest >= dense:
            raise ValueError(
                f"table {table.name!r} {table.shape} would take {smallest} bytes by {config.method!r} with these "
                f"options, not less than the {dense} bytes it has now: nothing to compress; ask for smaller factors"
            )
        untied = table.name if len(parts) > 1 else None
        requests += [Request(part, config, max_bytes, untied) for part in parts]
    return requests


def checked_requests(
    model: nn.Module,
    token_counts: Any,
    method: MethodConfig | str,
    ratio: float | None = None,
    size: str | int | None = None,
    tables: str | Sequence[str] = "auto",
    tie: Tie = "keep",
    **options: Any,
) -> tuple[list[Request], Tensor | None]:
    """Decide what becomes of which table, and check all that solving them needs.

    Args:
        model: The model.
        token_counts: See `check_counts`.
        method: See `plan_requests`.
        ratio: See `plan_requests`.
        size: See `plan_requests`.
        tables: See `plan_requests`.
        tie: See `plan_requests`.
        **options: Options of the method.

    Returns:
        The requests, and the token counts as a tensor or None.

    Raises:
        ValueError: If the request cannot be met, or a table or the counts cannot be used.
    """
    requests = plan_requests(model, method, ratio, size, tables, tie, **options)
    return requests, check_tables_and_counts(requests, token_counts)


def check_tables_and_counts(requests: Sequence[Request], token_counts: Any) -> Tensor | None:
    """Check all that solving requests needs.

    Args:
        requests: What is to become of which table.
        token_counts: See `check_counts`.

    Returns:
        The token counts as a tensor, or None.

    Raises:
        ValueError: If a table or the counts cannot be used.
    """
    counts = check_counts(token_counts, requests)
    for request in requests:
        check_finite(request.table)
    return counts


def _untied(model: nn.Module, table: Table) -> list[Table]:
    """A table by the two ways in which it is read, or as it is where there is only one."""
    embeddings = tuple(path for path in table.modules if isinstance(model.get_submodule(path), nn.Embedding))
    others = tuple(path for path in table.modules if path not in embeddings)
    return [Table(modules, table.weight) for modules in (embeddings, others) if modules]


def _round_down(ratio: float) -> float:
    """Two decimals that can be asked for: the nearest ones may be a little more than what can be reached."""
    return math.floor(ratio * 100) / 100


def check_counts(token_counts: Any, requests: Sequence[Request]) -> Tensor | None:
    """Check token counts against the tables that need them.

    Returns:
        `[vocab_size]` tensor, or None.

    Raises:
        ValueError: If they are needed and missing, of the wrong length, negative or not finite.
    """
    if token_counts is None:
        for request in requests:
            if request.config.needs_counts:
                raise ValueError(
                    f"method {request.config.method!r} weights the rows of table {request.table.name!r} by frequency: "
                    "give token_counts, how often every token occurs in the training data (torch.bincount(ids, "
                    "minlength=vocab_size)), or use a method that needs none"
                )
        return None
    return checked_counts(token_counts, {request.table.name: request.table.shape[0] for request in requests})
