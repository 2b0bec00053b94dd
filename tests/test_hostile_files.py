"""Plans and files that are damaged or made to do harm: refused with one error, quickly, without allocating memory."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_embcompress import apply_plan, load_compressed, load_from_checkpoint, save_compressed
from lightning_embcompress import structure_from_checkpoint as structure_of
from lightning_embcompress.checkpoint import restore_structure, write_record
from lightning_embcompress.checkpoint_io import AtomicCheckpointIO, read_without_tensors
from lightning_embcompress.factorizations import METHODS
from lightning_embcompress.plan import Plan, compress, plan_of

# What torch says of damaged pickles that it reads nevertheless.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore::DeprecationWarning")

_METHODS = sorted(METHODS)
_VOCAB_SIZE, _DIM = 120, 8
# Found on the way, and values that mean something elsewhere.
_HOSTILE: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        2.5,
        1e308,
        float("nan"),
        float("inf"),
        10**12,
        -(10**12),
        2**31,
        2**62,
        2**63,
    ),
    *(10**30, "", "7", "low_rank", "float32", "float64", "int8", "nn", "__class__", "encoder", "encoder.factorization"),
    *([], {}, [[]], [1], [-1], [10**12], [True], [1, 2.0], ["1"], [None], [[1, 2]], {"kind": "low_rank"}, {"": 1}),
    *([1] * 70_000, [2] * 64, [10**12] * 40, list(range(300)), "x" * 100_000, [[[[[[[[[[[]]]]]]]]]]], {"a": {"b": {}}}),
]


class _Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder = nn.Embedding(_VOCAB_SIZE, _DIM, _weight=torch.randn(_VOCAB_SIZE, _DIM, generator=generator))
        self.decoder = nn.Linear(_DIM, _VOCAB_SIZE)
        self.decoder.weight.data.copy_(torch.randn(_VOCAB_SIZE, _DIM, generator=generator))
        self.decoder.bias.data.zero_()

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.encoder(ids))


def _compressed(method: str) -> _Model:
    model = _Model()
    counts = torch.arange(_VOCAB_SIZE, 0, -1)
    chosen = METHODS[method]
    smallest = chosen.factorization.smallest_bytes(_VOCAB_SIZE, _DIM, 4, chosen.options())
    compress(model, method, ratio=min(1.6, _VOCAB_SIZE * _DIM * 4 / smallest), token_counts=counts)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, _Model]:
    """One of every method."""
    return {method: _compressed(method) for method in _METHODS}


class _NoLargeTensors(TorchDispatchMode):
    """Fails where a tensor is made that is larger than anything these models have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                assert tensor.untyped_storage().nbytes() < 2**20, f"{func} made a tensor of {tuple(tensor.shape)}"
        return out


@contextmanager
def _harmless() -> Iterator[None]:
    """Whatever happens within is quick, small, and raises nothing but a short ValueError."""
    begin, said = time.monotonic(), []
    with _NoLargeTensors():
        try:
            yield
        except ValueError as error:
            said.append(str(error))
    assert all(10 < len(message) < 5000 for message in said)
    assert time.monotonic() - begin < 3


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all parts of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, part in items for place in _places(part, (*path, key)))]


