"""All generators go on exactly from where their state was read."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_embcompress.utils.random_state import gather_over_processes, random_state, set_random_state

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _leave_other_tests_their_numbers() -> Iterator[None]:
    with isolate_rng():
        yield


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def _draw() -> list[Any]:
    """An odd number of normal values of each: the second of a pair waits in the generator for the next call."""
    return [
        torch.rand(5).tolist(),
        torch.randn(1).item(),
        [random.random() for _ in range(700)],
        random.gauss(0, 1),
        np.random.rand(700).tolist(),
        np.random.randn(),
    ]


def _saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_all_streams_go_on_exactly(drawn_before: int) -> None:
    _seed(1)
    for _ in range(drawn_before):
        _draw()
    before = random.getstate(), torch.get_rng_state()
    state = _saved(random_state(CPU))
    # Reading draws nothing.
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    expected = [_draw() for _ in range(3)]
    assert expected[0] != expected[1]
    _seed(2)
    set_random_state(state, CPU)
    assert [_draw() for _ in range(3)] == expected


def test_a_state_of_a_cuda_device_on_the_cpu() -> None:
    state = random_state(CPU) | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    expected = _draw()
    set_random_state(state, CPU)
    assert _draw() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_generator_of_a_cuda_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    state = _saved(random_state(device))
    expected, on_cpu = torch.rand(5, device=device), torch.rand(5)
    torch.rand(5, device=device)
    set_random_state(state, device)
    assert torch.equal(torch.rand(5, device=device), expected)
    assert torch.equal(torch.rand(5), on_cpu)


def test_another_generator_of_numpy_is_left_out_with_a_warning() -> None:
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        with pytest.warns(UserWarning, match="PCG64.*set_bit_generator"):
            state = random_state(CPU)
    finally:
        np.random.set_bit_generator(before)
    assert "numpy" not in state
    expected = [torch.rand(3).tolist(), random.random()]
    set_random_state(state, CPU)
    assert [torch.rand(3).tolist(), random.random()] == expected


_REMOVED = "removed"
# What is done to which part.
_DAMAGES: list[tuple[str, Any]] = [
    ("torch", _REMOVED),
    ("torch", None),
    ("torch", lambda state: state[:-8]),
    ("torch", lambda state: state.float()),
    ("torch", lambda state: torch.full_like(state, 255)),
    ("python", _REMOVED),
    ("python", None),
    ("python.keys", _REMOVED),
    ("python.keys", lambda keys: keys[1:]),
    ("python.keys", lambda keys: keys - (1 << 32)),
    ("python.keys", lambda keys: keys.index_fill(0, torch.tensor([624]), 625)),
    ("python.version", 7),
    ("python.gauss_next", "x"),
    ("numpy", []),
    ("numpy.keys", lambda keys: keys.double()),
    ("numpy.keys", lambda keys: keys + (1 << 32)),
    ("numpy.position", 10**9),
    ("numpy.position", -1),
    ("numpy.position", 1.5),
    ("numpy.has_gauss", 2),
    ("numpy.gauss", None),
]


@pytest.mark.parametrize(("path", "change"), _DAMAGES)
def test_a_damaged_state_is_refused_by_the_name_of_its_part(path: str, change: Any) -> None:
    state = copy.deepcopy(random_state(CPU))
    expected = _draw()
    set_random_state(state, CPU)
    part, _, entry = path.partition(".")
    parent, key = (state[part], entry) if entry else (state, part)
    old = parent.pop(key)
    if change is not _REMOVED:
        parent[key] = change(old) if callable(change) else change
    with pytest.raises(ValueError, match=f"'{part}'.*another checkpoint"):
        set_random_state(state, CPU)
    # Nothing was changed, not even by the parts before the damaged one.
    assert _draw() == expected
    with pytest.raises(ValueError, match="list"):
        set_random_state([1, 2], CPU)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 5055), junk=st.binary(min_size=1, max_size=64))
def test_any_bytes_of_torch_are_taken_or_refused(start: int, junk: bytes) -> None:
    state = random_state(CPU)
    end = min(start + len(junk), state["torch"].numel())
    state["torch"][start:end] = torch.frombuffer(bytearray(junk[: end - start]), dtype=torch.uint8)
    with isolate_rng():
        # Any other exception fails here, and a position outside the generator's memory would crash.
        with suppress(ValueError):
            set_random_state(state, CPU)
        drawn = torch.rand(2000)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1


@pytest.mark.distributed
@pytest.mark.slow
def test_every_process_gets_all_states_by_rank(torchrun: Callable[..., str]) -> None:
    assert gather_over_processes({"a": 1}) == [{"a": 1}]
    assert torchrun(Path(__file__).parent / "workers" / "gather_random_states.py").count("passed") == 2
