"""Codes of a trellis in a table: they lose less, and live through all that codes do."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_embcompress.compression.plan import compress
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.methods.registry import SharedBasisBlocks, TransformCodingConfig, factorization_from_spec
from lightning_embcompress.methods.shared_basis.layout import from_windows, nearest_codes
from toys import falling_counts, gpt2, normal

ROWS, DIM = 1200, 48


def _table(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = normal(ROWS, DIM, seed=0) * torch.logspace(0.3, -0.7, DIM) + normal(1, DIM, seed=1)
    return (rows * torch.linspace(2, 0.5, ROWS).unsqueeze(1)).to(dtype)


def _metric() -> Metric:
    factor = normal(DIM, DIM, seed=2, dtype=torch.float64)
    counts = falling_counts(ROWS).double() + 1
    return Metric(torch.eye(DIM, dtype=torch.float64) + 0.02 * factor @ factor.T, counts / counts.sum())


def _coded(bits: float = 2.5, dtype: torch.dtype = torch.float32, **options: Any) -> SharedBasisBlocks:
    config = TransformCodingConfig(**{"codes": "trellis", "effort": 6, **options})
    max_bytes = int(ROWS * DIM * bits / 8)
    coded = SharedBasisBlocks.decompose(_table(dtype), max_bytes, falling_counts(ROWS), config, metric=_metric())
    assert coded.stored_bytes() <= max_bytes
    return coded


@pytest.mark.parametrize("bits", [1.5, 2.5])
def test_less_is_lost_at_equal_bytes(bits: float) -> None:
    metric, table = _metric(), _table()
    levels, short, long = (_coded(bits, **options) for options in ({"codes": "lloyd"}, {"effort": 6}, {"effort": 9}))
    assert all(one.window == window for one, window in ((levels, 0), (short, 6), (long, 9)))
    lost = [metric.loss(table, one.materialize()) for one in (levels, short, long)]
    assert lost[2] < 0.95 * lost[1]
    assert lost[2] < 0.94 * lost[0]
    assert long.predicted_loss == pytest.approx(lost[2], rel=0.1)


def test_rows_of_few_components_have_levels_of_their_own() -> None:
    coded = _coded(0.8)
    narrow = [[bits for bits, _ in runs if bits <= 3] for runs in coded.segments]
    assert any(min(own, default=0) < 0 for own in narrow)
    assert any(max(own, default=0) > 0 for own in narrow)
    assert float((coded.rows(torch.arange(ROWS)) - coded.materialize()).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_and_layouts(dtype: torch.dtype) -> None:
    coded = _coded(dtype=dtype)
    ids, states = torch.tensor([[3, 0], [ROWS - 1, 3]]), torch.randn(3, DIM).to(dtype)
    file = io.BytesIO()
    torch.save(coded.state_dict(), file)
    file.seek(0)
    loaded = factorization_from_spec(coded.spec(), dtype)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.rows(ids), coded.rows(ids))
    assert loaded.stored_bytes() == coded.stored_bytes()
    with torch.no_grad():
        logits, rows = coded.logits(states), coded.rows(ids)
        assert loaded.lay_out()
        # A byte holds a number of the trellis as it is; only levels of their own are rounded.
        size = float(rows.abs().max())
        torch.testing.assert_close(loaded.rows(ids), rows, rtol=0, atol=0.02 * size)
        torch.testing.assert_close(loaded.logits(states), logits, rtol=0, atol=0.02 * float(logits.abs().max()))
    torch.testing.assert_close(dict(copy.deepcopy(loaded).state_dict()), dict(coded.state_dict()), rtol=0, atol=0)
    # A gradient wants the codes back.
    assert loaded.codes.numel() == 0
    for one in (coded, loaded):
        (one.logits(states).float().logsumexp(-1).sum() + one.rows(ids).float().square().sum()).backward()
    assert torch.equal(loaded.codes, coded.codes)
    torch.testing.assert_close(loaded.levels.grad, coded.levels.grad)


def test_codes_that_were_altered_are_read_as_some_rows() -> None:
    coded = _coded()
    state = coded.state_dict()
    state["packed_codes"] = torch.randint(256, state["packed_codes"].shape, dtype=torch.uint8)
    coded.load_state_dict(state)
    assert coded.rows(torch.arange(ROWS)).isfinite().all()


def test_numbers_behind_codes_become_the_same_codes_again() -> None:
    coded = _coded()
    latent: Any = coded.prepared(Quantization(8))
    assert latent.spec()["window"] == 6
    ids = torch.arange(0, ROWS, 7)
    torch.testing.assert_close(latent.rows(ids), coded.rows(ids), rtol=0, atol=1e-4)
    again = latent.converted()
    assert again.spec() == coded.spec()
    torch.testing.assert_close(again.materialize(), coded.materialize(), rtol=0, atol=1e-4)
    # Numbers that training has moved far are others.
    with torch.no_grad():
        for numbers in latent.coefficients:
            numbers.neg_()
    means = coded._frame().means
    ends = torch.tensor(coded.sizes).cumsum(0)
    shift = means[torch.searchsorted(ends, coded.position, right=True)]
    turned = latent.converted().materialize() - shift
    change = turned + (coded.materialize() - shift)
    assert float(change.norm()) < 0.5 * float(turned.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_unit_that_training_has_turned_or_emptied(dtype: torch.dtype) -> None:
    values, runs = normal(64, 16, seed=3).to(dtype), [(-2, 16)]
    codes, lost = {}, {}
    for unit in (0.02, -0.02, 0.0):
        tables = {-2: (torch.arange(-128, 128) * unit).to(dtype)}
        codes[unit] = nearest_codes(values, runs, tables, torch.ones(16, dtype=torch.float64), window=6)
        read = tables[-2][from_windows(codes[unit], runs, 6)]
        lost[unit] = float((values - read).float().square().mean())
    assert lost[-0.02] == pytest.approx(lost[0.02], rel=0.1)
    assert lost[-0.02] < 0.3 * lost[0.0]
    assert int(codes[0.0].min()) >= 0
    assert int(codes[0.0].max()) < 4


def test_refinement_goes_on_with_the_trellis() -> None:
    coded, metric = _coded(2.0), _metric()
    target = _table() + 0.3 * normal(ROWS, DIM, seed=5)
    config = TransformCodingConfig(codes="trellis", effort=6)
    before = metric.loss(target, coded.materialize())
    # In place where the structure stays.
    refined = coded.refined(target, int(ROWS * DIM * 2.0 / 8), falling_counts(ROWS), config, metric=metric)
    assert refined.window == 6
    assert metric.loss(target, refined.materialize()) < 0.9 * before
    plain = coded.refined(
        target, int(ROWS * DIM * 2.0 / 8), falling_counts(ROWS), TransformCodingConfig(), metric=metric
    )
    assert plain.window == 0


@pytest.mark.parametrize(
    ("name", "value"), [("codes", "lattice"), ("effort", 5), ("effort", 13), ("effort", 8.5), ("effort", True)]
)
def test_options_that_are_not_possible_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        TransformCodingConfig(**{"codes": "trellis", name: value})


def test_tied_tables_of_a_model_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = gpt2(vocab_size=600, n_embd=48)
    counts = falling_counts(600)
    plan = compress(model, "transform_coding", bits_per_weight=3, codes="trellis", effort=6, token_counts=counts)
    assert plan.tables[0].spec["window"] == 6
    assert any(bits < 0 for runs in plan.tables[0].spec["segments"] for bits, _ in runs)
    assert model.lm_head.factorization is model.transformer.wte.factorization
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(600, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
