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
    state = _saved(random_state(CPU))
    expected = [_draw() for _ in range(3)]
    assert expected[0] != expected[1]
    _seed(2)
    set_random_state(state, CPU)
    assert [_draw() for _ in range(3)] == expected


def test_reading_draws_nothing() -> None:
    _seed(1)
    expected = _draw()
    _seed(1)
    random_state(CPU)
    assert _draw() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_generator_of_a_cuda_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    state = _saved(random_state(device))
    expected = torch.rand(5, device=device)
    on_cpu = torch.rand(5)
    torch.rand(5, device=device)
    set_random_state(state, device)
    assert torch.equal(torch.rand(5, device=device), expected)
    assert torch.equal(torch.rand(5), on_cpu)
    # A run that goes on elsewhere takes what there is.
    set_random_state(state, CPU)
    assert torch.equal(torch.rand(5), on_cpu)
    set_random_state(random_state(CPU), device)


def test_a_state_of_a_cuda_device_on_the_cpu() -> None:
    state = random_state(CPU) | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    expected = _draw()
    set_random_state(state, CPU)
    assert _draw() == expected


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


def _change(path: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for name in path[:-1]:
            state = state[name]
        if value is KeyError:
            del state[path[-1]]
        else:
            state[path[-1]] = value(state[path[-1]]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (_change(("torch",), KeyError), "torch"),
        (_change(("torch",), None), "torch"),
        (_change(("torch",), lambda state: state[:-8]), "torch"),
        (_change(("torch",), lambda state: state.float()), "torch"),
        (_change(("torch",), lambda state: torch.full_like(state, 255)), "torch"),
        (_change(("python",), KeyError), "python"),
        (_change(("python",), None), "python"),
        (_change(("python", "keys"), KeyError), "python"),
        (_change(("python", "keys"), lambda keys: keys[1:]), "python"),
        (_change(("python", "keys"), lambda keys: keys - (1 << 32)), "python"),
        (_change(("python", "keys"), lambda keys: keys.index_fill(0, torch.tensor([624]), 625)), "python"),
        (_change(("python", "version"), 7), "python"),
        (_change(("python", "gauss_next"), "x"), "python"),
        (_change(("numpy",), []), "numpy"),
        (_change(("numpy", "keys"), lambda keys: keys.double()), "numpy"),
        (_change(("numpy", "keys"), lambda keys: keys + (1 << 32)), "numpy"),
        (_change(("numpy", "position"), 10**9), "numpy"),
        (_change(("numpy", "position"), -1), "numpy"),
        (_change(("numpy", "position"), 1.5), "numpy"),
        (_change(("numpy", "has_gauss"), 2), "numpy"),
        (_change(("numpy", "gauss"), None), "numpy"),
    ],
)
def test_a_damaged_state_is_refused_by_the_name_of_its_part(change: Callable[[Any], None], part: str) -> None:
    state = copy.deepcopy(random_state(CPU))
    expected = _draw()
    set_random_state(state, CPU)
    change(state)
    with pytest.raises(ValueError, match=f"damaged in its part '{part}'.*another checkpoint"):
        set_random_state(state, CPU)
    # Nothing was changed, not even by the parts before the damaged one.
    assert _draw() == expected


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(ValueError, match="damaged.*list"):
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


def test_alone_one_process_gathers_its_own() -> None:
    assert gather_over_processes({"a": 1}) == [{"a": 1}]


@pytest.mark.distributed
@pytest.mark.slow
def test_every_process_gets_all_states_by_rank(torchrun: Callable[..., str]) -> None:
    assert torchrun(Path(__file__).parent / "workers" / "gather_random_states.py").count("passed") == 2
