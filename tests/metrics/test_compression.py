"""The compression ratio as a metric."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_embcompress.compression.plan import compress, plan_of
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.metrics import CompressionRatio


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(2000, 32), nn.Linear(32, 32), nn.Linear(32, 2000))


def _compressed() -> nn.Sequential:
    model = _model()
    compress(model, "low_rank", ratio=4)
    return model


def test_ratio_of_the_tables_and_of_the_model() -> None:
    model = _compressed()
    whole, tables = CompressionRatio(), CompressionRatio(tables_only=True)
    for metric in (whole, tables):
        metric.update(model)
    assert whole.compute().item() == pytest.approx(model_bytes(model)["ratio"])
    assert tables.compute().item() == pytest.approx(plan_of(model).ratio)
    assert tables.compute() > whole.compute() > 1
    assert tables.compute() >= 4


def test_nothing_measured_yet() -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert torch.isnan(CompressionRatio().compute())


@pytest.mark.parametrize("call", ["update", "forward"])
def test_last_model_counts(call: str) -> None:
    metric = CompressionRatio()
    for model in (_model(), _compressed()):
        getattr(metric, call)(model)
    assert metric.compute().item() == pytest.approx(model_bytes(_compressed())["ratio"])
    metric.reset()
    metric.update(_model())
    assert metric.compute().item() == 1
