"""Several vocabularies in one model, tokens that texts lack, and rows of data sets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_embcompress import EmbeddingCompression, compress
from lightning_embcompress.calibration.rows import as_batch
from lightning_embcompress.calibration.special_tokens import special_tokens
from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.tasks import plan
from lightning_embcompress.methods.registry import get_config
from lightning_embcompress.tables.finding import find_tables
from toys import adam, falling_counts, gpt2, token_ids

SOURCE, TARGET, DIM = 300, 200, 16
TABLES = ["source", "target", "out"]


class Translator(LightningModule):
    """An embedding of one vocabulary, and an embedding and a softmax of another."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.out = (
            nn.Embedding(SOURCE, DIM),
            nn.Embedding(TARGET, DIM),
            nn.Linear(DIM, TARGET),
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.out(torch.tanh(self.source(source).mean(1, keepdim=True) + self.target(target)))

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        source, target = batch
        return F.cross_entropy(self(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return adam(self)


PAIRS = TensorDataset(token_ids(16, 5, SOURCE), token_ids(16, 6, TARGET, seed=4))


def _counted(ids: Tensor, size: int) -> Tensor:
    return torch.bincount(ids.flatten(), minlength=size)


def test_statistics_in_one_pass(tmp_path: Path) -> None:
    model = Translator()
    found = collect_statistics(model, [PAIRS.tensors], lambda model, batch: model.training_step(batch), tables=TABLES)
    read = _counted(PAIRS.tensors[1][:, :-1], TARGET)
    assert torch.equal(found.token_counts, _counted(PAIRS.tensors[0], SOURCE))
    assert set(found.table_counts) == {"target", "out"}
    assert all(torch.equal(counts, read) for counts in found.table_counts.values())
    found.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    assert torch.equal(again.counts_of(["out"]), read)
    assert compress(model, ratio=3, statistics=again, tables=TABLES).ratio >= 3


@pytest.mark.parametrize("method", ["group_reduce", "transform_coding"])
def test_counts_by_table(method: str) -> None:
    counts = {"source": falling_counts(SOURCE), "target": falling_counts(TARGET), "out": falling_counts(TARGET, seed=1)}
    tasks = plan(Translator(), get_config(method), Budget(ratio=3), TABLES, token_counts=counts)
    for task in tasks:
        assert torch.equal(task.token_counts, counts[task.table.name])


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"source": falling_counts(SOURCE)}, "none for table 'target' of 200 rows"),
        ({"source": falling_counts(SOURCE), "targets": falling_counts(TARGET)}, "'targets' .*did you mean 'target'"),
        ({"source": falling_counts(TARGET), "target": falling_counts(TARGET)}, "300 rows of table 'source'"),
        (falling_counts(SOURCE), r"'source' \(300 rows\), 'target' \(200 rows\).*token_counts="),
        ([falling_counts(SOURCE), falling_counts(TARGET)], "token_counts="),
    ],
)
def test_mistakes_in_counts(counts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compress(Translator(), "group_reduce", ratio=3, tables=["source", "target"], token_counts=counts)
    with pytest.raises(ValueError, match="table 'source' must be 300 numbers"):
        compress(Translator(), "group_reduce", ratio=3, tables=["source"], token_counts=["many"] * SOURCE)


@pytest.mark.parametrize("batches", [0, 4])
def test_the_callback_counts_every_vocabulary(make_trainer: Callable[..., Trainer], batches: int) -> None:
    model = Translator()
    given: dict[str, Any] = {"ratio": 3, "refine_at_epochs": [1], "statistics_batches": batches}
    callback = EmbeddingCompression("transform_coding", tables=TABLES, **given)
    make_trainer(callback, max_epochs=2, num_sanity_val_steps=0).fit(model, DataLoader(PAIRS, batch_size=4))
    counts = callback._done.token_counts
    assert isinstance(counts, dict)
    assert torch.equal(counts["source"], _counted(PAIRS.tensors[0], SOURCE))
    assert torch.equal(counts["out"], _counted(PAIRS.tensors[1][:, :-1], TARGET))


def test_special_tokens_of_configs_and_tokenizers() -> None:
    class Tokenizer:
        all_special_ids, eos_token_id, mask_token_id = (7, 8), 7, 8

    model = nn.Module()
    model.lm, model.tokenizer = gpt2(eos_token_id=[5, 6], bos_token_id=6), Tokenizer()
    table = find_tables(model)[0]
    assert special_tokens(model, table) == {5: "eos", 6: "bos, eos", 7: "eos", 8: "mask"}
    assert special_tokens(nn.Sequential(nn.Embedding(9, 4)), table) == {}


def test_they_count_as_common_words(caplog: pytest.LogCaptureFixture) -> None:
    counts = falling_counts(300)
    counts[[7, 299]] = 0
    given: dict[str, Any] = {"token_counts": counts, "keep_rows": [299]}
    model = gpt2(bos_token_id=0, eos_token_id=7)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        (task,) = plan(model, get_config("transform_coding"), Budget(ratio=3), **given)
    common = int(task.token_counts[7])
    # Half of the text are words that occur at least so often.
    assert counts[counts >= common].sum() >= counts.sum() / 2 > counts[counts > common].sum()
    assert task.token_counts[299] == common
    others = torch.ones(300, dtype=torch.bool).index_fill(0, torch.tensor([7, 299]), False)
    assert torch.equal(task.token_counts[others], counts[others])
    assert "7 (eos), 299 (named)" in caplog.text
    assert not counts[7]


@pytest.mark.parametrize("method", ["group_reduce", "transform_coding"])
def test_a_row_that_is_kept_is_nearer(method: str) -> None:
    lost = {}
    for kept in (None, [250]):
        model = nn.Sequential(nn.Embedding(300, 16))
        torch.manual_seed(0)
        nn.init.normal_(model[0].weight)
        row = model[0].weight[250].detach().clone()
        compress(model, method, ratio=6, token_counts=falling_counts(300), keep_rows=kept)
        lost[kept is None] = float((model[0](torch.tensor(250)) - row).norm())
    assert lost[False] < 0.8 * lost[True]


@pytest.mark.parametrize(
    ("method", "rows", "said"),
    [
        ("transform_coding", [300], "keep_rows .*299"),
        ("transform_coding", [-1], "keep_rows .*-1"),
        ("transform_coding", {"tabel": [1]}, "keep_rows name 'tabel'"),
        ("low_rank", [1], "keep_rows .*'low_rank'"),
    ],
)
def test_rows_that_cannot_be_kept(method: str, rows: Any, said: str) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(300, 16)})
    with pytest.raises(ValueError, match=said):
        compress(model, method, ratio=3, token_counts=falling_counts(300), keep_rows=rows)
    assert type(model["table"]) is nn.Embedding


