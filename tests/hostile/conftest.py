"""What the tests of hostile files share: models, values that files may hold, and what must not happen."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_embcompress.compression.plan import plan_of
from lightning_embcompress.integrations.checkpoint import write_record
from lightning_embcompress.methods.registry import METHODS
from toys import LanguageModel, compress_toy

VOCAB_SIZE, DIM = 120, 8
# Found on the way, and values that mean something elsewhere.
VALUES: list[Any] = [
    *(None, True, False, 2.5, 1e308, float("nan"), float("inf"), "", "7", "low_rank", "float32", "float64", "int8"),
    *(0, -1, 1, 2, 3, 10**12, -(10**12), 2**31, 2**62, 2**63, 10**30),
    *("nn", "__class__", "encoder", "encoder.factorization"),
    *([], {}, [[]], [1], [-1], [10**12], [True], [1, 2.0], ["1"], [None], [[1, 2]], {"kind": "low_rank"}, {"": 1}),
    *([1] * 70_000, [2] * 64, [10**12] * 40, list(range(300)), "x" * 100_000, [[[[[[[[[[[]]]]]]]]]]], {"a": {"b": {}}}),
]
NUMBERS = st.one_of(st.integers(), st.integers(-3, 200), st.sampled_from([10**12, 2**31, 2**63, -(2**63), 2**64]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=20)),
    lambda parts: st.one_of(st.lists(parts, max_size=6), st.dictionaries(st.text(max_size=12), parts, max_size=6)),
    max_leaves=20,
)


class Model(LanguageModel):
    """With small tables."""

    def __init__(self) -> None:
        super().__init__(VOCAB_SIZE, DIM)


class NoLargeTensors(TorchDispatchMode):
    """Fails where a tensor is made that is larger than anything these models have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                assert tensor.untyped_storage().nbytes() < 2**20, f"{func} made a tensor of {tuple(tensor.shape)}"
        return out


class Hostile:
    """Values and files that do harm, and checks that they do none.

    Attributes:
        values: Found on the way, and values that mean something elsewhere.
        numbers: A strategy of integers.
        json: A strategy of any JSON.
        quick: Settings of hypothesis for the default run, and `deep` those for the whole matrix.
        models: A compressed model of every method.
    """

    Model = Model
    NoLargeTensors = NoLargeTensors
    vocab_size, dim = VOCAB_SIZE, DIM
    values = VALUES
    numbers = NUMBERS
    json = JSON
    quick = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    deep = settings(quick, max_examples=2500, derandomize=False)

    def __init__(self) -> None:
        self.models = {method: Model() for method in sorted(METHODS)}
        for method, model in self.models.items():
            compress_toy(model, method, 1.6)

    def record(self, method: str) -> Any:
        """The plan of a model, as JSON has it."""
        return json.loads(json.dumps(plan_of(self.models[method]).to_dict()))

    def checkpoint(self, method: str) -> dict[str, Any]:
        """A checkpoint of a model."""
        module = self.models[method]
        checkpoint: dict[str, Any] = {"state_dict": dict(module.state_dict()), "pytorch-lightning_version": "2.6.0"}
        write_record(module, checkpoint)
        return checkpoint

    @staticmethod
    @contextmanager
    def harmless() -> Iterator[None]:
        """Whatever happens within is quick, small, and raises nothing but a short ValueError."""
        begin, said = time.monotonic(), []
        with NoLargeTensors():
            try:
                yield
            except ValueError as error:
                said.append(str(error))
        assert all(10 < len(message) < 5000 for message in said)
        assert time.monotonic() - begin < 3

    @staticmethod
    @contextmanager
    def unchanged_if_refused(module: Any) -> Iterator[None]:
        """A ValueError within leaves the modules as they were."""
        before = dict(module.named_modules())
        try:
            yield
        except ValueError:
            assert dict(module.named_modules()) == before
            raise

    @classmethod
    def places(cls, value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Paths to all parts of a JSON value."""
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
        return [path, *(place for key, part in items for place in cls.places(part, (*path, key)))]

    @staticmethod
    def changed(record: Any, place: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
        """A copy with one part changed by `change(parent, key)`."""
        record = {"": copy.deepcopy(record)}
        parent: Any = record
        path = ("", *place)
        for key in path[:-1]:
            parent = parent[key]
        change(parent, path[-1])
        return record.get("")

    @staticmethod
    def to(value: Any) -> Callable[[Any, Any], None]:
        """A change to a value."""
        return lambda parent, key: parent.__setitem__(key, value)

    @staticmethod
    def remove(parent: Any, key: Any) -> None:
        """A change: without it."""
        del parent[key]

    @staticmethod
    def double(parent: Any, key: Any) -> None:
        """A change: one more of it."""
        if isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[f"{key}_"] = copy.deepcopy(parent[key])

    @staticmethod
    def damaged(draw: Any, content: bytes, start: int = 0, stop: int | None = None) -> bytes:
        """A file with some bytes flipped, cut out, put in, or without its end; changed only between two places."""
        damaged = bytearray(content[start:stop])
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, max(0, len(damaged) - 1)))
            kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "insert", "truncate"]))
            if kind == "flip" and damaged:
                damaged[place] ^= draw(st.integers(1, 255))
            elif kind == "cut":
                del damaged[place : place + draw(st.integers(1, 40))]
            elif kind == "insert":
                damaged[place:place] = draw(st.binary(min_size=1, max_size=40))
            elif kind == "truncate" and start == 0 and stop is None:
                del damaged[place:]
        return content[:start] + bytes(damaged) + (b"" if stop is None else content[stop:])


@pytest.fixture(scope="session")
def hostile() -> Hostile:
    """Values and files that do harm, and checks that they do none."""
    return Hostile()


@pytest.fixture(params=["quick", pytest.param("deep", marks=pytest.mark.full)])
def examples(request: pytest.FixtureRequest) -> settings:
    """Settings of hypothesis, of the default run or for the whole matrix."""
    chosen: settings = getattr(Hostile, request.param)
    return chosen
