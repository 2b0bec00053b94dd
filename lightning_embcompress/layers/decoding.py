"""What decoding needs of a softmax, straight from the tiles of its logits: the best tokens, samples, log-probabilities.

Nothing is brought into the order of ids but what is returned, which for one state and a large vocabulary takes a good
part of the time that the product does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_embcompress.methods.kernels.online_softmax import add_log_sum_exp
from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.methods.tiles import Places, Tiles

# Logits that are there at once.
_ELEMENTS = 2**24
# Probabilities that are added up at a time.
_RUN = 1024
_FIRST = 64


class Best(NamedTuple):
    """The best tokens of every state, the best one first.

    Attributes:
        logits: `[*, k]`.
        ids: `[*, k]` int64.
    """

    logits: Tensor
    ids: Tensor


def decoding_rows(states: int) -> int:
    """Rows of a tile for so many states, or states for so many rows."""
    return max(1, _ELEMENTS // max(1, states))


@torch.no_grad()
def topk(tiles: Tiles, k: int) -> Best:
    """The `k` tokens with the largest logits.

    Args:
        tiles: Of `[N, dim]` states.
        k: How many.

    Raises:
        ValueError: If there are not so many tokens.
    """
    vocab_size = tiles.tiles[-1].stop
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k must be from 1 to the {vocab_size} tokens of the vocabulary, it is {k}")
    found = [(tile.start, tiles.logits(tile).topk(min(k, tile.stop - tile.start))) for tile in tiles.tiles]
    logits, places = torch.cat([best.values for _, best in found], dim=1).topk(k)
    rows = torch.cat([best.indices + start for start, best in found], dim=1)
    return Best(logits, _ids(tiles, rows.gather(1, places)))


def _ids(tiles: Tiles, rows: Tensor) -> Tensor:
    return rows if tiles.order is None else tiles.order[rows]


@torch.no_grad()
def log_prob(tiles: Tiles, ids: Tensor) -> Tensor:
    """Logarithms of the probabilities of tokens, in nats.

    Args:
        tiles: Of `[N, dim]` states.
        ids: `[N, m]` tokens of every state.

    Returns:
        `[N, m]`, float32 at least.
    """
    vocab_size = tiles.tiles[-1].stop
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(f"ids must be from 0 to {vocab_size - 1}, they go from {int(ids.min())} to {int(ids.max())}")
    asked = Places.of(ids.flatten(), tiles)
    normalizer = scores = torch.empty(0)
    for index, tile in enumerate(tiles.tiles):
        logits = tiles.logits(tile)
        if index == 0:
            normalizer = logits.new_full((len(logits),), -torch.inf, dtype=compute_dtype(logits.dtype))
            scores = normalizer.new_empty(ids.numel())
        queries, columns = asked.inside(index, tile)
        states = torch.div(queries, max(1, ids.shape[1]), rounding_mode="floor")
        scores[queries] = logits[states, columns].to(scores.dtype)
        add_log_sum_exp(normalizer, logits)
    return scores.view(ids.shape) - normalizer.unsqueeze(1)


@torch.no_grad()
def sample(
    tiles: Tiles,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token for every state.

    Args:
        tiles: Of `[N, dim]` states.
        temperature: What logits are divided by.
        top_k: Draw from so many of the likeliest tokens only.
        top_p: Draw from the fewest of the likeliest tokens, of those that `top_k` leaves, whose probabilities add up to
            so much.
        generator: Where random numbers come from; None for that of the device.

    Returns:
        `[N]` int64.

    Raises:
        ValueError: If an argument is out of its range, or logits are no numbers.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, it is {temperature}; for the likeliest tokens use topk")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, it is {top_p}")
    vocab_size = tiles.tiles[-1].stop
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, it is {top_k}")
    if top_k is not None and top_k < vocab_size:
        best = topk(tiles, top_k)
        chances = _softmax(best.logits, temperature)
        places = _draw(_nucleus(chances, chances.sum(dim=1, keepdim=True), top_p), generator)
        return best.ids.gather(1, places.unsqueeze(1)).squeeze(1)
    parts = [tiles.logits(tile) for tile in tiles.tiles]
    chances = _softmax(torch.cat(parts, dim=1), temperature)
    del parts
    if top_p is None or top_p == 1:
        return _ids(tiles, _draw(chances, generator))
    kept = min(_FIRST, vocab_size)
    total = chances.new_ones(len(chances), 1)
    largest, rows = chances.topk(kept)
    while kept < vocab_size and bool((largest.sum(dim=1) < top_p).any()):
        kept = min(4 * kept, vocab_size)
        largest, rows = chances.topk(kept)
    places = _draw(_nucleus(largest, total, top_p), generator)
    return _ids(tiles, rows.gather(1, places.unsqueeze(1)).squeeze(1))


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(compute_dtype(logits.dtype))
    if temperature != 1:
        # From the largest, so that none becomes infinite.
        wide = (wide - wide.amax(dim=1, keepdim=True)) / temperature
    return torch.softmax(wide, dim=1)


def _nucleus(chances: Tensor, total: Tensor, top_p: float | None) -> Tensor:
    """Of chances that fall, the first ones that add up to a part of the total; 0 for the others, but the first."""
    if top_p is None:
        return chances
    before = chances.cumsum(dim=1) - chances
    inside = before < top_p * total
    inside[:, 0] = True
    return chances * inside


def _draw(chances: Tensor, generator: torch.Generator | None) -> Tensor:
    """Places drawn by chances, `[N, n]` that need not add up to 1: one random number a state.

    A run of them is drawn first, then one of it, so that sums of many small numbers are as exact as those of few.

    Raises:
        ValueError: If they are no numbers.
    """
    count, size = chances.shape
    if not count:
        return torch.empty(0, dtype=torch.long, device=chances.device)
    number = -(-size // _RUN)
    padded = torch.nn.functional.pad(chances, (0, number * _RUN - size)).view(count, number, _RUN)
    ends = padded.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    if not bool(ends[:, -1].isfinite().all()):
        state = int(ends[:, -1].isfinite().logical_not().nonzero()[0])
        raise ValueError(
            f"the logits of state {state} have no probabilities: one of them is NaN or +inf, or all are -inf; look for "
            "such numbers in the hidden states, the factors and the bias"
        )
    uniform = torch.rand(count, 1, dtype=torch.float64, device=chances.device, generator=generator)
    at = uniform * ends[:, -1:]
    run = torch.searchsorted(ends, at, right=True).clamp(max=number - 1)
    at -= torch.where(run > 0, ends.gather(1, (run - 1).clamp(min=0)), 0.0)
    mine = padded.gather(1, run.unsqueeze(2).expand(-1, 1, _RUN)).squeeze(1)
    place = torch.searchsorted(mine.double().cumsum(dim=1), at, right=True)
    # Rounding must not lead to one that has no chance.
    columns = torch.arange(1, _RUN + 1, device=chances.device)
    last = (columns * (mine > 0)).amax(dim=1, keepdim=True) - 1
    return (run * _RUN + torch.minimum(place, last)).squeeze(1)