ROWS = [{"text": "a", "input_ids": [5, 6, 7, 8]}, {"text": "b", "input_ids": [9, 1, 2, 3]}]


def test_rows_of_a_data_set() -> None:
    model, columns = gpt2(), {"input_ids": torch.tensor([row["input_ids"] for row in ROWS])}
    expected = collect_statistics(model, [columns])
    rows = [{"input_ids": row["input_ids"], "idx": 3} for row in ROWS]
    collated = DataLoader([{"input_ids": row["input_ids"]} for row in ROWS], batch_size=2)
    tensors = [{"input_ids": ids} for ids in columns["input_ids"]]
    for batches in (ROWS, rows, tensors, collated, [{"input_ids": [row["input_ids"] for row in ROWS]}]):
        found = collect_statistics(model, batches)
        assert torch.equal(found.token_counts, expected.token_counts)
        torch.testing.assert_close(found.hidden, expected.hidden)


@pytest.mark.parametrize(
    ("rows", "said"),
    [([{"text": "a"}], "'text'.*input_ids"), ([{"input_ids": [[1, 2], [1]]}], "'input_ids' .*lengths")],
)
def test_rows_that_are_none(rows: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        collect_statistics(gpt2(), rows)
    assert as_batch((1, 2)) == (1, 2)


class _Padded(nn.Module):
    """An embedding of more rows than its softmax, as after special tokens, or padding, were added to one of them."""

    def __init__(self, rows: int = 160, words: int = 150) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(rows, 16), nn.Linear(16, words)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(ids))
        return logits


def _mean_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(("rows", "words"), [(160, 150), (150, 160)])
def test_one_vocabulary_with_other_padding_has_one_text(rows: int, words: int) -> None:
    model, ids = _Padded(rows, words), token_ids(vocab_size=150)
    statistics = collect_statistics(model, [ids], _mean_loss)
    counts = torch.bincount(ids[:, :-1].flatten(), minlength=160)
    assert torch.equal(statistics.counts_of(["embedding"]), counts[:rows])
    assert torch.equal(statistics.counts_of(["head"]), counts[:words])
    plan = compress(model, "transform_coding", ratio=2, statistics=statistics)
    assert [table.name for table in plan.tables] == ["embedding", "head"]
    # Counts of either are those of both.
    for size in (rows, words):
        compress(_Padded(rows, words), "group_reduce", ratio=2, groups=2, token_counts=counts[:size])
    with pytest.raises(ValueError, match="one entry for each of the .* rows of table"):
        compress(_Padded(rows, words), "group_reduce", ratio=2, groups=2, token_counts=counts[:155])
