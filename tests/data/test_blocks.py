"""Blocks that overlap by one token, their order, and resuming within an epoch."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_embcompress.data.blocks import BlockLoader, BlockSampler, TokenBlocks, make_block_loader

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
    parts = [list(BlockSampler(blocks, shuffle, rank=rank, world_size=world_size)) for rank in range(world_size)]
    # All do equally many steps; what is missing predicts nothing.
    assert len({len(part) for part in parts}) == 1
    numbers = sorted(number for part in parts for number in part)
    assert numbers == [*range(len(blocks)), *[len(blocks)] * (len(numbers) - len(blocks))]
    assert len(numbers) - len(blocks) < world_size


def _loader(shuffle: bool = True, num_workers: int = 0) -> BlockLoader:
    blocks = TokenBlocks(np.arange(101), 5)
    return make_block_loader(BlockSampler(blocks, shuffle, seed=3), blocks, batch_size=4, num_workers=num_workers)


def _epoch(loader: BlockLoader, epoch: int, number: int | None = None) -> list[torch.Tensor]:
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    iterator = iter(loader)
    return [next(iterator)["input_ids"] for _ in range(len(loader) if number is None else number)]


def _equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_order_is_that_of_the_epoch(num_workers: int) -> None:
    before = torch.random.get_rng_state()
    loader = _loader(num_workers=num_workers)
    epochs = [_epoch(loader, epoch) for epoch in range(2)]
    assert torch.equal(torch.random.get_rng_state(), before), "loading must not disturb the random numbers of training"
    assert not _equal(*epochs)
    assert _equal(_epoch(_loader(), 1), epochs[1])
    in_order = torch.cat(_epoch(_loader(shuffle=False), 1))
    for epoch in epochs:
        drawn = torch.cat(epoch)
        assert not torch.equal(drawn, in_order)
        assert torch.equal(drawn[drawn[:, 0].argsort()], in_order)


@pytest.mark.parametrize("position", [0, 1, 6])
def test_loader_resumes_where_it_was(position: int) -> None:
    loader = _loader()
    whole = _epoch(_loader(), 2)
    _epoch(loader, 2, position)
    state = loader.state_dict()
    assert state == {"epoch": 2, "position": position}
    resumed = _loader()
    resumed.load_state_dict(state)
    iter(resumed)  # an iterator that is not used must not use up the position
    assert resumed.state_dict() == state
    resumed.sampler.set_epoch(2)  # type: ignore[attr-defined]
    assert _equal([batch["input_ids"] for batch in resumed], whole[position:])
    assert _equal(_epoch(resumed, 3), _epoch(_loader(), 3)), "the next epoch is a whole one"


def test_end_of_epoch_is_the_start_of_the_next() -> None:
    loader = _loader()
    _epoch(loader, 4)
    assert loader.state_dict() == {"epoch": 5, "position": 0}
    resumed = _loader()
    resumed.load_state_dict(loader.state_dict())
    # What Lightning says when the checkpoint is from before the end of the epoch.
    assert _equal(_epoch(resumed, 4), _epoch(_loader(), 5))
    loader.batches_per_epoch = lambda: 4
    _epoch(loader, 6, 3)
    assert loader.state_dict() == {"epoch": 6, "position": 3}
    _epoch(loader, 6, 4)
    assert loader.state_dict() == {"epoch": 7, "position": 0}


def test_foreign_position() -> None:
    with pytest.raises(ValueError, match="saved after 50 batches of an epoch, but now an epoch has 7"):
        _loader().load_state_dict({"epoch": 0, "position": 50})


def test_pickling_sends_no_ids(tmp_path: Path) -> None:
    np.arange(100_000, dtype=np.int32).tofile(tmp_path / "ids")
    blocks = TokenBlocks(np.memmap(tmp_path / "ids", dtype=np.int32, mode="r"), 7)
    data = pickle.dumps(blocks)
    assert len(data) < 2000
    assert torch.equal(pickle.loads(data)[9]["input_ids"], blocks[9]["input_ids"])


@pytest.mark.parametrize(
    ("num_tokens", "block_size", "message"), [(10, 1, "block_size=1"), (1, 4, "1 tokens are too few")]
)
def test_errors(num_tokens: int, block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBlocks(np.arange(num_tokens), block_size)
