"""All methods on one model, at equal bytes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_embcompress.cli.compare import DEFAULT_METHODS, Candidate, compare, show_comparison, write_comparison
from lightning_embcompress.methods.registry import METHODS

VOCAB_SIZE, DIM = 400, 32
COUNTS = (10_000 / torch.arange(1, VOCAB_SIZE + 1)).long()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(VOCAB_SIZE, DIM, generator=generator) * torch.logspace(0, -2, DIM)
        self.encoder = nn.Embedding(VOCAB_SIZE, DIM, _weight=table)
        self.mix = nn.Linear(DIM, DIM)
        self.decoder = nn.Linear(DIM, VOCAB_SIZE, bias=False)
        self.decoder.weight = self.encoder.weight


def _evaluate(model: nn.Module) -> float:
    """Something that is 1 for the table as it was, and grows with what is lost of it."""
    original = Tied().encoder.weight
    rows = model.encoder(torch.arange(VOCAB_SIZE))  # type: ignore[operator]
    return 1 + float((rows - original).detach().norm() / original.detach().norm())


def test_every_method_at_the_bytes_of_every_quantization() -> None:
    model = Tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    methods = ["low_rank", "group_reduce:groups=4,refine_rounds=0", "tensor_train", "tensor_train:max_rank=1"]
    results = compare(model, _evaluate, methods, [2.0], token_counts=COUNTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert results[0].method == "dense"
    assert results[0].perplexity == 1
    # A table of 400 x 32 in float32; 4 or 8 bits a value, 16 for each group of 32, and what names them in a file.
    sizes = {"int8": VOCAB_SIZE * (DIM + 2), "int4": VOCAB_SIZE * (DIM // 2 + 2)}
    for name, size in sizes.items():
        (line,) = [result for result in results if result.method == name]
        assert line.stored_bytes is not None
        assert 0 < line.stored_bytes - size < 500
        size = line.stored_bytes
        rivals = [result for result in results if result.asked_ratio == line.asked_ratio]
        assert {result.method for result in rivals} == {name, *methods[:3]}
        assert all(result.stored_bytes <= size for result in rivals if result.stored_bytes is not None)
        reached = [result.perplexity for result in rivals if result.perplexity is not None]
        assert reached == sorted(reached)
        rest = 4 * (DIM * DIM + DIM)
        assert line.model_ratio == pytest.approx((4 * VOCAB_SIZE * DIM + rest) / (size + rest))
    (fixed,) = [result for result in results if result.method == "tensor_train:max_rank=1"]
    assert fixed.asked_ratio is None
    assert fixed.ratio == pytest.approx(32 / 10, rel=0.05)
    # A train of rank 1 takes 10 of 32 values: what int4 takes cannot be reached, which is said and comes last.
    unreached = [result for result in results if result.perplexity is None]
    assert {result.method for result in unreached} == {"tensor_train"}
    assert all("cannot be stored in" in result.note for result in unreached)


def test_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = compare(Tied(), _evaluate, ["low_rank", "tensor_train"], [2.0, 3.0], bits=(4,), token_counts=COUNTS)
    show_comparison(results)
    shown = capsys.readouterr().out
    assert "low_rank" in shown
    assert "cannot be reached" in shown
    files = write_comparison(tmp_path, results)
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert [line["method"] for line in record] == [result.method for result in results]
    with (tmp_path / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["perplexity"] or "nan") for line in lines] == pytest.approx(
        [float("nan") if result.perplexity is None else result.perplexity for result in results], nan_ok=True
    )
    pytest.importorskip("matplotlib", reason="the plot needs it: pip install matplotlib")
    assert files[-1].name == "comparison.png"
    assert files[-1].read_bytes().startswith(b"\x89PNG")


def test_default_methods_are_all_but_the_slowest() -> None:
    assert {Candidate.parse(text).method for text in DEFAULT_METHODS} == set(METHODS) - {"cp"}


def test_candidates_are_read_as_they_are_written() -> None:
    for text in (*DEFAULT_METHODS, "tensor_train:shape=[4, 4, 2],max_rank=2"):
        assert str(Candidate.parse(text)) == text
    assert Candidate.parse("tensor_train:shape=[4, 4, 2],max_rank=2").options == {"shape": [4, 4, 2], "max_rank": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["group_reduse"]}, r"unknown method 'group_reduse' \(did you mean 'group_reduce'\?\)"),
        ({"methods": ["group_reduce:group=3"]}, "unknown option 'group'"),
        ({"methods": ["group_reduce:groups=0"]}, "groups must be 1 or more"),
        ({"ratios": [1.0]}, "ratios must be above 1"),
        ({"bits": [1]}, "bits must be"),
        ({"tables": ["nowhere"]}, "no module 'nowhere'"),
        ({"token_counts": None}, "give token_counts"),
    ],
)
def test_refused_before_anything_is_solved(arguments: dict[str, object], message: str) -> None:
    def never(_: nn.Module) -> float:
        raise AssertionError("evaluated")

    given: dict[str, object] = {"methods": ["group_reduce"], "ratios": [2.0], "token_counts": COUNTS, **arguments}
    with pytest.raises(ValueError, match=message):
        compare(Tied(), never, **given)  # type: ignore[arg-type]