def _changed(record: Any, place: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy with one part changed by `change(parent, key)`."""
    record = {"": copy.deepcopy(record)}
    parent: Any = record
    path = ("", *place)
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return record.get("")


def _set(value: Any) -> Callable[[Any, Any], None]:
    return lambda parent, key: parent.__setitem__(key, value)


def _remove(parent: Any, key: Any) -> None:
    del parent[key]


def _double(parent: Any, key: Any) -> None:
    if isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    else:
        parent[f"{key}_"] = copy.deepcopy(parent[key])


def _read_and_apply(record: Any) -> None:
    """Read a plan and give a model its structure; if either is refused the model is as it was."""
    model = _Model()
    before = dict(model.named_modules())
    with _harmless():
        plan = None
        try:
            plan = Plan.from_dict(record)
            apply_plan(model, plan)
        except ValueError:
            assert dict(model.named_modules()) == before
            raise
        wanted, there = ({table.modules: table.spec for table in some.tables} for some in (plan, plan_of(model)))
        assert there == wanted


def _one_hostile_value(method: str, every: int) -> None:
    record = json.loads(json.dumps(_RECORDS[method]))
    _read_and_apply(record)
    places = [place for place in _places(record) if place[:2] != ("tables", 0)]
    changes = [(place, change) for place in places for change in (_remove, _double, *map(_set, _HOSTILE))]
    for place, change in changes[::every]:
        _read_and_apply(_changed(record, place, change))


@pytest.mark.parametrize("method", _METHODS)
def test_plans_with_one_hostile_value(method: str) -> None:
    # No divisor of the number of changes: each is made in some place.
    assert (len(_HOSTILE) + 2) % 7
    _one_hostile_value(method, 7)


@pytest.mark.full
@pytest.mark.parametrize("method", _METHODS)
def test_plans_with_any_hostile_value(method: str) -> None:
    _one_hostile_value(method, 1)


_NUMBERS = st.one_of(st.integers(), st.integers(-3, 200), st.sampled_from([10**12, 2**31, 2**63, -(2**63), 2**64]))
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, st.floats(), st.text(max_size=20)),
    lambda parts: st.one_of(st.lists(parts, max_size=6), st.dictionaries(st.text(max_size=12), parts, max_size=6)),
    max_leaves=20,
)
_QUICK = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
_DEEP = settings(_QUICK, max_examples=2500, derandomize=False)


def _check_any_json(record: Any, as_spec: bool, kind: str) -> None:
    if as_spec and isinstance(record, dict):
        spec = {"vocab_size": _VOCAB_SIZE, "dim": _DIM, **record, "kind": kind}
        entry = {"modules": ["encoder"], "method": kind, "options": {}, "spec": spec, "dtype": "float32"}
        record = {"version": 2, "tables": [{**entry, "stored_bytes": 9, "weighted_error": None, "untied": None}]}
    _read_and_apply(record)


_KINDS = sorted({method.factorization.kind for method in METHODS.values()})
_ANY_JSON = given(_JSON, st.booleans(), st.sampled_from(_KINDS))


def test_any_json() -> None:
    _QUICK(_ANY_JSON(_check_any_json))()


@pytest.mark.full
def test_any_json_for_long() -> None:
    _DEEP(_ANY_JSON(_check_any_json))()


@st.composite
def _mutated(draw: Any) -> Any:
    """A valid plan with a few parts changed."""
    record = json.loads(json.dumps(_RECORDS[draw(st.sampled_from(_METHODS))]))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(_places(record)))
        changes = st.one_of(st.sampled_from(_HOSTILE), _NUMBERS, st.lists(_NUMBERS, max_size=5)).map(_set)
        record = _changed(record, place, draw(st.one_of(st.sampled_from([_remove, _double]), changes)))
        if not isinstance(record, dict):
            break
    return record


_RECORDS = {method: plan_of(_compressed(method)).to_dict() for method in _METHODS}


def test_mutated_plans() -> None:
    _QUICK(given(_mutated())(_read_and_apply))()


@pytest.mark.full
def test_mutated_plans_for_long() -> None:
    _DEEP(given(_mutated())(_read_and_apply))()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": -1}, r"'rank' must be an integer from 0 up, it is -1"),
        ({"rank": 10**12}, r"rank must be from 0 to min\(vocab_size, dim\) = 8, it is 1000000000000"),
        ({"rank": True}, r"'rank' must be an integer from 0 up, it is True"),
        ({"rank": 2.0}, r"'rank' must be an integer from 0 up, it is 2.0"),
        ({"rank": float("nan")}, r"'rank' must be an integer from 0 up, it is nan"),
        ({"rank": [[2]]}, r"'rank' must be an integer from 0 up, it is \[\[2\]\]"),
        ({"rank": 8}, r"low_rank for a table of 120 x 8 would take more memory than the table itself"),
        ({"vocab_size": 10**12}, r"the plan's table 'encoder' is 1000000000000 x 8, the model's is 120 x 8"),
        ({"dim": 10**12}, r"the plan's table 'encoder' is 120 x 1000000000000, the model's is 120 x 8"),
        ({"more": 1}, r"must have the entries kind, vocab_size, dim, rank, and no others; look at \['more'\]"),
        ({"kind": "os.system"}, r"unknown kind of factorization 'os.system'; known are"),
        ({"kind": ["low_rank"]}, r"unknown kind of factorization \['low_rank'\]"),
    ],
)
def test_structures_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    record = json.loads(json.dumps(_RECORDS["low_rank"]))
    record["tables"][0]["spec"] |= change
    model = _Model()
    with _NoLargeTensors(), pytest.raises(ValueError, match=message):
        apply_plan(model, Plan.from_dict(record))
    assert type(model.encoder) is nn.Embedding


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, r"unknown method 'magic' of table 'encoder' in the compression plan: known are cp, "),
        ({"method": 3}, r"unknown method 3 of table 'encoder'"),
        ({"method": "tucker"}, r"method 'tucker' of table 'encoder' .* stores tables as 'tucker', not as 'low_rank'"),
        ({"dtype": "int8"}, r"unknown dtype 'int8' of table 'encoder'"),
        ({"dtype": ["float32"]}, r"unknown dtype \['float32'\]"),
        ({"modules": ["encoder", "encoder"]}, r"names module 'encoder' twice"),
        ({"modules": ["decoder"]}, r"names module 'decoder' twice"),
        ({"modules": [3]}, r"'modules' of the compression plan must be a list of paths, it is \[3\]"),
        ({"modules": ["x" * 10**6]}, r"the plan compresses module 'x.*no embedding or projection there"),
        ({"options": {"rank": float("nan")}}, r"'options' of table 'encoder' .* must be plain values by names"),
        ({"options": {"a": [[[[[[[[[1]]]]]]]]]}}, r"'options' of table 'encoder' .* must be plain values by names"),
        ({"options": {"a": [1] * 20_000}}, r"'options' of table 'encoder' .* must be plain values by names"),
        ({"options": {3: 1}}, r"'options' of table 'encoder' .* must be plain values by names"),
        ({"weighted_error": "0.1"}, r"'weighted_error' of table 'encoder' .*it is '0.1'"),
        ({"weighted_error": float("inf")}, r"'weighted_error' of table 'encoder' .*it is inf"),
        ({"weighted_error": True}, r"'weighted_error' of table 'encoder' .*it is True"),
        ({"stored_bytes": -1}, r"'stored_bytes' of table 'encoder' .*it is -1"),
        ({"stored_bytes": 1.5}, r"'stored_bytes' of table 'encoder' .*it is 1.5"),
        ({"untied": 3}, r"'untied' of table 'encoder' .*it is 3"),
        ({"more": 1}, r"must have the keys"),
    ],
)
def test_tables_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    record = json.loads(json.dumps(_RECORDS["low_rank"]))
    record["tables"][0] |= change
    model = _Model()
    with pytest.raises(ValueError, match=message) as refused:
        apply_plan(model, Plan.from_dict(record))
    assert len(str(refused.value)) < 1000
    assert type(model.encoder) is nn.Embedding


def _saved(module: _Model) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"state_dict": dict(module.state_dict()), "pytorch-lightning_version": "2.6.0"}
    write_record(module, checkpoint)
    return checkpoint


def _with_one(tensor: Tensor, value: float) -> Tensor:
    tensor.view(-1)[-1] = value
    return tensor


# What is done to the tensors of the decoder, by the name of one, and what is said.
_FACTORS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "NaN": (
        lambda tensor: _with_one(tensor, float("nan")),
        r"has NaN or infinite values in '{}'",
    ),
    "infinity": (
        lambda tensor: _with_one(tensor, -float("inf")),
        r"has NaN or infinite values in",
    ),
    "another shape": (lambda tensor: tensor[1:], r"'{}' has the shape \(.*\), by the plan \("),
    "integers": (lambda tensor: tensor.long(), r"'{}' holds torch.int64 instead of floating-point numbers"),
    "complex numbers": (lambda tensor: tensor.cfloat(), r"'{}' holds torch.complex64 instead of floating-point"),
    "sparse": (lambda tensor: tensor.to_sparse(), r"'{}' is no plain tensor, but Tensor"),
    "no tensor": (lambda tensor: tensor.tolist(), r"'{}' is no plain tensor, but list"),
    "missing": (lambda tensor: None, r"'{}' is missing"),
}


@pytest.mark.parametrize("name", sorted(_FACTORS))
@pytest.mark.parametrize("method", _METHODS)
def test_factors_are_refused_before_the_module_is_changed(method: str, name: str, models: dict[str, _Model]) -> None:
    change, message = _FACTORS[name]
    checkpoint = _saved(models[method])
    factor = next(key for key in checkpoint["state_dict"] if key.startswith("decoder.f") and "packed" not in key)
    changed = change(checkpoint["state_dict"][factor].detach().clone())
    checkpoint["state_dict"] |= {factor: changed}
    if changed is None:
        del checkpoint["state_dict"][factor]
    for module in (_Model(), copy.deepcopy(models[method])):
        modules, values = dict(module.named_modules()), copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match="the checkpoint .*" + message.format(factor)):
            restore_structure(module, checkpoint)
        assert dict(module.named_modules()) == modules
        torch.testing.assert_close(module.state_dict(), values, rtol=0, atol=0)
    # A file of another precision is another matter.
    torch.manual_seed(0)
    checkpoint = _saved(models[method])
    for key, tensor in checkpoint["state_dict"].items():
        checkpoint["state_dict"][key] = tensor.double() if tensor.is_floating_point() else tensor
    restored = _Model()
    restore_structure(restored, checkpoint)
    restored.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(restored(torch.arange(9)), models[method](torch.arange(9)))


@pytest.mark.parametrize("method", _METHODS)
def test_tensors_too_many(method: str, models: dict[str, _Model]) -> None:
    for extra, message in (
        ("decoder.factorization.more", r"'decoder.factorization.more' is no factor of a "),
        ("decoder.weight", r"it has 'decoder.weight', whose table is compressed"),
    ):
        checkpoint = _saved(models[method])
        checkpoint["state_dict"][extra] = torch.ones(3)
        with pytest.raises(ValueError, match=message):
            restore_structure(_Model(), checkpoint)


def test_tensors_of_others_are_not_looked_at(models: dict[str, _Model]) -> None:
    checkpoint = _saved(models["low_rank"])
    checkpoint["state_dict"] |= {"other.factorization.more": torch.tensor(float("nan")), "decoder.bias": "no tensor"}
    restore_structure(_Model(), checkpoint)


@pytest.mark.parametrize("method", ["group_reduce", "product_quantization"])
def test_any_packed_integers_are_refused_or_can_be_read(method: str, models: dict[str, _Model]) -> None:
    @settings(_QUICK, max_examples=60)
    @given(st.data())
    def run(data: Any) -> None:
        checkpoint = _saved(models[method])
        name = data.draw(st.sampled_from([key for key in checkpoint["state_dict"] if "packed" in key]))
        packed = checkpoint["state_dict"][name].clone()
        for _ in range(data.draw(st.integers(1, 3))):
            packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
        checkpoint["state_dict"][name] = packed
        module = _Model()
        before = dict(module.named_modules())
        try:
            restore_structure(module, checkpoint)
        except ValueError:
            assert dict(module.named_modules()) == before
            return
        module.load_state_dict(checkpoint["state_dict"])
        ids = torch.arange(_VOCAB_SIZE)
        assert module(ids).isfinite().all()
        assert module(ids[:1]).isfinite().all()

    run()
    checkpoint = _saved(models[method])
    name = next(key for key in checkpoint["state_dict"] if "packed" in key)
    checkpoint["state_dict"][name] = checkpoint["state_dict"][name].long()
    with pytest.raises(ValueError, match=rf"'{name}' holds torch.int64 instead of packed bytes"):
        restore_structure(_Model(), checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_in_saved_directories(value: float, tmp_path: Path, models: dict[str, _Model]) -> None:
    model = copy.deepcopy(models["tensor_train"])
    model.encoder.factorization.cores.data[5, 1] = value
    save_compressed(model, tmp_path)
    fresh = _Model()
    with pytest.raises(ValueError, match=r"safetensors' has NaN or infinite values in 'encoder.factorization.cores'"):
        load_compressed(tmp_path, fresh)
    assert type(fresh.encoder) is nn.Embedding


# Files


def _damaged(draw: Any, content: bytes, start: int = 0, stop: int | None = None) -> bytes:
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


def _header(draw: Any, content: bytes) -> bytes:
    """A safetensors file with another header."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    place = draw(st.sampled_from(_places(header)[1:]))
    change = draw(st.one_of(st.sampled_from([_remove, _double]), st.sampled_from(_HOSTILE).map(_set), _JSON.map(_set)))
    changed = json.dumps(_changed(header, place, change)).encode()
    length = draw(st.sampled_from([len(changed)] * 6 + [0, 1, len(changed) + 1, 2**40, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + changed + content[8 + size :]


def _fuzz_directories(folder: Path, models: dict[str, _Model], examples: settings) -> None:
    content = {}
    for method in _METHODS:
        save_compressed(models[method], folder)
        config = json.loads((folder / "config.json").read_text())
        content[method] = (config, (folder / "model.safetensors").read_bytes())

    @examples
    @given(st.data())
    def run(data: Any) -> None:
        method = data.draw(st.sampled_from(_METHODS))
        config, weights = content[method]
        # As directories were without a checksum: everything beyond it has to hold by itself.
        config = {name: value for name, value in config.items() if name != "sha256"}
        kind = data.draw(st.sampled_from(["weights", "header", "config", "aliases"]))
        text = json.dumps(config).encode()
        if kind == "weights":
            weights = _damaged(data.draw, weights)
        elif kind == "header":
            weights = _header(data.draw, weights)
        elif kind == "config":
            text = _damaged(data.draw, text)
        else:
            text = json.dumps({**config, "aliases": data.draw(_JSON)}).encode()
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_bytes(text)
        module = _Model()
        before = dict(module.named_modules())
        with _harmless():
            try:
                load_compressed(folder, module)
            except ValueError:
                assert dict(module.named_modules()) == before
                raise
            module(torch.arange(_VOCAB_SIZE))

    run()


def test_any_damage_of_saved_directories(tmp_path: Path, models: dict[str, _Model]) -> None:
    _fuzz_directories(tmp_path, models, _QUICK)


@pytest.mark.full
def test_any_damage_of_saved_directories_for_long(tmp_path: Path, models: dict[str, _Model]) -> None:
    _fuzz_directories(tmp_path, models, _DEEP)


def test_a_checksum_finds_any_change(tmp_path: Path, models: dict[str, _Model]) -> None:
    save_compressed(models["low_rank"], tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()

    @settings(_QUICK, max_examples=50)
    @given(st.integers(0, len(content) - 1), st.integers(1, 255))
    def run(place: int, flipped: int) -> None:
        weights.write_bytes(content[:place] + bytes([content[place] ^ flipped]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"model.safetensors' is damaged"):
            load_compressed(tmp_path, _Model())

    run()


def test_safetensors_of_another_model(tmp_path: Path, models: dict[str, _Model]) -> None:
    save_compressed(models["low_rank"], tmp_path)
    (tmp_path / "model.safetensors").write_bytes(save({"other": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"not the one that config.json beside it was written with"):
        load_compressed(tmp_path, _Model())


def _fuzz_checkpoints(folder: Path, models: dict[str, _Model], examples: settings) -> None:
    path = folder / "last.ckpt"
    content, expected = {}, {}
    for method in _METHODS:
        torch.save(_saved(models[method]), path)
        content[method], expected[method] = path.read_bytes(), models[method].state_dict()

    @examples
    @given(st.data())
    def run(data: Any) -> None:
        method = data.draw(st.sampled_from(_METHODS))
        path.write_bytes(_damaged(data.draw, content[method]))
        with _harmless():
            loaded = load_from_checkpoint(_Model, path)
            # Only what means nothing was hit, such as the padding between two records.
            torch.testing.assert_close(dict(loaded.state_dict()), dict(expected[method]), rtol=0, atol=0)
        with _harmless():
            assert isinstance(structure_of(path), Plan)

    run()


def test_any_damage_of_checkpoints(tmp_path: Path, models: dict[str, _Model]) -> None:
    _fuzz_checkpoints(tmp_path, models, _QUICK)


@pytest.mark.full
def test_any_damage_of_checkpoints_for_long(tmp_path: Path, models: dict[str, _Model]) -> None:
    _fuzz_checkpoints(tmp_path, models, _DEEP)


def _zipped(records: dict[str, bytes]) -> bytes:
    """An archive as torch writes it, with checksums that are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _records(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def _fuzz_pickles(folder: Path, models: dict[str, _Model], examples: settings) -> None:
    """Damage that the checksums do not show: the pickle was changed before they were computed."""
    path = folder / "last.ckpt"
    torch.save(_saved(models["group_reduce"]), path)
    records = _records(path.read_bytes())
    (pickled,) = [name for name in records if name.endswith("data.pkl")]

    @examples
    @given(st.data())
    def run(data: Any) -> None:
        name = data.draw(st.sampled_from([pickled] * 9 + sorted(records)))
        path.write_bytes(_zipped({**records, name: _damaged(data.draw, records[name])}))
        for read in (AtomicCheckpointIO().load_checkpoint, read_without_tensors):
            with _harmless():
                checkpoint = read(path)
                if isinstance(checkpoint, dict):
                    module = _Model()
                    before = dict(module.named_modules())
                    try:
                        restore_structure(module, checkpoint)
                    except ValueError:
                        assert dict(module.named_modules()) == before
                        raise

    run()


def test_any_pickle(tmp_path: Path, models: dict[str, _Model]) -> None:
    _fuzz_pickles(tmp_path, models, settings(_QUICK, max_examples=40))


@pytest.mark.full
def test_any_pickle_for_long(tmp_path: Path, models: dict[str, _Model]) -> None:
    _fuzz_pickles(tmp_path, models, _DEEP)


class _Call:
    """An object that calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = (function, arguments)

    def __reduce__(self) -> Any:
        return self.called


@pytest.mark.parametrize("kind", ["system", "eval", "getattr", "exec"])
@pytest.mark.parametrize("where", ["hyper_parameters", "embcompress", "state_dict", "callbacks"])
def test_no_pickle_runs_anything(kind: str, where: str, tmp_path: Path, models: dict[str, _Model]) -> None:
    marker = tmp_path / "marker"
    touch = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    call = {
        "system": _Call(os.system, f"touch {marker}"),
        "eval": _Call(eval, touch),
        "getattr": _Call(getattr, _Call(__import__, "os"), "system"),
        "exec": _Call(exec, touch),
    }[kind]
    path = tmp_path / "last.ckpt"
    torch.save({**_saved(models["low_rank"]), where: call}, path)
    for read in (lambda: load_from_checkpoint(_Model, path), lambda: structure_of(path)):
        with pytest.raises(ValueError, match=r"last.ckpt' (holds more than tensors and plain values|is damaged)"):
            read()
    assert not marker.exists()
    # It is a pickle that would have.
    if kind != "getattr":
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_a_pickle_without_an_archive(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "last.ckpt").write_bytes(pickle.dumps(_Call(os.system, f"touch {marker}")))
    for read in (
        lambda: load_from_checkpoint(_Model, tmp_path / "last.ckpt"),
        lambda: structure_of(tmp_path / "last.ckpt"),
    ):
        with pytest.raises(ValueError, match="is not a whole checkpoint"):
            read()
    assert not marker.exists()
