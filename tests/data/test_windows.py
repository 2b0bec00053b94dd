import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_embcompress.data.windows import TokenWindows

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"sequence_length": -1}, "sequence_length=-1"),
        ({"batch_size": 6}, "10 tokens .*batch_size=6"),
        ({"world_size": 3}, "3 processes"),
        ({"rank": 1}, "rank=1"),
    ],
)
def test_errors(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenWindows(np.arange(10), **{"batch_size": 2, "sequence_length": 3, **arguments})  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="window 2"):
        TokenWindows(np.arange(10), 2, 3)[2]
