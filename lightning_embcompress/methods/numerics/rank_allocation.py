"""How many ranks each block of a table gets."""

from __future__ import annotations

import math
from collections.abc import Sequence


def block_elements(size: int, rank: int, dim: int) -> int:
    """Elements that a block of `size` rows takes at a rank: factors, or the rows themselves where those are fewer."""
    return min(rank * (size + dim), size * dim)


def is_dense(size: int, rank: int, dim: int) -> bool:
    """Whether a block at this rank is stored as its rows, without factors: it then takes no more and is exact."""
    return size > 0 and rank * (size + dim) >= size * dim


def full_rank(size: int, dim: int) -> int:
    """The largest rank that a block of `size` rows can have."""
    return min(size, dim)


def smallest_elements(sizes: Sequence[int], dim: int) -> int:
    """Elements of a block table in which every block has rank 1, the least that GroupReduce gives."""
    return sum(block_elements(size, 1, dim) for size in sizes)


def proportional_ranks(frequencies: Sequence[float], sizes: Sequence[int], dim: int, max_elements: int) -> list[int]:
    """Ranks proportional to the mean frequency of each block, scaled to a budget (GroupReduce, section 3.2).

    `r_b = ⌊s f_b⌋`, at least 1 and at most `min(n_b, dim)`; the scale `s` is bisected so that the blocks fill the
    budget. What is left over, less than the next step of the scale costs, goes to single ranks, the most frequent
    blocks first. A block whose factors would take as much as its rows gets its full rank: it is stored as it is.

    Args:
        frequencies: Mean token frequency of each block, any unit.
        sizes: Rows of each block; an empty block gets rank 0.
        dim: Columns of the table.
        max_elements: Elements that all blocks together may take.

    Returns:
        One rank a block.

    Raises:
        ValueError: If the budget does not even cover rank 1 in every block.

    Example:
        >>> proportional_ranks([100.0, 10.0, 1.0], [50, 50, 50], dim=32, max_elements=2500)
        [32, 9, 1]
    """
    if smallest_elements(sizes, dim) > max_elements:
        raise ValueError(
            f"{max_elements} elements do not cover rank 1 in each of {len(sizes)} blocks, "
            f"which takes {smallest_elements(sizes, dim)}; allow more bytes or use fewer groups"
        )
    # A floor keeps the bisection finite for blocks that never occur.
    floor = max(max(frequencies), 1.0) * 1e-12
    shares = [max(float(frequency), floor) for frequency in frequencies]

    def settle(rank: int, size: int) -> int:
        rank = min(max(1, rank), full_rank(size, dim))
        return full_rank(size, dim) if is_dense(size, rank, dim) else rank

    def ranks_at(scale: float) -> list[int]:
        return [settle(int(min(scale * share, dim)), size) for share, size in zip(shares, sizes, strict=True)]

    def elements(ranks: list[int]) -> int:
        return sum(block_elements(size, rank, dim) for size, rank in zip(sizes, ranks, strict=True))

    # Every block has rank 1 at the low end and its full rank at the high end; shares span many orders of magnitude,
    # so the logarithm of the scale is bisected.
    low, high = 0.5 / max(shares), (dim + 1) / min(shares)
    if elements(ranks_at(high)) <= max_elements:
        return ranks_at(high)
    for _ in range(100):
        middle = math.sqrt(low * high)
        if elements(ranks_at(middle)) <= max_elements:
            low = middle
        else:
            high = middle
    ranks = ranks_at(low)
    for block in sorted(range(len(sizes)), key=lambda block: -shares[block]):
        raised = settle(ranks[block] + 1, sizes[block])
        candidate = [*ranks[:block], raised, *ranks[block + 1 :]]
        if elements(candidate) <= max_elements:
            ranks = candidate
    return ranks
