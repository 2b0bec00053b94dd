"""Text for models of transformers: tokenizers, documents, packed blocks and datasets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from lightning_embcompress.cli.main import main
from lightning_embcompress.data import HuggingFaceText
from lightning_embcompress.data.tokenized import load_tokenizer
from toys import save_byte_tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

Make = Callable[..., HuggingFaceText]


def _ids(data: HuggingFaceText, *texts: str) -> list[int]:
    eos = data.tokenizer.eos_token_id
    return [token for text in texts for token in [*data.tokenizer(text)["input_ids"], eos]]


def _predicted(loader: Any) -> list[int]:
    labels = torch.cat([batch["labels"] for batch in loader])
    return labels[:, 1:][labels[:, 1:] != -100].tolist()


def test_every_token_is_evaluated_once(subwords: Make, corpus: Path) -> None:
    data = subwords(batch_size=4)
    data.prepare_data()
    data.setup("fit")
    for _ in range(2):
        assert _predicted(data.val_dataloader()) == _ids(data, (corpus / "valid.txt").read_text())[1:]
    assert _predicted(data.test_dataloader()) == _ids(data, (corpus / "test.txt").read_text())[1:]
    batch = next(iter(data.train_dataloader()))
    assert {(value.shape, value.dtype) for value in batch.values()} == {((4, 17), torch.int64)}
    whole = _ids(data, *((corpus / f"train-{number}.txt").read_text() for number in range(2)))
    assert sorted(_predicted(data.train_dataloader())) == sorted(whole[1:])
    assert _predicted(subwords(shuffle_seed=None).train_dataloader()) == whole[1:]
    assert data.token_counts[data.tokenizer.eos_token_id] == 2


def test_lines_as_documents(subwords: Make, corpus: Path) -> None:
    (corpus / "valid.txt").write_text("the cat\n\n  \nsat on a mat\n")
    data = subwords(documents="lines", eos_token="Ċ")
    end = data.tokenizer.get_vocab()["Ċ"]
    ids = [token for line in ("the cat", "sat on a mat") for token in [*data.tokenizer(line)["input_ids"], end]]
    assert _predicted(data.val_dataloader()) == ids[1:]
    (corpus / "valid.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="valid text: only 0 tokens"):
        subwords(documents="lines").prepare_data()


def test_long_documents_are_cut_between_lines(subwords: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = subwords()
    expected = data.tokens("train").ids[:].tolist()
    for name, value in (("PIECE_CHARACTERS", 50), ("CALL_CHARACTERS", 200)):
        monkeypatch.setattr(f"lightning_embcompress.data.tokenized.{name}", value)
    assert subwords(cache_dir=tmp_path / "other").tokens("train").ids[:].tolist() == expected
    # Also by a tokenizer whose rules are not at hand.
    monkeypatch.setattr(type(data.tokenizer), "backend_tokenizer", None)
    assert subwords(cache_dir=tmp_path / "third").tokens("train").ids[:].tolist() == expected


def test_the_cache_follows_text_tokenizer_and_options(subwords: Make, corpus: Path, tmp_path: Path) -> None:
    def kept() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (corpus.parent / "cache").rglob("*.arrow")}

    subwords().prepare_data()
    before = kept()
    assert len(before) == 3
    again = subwords()
    again.tokenizer("the cat sat", max_length=2, truncation=True)  # which stays set in it
    again.prepare_data()
    assert kept() == before
    subwords(documents="lines").prepare_data()
    assert len(kept()) == 6
    (corpus / "valid.txt").write_text("the cat\n")
    assert _predicted(subwords().val_dataloader()) == _ids(again, "the cat\n")[1:]
    save_byte_tokenizer(tmp_path / "other", "the cat", 270)
    other = subwords(tokenizer=str(tmp_path / "other"))
    assert other.token_counts.shape == (other.vocab_size,)
    with pytest.raises(ValueError, match=rf"expects {again.vocab_size} tokens.*tokenizer='.*other'"):
        other.load_state_dict(again.state_dict())
    again.load_state_dict(subwords().state_dict())


def test_gpt2s_two_files_are_enough(subwords: Make, tokenizer: Path, tmp_path: Path) -> None:
    trained = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    path = tmp_path / "two-files"
    path.mkdir()
    trained.model.save(str(path))
    assert {file.name for file in path.iterdir()} == {"vocab.json", "merges.txt"}
    assert load_tokenizer(str(path))("the cat.\n")["input_ids"] == trained.encode("the cat.\n").ids
    assert subwords(tokenizer=str(path), eos_token="<|end|>").val_dataloader()


def test_the_real_gpt2_tokenizer(tmp_path: Path) -> None:
    folder, text = SHARED / "gpt2-tokenizer", SHARED / "lm1b" / "vocab-counts.top1000.txt"
    if not folder.is_dir() or not text.is_file():
        pytest.skip(f"needs the tokenizer of GPT-2 and some text in {SHARED}")
    data = HuggingFaceText(str(folder), train_files=str(text), cache_dir=tmp_path, block_size=64)
    assert data.vocab_size == 50257
    ids = data.tokens("train").ids[:]
    assert ids.dtype == np.uint16
    assert data.tokenizer.decode(ids[:-1]) == text.read_text()
    assert ids[-1] == 50256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size=1"),
        ({"documents": "words"}, "documents='words'"),
        ({"dataset": "wikitext"}, "dataset='wikitext' and train_files, valid_files, test_files are both given"),
        ({"train_files": None}, "train_files"),
        ({"eos_token": "<stop>"}, r"eos_token='<stop>' is not a token of.*<\|end\|>"),
    ],
)
def test_errors_leave_nothing(subwords: Make, corpus: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subwords(**options).prepare_data()
    assert not (corpus.parent / "cache").exists()


def test_tokenizers_that_do_not_load(subwords: Make, tmp_path: Path) -> None:
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    for name in ("empty", "no", "damaged"):
        with pytest.raises(ValueError, match=f"tokenizer='{tmp_path / name}' .*tokenizer.json"):
            _ = subwords(tokenizer=str(tmp_path / name)).vocab_size
    save_byte_tokenizer(tmp_path / "nameless", "the cat", eos=False)
    with pytest.raises(ValueError, match="has no eos_token"):
        subwords(tokenizer=str(tmp_path / "nameless")).prepare_data()


def test_the_extra_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["run", "gpt2", "--data.tokenizer", str(tokenizer)]) == 1
    assert 'pip install "lightning-embcompress[text]"' in capsys.readouterr().err


SPLITS = {"train": [" the cat\n", "", " sat\n"], "validation": ["a mat", "was", "  "]}


@pytest.fixture
def from_dataset(tmp_path: Path, tokenizer: Path) -> Make:
    """Make a data module of a dataset in a folder."""

    def make(splits: dict[str, list[Any]] = SPLITS, **options: Any) -> HuggingFaceText:
        folder = tmp_path / "saved"
        rows = {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in splits.items()}
        datasets.DatasetDict(rows).save_to_disk(str(folder))
        given = {"dataset": str(folder), "test_split": None, "cache_dir": tmp_path / "cache", "shuffle_seed": None}
        return HuggingFaceText(str(tokenizer), **{**given, "block_size": 4, **options})  # type: ignore[arg-type]

    return make


def test_rows_of_a_dataset(from_dataset: Make) -> None:
    data = from_dataset()
    data.prepare_data()
    assert data.documents == "lines"
    assert _predicted(data.train_dataloader()) == _ids(data, " the cat\n", " sat\n")[1:]
    assert _predicted(data.val_dataloader()) == _ids(data, "a mat", "was")[1:]
    with pytest.raises(ValueError, match="no test text"):
        data.test_dataloader()
    joined = from_dataset(documents="files")
    assert _predicted(joined.train_dataloader()) == _ids(data, " the cat\n\n sat\n")[1:]
    assert int(joined.token_counts[data.tokenizer.eos_token_id]) == 1


def test_datasets_are_cached_by_their_fingerprint(
    from_dataset: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_embcompress.data.tokenized.PIECE_CHARACTERS", 5)
    first = from_dataset(documents="files").token_counts
    assert torch.equal(from_dataset(documents="files").token_counts, first)
    changed = from_dataset({**SPLITS, "train": ["that"]}, documents="files").token_counts
    assert not torch.equal(changed, first)
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 2


def test_a_folder_of_text_files_is_a_dataset(corpus: Path, from_dataset: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", corpus.parent / "downloads")
    folder = from_dataset(dataset=str(corpus), valid_split=None)
    assert folder.val_dataloader() == []
    lines = "".join((corpus / f"train-{number}.txt").read_text() for number in range(2)).split("\n")
    assert _predicted(folder.train_dataloader()) == _ids(folder, *filter(None, lines))[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "./none"}, "dataset='./none' with dataset_config=None cannot be loaded. What datasets says: "),
        ({"text_column": "body"}, "text_column='body' is not in .*train, which has the columns 'text'"),
        ({"splits": {"train": [1]}, "valid_split": None}, "row 0 of .*train: 'text' is 1, which is no text"),
        ({"test_split": "exam"}, "test_split='exam'.*'train', 'validation'"),
    ],
)
def test_datasets_that_do_not_fit(from_dataset: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dataset(**options).prepare_data()
