"""Single calls of embeddings and heads, as hooks see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import compute_dtype

# Of logits that are looked at together: on a CPU 8 MiB of float32, which stay in the cache, elsewhere enough for the
# device to be busy.
_CPU_CHUNK_ELEMENTS, _CHUNK_ELEMENTS = 2**21, 2**24
# A gradient of logits is seldom zero in all of the first columns and not in the others.
_FIRST_COLUMNS = 64


@dataclass
class EmbeddingCall:
    """One call of an embedding.

    Attributes:
        path: Of the module.
        rows: `[*, d]`, the output as a leaf that requires a gradient.
        scale: What the rows of the table were multiplied by.
        ids: `[*]`, what was looked up.
        words: `[*]` bool, where those are words and no padding.
        padding: The id whose row is a constant, if there is one.
    """

    path: str
    rows: Tensor
    scale: float
    ids: Tensor
    words: Tensor
    padding: int | None


class HeadCall:
    """One call of a head.

    Args:
        path: Of the module.
        logits_of: Gives logits of hidden states.
        hidden: `[*, d]`, what it reads.
        words: `[*]` bool, which positions are no padding; None for all.
        targets: `[*]` bool, which positions are of targets where logits are not seen; None for all.

    Attributes:
        hidden: `[N, d]`, without its gradient.
        reached: `[*, d]`, with it.
        is_target: `[N]`, which positions are of targets, by the gradient once logits are seen.
        probabilities: `[2, vocab_size]`, the sum over all positions, and that of squares; None unless logits are seen.
    """

    def __init__(
        self,
        path: str,
        logits_of: Callable[[Tensor], Tensor],
        hidden: Tensor,
        words: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        """Note what is needed to compute logits once more."""
        self.path = path
        self._logits_of = logits_of
        self.hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self.reached = hidden
        self._words = torch.ones(len(self.hidden), dtype=torch.bool, device=hidden.device)
        if words is not None:
            self._words &= words.flatten().to(hidden.device)
        self.is_target = self._words if targets is None else self._words & targets.flatten().to(hidden.device)
        self.probabilities: Tensor | None = None
        device = hidden.device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def see_logits(self, logits: Tensor) -> None:
        """Sum up the probabilities of all positions, and wait for the gradient to say which are targets.

        Here, and not when that is known: by then a loss may have overwritten the logits, and to keep them would take
        their memory once more.
        """
        flat = logits.detach().reshape(-1, logits.shape[-1])
        self.is_target = torch.zeros_like(self.is_target)
        self.probabilities = _sum_of_probabilities(flat)
        logits.register_hook(self._see_gradient)  # type: ignore[no-untyped-call]

    def _see_gradient(self, gradient: Tensor) -> None:
        flat = gradient.detach().reshape(-1, gradient.shape[-1])
        is_target = flat[:, :_FIRST_COLUMNS].ne(0).any(1)
        for rows in torch.split((~is_target).nonzero().flatten(), _rows(flat)):
            is_target[rows] = flat[rows].ne(0).any(1)
        self.is_target = is_target & self._words

    def moments(self) -> tuple[int, dict[str, Tensor]]:
        """Number of targets, and what `Collector` sums up of them by the names of `Statistics`."""
        count, hidden = int(self.is_target.sum()), wide(self.hidden)
        if count < len(hidden):
            hidden = hidden.where(self.is_target.unsqueeze(1), 0)
        return count, _moments(hidden.T @ hidden, hidden.sum(0), self._probabilities_of_targets(count))

    def _probabilities_of_targets(self, count: int) -> Tensor | None:
        total = self.probabilities
        if total is None or count == len(self.hidden):
            return total
        # Hidden states that do not matter may be anything.
        if 2 * count < len(self.hidden) or not bool(torch.isfinite(total).all()):
            return self._sum_over(self.is_target)
        return (total - self._sum_over(~self.is_target)).clamp_(min=0)

    def _sum_over(self, which: Tensor) -> Tensor:
        assert self.probabilities is not None
        total = torch.zeros_like(self.probabilities)
        device, dtype, enabled = self.autocast
        chunk = max(1, _chunk_elements(self.hidden) // total.shape[1])
        with torch.no_grad(), torch.autocast(device, dtype, enabled):
            for hidden in torch.split(self.hidden[which], chunk):
                # Not by the layer itself, which has our hooks.
                total += _sum_of_probabilities(self._logits_of(hidden))
        return total


class HeadPieces:
    """One call of a head whose logits are computed a few positions at a time, see `CausalModel`.

    Args:
        path: Of the module.
        sums: What moments are added to in the end, as `Collector` has them.
        shape: Of the labels, `[batch, length]`.
    """

    def __init__(self, path: str, sums: Mapping[tuple[str, str], Tensor], shape: torch.Size) -> None:
        """Begin with nothing."""
        self.path = path
        self.shape = shape
        self._is_word: Tensor | None = None
        self._hidden: Tensor
        self._given: Tensor
        self._count = 0
        self._squares = torch.zeros_like(sums["hidden", path])
        self._mean = torch.zeros_like(sums["hidden_mean", path])
        self._probabilities = torch.zeros_like(sums["probabilities", path]).repeat(2, 1)

    def reach(self, hidden: Tensor, is_word: Tensor | None) -> None:
        """Note what the head reads for the next piece, `[*, d]`, and where in `shape` no padding is, None for all."""
        self._hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self._is_word = None if is_word is None else is_word.flatten()

    def give(self, products: Tensor) -> None:
        """Note what the head gives for the next piece, `[*, vocab_size]`, of which the model makes its logits."""
        self._given = products

    def _energy(self, logits: Tensor, gradient: Tensor) -> float:
        """Mean square by which logits grow with what the head gives, as seen by a gradient: of a factor its square."""
        if logits is self._given or logits._base is self._given:
            return 1.0
        (at_products,) = torch.autograd.grad(logits, self._given, gradient, retain_graph=True)
        return float(at_products.float().square().sum() / gradient.float().square().sum().clamp(min=1e-30))

    @torch.no_grad()
    def see(self, logits: Tensor, targets: Tensor, places: Tensor) -> Tensor:
        """Add up the moments of a piece.

        Args:
            logits: `[N, vocab_size]`, with what they were computed from.
            targets: `[N]`.
            places: `[N]`, which positions these are.

        Returns:
            `[N, vocab_size]`, the gradient of the cross entropy, summed over the piece, at the logits.
        """
        every = torch.ones_like(places, dtype=torch.bool)
        is_word = every if self._is_word is None else self._is_word.to(places.device)[places]
        gradient = torch.empty_like(logits)
        with torch.autocast(logits.device.type, enabled=False):
            hidden = wide(self._hidden[is_word.to(self._hidden.device)])
            self._count += len(hidden)
            self._mean += hidden.sum(0).to(self._mean.device)
            for rows, probabilities, room in _softmax(logits):
                _add_probabilities(self._probabilities, probabilities, room, is_word[rows].to(probabilities))
                probabilities.scatter_add_(1, targets[rows, None], probabilities.new_full((len(probabilities), 1), -1))
                gradient[rows] = probabilities
            self._squares += (hidden.T @ hidden).to(self._squares) * self._energy(logits, gradient)
        return gradient

    def moments(self) -> tuple[int, dict[str, Tensor]]:
        """See `HeadCall.moments`."""
        return self._count, _moments(self._squares, self._mean, self._probabilities)


def _moments(squares: Tensor, mean: Tensor, probabilities: Tensor | None) -> dict[str, Tensor]:
    found = {"hidden": squares, "hidden_mean": mean}
    if probabilities is not None:
        found |= {"probabilities": probabilities[0], "squared_probabilities": probabilities[1]}
    return found


def _chunk_elements(tensor: Tensor) -> int:
    return _CPU_CHUNK_ELEMENTS if tensor.device.type == "cpu" else _CHUNK_ELEMENTS


def _rows(logits: Tensor) -> int:
    return max(1, _chunk_elements(logits) // max(1, logits.shape[-1]))


def wide(tensor: Tensor) -> Tensor:
    """In the dtype in which products are computed, float32 at least."""
    return tensor.to(compute_dtype(tensor.dtype))


def _softmax(logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some rows of the softmax of `[N, vocab_size]` logits after others.

    With room for a result of the same shape; the next rows overwrite both: memory that is asked for anew takes longer
    than what is written to it.
    """
    dtype, step = compute_dtype(logits.dtype), min(_rows(logits), max(1, len(logits)))
    memory = torch.empty(2, step, logits.shape[-1], dtype=dtype, device=logits.device)
    for start in range(0, len(logits), step):
        chunk = logits[start : start + step]
        found, room = memory[:, : len(chunk)]
        torch.softmax(chunk, -1, dtype=dtype, out=found)
        yield slice(start, start + len(chunk)), found, room


