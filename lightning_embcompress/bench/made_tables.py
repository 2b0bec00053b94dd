"""Tables as trained ones are, made without data: spectra that fall, and words that occur by Zipf's law."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies
from lightning_embcompress.methods.registry import get_method
from lightning_embcompress.methods.specs import dense_bytes

# Words of the training text of the One Billion Word benchmark.
_TOKENS = 829_250_940
# Groups of neighbouring frequency that have a spectrum of their own, and how far components trade places in them.
_RUNS, _MIXING = 20, 48 / 1024
# Ends of the spectra, as powers of ten: standard deviations of components, and of the hidden states or gradients.
_SPECTRUM, _STATES = -1.5, -1.0


def bytes_allowed(method: str, options: dict[str, Any], vocab_size: int, dim: int, ratio: float) -> int:
    """Most bytes that a float32 table may be stored in.

    Args:
        method: Name of a method, see `embcompress list`.
        options: Its options; those that fix the size leave the ratio unused.
        vocab_size: Rows of the table.
        dim: Its columns.
        ratio: Dense bytes over stored bytes.

    Raises:
        ValueError: If the method or an option is unknown, or it cannot store a table of this shape in so little.

    Example:
        >>> bytes_allowed("low_rank", {}, vocab_size=1000, dim=64, ratio=4)
        64000
    """
    if not (math.isfinite(ratio) and ratio > 1):
        raise ValueError(f"ratio must be above 1, it is {ratio}")
    found = get_method(method)
    chosen = found.options(**options)
    least = found.factorization.smallest_bytes(vocab_size, dim, 4, chosen)
    if chosen.fixes_size:
        return least
    dense = dense_bytes(vocab_size, dim, 4)
    if least > int(dense / ratio):
        raise ValueError(
            f"{method} needs {least} bytes for a table of {vocab_size} x {dim}, a ratio of {dense / least:.2f}, not "
            f"{ratio:g}: ask for less, or take another method"
        )
    return int(dense / ratio)


def fill_table(table: Tensor, seed: int, advance: Callable[[float], None] = lambda _: None) -> None:
    """Give a table values whose spectrum falls, in other directions for frequent rows than for rare ones.

    Args:
        table: `[vocab_size, dim]`, the most frequent rows first; it is written to.
        seed: Of the values.
        advance: Called with shares of the work that add up to 1.
    """
    vocab_size, dim = table.shape
    generator = torch.Generator().manual_seed(seed)
    parts = torch.split(table, -(-vocab_size // _RUNS))
    for rows in parts:
        order = (torch.arange(dim) + _MIXING * dim * torch.rand(dim, generator=generator)).argsort()
        rows.normal_(generator=generator).mul_(torch.logspace(0, _SPECTRUM, dim)[order])
        advance(1 / len(parts))


def zipf_metric(vocab_size: int, dim: int, seed: int) -> tuple[Metric, Tensor]:
    """What errors cost: counts by Zipf's law, and the second moment of states whose spectrum falls.

    Returns:
        The metric, and `[vocab_size]` counts.
    """
    frequencies = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    counts = (_TOKENS * frequencies / frequencies.sum()).long()
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4 * dim, dim, generator=generator) * torch.logspace(0, _STATES, dim)
    return Metric((states.T @ states / len(states)).double(), smoothed_frequencies(counts)), counts


def made_states(count: int, dim: int, generator: torch.Generator, deviation: float = 2.0) -> Tensor:
    """Hidden states of the spectrum of `zipf_metric`.

    Args:
        count: How many.
        dim: Their width.
        generator: Where the numbers come from.
        deviation: Standard deviation of their logits in a table of `fill_table`, as trained models have it.

    Returns:
        `[count, dim]` float32.
    """
    spectrum = torch.logspace(0, _STATES, dim)
    made = float((spectrum * torch.logspace(0, _SPECTRUM, dim)).norm())
    return torch.randn(count, dim, generator=generator) * spectrum * (deviation / made)


def drawn_ids(count: int, vocab_size: int, generator: torch.Generator, zipf: bool = True) -> Tensor:
    """Ids as words come in text, the most frequent ones being the first.

    Args:
        count: How many.
        vocab_size: Of how many.
        generator: Where random numbers come from.
        zipf: Whether by Zipf's law; else all alike.

    Returns:
        `[count]` int64.

    Example:
        >>> drawn_ids(3, 10, torch.Generator().manual_seed(0)).shape
        torch.Size([3])
    """
    if not zipf:
        return torch.randint(vocab_size, (count,), generator=generator)
    # Not `torch.multinomial`, which takes at most 2^24 categories.
    ends = (1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)).cumsum(0)
    uniform = torch.rand(count, dtype=torch.float64, generator=generator) * ends[-1]
    return torch.searchsorted(ends, uniform).clamp(max=vocab_size - 1)
