"""A stream of token ids as blocks that overlap by one token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_embcompress.data.loading import ResumableSampler
from lightning_embcompress.data.tokenized import Ids, TokenStream
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX as IGNORE_INDEX

Block = dict[str, Tensor]


class TokenBlocks(Dataset[Block]):
    """Blocks of a stream: each begins with the last token of the block before it.

    A causal model reads a block and predicts every token of it but the first, which nothing precedes. The overlap makes
    that first token the last one that the block before has predicted. So of the ``N`` ids every one but the very first
    of the stream is predicted exactly once. The last block ends where the stream ends: it is moved back to its full
    length, and the labels of what the block before has predicted already are -100. No block is padded.

    Args:
        ids: The stream, integers ``[N]``, read block by block.
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

    def __init__(self, ids: Ids | TokenStream, block_size: int) -> None:
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


class BlockSampler(ResumableSampler):
    """The blocks of one process: all once over all processes, shuffled anew in each epoch.

    Unlike :class:`~torch.utils.data.DistributedSampler` it repeats no block where processes do not divide the blocks
    evenly, which would count text twice: what is missing is filled with blocks in which nothing is predicted.

    Args:
        dataset: The blocks.
        shuffle: Whether their order is drawn, from ``seed`` and the number of the epoch.
        seed: Of the order.
        rank: Which part to give, in distributed training.
        world_size: How many processes there are.
    """

    fixed_by = "text, tokenizer, batch_size and block_size"

    def __init__(self, dataset: TokenBlocks, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """Keep the arguments."""
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.num_blocks = len(dataset)

    def order(self) -> Sequence[int]:
        """Give the numbers of the blocks."""
        order = torch.arange(self.num_blocks)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = order[torch.randperm(self.num_blocks, generator=generator)]
        fillers = torch.full((len(self) * self.num_replicas - self.num_blocks,), self.num_blocks)
        numbers: list[int] = torch.cat([order, fillers])[self.rank :: self.num_replicas].tolist()
        return numbers
