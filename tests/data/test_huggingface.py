"""Text for models of transformers: tokenizers, caches, documents, batches, resuming, datasets."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightning_embcompress.cli.main import main
from lightning_embcompress.data import HuggingFaceText
from lightning_embcompress.data.tokenized import load_tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
TEXT = "the cat sat on a mat and saw that this was not what it had been told by the other cat"
WORDS = TEXT.split()
END, VOCAB_SIZE = "<|end|>", 60


def _train(path: Path, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE like GPT-2's, of a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted({*"abcdefghijklmnopqrstuvwxyz.0123456789", "Ġ", "Ċ"})
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    path.mkdir()
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer as transformers saves it."""
    path = tmp_path_factory.mktemp("tokenizers") / "bpe"
    PreTrainedTokenizerFast(tokenizer_object=_train(path), eos_token=END).save_pretrained(path)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "corpus"
    directory.mkdir()
    for name, lines in (("train-0", 40), ("train-1", 30), ("valid", 15), ("test", 15)):
        text = [" ".join(WORDS[(number + step) % len(WORDS)] for step in range(7)) for number in range(lines)]
        (directory / f"{name}.txt").write_text("\n\n".join([*text, f"{name}."]) + "\n")
    return directory


def make(corpus: Path, tokenizer: Path, **options: Any) -> HuggingFaceText:
    files = {"train_files": f"{corpus}/train-*.txt"} | {f"{s}_files": f"{corpus}/{s}.txt" for s in ("valid", "test")}
    sizes = {"block_size": 9, "batch_size": 4, "cache_dir": corpus.parent / "cache"}
    return HuggingFaceText(**{"tokenizer": str(tokenizer), **files, **sizes, **options})  # type: ignore[arg-type]


def _ids(data: HuggingFaceText, *texts: str) -> list[int]:
    eos = data.tokenizer.eos_token_id
    return [token for text in texts for token in [*data.tokenizer(text)["input_ids"], eos]]


def _predicted(loader: Any) -> list[int]:
    labels = torch.cat([batch["labels"] for batch in loader])
    return labels[:, 1:][labels[:, 1:] != -100].tolist()


def test_properties_before_setup(corpus: Path, tokenizer: Path) -> None:
    data = make(corpus, tokenizer)
    assert str(data).startswith("HuggingFaceText(tokenizer=")
    assert not (corpus.parent / "cache").exists(), "describing it must not tokenize it"
    assert data.vocab_size == len(data.vocabulary) == VOCAB_SIZE
    texts = [(corpus / f"train-{number}.txt").read_text() for number in range(2)]
    expected = torch.bincount(torch.tensor(_ids(data, *texts)), minlength=VOCAB_SIZE)
    assert data.token_counts.dtype == torch.int64
    assert torch.equal(data.token_counts, expected)
    assert data.token_counts[data.tokenizer.eos_token_id] == 2
    data.token_counts.zero_()
    assert torch.equal(data.token_counts, expected), "a caller may change its copy"


def test_every_token_is_evaluated_once(corpus: Path, tokenizer: Path) -> None:
    data = make(corpus, tokenizer)
    data.prepare_data()
    data.setup("fit")
    text = (corpus / "valid.txt").read_text()
    for _ in range(2):
        assert _predicted(data.val_dataloader()) == _ids(data, text)[1:]
    assert _predicted(data.test_dataloader()) == _ids(data, (corpus / "test.txt").read_text())[1:]
    batch = next(iter(data.train_dataloader()))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "input_ids": ((4, 9), torch.int64),
        "labels": ((4, 9), torch.int64),
    }
    whole = _ids(data, *((corpus / f"train-{number}.txt").read_text() for number in range(2)))
    assert sorted(_predicted(data.train_dataloader())) == sorted(whole[1:])
    in_order = make(corpus, tokenizer, shuffle_seed=None)
    assert _predicted(in_order.train_dataloader()) == whole[1:]