def _add_probabilities(total: Tensor, probabilities: Tensor, room: Tensor, weights: Tensor) -> None:
    """Add `[N, vocab_size]` probabilities and their squares, times `[N]` weights, to `[2, vocab_size]` sums."""
    # A product is the fastest sum over positions.
    total[0] += (weights @ probabilities).to(total.device)
    total[1] += (weights @ torch.mul(probabilities, probabilities, out=room)).to(total.device)


def _no_probabilities(device: torch.device, vocab_size: int) -> Tensor:
    # It has no float64.
    return torch.zeros(2, vocab_size, dtype=torch.float64, device="cpu" if device.type == "mps" else device)


@torch.no_grad()
def _sum_of_probabilities(logits: Tensor) -> Tensor:
    """`[N, vocab_size]` logits to the `[2, vocab_size]` sums of their softmax and of its square, in float64."""
    total = _no_probabilities(logits.device, logits.shape[-1])
    with torch.autocast(logits.device.type, enabled=False):
        for _, probabilities, room in _softmax(logits):
            _add_probabilities(total, probabilities, room, probabilities.new_ones(len(probabilities)))
    return total


def never_called(role: str, path: str) -> str:
    """What to say of a table that no batch went through."""
    return (
        f"{role} {path!r} was never called with gradients enabled{' at a target' * (role == 'head')}, so it has no "
        "statistics: compute a loss that goes through it (the full softmax, not a sampled one), or name only the other "
        "modules, as in tables=['encoder']"
    )
