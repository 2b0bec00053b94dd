import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

from lightning_embcompress.data.windows import TokenWindows, WindowLoader, make_loader

sizes = {"batch_size": st.integers(1, 7), "sequence_length": st.integers(1, 9), "surplus": st.integers(0, 60)}


@given(**sizes)
def test_every_target_once_and_no_gaps(batch_size: int, sequence_length: int, surplus: int) -> None:
    num_tokens = 2 * batch_size + surplus
    windows = TokenWindows(np.arange(num_tokens), batch_size, sequence_length)
    parts = [windows[index] for index in range(len(windows))]
    inputs = torch.cat([part[0] for part in parts], dim=1)
    targets = torch.cat([part[1] for part in parts], dim=1)
    # Each stream runs on from window to window, and the target is the next token.
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(targets, inputs + 1)
    # Row after row, the streams give every target once, in order, but for the unavoidable end.
    seen = targets.flatten()
    assert seen.tolist() == list(range(1, len(seen) + 1))
    assert num_tokens - 1 - len(seen) <= batch_size - 1
    assert all(part[0].shape == (batch_size, sequence_length) for part in parts[:-1])
    assert 1 <= parts[-1][0].shape[1] <= sequence_length
    assert inputs.dtype == targets.dtype == torch.int64


@given(**sizes)
def test_processes_share_the_streams(batch_size: int, sequence_length: int, surplus: int) -> None:
    ids = np.arange(6 * batch_size + surplus)
    whole = TokenWindows(ids, 3 * batch_size, sequence_length)
    ranks = [TokenWindows(ids, batch_size, sequence_length, rank=rank, world_size=3) for rank in range(3)]
    for index in range(len(whole)):
        assert torch.equal(whole[index][0], torch.cat([rank[index][0] for rank in ranks]))


def test_inputs_are_replaced_and_targets_are_not() -> None:
    windows = TokenWindows(np.array([1, 5, 6, 1, 7], dtype=np.uint16), 1, 4, replace_inputs=(1, 9))
    inputs, targets = windows[0]
    assert inputs.tolist() == [[9, 5, 6, 9]]
    assert targets.tolist() == [[5, 6, 1, 7]]


def test_pickling_sends_no_ids(tmp_path: Path) -> None:
    np.arange(100_000, dtype=np.int32).tofile(tmp_path / "ids")
    windows = TokenWindows(np.memmap(tmp_path / "ids", dtype=np.int32, mode="r"), 2, 3)
    data = pickle.dumps(windows)
    assert len(data) < 2000
    assert torch.equal(pickle.loads(data)[7][0], windows[7][0])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_gives_the_windows_in_order(num_workers: int) -> None:
    windows = TokenWindows(np.arange(100), 3, 4)
    before = torch.random.get_rng_state()
    loader = make_loader(windows, num_workers)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == len(windows)
        assert all(torch.equal(batch[0], windows[index][0]) for index, batch in enumerate(batches))
    assert torch.equal(torch.random.get_rng_state(), before), "loading must not disturb the random numbers of training"


def drawn(loader: WindowLoader, number: int) -> None:
    iterator = iter(loader)
    for _ in range(number):
        next(iterator)


@pytest.mark.parametrize("position", [0, 1, 5])
def test_loader_resumes_where_it_was(position: int) -> None:
    windows = TokenWindows(np.arange(100), 3, 4)
    loader = make_loader(windows)
    drawn(loader, position)
    state = loader.state_dict()
    assert state == {"epoch": 0, "position": position}
    resumed = make_loader(windows)
    resumed.load_state_dict(state)
    iter(resumed)  # an iterator that is not used must not use up the position
    assert resumed.state_dict() == state
    rest = list(resumed)
    assert len(rest) == len(windows) - position
    assert torch.equal(rest[0][0], windows[position][0])
    assert len(list(resumed)) == len(windows), "the next epoch is a whole one"


def test_end_of_epoch_is_the_start_of_the_next() -> None:
    loader = make_loader(TokenWindows(np.arange(100), 3, 4))
    list(loader)
    assert loader.state_dict() == {"epoch": 1, "position": 0}
    loader.batches_per_epoch = lambda: 4
    drawn(loader, 3)
    assert loader.state_dict() == {"epoch": 0, "position": 3}
    drawn(loader, 4)
    assert loader.state_dict() == {"epoch": 1, "position": 0}


def test_a_state_without_the_epoch() -> None:
    loader = make_loader(TokenWindows(np.arange(100), 3, 4))
    loader.load_state_dict({"position": 2})
    assert loader.state_dict() == {"epoch": 0, "position": 2}


def test_resuming_with_another_sampler_is_told() -> None:
    windows = TokenWindows(np.arange(100), 3, 4)
    loader = WindowLoader(windows, batch_size=None, sampler=SequentialSampler(windows))
    with pytest.warns(UserWarning, match="saved after 2 batches.*SequentialSampler.*starts at its beginning"):
        loader.load_state_dict({"epoch": 0, "position": 2})
    assert len(list(loader)) == len(windows)


def test_foreign_position() -> None:
    loader = make_loader(TokenWindows(np.arange(100), 3, 4))
    with pytest.raises(ValueError, match="saved after 50 batches.*same text, batch_size and sequence_length"):
        loader.load_state_dict({"position": 50})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"sequence_length": -1}, "sequence_length=-1"),
        ({"batch_size": 6}, "10 tokens are too few for batch_size=6"),
        ({"world_size": 3}, "on each of 3 processes"),
        ({"rank": 1}, "rank=1"),
    ],
)
def test_errors(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenWindows(np.arange(10), **{"batch_size": 2, "sequence_length": 3, **arguments})  # type: ignore[arg-type]


def test_index_out_of_range() -> None:
    windows = TokenWindows(np.arange(10), 2, 3)
    with pytest.raises(IndexError, match="window 2"):
        windows[2]
