"""Blocks that overlap by one token, and their order."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_embcompress.data.blocks import TokenBlocks
from lightning_embcompress.data.loading import ResumableSampler

sizes = {"num_tokens": st.integers(2, 70), "block_size": st.integers(2, 12)}


@given(**sizes)
def test_every_token_but_the_first_is_predicted_once(num_tokens: int, block_size: int) -> None:
    blocks = TokenBlocks(np.arange(num_tokens), block_size)
    predicted: list[int] = []
    for index in range(len(blocks)):
        block = blocks[index]
        ids, labels = block["input_ids"], block["labels"]
        assert ids.dtype == labels.dtype == torch.int64
        assert ids.shape == labels.shape == (min(block_size, num_tokens),)
        assert torch.equal(ids, torch.arange(int(ids[0]), int(ids[0]) + len(ids)))
        assert all(label in (-100, token) for label, token in zip(labels.tolist(), ids.tolist(), strict=True))
        predicted += [label for label in labels[1:].tolist() if label != -100]
    assert predicted == list(range(1, num_tokens))
    assert (blocks[len(blocks)]["labels"] == -100).all()
    with pytest.raises(IndexError, match="is not in"):
        blocks[len(blocks) + 1]


@given(**sizes, world_size=st.integers(1, 5), shuffle=st.booleans())
def test_processes_share_the_blocks(num_tokens: int, block_size: int, world_size: int, shuffle: bool) -> None:
    blocks = TokenBlocks(np.arange(num_tokens), block_size)
    sampler = partial(ResumableSampler, len(blocks), "", shuffle, 3)
    parts = [list(sampler(rank, world_size)) for rank in range(world_size)]
    # All do equally many steps; what is missing predicts nothing.
    assert len({len(part) for part in parts}) == 1
    numbers = sorted(number for part in parts for number in part)
    assert numbers == [*range(len(blocks)), *[len(blocks)] * (len(numbers) - len(blocks))]
    assert len(numbers) - len(blocks) < world_size


@pytest.mark.parametrize(("num_tokens", "block_size", "message"), [(10, 1, "block_size=1"), (1, 4, "1 tokens")])
def test_errors(num_tokens: int, block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBlocks(np.arange(num_tokens), block_size)
