"""Statistics in files, and those of other models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.tables.finding import find_tables

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


_RECORD: dict[str, Any] = {"record": None, "metadata": None, "version": 1, "num_targets": 3, "skipped_batches": 0}
# Bytes, tensors that are changed (None: left out), the record, and what is named.
_DAMAGES: list[tuple[Any, str]] = [
    *((content, "") for content in (b"", slice(-1), slice(500), b"\xff" * 100)),
    ({"metadata": {}}, "something else"),
    ({"record": "{}"}, "'version'"),
    ({"record": "["}, "Expecting value"),
    ({"record": "[]"}, "list indices"),
    ({"version": 2}, "version is 2"),
    ({"num_targets": -1}, "num_targets is -1"),
    ({"token_counts": None}, "'token_counts'"),
    ({"token_counts": -torch.arange(VOCAB_SIZE)}, "token_counts"),
    ({"hidden/decoder": torch.zeros(6, 5, dtype=torch.float64)}, "'hidden/decoder'"),
    ({"hidden_mean/decoder": torch.zeros(5, dtype=torch.float64)}, "'hidden_mean/decoder'"),
    ({"probabilities/decoder": torch.zeros(VOCAB_SIZE)}, "'probabilities/decoder'"),
    ({"gradients/encoder": torch.full((5, 5), torch.nan, dtype=torch.float64)}, "'gradients/encoder'"),
    ({"else": torch.zeros(1)}, "'else'"),
]


@pytest.mark.parametrize(("damage", "said"), _DAMAGES)
def test_damaged_and_foreign_files(damage: Any, said: str, statistics: Statistics, tmp_path: Path) -> None:
    file, name = tmp_path / "statistics.safetensors", "lightning-embcompress statistics"
    statistics.save(file)
    if not isinstance(damage, dict):
        file.write_bytes(damage if isinstance(damage, bytes) else file.read_bytes()[damage])
    else:
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        tensors |= {key: value for key, value in damage.items() if key not in _RECORD}
        record = {**_RECORD, **{key: value for key, value in damage.items() if key in _RECORD}}
        text, is_ours = record.pop("record"), record.pop("metadata") is None
        tensors = {key: value for key, value in tensors.items() if value is not None}
        save_file(tensors, file, {name: text or json.dumps(record)} if is_ours else {})
    with pytest.raises(ValueError, match=f"statistics.safetensors' cannot be read as statistics: .*{said}"):
        Statistics.load(file)


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
