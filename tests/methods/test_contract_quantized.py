"""Every method in few bits: while its factors train, and packed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_embcompress.methods.registry import (
    METHODS,
    Factorization,
    Quantization,
    SharedBasisBlocks,
    check_spec,
    factorization_from_spec,
)
from toys import DIM, VOCAB_SIZE, factors_of, falling_table, loss_metric, normal


def _check_reads(factors: Factorization[Any], tolerance: float = 1e-5) -> None:
    dense = factors.materialize()
    ids = torch.tensor([[3, 0, 149], [3, 40, 41]])
    torch.testing.assert_close(factors.rows(ids), dense[ids], rtol=tolerance, atol=tolerance)
    for states in (1, 30):
        hidden = normal(states, DIM, seed=5, dtype=factors.dtype)
        expected = hidden.double() @ dense.double().T
        assert (factors.logits(hidden).double() - expected).abs().max() < 10 * tolerance * (1 + expected.abs().max())


@pytest.mark.parametrize(
    ("method", "ranges"),
    [*((method, "minmax") for method in METHODS), ("low_rank", "learned"), ("tensor_train", "learned")],
)
def test_what_trains_is_what_will_be_packed(method: str, ranges: Any, tmp_path: Path) -> None:
    factors = factors_of(method)
    before = list(factors.parameters())
    prepared = factors.prepared(Quantization(bits=5, group_size=16, ranges=ranges))
    assert prepared.is_prepared
    if method != "transform_coding":
        kept = [parameter for name, parameter in prepared.named_parameters() if not name.endswith("scales")]
        assert [id(parameter) for parameter in kept] == [id(parameter) for parameter in before]
    _check_reads(prepared)
    hidden = normal(20, DIM, seed=2, dtype=torch.float32)
    (prepared.rows(torch.arange(VOCAB_SIZE)).square().sum() + prepared.logits(hidden).square().sum()).backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())

    packed = prepared.converted()
    assert packed.is_packed
    assert not packed.is_prepared
    assert not prepared.is_packed
    _check_reads(packed)
    torch.testing.assert_close(packed.materialize(), prepared.materialize(), rtol=1e-5, atol=1e-5)
    for some in (prepared, packed):
        check_spec(some.spec())
        empty = factorization_from_spec(json.loads(json.dumps(some.spec())), torch.float32, torch.device("meta"))
        assert empty.stored_bytes() == some.stored_bytes()
        empty.load_state_dict(some.state_dict(), assign=True)
        assert torch.equal(empty.materialize(), some.materialize())
        assert empty.spec() == some.spec()
        save_file({name: tensor.contiguous() for name, tensor in some.state_dict().items()}, tmp_path / "factors")
        on_disk = (tmp_path / "factors").stat().st_size + len(json.dumps(some.spec(), separators=(",", ":")))
        # The header of the file has the names of the tensors, of which an estimate is counted.
        assert abs(on_disk - some.stored_bytes()) <= 60 * len(some.state_dict()) + 100


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_without_training(method: str, with_metric: bool) -> None:
    factors, metric = factors_of(method), loss_metric(VOCAB_SIZE, DIM)
    if method == "transform_coding":
        factors = SharedBasisBlocks.solve(falling_table(last=1.0), 6000, metric, None, 2, ())
    parameters = {name: parameter.detach().clone() for name, parameter in factors.named_parameters()}
    dense = factors.materialize()
    nearest = copy.deepcopy(factors).prepared(Quantization(4, 16)).converted()
    packed = factors.quantized(Quantization(4, 16), metric if with_metric else None)
    assert packed.is_packed
    assert factors.quantization is None
    for name, parameter in factors.named_parameters():
        assert torch.equal(parameter, parameters[name])
    assert packed.stored_bytes() == nearest.stored_bytes()
    _check_reads(packed)
    lost, before = (
        metric.loss(dense, some.materialize()) if with_metric else float((dense - some.materialize()).square().sum())
        for some in (packed, nearest)
    )
    assert lost <= 1.05 * before
    if method in ("low_rank", "weighted_low_rank", "transform_coding") and with_metric:
        assert lost < 0.8 * before
