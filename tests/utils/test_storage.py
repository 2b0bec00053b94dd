"""Which tensors are one, and what a whole model takes; sharded models are tested by `distributed`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_embcompress.compression.plan import apply_plan, compress
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.utils.storage import check_plain, identity_of, place_of


def test_tensors_that_are_one() -> None:
    table = torch.zeros(6, 4)
    same = table.view(6, 4)
    assert identity_of(table) == identity_of(same)
    for other in (table.view(4, 6), table[:3], table.view(torch.int32), table[1:], table.clone()):
        assert identity_of(table) != identity_of(other)
    assert place_of(table) == place_of(table[:3]) == place_of(table.view(torch.int32))
    # None of these has memory.
    for one, other in (
        (torch.empty(0), torch.empty(0)),
        (torch.empty(3, device="meta"), torch.empty(3, device="meta")),
    ):
        assert place_of(one) != place_of(other)
        assert place_of(one) == place_of(one)


class _Model(nn.Module):
    """Two tied layers, one that is registered twice, a view, and tensors of no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(500, 16)
        self.decoder = nn.Linear(16, 500)
        self.decoder.weight = self.encoder.weight
        self.norm = self.again = nn.LayerNorm(16)
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("cache", torch.empty(7), persistent=False)
        if not self.norm.weight.is_meta:
            self.register_buffer("view", self.norm.weight.detach())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shared_tensors_are_counted_once_on_any_device(device: str) -> None:
    rest = 4 * (500 + 2 * 16)
    dense = rest + 4 * 500 * 16
    with torch.device(device):
        model = _Model()
    assert model_bytes(model) == {"dense_bytes": dense, "stored_bytes": dense, "ratio": 1.0, "bits_per_weight": 32.0}
    apply_plan(model, compress(_Model(), "low_rank", rank=3))
    assert model.decoder.factorization.device.type == device
    stored = rest + model.encoder.factorization.stored_bytes()
    found = model_bytes(model)
    assert found.pop("bits_per_weight") == pytest.approx(32 * stored / dense)
    assert found == {"dense_bytes": dense, "stored_bytes": stored, "ratio": dense / stored}


class _Packed(nn.Parameter):
    """As weights that another library has quantized."""


def test_tensors_that_are_not_plain() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    check_plain(model, "save_compressed")
    model[0].weight = _Packed(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"save_compressed cannot store '0\.weight', a _Packed of .*quantizes it"):
        check_plain(model, "save_compressed")
