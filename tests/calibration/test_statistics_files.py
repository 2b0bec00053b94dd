"""Statistics in files, and those of other models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.tables.replacement import find_tables

VOCAB_SIZE, EMBEDDING_DIM, HEAD_DIM = 90, 5, 6


@pytest.fixture
def statistics() -> Statistics:
    torch.manual_seed(0)
    hidden = torch.randn(20, HEAD_DIM, dtype=torch.float64)
    gradients = torch.randn(20, EMBEDDING_DIM, dtype=torch.float64)
    return Statistics(
        torch.arange(VOCAB_SIZE),
        {"decoder": hidden.T @ hidden / 20},
        {"decoder": hidden.mean(0)},
        {"decoder": torch.rand(VOCAB_SIZE, dtype=torch.float64).softmax(0)},
        {"encoder": gradients.T @ gradients / 20},
        num_targets=20,
        skipped_batches=2,
    )


def test_saved_and_loaded(statistics: Statistics, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    statistics.save(file)
    loaded = Statistics.load(str(file))
    torch.testing.assert_close(vars(loaded), vars(statistics), rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with pytest.raises(FileNotFoundError, match="nothing.safetensors.*collect them"):
        Statistics.load(tmp_path / "nothing.safetensors")
    with pytest.raises(OSError, match="could not be written"):
        statistics.save(tmp_path / "missing" / "statistics.safetensors")


def test_damaged_and_foreign_files(statistics: Statistics, tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    statistics.save(file)
    whole, tensors = file.read_bytes(), {name: tensor.clone() for name, tensor in load_file(file).items()}
    record = {"version": 1, "num_targets": 3, "skipped_batches": 0}

    def refused(said: str) -> None:
        with pytest.raises(ValueError, match=f"statistics.safetensors' cannot be read as statistics: .*{said}"):
            Statistics.load(file)

    name = "lightning-embcompress statistics"

    def write(tensors: dict[str, Tensor], **changes: Any) -> None:
        save_file(tensors, file, {name: json.dumps({**record, **changes})})

    for content in (b"", whole[:-1], whole[: len(whole) // 2], b"\xff" * 100):
        file.write_bytes(content)
        refused("")
    save_file(tensors, file)
    refused("it holds something else")
    save_file(tensors, file, {name: "{}"})
    refused("'version' is missing")
    save_file(tensors, file, {name: "["})
    refused("Expecting value")
    save_file(tensors, file, {name: "[]"})
    refused("list indices")
    write(tensors, version=2)
    refused("its version is 2")
    write(tensors, num_targets=-1)
    refused("num_targets is -1")
    write({key: tensor for key, tensor in tensors.items() if key != "token_counts"})
    refused("'token_counts' is missing")
    write({**tensors, "token_counts": -tensors["token_counts"]})
    refused("token_counts are no counts")
    for key, value in {
        "hidden/decoder": torch.zeros(6, 5, dtype=torch.float64),
        "hidden_mean/decoder": torch.zeros(5, dtype=torch.float64),
        "probabilities/decoder": torch.zeros(VOCAB_SIZE),
        "gradients/encoder": torch.full((5, 5), torch.nan, dtype=torch.float64),
    }.items():
        write({**tensors, key: value})
        refused(f"'{key}' is damaged")
    write({**tensors, "else": torch.zeros(1)})
    refused("'else' is unknown")
    write(tensors)
    assert Statistics.load(file).num_targets == 3


def test_statistics_of_another_model(statistics: Statistics) -> None:
    def other(vocab_size: int, dim: int, name: str = "encoder") -> Any:
        return find_tables(nn.ModuleDict({name: nn.Embedding(vocab_size, dim)}))

    statistics.check(other(VOCAB_SIZE, EMBEDDING_DIM))

    with pytest.raises(ValueError, match=r"count 90 tokens, but table 'encoder' \(80, 5\) has 80 rows: .*collect them"):
        statistics.check(other(80, EMBEDDING_DIM))
    with pytest.raises(ValueError, match=r"'encoder' \(90, 7\) must be 7 x 7 moments, but gradients\['encoder'\] has"):
        statistics.check(other(90, 7))
    with pytest.raises(ValueError, match="no moments of table 'words' .*only of 'encoder', 'decoder'"):
        statistics.check(other(90, 5, "words"))
