"""A stream of token ids as blocks that overlap by one token, and a loader that resumes within an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_embcompress.metrics.perplexity import IGNORE_INDEX as IGNORE_INDEX

Block = dict[str, Tensor]


class TokenBlocks(Dataset[Block]):
    """Blocks of a stream: each begins with the last token of the block before it.

    A causal model reads a block and predicts every token of it but the first, which nothing precedes. The overlap makes
    that first token the last one that the block before has predicted. So of the ``N`` ids every one but the very first
    of the stream is predicted exactly once. The last block ends where the stream ends: it is moved back to its full
    length, and the labels of what the block before has predicted already are -100. No block is padded.

    Args:
        ids: The stream, integers ``[N]``; a memory map is read block by block.
        block_size: How many tokens a block has; a stream that is shorter is one block.

    Raises:
        ValueError: If ``block_size`` or the number of ids is below two.

    Example:
        >>> blocks = TokenBlocks(np.arange(10, 18), block_size=4)
        >>> [blocks[index]["input_ids"].tolist() for index in range(len(blocks))]
        [[10, 11, 12, 13], [13, 14, 15, 16], [14, 15, 16, 17]]
        >>> blocks[1]["labels"].tolist(), blocks[2]["labels"].tolist()
        ([13, 14, 15, 16], [-100, -100, -100, 17])
    """

    def __init__(self, ids: NDArray[np.integer[Any]], block_size: int) -> None:
        """Check and keep the arguments."""
        if block_size < 2:
            raise ValueError(f"block_size={block_size}: it must be at least 2, one token to read and one to predict.")
        if len(ids) < 2:
            raise ValueError(f"{len(ids)} tokens are too few: a block needs one to read and one to predict.")
        self.ids = ids
        self.block_size = min(block_size, len(ids))

    def __len__(self) -> int:
        """The number of blocks."""
        return math.ceil((len(self.ids) - 1) / (self.block_size - 1))

    def __getitem__(self, index: int) -> Block:
        """Give one block.

        Args:
            index: Number of the block. ``len(self)`` stands for a block in which nothing is predicted: processes that
                must do equally many steps read it where the blocks do not divide evenly.

        Returns:
            ``input_ids`` and ``labels``, both int64 ``[block_size]``. Labels are the ids themselves, to be shifted by
            the model as transformers does, or -100.

        Raises:
            IndexError: If there is no such block.
        """
        if not 0 <= index <= len(self):
            raise IndexError(f"The block {index} is not in [0, {len(self)}).")
        is_filler = index == len(self)
        wanted = 0 if is_filler else index * (self.block_size - 1)
        start = min(wanted, len(self.ids) - self.block_size)
        input_ids = torch.from_numpy(self.ids[start : start + self.block_size].astype(np.int64))
        labels = input_ids.clone()
        labels[: self.block_size if is_filler else wanted - start + (wanted > start)] = IGNORE_INDEX
        return {"input_ids": input_ids, "labels": labels}

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


class BlockSampler(DistributedSampler[int]):
    """The blocks of one process: all once over all processes, shuffled anew in each epoch, from ``start`` on.

    It is a :class:`~torch.utils.data.DistributedSampler` so that Lightning leaves it in its place. Unlike that it
    repeats no block where processes do not divide the blocks evenly, which would count text twice: what is missing is
    filled with blocks in which nothing is predicted.

    Args:
        dataset: The blocks.
        shuffle: Whether their order is drawn, from ``seed`` and the number of the epoch.
        seed: Of the order.
        rank: Which part to give, in distributed training.
        world_size: How many processes there are.
    """

    def __init__(self, dataset: TokenBlocks, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """Keep the arguments."""
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.num_blocks = len(dataset)
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch.

        Never an earlier one: resuming from between the last step of an epoch and its end, Lightning names the epoch
        that is over, but the loader's state knows better.
        """
        self.epoch = max(self.epoch, epoch)

    def __iter__(self) -> Iterator[int]:
        """Give the numbers of the blocks; only the first time do they begin at ``start``."""
        start, self.start = self.start, 0
        order = torch.arange(self.num_blocks)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = order[torch.randperm(self.num_blocks, generator=generator)]
        fillers = torch.full((len(self) * self.num_replicas - self.num_blocks,), self.num_blocks)
        return iter(torch.cat([order, fillers])[self.rank :: self.num_replicas][start:].tolist())


class BlockLoader(DataLoader[Block]):
    """A loader that continues in the middle of an epoch, in the same order, when training is resumed there.

    Lightning saves its ``state_dict`` in checkpoints. Make it with :func:`make_block_loader`.
    """

    batches_per_epoch: Callable[[], float] | None = None
    """How many batches the trainer takes from an epoch, if that may be fewer than there are."""

    _position = 0

    def __iter__(self) -> Iterator[Block]:  # type: ignore[override]
        """Give the batches: ``input_ids`` and ``labels``, int64 ``[batch_size, block_size]``."""
        sampler = self.sampler
        # Nothing may be consumed before the first batch is drawn: Lightning makes iterators it does not use.
        self._position = sampler.start // (self.batch_size or 1) if isinstance(sampler, BlockSampler) else 0
        for batch in super().__iter__():
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Give the epoch, by whose number the order is drawn, and how many of its batches were already used."""
        limit = len(self) if self.batches_per_epoch is None else min(len(self), self.batches_per_epoch())
        is_over = self._position >= limit
        epoch = self.sampler.epoch if isinstance(self.sampler, BlockSampler) else 0
        return {"epoch": epoch + is_over, "position": 0 if is_over else self._position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next epoch begin where the saved one was.

        Raises:
            ValueError: If there are not that many batches.
        """
        position = int(state_dict["position"])
        if not 0 <= position < len(self):
            raise ValueError(
                f"The checkpoint was saved after {position} batches of an epoch, but now an epoch has {len(self)}: "
                f"resume with the same text, tokenizer, batch_size and block_size."
            )
        self._position = position
        if isinstance(self.sampler, BlockSampler):
            self.sampler.epoch = int(state_dict["epoch"])
            self.sampler.start = position * (self.batch_size or 1)


def make_block_loader(sampler: BlockSampler, blocks: TokenBlocks, batch_size: int, num_workers: int = 0) -> BlockLoader:
    """Make the loader of some blocks.

    Args:
        sampler: Their order.
        blocks: What to load.
        batch_size: Blocks in a batch, per process; the last batch may have fewer.
        num_workers: Processes that read ahead; 0 reads in the training process, which is fast enough for most models.
    """
    return BlockLoader(
        blocks,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        # An own generator: each new iterator draws a seed, which must not disturb the random numbers of training.
        generator=torch.Generator(),
    )