def test_lines_as_documents(corpus: Path, tokenizer: Path) -> None:
    data = make(corpus, tokenizer, documents="lines", eos_token="Ċ")
    lines = [line for line in (corpus / "valid.txt").read_text().split("\n") if line]
    ids = [token for line in lines for token in [*data.tokenizer(line)["input_ids"], data.tokenizer.get_vocab()["Ċ"]]]
    assert _predicted(data.val_dataloader()) == ids[1:]


def test_long_documents_are_cut_between_lines(corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(corpus, tokenizer)
    expected = whole._cache("train").ids().tolist()
    monkeypatch.setattr("lightning_embcompress.data.tokenized.PIECE_CHARACTERS", 50)
    monkeypatch.setattr("lightning_embcompress.data.tokenized._CALL_CHARACTERS", 200)
    cut = make(corpus, tokenizer, cache_dir=corpus.parent / "other")
    assert cut._cache("train").ids().tolist() == expected


def test_the_cache_follows_text_tokenizer_and_options(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    make(corpus, tokenizer).prepare_data()
    cache = corpus.parent / "cache"
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*.ids")}
    assert len(kept) == 3
    assert {path.suffix for path in cache.iterdir()} == {".ids", ".npy", ".json", ".lock"}
    again = make(corpus, tokenizer)
    again.prepare_data()
    again.tokenizer("the cat sat", max_length=2, truncation=True)  # which stays set in it
    again.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.ids")} == kept
    make(corpus, tokenizer, documents="lines").prepare_data()
    assert len(list(cache.glob("*.ids"))) == 6
    (corpus / "valid.txt").write_text("the cat\n")
    changed = make(corpus, tokenizer)
    assert _predicted(changed.val_dataloader()) == _ids(changed, "the cat\n")[1:]
    other = tmp_path / "other"
    PreTrainedTokenizerFast(tokenizer_object=_train(other, 50), eos_token=END).save_pretrained(other)
    assert make(corpus, other).token_counts.shape == (50,)
    # A smaller one has the first of its tokens, but is another vocabulary.
    with pytest.raises(ValueError, match=r"another tokenizer, of 60 tokens.*tokenizer='.*other' has 50"):
        make(corpus, other).load_state_dict(again.state_dict())
    again.load_state_dict(make(corpus, tokenizer).state_dict())


def test_gpt2s_two_files_are_enough(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "two-files"
    trained = _train(path)
    trained.model.save(str(path))
    assert {file.name for file in path.iterdir()} == {"vocab.json", "merges.txt"}
    loaded = load_tokenizer(str(path))
    assert loaded("the cat.\n")["input_ids"] == trained.encode("the cat.\n").ids
    assert make(corpus, path, eos_token=END).val_dataloader()


def test_the_real_gpt2_tokenizer(tmp_path: Path) -> None:
    folder, text = SHARED / "gpt2-tokenizer", SHARED / "lm1b" / "vocab-counts.top1000.txt"
    if not folder.is_dir() or not text.is_file():
        pytest.skip(f"needs the tokenizer of GPT-2 and some text in {SHARED}")
    data = HuggingFaceText(str(folder), train_files=str(text), cache_dir=tmp_path, block_size=64)
    assert data.vocab_size == 50257
    ids = data._cache("train").ids()
    assert ids.dtype == np.uint16
    assert data.tokenizer.decode(ids[:-1]) == text.read_text()
    assert ids[-1] == 50256


class Recorder(LightningModule):
    """Keeps the batches it sees, and has something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["input_ids"])
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAfter(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def _fit(tmp_path: Path, data: HuggingFaceText, *callbacks: Callback, **options: Any) -> list[Tensor]:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"default_root_dir": tmp_path, "accelerator": "cpu", "enable_checkpointing": False, "max_epochs": 3}
    fit = {key: options.pop(key) for key in ("ckpt_path",) if key in options}
    model = Recorder()
    Trainer(**{**quiet, "num_sanity_val_steps": 1, **options}, callbacks=list(callbacks)).fit(model, data, **fit)
    return model.seen


@pytest.mark.parametrize("limit", [None, 6])
@pytest.mark.parametrize("step", [4, 6, 9, 12])
def test_resume_in_the_middle_of_an_epoch(
    corpus: Path, tokenizer: Path, tmp_path: Path, step: int, limit: int | None
) -> None:
    path = tmp_path / "middle.ckpt"
    whole = _fit(tmp_path, make(corpus, tokenizer), SaveAfter(step, path), limit_train_batches=limit)
    resumed = _fit(tmp_path, make(corpus, tokenizer), limit_train_batches=limit, ckpt_path=path)
    assert len(resumed) == len(whole) - step
    assert all(torch.equal(first, second) for first, second in zip(resumed, whole[step:], strict=True))
    per_epoch = len(whole) // 3
    assert not torch.equal(whole[0], whole[per_epoch]), "every epoch has an order of its own"


def test_trainer_without_held_out_text(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    data = make(corpus, tokenizer, valid_files=None, test_files=None)
    assert _fit(tmp_path, data, max_epochs=1)
    assert data.files("test") == []
    with pytest.raises(ValueError, match="no test text: name it with test_files"):
        data.test_dataloader()


def test_processes_read_different_blocks(corpus: Path, tokenizer: Path) -> None:
    class FakeTrainer:
        world_size, global_rank = 2, 1

    data = make(corpus, tokenizer, shuffle_seed=None)
    alone = list(data.val_dataloader())
    data.trainer = FakeTrainer()  # type: ignore[assignment]
    second = list(data.val_dataloader())
    assert torch.equal(second[0]["input_ids"][0], alone[0]["input_ids"][1])
    assert len(second) < len(alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size=1: it must be at least 2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"documents": "words"}, "documents='words' is not known"),
        ({"dataset": "wikitext"}, "dataset='wikitext' and train_files, valid_files, test_files are both given"),
        ({"train_files": None}, "There is no text: name files with train_files"),
        ({"valid_files": "no*"}, r"valid_files='no\*' matches no file"),
        ({"eos_token": "<stop>"}, f"eos_token='<stop>' is not a token of.*such as {END!r}".replace("|", r"\|")),
    ],
)
def test_errors_leave_nothing(corpus: Path, tokenizer: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(corpus, tokenizer, **options).prepare_data()
    assert not (corpus.parent / "cache").exists()


def test_tokenizers_that_do_not_load(corpus: Path, tmp_path: Path, tokenizer: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "tokenizer.json").write_text("{")
    mistakes = {empty: "holds no tokenizer", tmp_path / "no": "is not a directory", damaged: "cannot be loaded"}
    for path, message in mistakes.items():
        with pytest.raises(ValueError, match=f"tokenizer='{path}' {message}: give a directory with tokenizer.json"):
            _ = make(corpus, path).vocab_size
    nameless = tmp_path / "nameless"
    PreTrainedTokenizerFast(tokenizer_object=_train(nameless)).save_pretrained(nameless)
    with pytest.raises(ValueError, match="has no eos_token to put after documents: name one of its tokens"):
        make(corpus, nameless).prepare_data()


def test_text_without_tokens(corpus: Path, tokenizer: Path) -> None:
    (corpus / "valid.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="Tokenizing valid text: only 0 tokens, too few to predict any"):
        make(corpus, tokenizer, documents="lines").prepare_data()
    assert not list((corpus.parent / "cache").glob("*.tmp"))


def test_configured_by_jsonargparse() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    init_args = {"tokenizer": "gpt2", "train_files": ["a", "b*"], "documents": "lines", "cache_dir": "cache"}
    config = parser.parse_object(
        {"data": {"class_path": "lightning_embcompress.data.HuggingFaceText", "init_args": init_args}}
    )
    data = parser.instantiate_classes(parser.parse_string(parser.dump(config))).data
    assert data.patterns["train"] == ["a", "b*"]
    assert data.cache_dir == Path("cache")


def test_the_extra_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tokenizer: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-embcompress\[datasets\]"'):
        HuggingFaceText("gpt2", dataset="Salesforce/wikitext")
    assert main(["run", "gpt2", "--data.tokenizer", str(tokenizer)]) == 1
    assert "embcompress: error: dataset=... needs the package `datasets`" in capsys.readouterr().err


class Rows:
    """What is used of a `datasets.Dataset`."""

    column_names = ("text", "url")

    def __init__(self, *texts: Any) -> None:
        self.texts = texts
        self._fingerprint = str(hash(texts))

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Any:
        return ({"text": text, "url": 1} for text in self.texts)


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A module in the place of `datasets`, and the splits that it loads."""
    splits: dict[str, Any] = {"train": Rows(" the cat\n", "", " sat\n"), "validation": Rows("a mat", "was", "  ")}
    module: Any = ModuleType("datasets")

    def load_dataset(path: str, name: str | None) -> dict[str, Any]:
        if (path, name) != ("org/text", "raw"):
            raise FileNotFoundError(f"Dataset {path} is not there,\nsays the hub")
        return splits

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return splits


def _from_dataset(tmp_path: Path, tokenizer: Path, **options: Any) -> HuggingFaceText:
    given = {"dataset": "org/text", "dataset_config": "raw", "test_split": None, "cache_dir": tmp_path / "cache"}
    return HuggingFaceText(str(tokenizer), **{**given, "block_size": 4, **options})  # type: ignore[arg-type]


@pytest.mark.usefixtures("fake_datasets")
def test_datasets(tmp_path: Path, tokenizer: Path) -> None:
    data = _from_dataset(tmp_path, tokenizer, shuffle_seed=None)
    data.prepare_data()
    assert data.documents == "lines"
    assert _predicted(data.train_dataloader()) == _ids(data, " the cat\n", " sat\n")[1:]
    assert _predicted(data.val_dataloader()) == _ids(data, "a mat", "was")[1:]
    assert data.files("test") == []
    joined = _from_dataset(tmp_path, tokenizer, documents="files", shuffle_seed=None)
    assert _predicted(joined.train_dataloader()) == _ids(data, " the cat\n\n sat\n")[1:]
    assert int(joined.token_counts[data.tokenizer.eos_token_id]) == 1


def test_datasets_are_cached_by_their_fingerprint(
    tmp_path: Path, tokenizer: Path, fake_datasets: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_embcompress.data.hub.PIECE_CHARACTERS", 5)
    first = _from_dataset(tmp_path, tokenizer, documents="files").token_counts
    assert torch.equal(_from_dataset(tmp_path, tokenizer, documents="files").token_counts, first)
    assert len(list((tmp_path / "cache").glob("*.ids"))) == 1
    fake_datasets["train"] = Rows("that")
    assert not torch.equal(_from_dataset(tmp_path, tokenizer, documents="files").token_counts, first)


@pytest.mark.usefixtures("fake_datasets")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "org/none"}, "dataset='org/none' with dataset_config='raw' cannot be loaded.*there, says the hub"),
        (
            {"text_column": "backbone"},
            "text_column='backbone' is not in org/text/raw/train, which has the columns 'text', 'url'",
        ),
        ({"text_column": "url"}, "row 0 of org/text/raw/train: 'url' is 1, which is no text"),
        ({"test_split": "exam"}, "test_split='exam' is not in the dataset 'org/text', which has the splits 'train'"),
    ],
)
def test_datasets_that_do_not_fit(tmp_path: Path, tokenizer: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _from_dataset(tmp_path, tokenizer, **options).prepare_data()


def test_the_real_datasets_package(corpus: Path, tokenizer: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional package `datasets` is not installed")
    rows = [line for line in (corpus / "train-0.txt").read_text().split("\n") if line]
    saved = corpus.parent / "saved"
    made = {split: datasets.Dataset.from_dict({"text": rows}) for split in ("train", "validation")}
    datasets.DatasetDict(made).save_to_disk(str(saved))
    data = _from_dataset(corpus.parent, tokenizer, dataset=str(saved), dataset_config=None, shuffle_seed=None)
    assert _predicted(data.train_dataloader()) == _ids(data, *rows)[1:]
    folder = _from_dataset(
        corpus.parent, tokenizer, dataset=str(corpus), dataset_config=None, shuffle_seed=None, valid_split=None
    )
    assert folder.files("valid") == []
    assert len(_predicted(folder.train_dataloader())) > len(rows)
