"""Random small models through their whole life: compress, train a step, save, load, make dense.

Every model has to come out equal, or be refused by one clear ValueError before anything has changed.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_embcompress.compression.plan import compress, densify
from lightning_embcompress.integrations.saved import load_compressed, save_compressed
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.methods.registry import METHODS, Quantization
from lightning_embcompress.quantization.aware import convert_qat, is_prepared, prepare_qat, quantize_tables
from lightning_embcompress.tables.finding import find_tables
from random_models import RandomModel

SEED = 0
_METHODS = """
    low_rank low_rank transform_coding transform_coding group_reduce shared_basis weighted_low_rank
    product_quantization tensor_train tensor_train_matrix cp tucker
"""
_ARGUMENTS = ["nn.Embedding", "ratio", "size", "bits_per_weight", "tables", "tie", "token_counts", "method"]
# Of 16 bits only gross mistakes show, for rounding grows where factors cancel; a cast to float64 shows the rest.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.3, torch.bfloat16: 0.3}


def request_for(model: RandomModel, seed: int) -> dict[str, Any]:
    """Arguments of `compress` for a model."""
    chance = random.Random(f"request {seed}")
    asked: dict[str, Any] = {
        "method": chance.choice(_METHODS.split()),
        "tie": chance.choice(("keep",) * 4 + ("untie", "auto")),
    }
    readers = [(name, number) for name, number, kind, _ in model.readers if kind != "product"]
    sizes = {number: model.vocabularies[number] for _, number in readers}
    if chance.random() < 0.6:
        chosen = chance.sample(readers, chance.randint(1, len(readers)))
        asked["tables"] = [name for name, _ in chosen]
    else:
        chosen = readers
    if chance.random() < 0.95:
        asked["token_counts"] = _counts(model, asked.get("tables", "auto"))
    ratio = chance.choice((1.2, 1.5, 2.0, 2.0, 3.0, chance.uniform(1.1, 6.0)))
    itemsize = model.dtype.itemsize
    if chance.random() < 0.9:
        # Mostly what the method can reach, at these sizes.
        kind, config = METHODS[asked["method"]].factorization, METHODS[asked["method"]].config()
        shapes = [model.vocabularies[number] for _, number in chosen]
        most = min(rows * dim * itemsize / kind.smallest_bytes(rows, dim, itemsize, config) for rows, dim in shapes)
        if most < 1.2:
            asked["method"], most = "low_rank", 2.0
        ratio = min(ratio, most * 0.9)
    budget = chance.choice(("ratio", "ratio", "size", "bits_per_weight"))
    weights = sum(sizes[number][0] * sizes[number][1] for number in {number for _, number in chosen})
    asked[budget] = {
        "ratio": ratio,
        "size": max(1, int(weights * itemsize / ratio)),
        "bits_per_weight": 8 * itemsize / ratio,
    }[budget]
    return asked


def _counts(model: nn.Module, tables: Any) -> Any:
    """Counts of the words of every table, or None where the tables are refused."""
    try:
        sizes = {table.name: table.shape[0] for table in find_tables(model, tables)}
    except ValueError:
        return None
    counts = {name: torch.randint(0, 50, (size,)) for name, size in sizes.items()}
    return counts if len(set(sizes.values())) > 1 else next(iter(counts.values()))


def _compress_another(model: RandomModel, chance: random.Random) -> None:
    """Compress one more of the tables, by low rank."""
    dense = [name for name, _, kind, _ in model.readers if kind != "product" and not _is_compressed(model, name)]
    if dense:
        path = chance.choice(dense)
        _or_refusal(model, lambda: compress(model, "low_rank", ratio=1.1, tables=[path]))


def _is_compressed(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), CompressedLayer)


def _or_refusal(model: nn.Module, change: Callable[[], Any]) -> str | None:
    """Change a model, or give what is said against it, having looked that nothing has changed."""
    before = _snapshot(model)
    try:
        change()
    except ValueError as error:
        message = str(error)
        changed = _difference(before, _snapshot(model), before)
        _expect(changed is None, f"refused, but changed {changed}: {message}")
        named = any(path and repr(path) in message for path in before["types"])
        _expect(named or any(name in message for name in _ARGUMENTS), f"the refusal names nothing: {message}")
        return message
    return None


class _Wrong(Exception):
    """What has to be mended."""


def _expect(condition: object, what: str) -> None:
    if not condition:
        raise _Wrong(what)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are equal to the bit, NaN included."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and bool(((one == other) | (one != one) & (other != other)).all())
    )


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refusal must leave as it is."""
    modules = dict(model.named_modules(remove_duplicate=False))
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks += ("_state_dict_hooks", "_load_state_dict_pre_hooks")
    state = model.state_dict(keep_vars=True)
    return {
        "layers": {path: id(module) for path, module in modules.items()},
        "types": {path: type(module) for path, module in modules.items()},
        "hooks": {path: {name: len(getattr(module, name)) for name in hooks} for path, module in modules.items()},
        "training": {path: module.training for path, module in modules.items()},
        "names": list(state),
        "identities": {name: id(one) for name, one in model.named_parameters(remove_duplicate=False)},
        "trains": {name: tensor.requires_grad for name, tensor in state.items()},
        "values": {name: tensor.detach().clone() for name, tensor in state.items()},
    }


