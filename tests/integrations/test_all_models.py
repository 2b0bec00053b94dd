"""All causal, seq2seq and masked language models of transformers that can be built small, through their whole life.

Every class has to come out equal, or be refused by one clear ValueError before anything has changed.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_embcompress.compression.plan import compress, densify
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.tables.finding import find_tables, large_and_dense
from small_models import VOCAB_SIZE, class_names, inputs_of, logits_of, small_model

METHODS = ("low_rank", "transform_coding")
_SECONDS = 90


@dataclass(frozen=True)
class Outcome:
    """What became of a class by a method: `equal`, `refused`, `not built` or `wrong`, and what was said."""

    name: str
    method: str
    kind: str
    said: str = ""


class _Wrong(Exception):
    """What has to be mended."""


def _expect(condition: object, what: str) -> None:
    if not condition:
        raise _Wrong(what)


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def check(name: str, model_type: str, method: str) -> Outcome:
    """Lead a class through its life."""
    torch.set_num_threads(1)
    try:
        with _within(_SECONDS):
            model: Any = small_model(model_type, name)
            inputs = inputs_of(model)
            logits_of(model, inputs)
    except Exception as error:  # whatever keeps it from being built here
        return Outcome(name, method, "not built", f"{type(error).__name__}: {str(error)[:200]}")
    dense = copy.deepcopy(model)
    stages = ["compress"]
    try:
        with _within(_SECONDS):
            refusal = _compressed(model, method)
            if refusal is not None:
                return Outcome(name, method, "refused", refusal)
            _live(model, dense, inputs, stages)
    except Exception as error:  # whatever it is, it has to be mended
        what = str(error) if isinstance(error, _Wrong) else f"{type(error).__name__}: {str(error)[:400]}"
        if stages[-1] != "compress" and (own := _own_trouble(dense, inputs)):
            return Outcome(name, method, "not built", f"the dense model fails too: {own}")
        return Outcome(name, method, "wrong", f"{stages[-1]}: {what}")
    return Outcome(name, method, "equal")


def _compressed(model: Any, method: str) -> str | None:
    """Compress a model; what a refusal says."""
    before, values = _structure(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {"token_counts": _counts(model)} if method == "transform_coding" else {}
    try:
        said = large_and_dense(model, find_tables(model))
        compress(model, method, ratio=1.5, **given)
    except ValueError as error:
        same = all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
        _expect(same and _structure(model) == before, f"refused, but it has changed: {error}")
        named = any(path and f"'{path}'" in str(error) for path, _ in model.named_modules())
        _expect(named, f"the refusal names no layer: {error}")
        return str(error)
    for path, layer in model.named_modules():
        # As many rows as there are tokens.
        is_table = isinstance(layer, nn.Embedding | nn.EmbeddingBag | nn.Linear) and len(layer.weight) == VOCAB_SIZE
        _expect(not is_table or path in said, f"{path!r} was left dense without a word")
    return None


def _structure(model: nn.Module) -> list[Any]:
    """All layers and tensors, by what they are."""
    layers = list(model.named_modules(remove_duplicate=False))
    return [(name, id(one)) for name, one in [*layers, *model.state_dict(keep_vars=True).items()]]


def _counts(model: nn.Module) -> Any:
    try:
        sizes = {table.name: table.shape[0] for table in find_tables(model)}
    except ValueError:
        # `compress` says it.
        return None
    counts = {name: torch.arange(size, 0, -1) for name, size in sizes.items()}
    return counts if len(set(sizes.values())) > 1 else next(iter(counts.values()))


def _live(model: Any, dense: Any, inputs: dict[str, Tensor], stages: list[str]) -> None:
    def at(stage: str) -> None:
        stages.append(stage)

    at("forward")
    logits = logits_of(model, inputs)
    at("densify a copy")
    reference = copy.deepcopy(model)
    densify(reference)
    expected = logits_of(reference, inputs)
    _expect(
        _close(logits, expected),
        f"logits differ from those of the densified model by {_distance(logits, expected):.3g}",
    )
    at("train")
    _expect_trains(copy.deepcopy(model), dense, inputs)
    at("save_pretrained")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        at("from_pretrained")
        loaded = type(model).from_pretrained(folder).eval()
    _expect_same_state(model, loaded)
    again = logits_of(loaded, inputs)
    _expect(torch.equal(again, logits), f"logits of the loaded model differ by {_distance(again, logits):.3g}")
    at("generate")
    if model.can_generate() and (wanted := _generated(reference, inputs)) is not None:
        _expect(torch.equal(_generated(loaded, inputs, must=True), wanted), "generates other tokens")
    at("densify")
    densify(loaded)
    _expect(_close(logits_of(loaded, inputs), expected), "logits differ")
    _expect(_ties(loaded) == _ties(dense), f"other ties: {sorted(map(sorted, _ties(loaded) ^ _ties(dense)))}")
    types = [{path: type(layer) for path, layer in one.named_modules()} for one in (loaded, dense)]
    _expect(types[0] == types[1], f"other layers: {set(types[0].items()) ^ set(types[1].items())}")
    at("save the dense model")
    with tempfile.TemporaryDirectory() as folder:
        loaded.save_pretrained(folder)
        _expect(_close(logits_of(type(model).from_pretrained(folder).eval(), inputs), expected), "logits differ")


def _own_trouble(dense: Any, inputs: dict[str, Tensor]) -> str | None:
    """What a dense model cannot do either."""
    try:
        logits = logits_of(dense, inputs)
        _expect(_close(logits_of(copy.deepcopy(dense), inputs), logits), "a copy differs")
        with tempfile.TemporaryDirectory() as folder:
            dense.save_pretrained(folder)
            loaded = type(dense).from_pretrained(folder).eval()
        _expect(_close(logits_of(loaded, inputs), logits), "logits of the loaded model differ")
        _expect_same_state(dense, loaded)
    except Exception as error:  # its own trouble, whatever it is
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def _expect_trains(model: Any, dense: Any, inputs: dict[str, Tensor]) -> None:
    """Gradients reach the tables wherever they reach the dense ones."""
    dense = copy.deepcopy(dense)
    for one in (dense, model):
        try:
            logits_of(one, inputs, grad=True).square().mean().backward()
        except (RuntimeError, AssertionError):
            if one is model:
                raise
            return
    for path, layer in model.named_modules():
        if isinstance(layer, CompressedLayer) and dense.get_submodule(path).weight.grad is not None:
            reached = [parameter.grad is not None for parameter in layer.factorization.parameters()]
            _expect(not reached or any(reached), f"no gradient reaches {path!r}")


def _generated(model: Any, inputs: dict[str, Tensor], must: bool = False) -> Tensor | None:
    torch.manual_seed(0)
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
    try:
        return model.generate(**given, max_new_tokens=4, do_sample=False, num_beams=1)
    except Exception:  # a dense one that cannot is not asked for it
        if must:
            raise
        return None


def _expect_same_state(model: nn.Module, loaded: nn.Module) -> None:
    mine, theirs = model.state_dict(), loaded.state_dict()
    _expect(mine.keys() == theirs.keys(), f"other keys {sorted(mine.keys() ^ theirs.keys())[:4]}")
    differ = [name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])]
    _expect(not differ, f"{differ[:4]} differ")


def _ties(model: nn.Module) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-9))


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and found.dtype == expected.dtype and _distance(found, expected) < 1e-3


def _task(task: tuple[str, str, str]) -> Outcome:
    return check(*task)


def check_all(processes: int, names: Sequence[tuple[str, str, str]]) -> Iterator[Outcome]:
    """Check classes in a few processes, by either method in turn."""
    tasks = [(name, model_type, METHODS[index % 2]) for index, (model_type, name, _) in enumerate(names)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_task, tasks)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen2", "Qwen2ForCausalLM"),
        ("mamba", "MambaForCausalLM"),
        ("marian", "MarianMTModel"),
        ("electra", "ElectraForMaskedLM"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_few_models(model_type: str, name: str, method: str) -> None:
    assert check(name, model_type, method) == Outcome(name, method, "equal")


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_all_models() -> None:
    outcomes = list(check_all(2, class_names()))
    counts = Counter(one.kind for one in outcomes)
    print(f"\n{len(outcomes)} classes of transformers {transformers.__version__}: {dict(counts)}")
    for one in sorted(outcomes, key=lambda one: (one.kind, one.name)):
        if one.kind != "equal":
            print(f"{one.kind}: {one.name} ({one.method}): {one.said}")
    assert counts["wrong"] == 0
    page = Path(__file__).parents[2] / "docs" / "models.md"
    listed = page.read_text(encoding="utf-8").partition("## Refused")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in listed.splitlines() if row.startswith("| `")]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert names == {one.name for one in outcomes if one.kind == "refused"}
    assert counts["equal"] > 200
