"""A method that nobody has heard of: a class of its own and a line in the registry, and everything works with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_embcompress import (
    EmbeddingCompression,
    compress,
    load_compressed,
    load_from_checkpoint,
    plan_of,
    save_compressed,
)
from lightning_embcompress.methods.base import Factorization, Problem
from lightning_embcompress.methods.registry import METHODS, Method, MethodConfig
from lightning_embcompress.methods.specs import positive_integers, stored_bytes
from toys import LanguageModel, check_resuming, loaders


@dataclass(frozen=True)
class FirstColumnsConfig(MethodConfig):
    """The first columns of a table, and zeros.

    Attributes:
        columns: How many, instead of a budget.
    """

    method: ClassVar[str] = "first_columns"
    description: ClassVar[str] = "The first columns of the table"
    size_fields: ClassVar[tuple[str, ...]] = ("columns",)

    columns: int | None = None


class FirstColumns(Factorization[FirstColumnsConfig]):
    """A table whose last columns are zeros."""

    kind = "first_columns"
    config_class = FirstColumnsConfig

    def __init__(self, vocab_size: int, dim: int, columns: int, dtype: Any = None, device: Any = None) -> None:
        super().__init__(vocab_size, dim)
        self.first = nn.Parameter(torch.zeros(vocab_size, columns, dtype=dtype, device=device))

    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        return F.pad(self.first[ids], (0, self.dim - self.first.shape[1]))

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden[..., : self.first.shape[1]], self.first)

    def structure(self) -> dict[str, Any]:
        shape = {"vocab_size": self.vocab_size, "dim": self.dim, "columns": self.first.shape[1]}
        return {"kind": self.kind, **shape}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: Any = None) -> FirstColumns:
        return cls(*positive_integers(spec, "vocab_size", "dim", "columns"), dtype, device)

    @classmethod
    def smallest_bytes(cls, vocab_size: int, dim: int, itemsize: int, config: Any = None) -> int:
        empty = cls(vocab_size, dim, (config and config.columns) or 1, device="meta")
        return stored_bytes(empty.first.numel() * itemsize, 1, empty.structure())

    @classmethod
    def _decompose(cls, problem: Problem[FirstColumnsConfig]) -> FirstColumns:
        weight = problem.weight
        columns = problem.config.columns or (problem.max_bytes - 300) // (len(weight) * weight.element_size())
        return cls(*weight.shape, columns, weight.dtype, weight.device)._refine(problem)

    def _refine(self, problem: Problem[FirstColumnsConfig]) -> FirstColumns:
        self.first.copy_(problem.weight[:, : self.first.shape[1]])
        return self


class FirstColumnsCallback(EmbeddingCompression, config=FirstColumnsConfig):
    """The method as a callback."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, FirstColumnsConfig.method, Method(FirstColumnsConfig, FirstColumns))


@pytest.mark.parametrize("tied", [False, True])
def test_it_compresses_and_is_saved_and_loaded(tied: bool, tmp_path: Path) -> None:
    model, expected, fresh = (LanguageModel(tied=tied) for _ in range(3))
    plan = compress(model, "first_columns", ratio=2)
    assert plan.ratio >= 2
    assert compress(expected, FirstColumnsConfig(), ratio=2) == plan
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(model(ids), expected(ids))
    save_compressed(model, tmp_path / "saved")
    load_compressed(tmp_path / "saved", fresh)
    assert torch.equal(model(ids), fresh(ids))


@pytest.mark.parametrize(
    "make",
    [
        lambda: EmbeddingCompression("first_columns", columns=4, at_epoch=1, refine_at_epochs=[2]),
        lambda: FirstColumnsCallback(columns=4, at_epoch=1, refine_at_epochs=[2]),
    ],
)
def test_it_trains_resumes_and_is_reported(make: Callable[[], EmbeddingCompression], tmp_path: Path) -> None:
    whole = check_resuming(tmp_path, lambda: [LanguageModel(), make()], (0, 1), data=loaders(), max_epochs=4)
    (table, *_) = whole.report["tables"]
    assert (table["method"], table["structure"]) == ("first_columns", "columns 4")
    assert table["bits_per_weight"] == pytest.approx(32 / table["ratio"])
    assert plan_of(load_from_checkpoint(LanguageModel, tmp_path / "whole" / "epoch=3.ckpt")) == whole.plan


def test_its_mistakes_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"columns"):
        compress(LanguageModel(), "first_columns", ratio=2, columns=3)
    with pytest.raises(ValueError, match=r"'colums' \(did you mean 'columns'"):
        FirstColumnsCallback(colums=3)
