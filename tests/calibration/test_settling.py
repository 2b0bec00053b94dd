"""When the moments of a text have settled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_embcompress.calibration.collector import Collector
from lightning_embcompress.calibration.settling import Settling, expected_excess
from lightning_embcompress.calibration.statistics import collect_statistics
from toys import gpt2, normal, token_ids

DIM = 24


def _moments(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of both halves of samples whose directions have very different variances."""
    states = normal(2, number // 2, DIM, seed=seed) * torch.logspace(0, -2, DIM, dtype=torch.float64)
    halves = states.mT @ states
    return halves.sum(0), halves[0]


def _real_excess(moments: Tensor) -> float:
    """What errors, equal in all directions of the estimated metric, cost in the true one beyond the least."""
    true = torch.diag(torch.logspace(0, -4, DIM, dtype=torch.float64))
    ratio = torch.linalg.slogdet(moments).logabsdet - torch.linalg.slogdet(true).logabsdet
    return float(torch.trace(torch.linalg.inv(moments) @ true) / DIM * torch.exp(ratio / DIM)) - 1


@pytest.mark.parametrize("number", [480, 1920, 7680])
def test_the_estimate_is_what_it_says(number: int) -> None:
    drawn = [_moments(number, seed) for seed in range(20)]
    estimated = sum(expected_excess(*moments) for moments in drawn) / 20
    real = sum(_real_excess(total) for total, _ in drawn) / 20
    # Of two halves of Gaussian samples, whose halves err a little more than twice as much.
    assert real == pytest.approx(DIM / number / 2, rel=0.15)
    assert estimated == pytest.approx(real, rel=0.2)


def test_halves_that_lack_directions_say_nothing() -> None:
    total, part = _moments(480, 0)
    assert expected_excess(total, torch.zeros_like(part)) == float("inf")
    # Fewer samples than directions.
    assert expected_excess(*_moments(40, 0)) > 100
    assert expected_excess(torch.zeros_like(total), torch.zeros_like(part)) == float("inf")
    # Those that the whole text lacks, too, do not matter.
    padded = [torch.nn.functional.pad(moment, (0, 8, 0, 8)) for moment in (total, part)]
    assert expected_excess(*padded) == pytest.approx(expected_excess(total, part) * DIM / (DIM + 8), rel=1e-2)


def _batches(number: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": batch} for batch in token_ids(8 * number, 16).split(8)]


def _collect(number: int, tolerance: float | None, caplog: Any) -> tuple[Any, str]:
    model = gpt2(vocab_size=150, n_embd=8, n_positions=16).double()
    caplog.clear()
    with caplog.at_level("INFO"):
        found = collect_statistics(model, _batches(number), tolerance=tolerance)
    return found, " ".join(record.message for record in caplog.records if "moments" in record.message)


def test_a_pass_ends_when_they_have_settled(caplog: pytest.LogCaptureFixture) -> None:
    everything, said = _collect(40, None, caplog)
    assert everything.num_targets == 40 * 8 * 15
    assert not said
    found, said = _collect(40, 0.05, caplog)
    assert 4 * 8 <= found.num_targets < everything.num_targets
    assert f"settled after {found.num_targets:,} targets" in said
    # What it has seen is what the same batches give.
    used = found.num_targets // (8 * 15)
    model = gpt2(vocab_size=150, n_embd=8, n_positions=16).double()
    torch.testing.assert_close(found.hidden, collect_statistics(model, _batches(40), limit=used).hidden)
    # A tighter tolerance needs more.
    assert _collect(40, 0.003, caplog)[0].num_targets > found.num_targets
    few, said = _collect(2, 1e-4, caplog)
    assert few.num_targets == 2 * 8 * 15
    assert "have not settled by 240 targets (tolerance 0%)" in said


def test_looks_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2(vocab_size=150, n_embd=8, n_positions=16).double()
    collector = Collector(model, [["transformer.wte", "lm_head"]], in_halves=True)
    settling = Settling(collector, 0.01)
    looks = []
    monkeypatch.setattr(settling, "_excess", lambda: looks.append(collector.num_targets) or 40 / collector.num_targets)
    while not settling.is_settled():
        collector.num_targets += 1
    assert collector.num_targets == pytest.approx(4000, rel=0.1)
    assert len(looks) < 12


@pytest.mark.parametrize("tolerance", [0.0, -0.1, float("nan")])
def test_tolerances_that_are_none(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        collect_statistics(gpt2(), [], tolerance=tolerance)