def _difference(before: dict[str, Any], after: dict[str, Any], keys: Iterable[str]) -> str | None:
    for key in keys:
        if key == "values":
            for name, tensor in before[key].items():
                if not _same(tensor, after[key][name]):
                    return f"values of {name}"
        elif before[key] != after[key]:
            changed = (
                set(map(str, dict.items(before[key]))) ^ set(map(str, dict.items(after[key])))
                if isinstance(before[key], dict)
                else set(before[key]) ^ set(after[key])
            )
            return f"{key}: {sorted(map(str, changed))[:4]}"
    return None


def _ties(model: nn.Module) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), set()).add(name)
    return {frozenset(names) for names in groups.values()}


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        _expect(
            one.shape == other.shape and one.dtype == other.dtype,
            f"{one.shape} {one.dtype}, not {other.shape} {other.dtype}",
        )
        # Where numbers of 16 bits cancel, rounding is all that is left.
        floor = (0.05 if one.dtype.itemsize == 2 else 1e-3) * max(1, one.numel()) ** 0.5
        one, other = (tensor.detach().double().nan_to_num(0.0, 1e3, -1e3) for tensor in (one, other))
        worst = max(worst, float((one - other).norm() / other.norm().clamp(min=floor)))
    return worst


def _frozen(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = model.named_parameters()
    return [(name, one) for name, one in named if ".factorization." in name and not one.requires_grad]


def _train_a_step(model: nn.Module, inputs: Any) -> bool:
    outputs = model(inputs)
    loss = sum(output.float().square().mean() for output in outputs if output.numel())
    # Of a table that stays dense there may be no number that is finite.
    if not loss.requires_grad or not loss.isfinite():
        return False
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return True


def _dense(seed: int) -> RandomModel:
    """A model that works while it is dense, in its own dtype or in float32."""
    model = RandomModel(seed)
    try:
        trial = copy.deepcopy(model)
        _train_a_step(trial, model.inputs())
    except (RuntimeError, NotImplementedError):
        return _fresh(seed, torch.float32)
    return model


def _fresh(seed: int, dtype: torch.dtype, values: int = 0) -> RandomModel:
    model = RandomModel(seed, values).to(dtype)
    model.dtype = dtype
    return model


def check(seed: int) -> tuple[int, str, str]:
    """Lead one model through its life; the seed, `equal`, `refused` or `wrong`, and what was said."""
    torch.set_num_threads(1)
    stage = "build"
    asked: dict[str, Any] = {}
    try:
        model = _dense(seed)
        asked = request_for(model, seed)
        inputs = model.inputs()
        before = _snapshot(model)
        ties = _ties(model)
        dense_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        stage = "compress"
        refusal = _or_refusal(model, lambda: compress(model, **asked))
        if refusal is not None:
            return seed, "refused", refusal
        stage = "forward"
        after = _snapshot(model)
        for key in ("hooks", "training"):
            kept = {path: value for path, value in after[key].items() if path in before[key]}
            expected = {path: value for path, value in before[key].items() if path in kept}
            _expect(kept == expected, f"{key} changed by compress: {_difference({key: expected}, {key: kept}, [key])}")
        outputs = copy.deepcopy(model)(inputs)
        stage = "densify a copy"
        other = copy.deepcopy(model)
        densify(other)
        distance = _distance(outputs, other(inputs))
        _expect(distance < _TOLERANCES[model.dtype], f"densified differs by {distance:.3g}")
        chance = random.Random(f"course {seed}")
        if (more := chance.random()) < 0.15:
            stage = "compress another table"
            _compress_another(model, chance)
        elif more < 0.4:
            stage = "quantize"
            bits = Quantization(bits=chance.choice((2, 4, 8)), group_size=chance.choice((16, 64)))
            in_place = prepare_qat if more < 0.3 else quantize_tables
            quantized = _or_refusal(model, lambda: in_place(model, bits))
            if quantized is not None:
                return seed, "refused", f"{stage}: {quantized}"
        stage = "train"
        # A lookup with max_norm changes dense tables, frozen or not.
        frozen = {
            name: tensor.detach().clone() for name, tensor in model.named_parameters() if not tensor.requires_grad
        }
        _train_a_step(model, inputs)
        for name, tensor in model.named_parameters():
            _expect(
                ".factorization." not in name or name not in frozen or _same(tensor, frozen[name]),
                f"frozen {name} was trained",
            )
        is_pickled = not any(map(is_parametrized, model.modules()))
        expected_outputs = (pickle.loads(pickle.dumps(model)) if is_pickled else copy.deepcopy(model))(inputs)
        if is_prepared(model):
            stage = "convert"
            convert_qat(model)
            converted = copy.deepcopy(model)(inputs)
            distance = _distance(converted, expected_outputs)
            _expect(distance < _TOLERANCES[model.dtype], f"converted differs by {distance:.3g}")
            expected_outputs = converted
        stage = "save"
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            save_compressed(model, folder)
            stage = "load"
            fresh = _fresh(seed, model.dtype, values=1)
            load_compressed(folder, fresh)
        _check_same_state(model, fresh, "loaded")
        _check_equal(copy.deepcopy(fresh), inputs, expected_outputs, model, "loaded")
        stage = "state dict"
        with torch.no_grad():
            for tensor in [*fresh.parameters()]:
                tensor.add_(1)
        compressed_state = copy.deepcopy(model.state_dict())
        fresh.load_state_dict(compressed_state)
        _check_same_state(model, fresh, "state dict")
        stage = "cast"
        cast = copy.deepcopy(fresh).to(torch.float64)
        wide = {number: {key: _wide(value) for key, value in given.items()} for number, given in inputs.items()}
        dense_cast = copy.deepcopy(cast)
        densify(dense_cast)
        distance = _distance(cast(wide), dense_cast(wide))
        _expect(distance < 1e-3, f"after a cast to float64 densified differs by {distance:.3g}")
        stage = "densify"
        densify(model)
        distance = _distance(expected_outputs, copy.deepcopy(model)(inputs))
        _expect(distance < _TOLERANCES[model.dtype], f"after training densified differs by {distance:.3g}")
        at_end = _snapshot(model)
        keys = ["types", "hooks", "training", "names", "trains"]
        changed = _difference(before, at_end, keys)
        _expect(changed is None, f"densified model has other {changed}")
        if asked["tie"] == "keep":
            _expect(_ties(model) == ties, f"ties {sorted(map(sorted, _ties(model) ^ ties))}")
        stage = "state dict into a dense model"
        for source, target, what in (
            (compressed_state, _fresh(seed, model.dtype, values=2), "factors into a dense model"),
            (dense_state, copy.deepcopy(fresh), "a dense table into factors"),
        ):
            try:
                target.load_state_dict(source, strict=False)
            except (RuntimeError, ValueError):
                continue
            raise _Wrong(f"{what} passes with strict=False")
        return seed, "equal", ""
    except _Wrong as error:
        return seed, "wrong", f"{stage}: {error} | {_shown(asked)}"
    except Exception as error:  # any other exception is what is searched for
        return seed, "wrong", f"{stage}: {type(error).__name__}: {str(error)[:400]} | {_shown(asked)}"


def _check_same_state(model: nn.Module, other: nn.Module, what: str) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    _expect(list(mine) == list(theirs), f"{what}: other keys {sorted(set(mine) ^ set(theirs))[:4]}")
    for name, tensor in mine.items():
        _expect(_same(tensor, theirs[name]), f"{what}: {name} differs")


def _check_equal(model: nn.Module, inputs: Any, expected: list[Tensor], source: nn.Module, what: str) -> None:
    found = model(inputs)
    for one, other in zip(found, expected, strict=True):
        _expect(_same(one, other), f"{what}: outputs differ by {_distance([one], [other]):.3g}")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _shown(asked: dict[str, Any]) -> str:
    return str({name: "..." if name == "token_counts" else value for name, value in asked.items()})


def _folder() -> str | None:
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() else None


def check_all(seeds: Iterable[int], processes: int) -> tuple[Counter[str], list[tuple[int, str, str]]]:
    """Check many seeds; how many had which outcome, and what was said of those that were not equal."""
    counts: Counter[str] = Counter()
    others = []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        for found in pool.map(check, seeds, chunksize=20):
            counts[found[1]] += 1
            if found[1] != "equal":
                others.append(found)
    return counts, others


def test_random_models_live_or_are_refused() -> None:
    found = [check(seed) for seed in range(SEED, SEED + 50)]
    assert not [one for one in found if one[1] == "wrong"]
    assert Counter(outcome for _, outcome, _ in found)["equal"] >= 25


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_ten_thousand_random_models() -> None:
    count = 10_000
    counts, others = check_all(range(SEED, SEED + count), processes=2)
    print(f"\n{count} random models, seeds {SEED} to {SEED + count - 1}: {dict(counts)}")
    wrong = [one for one in others if one[1] == "wrong"]
    assert not wrong, wrong[:10]
