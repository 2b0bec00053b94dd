"""Which kernels run."""

from __future__ import annotations

import pytest
import torch

from lightning_embcompress.layers.fused_loss import fused_cross_entropy
from lightning_embcompress.methods.kernels import choice
from lightning_embcompress.methods.kernels.choice import VARIABLE, takes_triton


class Cuda(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0


@pytest.fixture
def tensor(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(choice, "TRITON_IS_INSTALLED", True)
    monkeypatch.setattr(choice, "_has_compiler", lambda: True)
    monkeypatch.setattr(choice, "_runs_on", choice._runs_on.__wrapped__)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    return torch.zeros(2).as_subclass(Cuda)


def test_gpus_take_triton(tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert takes_triton(tensor)
    assert not takes_triton(torch.zeros(2))
    assert takes_triton(tensor.bfloat16())
    assert not takes_triton(tensor.double())
    monkeypatch.setenv(VARIABLE, "auto")
    assert takes_triton(tensor)
    monkeypatch.setenv(VARIABLE, "torch")
    assert not takes_triton(tensor)


def test_only_where_triton_can_run(tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    for target, name, value in (
        (choice, "TRITON_IS_INSTALLED", False),
        (choice, "_has_compiler", lambda: False),
        (torch.cuda, "get_device_capability", lambda device: (7, 5)),
        (torch.compiler, "is_compiling", lambda: True),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(target, name, value)
            assert not takes_triton(tensor)
    assert takes_triton(tensor)


def test_triton_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setattr(choice, "TRITON_IS_INSTALLED", True)
    assert takes_triton(torch.zeros(2))
    assert not takes_triton(torch.zeros(2, dtype=torch.float64))
    monkeypatch.setattr(choice, "TRITON_IS_INSTALLED", False)
    with pytest.raises(ModuleNotFoundError, match="EMBCOMPRESS_KERNELS=triton needs Triton, which is not installed"):
        takes_triton(torch.zeros(2))


def test_another_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "tritn")
    with pytest.raises(ValueError, match="EMBCOMPRESS_KERNELS must be one of auto, torch, triton, it is 'tritn'"):
        fused_cross_entropy(torch.nn.Linear(2, 3), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))


def test_the_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    look = choice._has_compiler.__wrapped__
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert not look()
