"""A stream of token ids as windows for truncated back-propagation through time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Window = tuple[Tensor, Tensor]


class TokenWindows(Dataset[Window]):
    """Windows over parallel streams: item ``t`` continues every stream where item ``t - 1`` ended.

    The ``N`` ids make ``N - 1`` pairs of a token and its successor. They are laid out as ``batch_size`` streams of
    ``P = (N - 1) // batch_size`` pairs each; neighbouring streams share the token between them. So every target is
    seen exactly once, except for at most ``batch_size - 1`` at the very end (none with ``batch_size=1``). The last
    window is shorter where ``sequence_length`` does not divide ``P``; it is kept.

    Args:
        ids: The stream, integers ``[N]``; a memory map is read window by window.
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
        ids: NDArray[np.integer[Any]],
        batch_size: int,
        sequence_length: int,
        *,
        replace_inputs: tuple[int, int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Check and keep the arguments."""
        for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
            if value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1.")
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
        self.num_streams = streams
        self.steps = (len(ids) - 1) // streams
        self.rows = slice(rank * batch_size, (rank + 1) * batch_size)

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
        total = self.num_streams * self.steps
        parts = (
            self.ids[shift : total + shift].reshape(self.num_streams, self.steps)[self.rows, start:stop]
            for shift in (0, 1)
        )
        inputs, targets = (torch.from_numpy(part.astype(np.int64)) for part in parts)
        if self.replace_inputs is not None:
            old, new = self.replace_inputs
            inputs[inputs == old] = new
        return inputs, targets

    def __getstate__(self) -> dict[str, Any]:
        """Send the path of a memory map to worker processes: pickling it would send the whole corpus."""
        state = self.__dict__.copy()
        if isinstance(self.ids, np.memmap):
            state["ids"] = (self.ids.filename, self.ids.dtype.str, self.ids.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the file again."""
        self.__dict__.update(state)
        if isinstance(self.ids, tuple):
            filename, dtype, shape = self.ids
            self.ids = np.memmap(filename, dtype=dtype, mode="r", shape=shape)


class WindowSampler(DistributedSampler[int]):
    """All windows in their order, from ``start`` on.

    It is a :class:`~torch.utils.data.DistributedSampler` so that Lightning does not put its own in this place: that
    would deal the windows out to the processes, and no process would see a stream without gaps. The windows already
    differ from process to process.
    """

    def __init__(self, dataset: TokenWindows) -> None:
        """Check and keep the arguments."""
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        """Give the numbers of the windows; only the first time do they begin at ``start``."""
        start, self.start = self.start, 0
        return iter(range(start, len(self)))


class WindowLoader(DataLoader[Window]):
    """A loader that continues in the middle of an epoch when training is resumed there.

    Lightning saves its ``state_dict`` in checkpoints. Make it with :func:`make_loader`.
    """

    batches_per_epoch: Callable[[], float] | None = None
    """How many batches the trainer takes from an epoch, if that may be fewer than there are."""

    _position = 0

    def __iter__(self) -> Iterator[Window]:  # type: ignore[override]
        """Give the windows, in order."""
        sampler = self.sampler
        # Nothing may be consumed before the first window is drawn: Lightning makes iterators it does not use.
        self._position = sampler.start if isinstance(sampler, WindowSampler) else 0
        for window in super().__iter__():
            self._position += 1
            yield window

    def state_dict(self) -> dict[str, int]:
        """Give the number of windows of this epoch that were already used."""
        limit = len(self) if self.batches_per_epoch is None else min(len(self), self.batches_per_epoch())
        return {"position": self._position if self._position < limit else 0}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next epoch begin where the saved one was.

        Raises:
            ValueError: If there are not that many windows.
        """
        position = int(state_dict["position"])
        if not 0 <= position < len(self):
            raise ValueError(
                f"The checkpoint was saved after {position} windows of an epoch, but now an epoch has {len(self)}: "
                f"resume with the same text, batch_size and sequence_length."
            )
        self._position = position
        if isinstance(self.sampler, WindowSampler):
            self.sampler.start = position


def make_loader(windows: TokenWindows, num_workers: int = 0) -> WindowLoader:
    """Make the loader of some windows; a batch is one window.

    Args:
        windows: What to load.
        num_workers: Processes that read ahead; 0 reads in the training process, which is fast enough for most models.
    """
    return WindowLoader(
        windows,
        batch_size=None,
        sampler=WindowSampler(windows),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        # An own generator: each new iterator draws a seed, which must not disturb the random numbers of training.
        generator=torch.Generator(),
    )
