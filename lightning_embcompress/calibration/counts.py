"""Token counts: how often every token occurs in the training data, in each vocabulary of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_embcompress.methods.config import nearest
from lightning_embcompress.tables.automatic import is_one_vocabulary


class Vocabulary(NamedTuple):
    """A table as counts see it: paths of the modules that read it, and its rows."""

    modules: Sequence[str]
    size: int


def counts_by_table(token_counts: Any, tables: Sequence[Vocabulary]) -> list[Tensor]:
    """Check token counts, and say which are those of which table.

    Args:
        token_counts: `[vocab_size]` how often every token occurs; of tables with vocabularies of their own, such counts
            by the path of a module that reads the table. Tables of one vocabulary may differ by a tenth of padding.
        tables: Of the model.

    Returns:
        For every table a `[vocab_size]` tensor on the CPU.

    Raises:
        ValueError: If a table has none, or they are of the wrong length, negative, not finite or of no table.

    Example:
        >>> tables = [Vocabulary(["source"], 3), Vocabulary(["target"], 2)]
        >>> counts_by_table({"source": [5, 2, 0], "target": [4, 1]}, tables)
        [tensor([5, 2, 0]), tensor([4, 1])]
    """
    if isinstance(token_counts, Mapping):
        paths = [path for modules, _ in tables for path in modules]
        for name in token_counts:
            if name not in paths:
                raise ValueError(
                    f"token_counts name {name!r}{nearest(str(name), paths)}, but the tables are "
                    f"{', '.join(repr(modules[0]) for modules, _ in tables)}"
                )
        found = []
        for modules, size in tables:
            given = [token_counts[path] for path in modules if path in token_counts]
            if not given:
                raise ValueError(
                    f"token_counts have none for table {modules[0]!r} of {size} rows: give them for every table, as in "
                    f"token_counts={{{modules[0]!r}: counts, ...}}"
                )
            found.append(_checked(given[0], modules[0], size))
        return found
    sizes = {size: modules[0] for modules, size in reversed(tables)}
    if not is_one_vocabulary(sizes):
        listed = ", ".join(f"{name!r} ({size} rows)" for size, name in reversed(sizes.items()))
        raise ValueError(
            f"tables {listed} have vocabularies of their own, and token_counts are of one: give those of each by its "
            f"name, as in token_counts={{{next(reversed(sizes.values()))!r}: counts, ...}}"
        )
    # Of one vocabulary, which may be padded in some of the tables.
    size = next((size for size in sizes if _length(token_counts) == size), tables[0].size)
    counts = _checked(token_counts, sizes[size], size)
    return [fitted(counts, table.size) for table in tables]


def fitted(token_counts: Tensor, size: int) -> Tensor:
    """Counts for a table of the same vocabulary with other padding: no token of the data is in that.

    Args:
        token_counts: `[vocab_size]` counts.
        size: Rows of the table.

    Returns:
        `[size]` counts.

    Example:
        >>> fitted(torch.tensor([5, 2, 0]), 2), fitted(torch.tensor([5, 2, 0]), 4)
        (tensor([5, 2]), tensor([5, 2, 0, 0]))
    """
    if len(token_counts) == size:
        return token_counts
    return nn.functional.pad(token_counts, (0, size - len(token_counts)))


def _length(token_counts: Any) -> int | None:
    try:
        return len(token_counts)
    except TypeError:
        return None


def _checked(token_counts: Any, name: str, size: int) -> Tensor:
    try:
        counts = torch.as_tensor(token_counts).detach().cpu()
        wide = counts.double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"token_counts of table {name!r} must be {size} numbers, they are a {type(token_counts).__name__}: {error}"
        ) from error
    if counts.shape != (size,):
        raise ValueError(
            f"token_counts must have one entry for each of the {size} rows of table {name!r}, its shape is "
            f"{tuple(counts.shape)}"
        )
    bad = (~torch.isfinite(wide) | (counts < 0)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"token_counts must be finite and not negative; entry {bad[0]} is {counts[bad[0]].item()} "
            f"({len(bad)} such entries)"
        )
    return counts


def count_of_common_token(token_counts: Tensor) -> int | float:
    """How often a common word occurs: half of a text are words that occur at least so often.

    Args:
        token_counts: `[vocab_size]` counts.

    Example:
        >>> count_of_common_token(torch.tensor([1, 100, 40, 30, 20, 9]))
        100
        >>> count_of_common_token(torch.tensor([1, 90, 40, 30, 20, 19]))
        40
    """
    ordered = token_counts.sort(descending=True).values
    reached = ordered.double().cumsum(0)
    place = int((2 * reached < reached[-1]).sum())
    return ordered[place].item()
