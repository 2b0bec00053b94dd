"""A stream of token ids as blocks that overlap by one token."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

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
        ids: The stream, integers ``[N]`` read block by block.
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
        if min(block_size, len(ids)) < 2:
            raise ValueError(
                f"block_size={block_size} of {len(ids)} tokens: a block needs one token to read and one to predict."
            )
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
