"""Loaders of windows and of blocks: their order, and resuming within an epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from lightning_embcompress.data.blocks import TokenBlocks
from lightning_embcompress.data.loading import ResumableLoader, ResumableSampler, make_loader
from lightning_embcompress.data.windows import TokenWindows

Make = Callable[..., ResumableLoader[Any]]


def windows(num_workers: int = 0) -> ResumableLoader[Any]:
    """Nine batches."""
    data = TokenWindows(np.arange(100), 3, 4)
    return make_loader(data, ResumableSampler(len(data), "batch_size"), None, num_workers)


def blocks(num_workers: int = 0) -> ResumableLoader[Any]:
    """Seven batches, the last one smaller."""
    data = TokenBlocks(np.arange(101), 5)
    return make_loader(data, ResumableSampler(len(data), "block_size", shuffle=True, seed=3), 4, num_workers)


both = pytest.mark.parametrize("make", [windows, blocks])


def epoch_of(loader: ResumableLoader[Any], epoch: int, number: int | None = None) -> list[Tensor]:
    """The first inputs of an epoch, or all of them."""
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(len(loader) if number is None else number)]
    return [batch["input_ids"] if isinstance(batch, dict) else batch[0] for batch in batches]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@both
@pytest.mark.parametrize("num_workers", [0, 1])
def test_order_is_that_of_the_epoch(make: Make, num_workers: int) -> None:
    before = torch.random.get_rng_state()
    loader = make(num_workers)
    epochs = [epoch_of(loader, epoch) for epoch in range(2)]
    assert torch.equal(torch.random.get_rng_state(), before), "loading must not disturb the random numbers of training"
    assert equal(*epochs) == (make is windows)
    assert equal(epoch_of(make(), 1), epochs[1])


def test_an_epoch_has_every_block_once() -> None:
    first = torch.cat(epoch_of(blocks(), 0))
    assert first[:, 0].tolist() != sorted(first[:, 0].tolist())
    assert sorted(first[:, 0].tolist()) == list(range(0, 100, 4))


@both
@pytest.mark.parametrize("position", [0, 1, 6])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_resumes_where_it_was(make: Make, position: int, num_workers: int) -> None:
    loader = make()
    epoch_of(loader, 2, position)
    state = loader.state_dict()
    assert state == {"epoch": 2, "position": position}
    resumed = make(num_workers)
    resumed.load_state_dict(state)
    iter(resumed)  # an iterator that is not used must not use up the position
    assert resumed.state_dict() == state
    assert equal(epoch_of(resumed, 2, len(resumed) - position), epoch_of(make(), 2)[position:])
    assert equal(epoch_of(resumed, 3), epoch_of(make(), 3)), "the next epoch is a whole one"


@both
def test_end_of_epoch_is_the_start_of_the_next(make: Make) -> None:
    loader = make()
    epoch_of(loader, 4)
    assert loader.state_dict() == {"epoch": 5, "position": 0}
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    # What Lightning says when the checkpoint is from before the end of the epoch.
    assert equal(epoch_of(resumed, 4), epoch_of(make(), 5))
    loader.batches_per_epoch = lambda: 4
    epoch_of(loader, 6, 3)
    assert loader.state_dict() == {"epoch": 6, "position": 3}
    epoch_of(loader, 6, 4)
    assert loader.state_dict() == {"epoch": 7, "position": 0}


def test_states_that_do_not_fit() -> None:
    loader = windows()
    loader.load_state_dict({"position": 2})
    assert loader.state_dict() == {"epoch": 0, "position": 2}, "an older state without the epoch"
    with pytest.raises(ValueError, match="saved after 50 batches.*same batch_size"):
        loader.load_state_dict({"position": 50})
    replaced = ResumableLoader(loader.dataset, batch_size=None, sampler=SequentialSampler(loader.dataset))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="saved after 2 batches.*SequentialSampler"):
        replaced.load_state_dict({"epoch": 0, "position": 2})
    assert len(list(replaced)) == len(loader)
