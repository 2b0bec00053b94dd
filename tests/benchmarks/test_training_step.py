"""A training step with compressed tables: `pytest tests/benchmarks/test_training_step.py -s --benchmark-only`.

Ratios of the same run to the dense model, with the loss that all of them have, a chunk of tokens at a time, and with
torch's own of all logits. Memory is of parameters, gradients, optimizer state and activations, each side in a process
of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measure import Side, in_turns
from training_step import VOCAB_SIZE, Training, language_model

from lightning_embcompress import compress
from lightning_embcompress.modules import LSTMLanguageModel

pytestmark = pytest.mark.timeout(1800)

ROUNDS = 3


def _compressed(method: str, ratio: float) -> LSTMLanguageModel:
    model = language_model()
    with torch.no_grad():
        # A falling spectrum, as trained tables have.
        for table in (model.encoder.weight, model.decoder.weight):
            table.mul_(torch.logspace(0, -1.5, table.shape[1]))
    compress(model, method, ratio=ratio, token_counts=2_000_000 // torch.arange(1, VOCAB_SIZE + 1) + 1)
    return model


def _peak(model: LSTMLanguageModel, folder: Path, side: str) -> int:
    path = folder / "model.pt"
    torch.save(model, path)
    script = Path(__file__).with_name("training_step.py")
    command = [sys.executable, str(script), str(path), side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_training_step(benchmark, tmp_path: Path) -> None:
    models = {
        "dense": language_model(),
        "group_reduce 4x": _compressed("group_reduce", 4),
        "transform_coding 4x": _compressed("transform_coding", 4),
        "transform_coding 20x": _compressed("transform_coding", 20),
    }
    peaks = {name: _peak(model, tmp_path, "chunks") for name, model in models.items()}
    peaks["dense, all logits"] = _peak(models["dense"], tmp_path, "whole")
    steps = {name: Training(model) for name, model in models.items()}
    steps["dense, all logits"] = Training(language_model(), whole_logits=True)
    sides = {name: Side(step) for name, step in steps.items()}
    found = benchmark.pedantic(lambda: in_turns(sides, ROUNDS), rounds=1)
    least = {name: timing.seconds for name, timing in found.items()}
    for name in steps:
        ratios = [of[name] / of[dense] for of in (least, peaks) for dense in ("dense", "dense, all logits")]
        print(
            f"{name}: {ratios[0]:.2f} of dense ({ratios[1]:.2f} with all logits) in time; {peaks[name] / 1e6:.0f} MB, "
            f"{ratios[2]:.2f} ({ratios[3]:.2f})"
        )
    assert least["group_reduce 4x"] < 0.6 * least["dense"]
    assert least["dense"] < least["dense, all logits"]
    assert peaks["dense"] < 0.7 * peaks["dense, all logits"]
    for name in ("group_reduce 4x", "transform_coding 4x", "transform_coding 20x"):
        assert peaks[name] < 0.4 * peaks["dense, all logits"]
