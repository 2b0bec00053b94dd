"""Models that are larger than the memory of a device, block by block through it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import backend_registration

from lightning_embcompress import compress
from lightning_embcompress.calibration.statistics import collect_statistics
from lightning_embcompress.integrations import placement as placing
from lightning_embcompress.integrations.placement import Placement
from toys import gpt2 as gpt2_model

_CPU = torch.device("cpu")
_IDS = torch.arange(24).reshape(2, 12)


def _larger(model: nn.Module, monkeypatch: pytest.MonkeyPatch, free: int) -> Placement:
    """As if a device had little memory; it is the CPU all the same."""
    monkeypatch.setattr(placing, "free_memory", lambda _: free)
    placement = Placement(model, _CPU)
    placement.is_larger = True
    return placement


def _is_away(model: Any) -> list[bool]:
    return [any(tensor.is_meta for tensor in block.parameters()) for block in model.transformer.h]


def test_blocks_that_do_not_fit_come_when_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    model: Any = gpt2_model(n_layer=3)
    plain = copy.deepcopy(model)
    block = sum(tensor.nbytes for tensor in model.transformer.h[0].parameters())
    whole = sum(tensor.nbytes for tensor in model.parameters())
    blocks = len(model.transformer.h)
    assert blocks > 1
    # Room for all else, two blocks in passing, and the first of them for good.
    placement = _larger(model, monkeypatch, whole - blocks * block + 3 * block)
    expected = collect_statistics(plain, [{"input_ids": _IDS}])
    with placement.running():
        assert _is_away(model) == [False] + [True] * (blocks - 1)
        assert torch.equal(model(_IDS).logits, plain(_IDS).logits)
        found = collect_statistics(model, [{"input_ids": _IDS}])
    assert not any(_is_away(model))
    assert not any("_hf_hook" in vars(part) for part in model.modules())
    for kind in ("hidden", "gradients"):
        for path, moment in getattr(expected, kind).items():
            torch.testing.assert_close(getattr(found, kind)[path], moment)
    with placement.solving(["transformer.wte", "lm_head"]):
        plan = compress(model, "transform_coding", ratio=3, statistics=found)
    compress(plain, "transform_coding", ratio=3, statistics=found)
    assert plan.tables
    with placement.running():
        assert torch.equal(model(_IDS).logits, plain(_IDS).logits)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_what_a_model_needs_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    device, model = torch.device("cuda"), gpt2_model(n_layer=3)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(placing, "free_memory", lambda _: size)
    assert not Placement(model, device).is_larger
    assert not Placement(nn.Linear(10**6, 10**6, device="meta"), device, is_called=False).is_larger
    monkeypatch.setattr(placing, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="accelerate"):
        Placement(model, device, workspace=1)
    monkeypatch.setattr(placing, "find_spec", lambda _: object())
    assert Placement(model, device, workspace=1).is_larger
    with pytest.raises(ValueError, match="Linear does not name its blocks"):
        Placement(nn.Linear(100, 100), device, workspace=size)


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch has no backends in Python",
)
def test_nothing_is_mixed_with_tensors_of_another_device() -> None:
    worker, tests = Path(__file__).parent / "workers" / "another_device.py", Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    done = subprocess.run(
        [sys.executable, str(worker)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("done\n")
