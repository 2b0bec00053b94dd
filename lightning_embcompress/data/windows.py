"""A stream of token ids as windows for truncated back-propagation through time."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_embcompress.data.module import check_least
from lightning_embcompress.data.tokenized import Ids, TokenStream

Window = tuple[Tensor, Tensor]


class TokenWindows(Dataset[Window]):
    """Windows over parallel streams: item ``t`` continues every stream where item ``t - 1`` ended.

    The ``N`` ids make ``N - 1`` pairs of a token and its successor. They are laid out as ``batch_size`` streams of
    ``P = (N - 1) // batch_size`` pairs each; neighbouring streams share the token between them. So every target is
    seen exactly once, except for at most ``batch_size - 1`` at the very end (none with ``batch_size=1``). The last
    window is shorter where ``sequence_length`` does not divide ``P``; it is kept.

    Args:
        ids: The stream, integers ``[N]``, read window by window.
        batch_size: How many streams run in parallel.
        sequence_length: How many steps a window has.
        replace_inputs: ``(id, other)``: where ``id`` is an input, ``other`` is read in its place (see
            :class:`~lightning_embcompress.data.OneBillionWord`). Targets stay.
        rank: Which part of the streams to give, in distributed training; each process has ``batch_size`` streams of
            its own among ``batch_size * world_size``.
        world_size: How many processes there are.

    Raises:
        ValueError: If a size is below one, or there are fewer than two tokens for each stream.

    Example:
        >>> windows = TokenWindows(np.arange(9), batch_size=2, sequence_length=3)
        >>> len(windows)
        2
        >>> windows[0]
        (tensor([[0, 1, 2],
                [4, 5, 6]]), tensor([[1, 2, 3],
                [5, 6, 7]]))
        >>> windows[1]
        (tensor([[3],
                [7]]), tensor([[4],
                [8]]))
    """

    def __init__(
        self,
        ids: Ids | TokenStream,
        batch_size: int,
        sequence_length: int,
        *,
        replace_inputs: tuple[int, int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Check and keep the arguments."""
        check_least(1, batch_size=batch_size, sequence_length=sequence_length)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in [0, world_size={world_size}).")
        streams = batch_size * world_size
        if len(ids) < 2 * streams:
            processes = f" on each of {world_size} processes" if world_size > 1 else ""
            raise ValueError(
                f"{len(ids)} tokens are too few for batch_size={batch_size}{processes}, which needs at least "
                f"{2 * streams}: lower the batch size or give more text."
            )
        self.ids = ids
        self.sequence_length = sequence_length
        self.replace_inputs = replace_inputs
        self.steps = (len(ids) - 1) // streams
        self.rows = range(rank * batch_size, (rank + 1) * batch_size)

    def __len__(self) -> int:
        """The number of windows."""
        return math.ceil(self.steps / self.sequence_length)

    def __getitem__(self, index: int) -> Window:
        """Give one window.

        Returns:
            Inputs and targets, both int64 ``[batch_size, steps]`` with ``steps = sequence_length``, or less in the
            last window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"The window {index} is not in [0, {len(self)}).")
        start = index * self.sequence_length
        stop = min(start + self.sequence_length, self.steps)
        found = np.stack([self.ids[row * self.steps + start : row * self.steps + stop + 1] for row in self.rows])
        inputs, targets = (torch.from_numpy(part.astype(np.int64)) for part in (found[:, :-1], found[:, 1:]))
        if self.replace_inputs is not None:
            old, new = self.replace_inputs
            inputs[inputs == old] = new
        return inputs, targets
