"""What losses and decoding read from the tiles of a softmax's logits: normalizers, the best tokens, samples.

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
    """The `k` tokens with the largest logits of every state, see `CompressedLinear.topk`."""
    vocab_size = tiles.tiles[-1].stop
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k must be from 1 to the {vocab_size} tokens of the vocabulary, it is {k}")
    found = [(tile.start, tiles.logits(tile).topk(min(k, tile.stop - tile.start))) for tile in tiles.tiles]
    logits, places = torch.cat([best.values for _, best in found], dim=1).topk(k)
    rows = torch.cat([best.indices + start for start, best in found], dim=1)
    return Best(logits, _ids(tiles, rows.gather(1, places)))


def _ids(tiles: Tiles, rows: Tensor) -> Tensor:
    return rows if tiles.order is None else tiles.order[rows]


def normalizers(
    tiles: Tiles, asked: Places, per_state: int = 1, adds: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read every logit once, for probabilities of some of them.

    Args:
        tiles: Of `[N, dim]` states.
        asked: Where the tokens asked for are, the same number of every state.
        per_state: That number.
        adds: Whether logits are to be added up.

    Returns:
        Logarithms of the normalizers `[N]`, logits of the tokens `[N * per_state]`, and sums of all logits `[N]`, if
        asked for, all float32 at least.
    """
    normalizer = scores = torch.empty(0)
    total: Tensor | None = None
    for index, tile in enumerate(tiles.tiles):
        logits = tiles.logits(tile)
        if index == 0:
            normalizer = logits.new_full((len(logits),), -torch.inf, dtype=compute_dtype(logits.dtype))
            scores = normalizer.new_zeros(len(asked.queries))
            total = torch.zeros_like(normalizer) if adds else None
        queries, columns = asked.inside(index, tile)
        states = torch.div(queries, per_state, rounding_mode="floor") if per_state > 1 else queries
        scores[queries] = logits[states, columns].to(scores.dtype)
        add_log_sum_exp(normalizer, logits, total)
    return normalizer, scores, total


@torch.no_grad()
def log_prob(tiles: Tiles, ids: Tensor) -> Tensor:
    """Log-probabilities of `[N, m]` tokens in nats, see `CompressedLinear.log_prob`."""
    vocab_size = tiles.tiles[-1].stop
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(f"ids must be from 0 to {vocab_size - 1}, they go from {int(ids.min())} to {int(ids.max())}")
    normalizer, scores, _ = normalizers(tiles, Places.of(ids.flatten(), tiles), max(1, ids.shape[1]))
    return scores.view(ids.shape) - normalizer.unsqueeze(1)


@torch.no_grad()
def sample(
    tiles: Tiles,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token for every state, see `CompressedLinear.sample`."""
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
