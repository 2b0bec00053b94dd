"""What data modules of words and of subwords share, and the streams of words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, Trainer
from torch import Tensor

from lightning_embcompress.data import HuggingFaceText, OneBillionWord, PythonDocs, TextFiles
from toys import Recorder

Make = Callable[..., Any]
MakeTrainer = Callable[..., Trainer]


def inputs_of(batches: list[Any]) -> list[Tensor]:
    return [batch["input_ids"] if isinstance(batch, dict) else batch[0] for batch in batches]


def test_description_opens_nothing(make: Make, corpus: Path) -> None:
    # Lightning's own description asks every loader.
    assert str(make(train_files="no*")).split("(")[0] in ("TextFiles", "HuggingFaceText")
    assert not (corpus.parent / "cache").exists()


def test_properties_before_setup(make: Make) -> None:
    data = make()
    assert data.vocab_size == len(data.vocabulary)
    expected = torch.bincount(torch.from_numpy(data.tokens("train").ids[:].astype("int64")), minlength=data.vocab_size)
    assert data.token_counts.dtype == torch.int64
    assert torch.equal(data.token_counts, expected)
    data.token_counts.zero_()
    assert torch.equal(data.token_counts, expected), "a caller may change its copy"


def test_streams_of_words(words: Make, corpus: Path) -> None:
    data = words(eval_batch_size=1, sequence_length=1000)
    data.prepare_data()
    data.setup()
    assert data.vocab_size == 7 + 5 - 1
    assert int(data.token_counts.sum()) == 60 * 5
    # "valid" is a word of its own only in held-out text.
    assert "valid" not in data.vocabulary
    ((inputs, _),) = list(data.train_dataloader())
    assert inputs.shape == (4, (300 - 1) // 4)
    ((_, targets),) = list(data.val_dataloader())
    text = (corpus / "valid.txt").read_text().replace("\n", " </S> ").split()
    assert targets.flatten().tolist() == data.vocabulary.encode(text[1:])
    assert len(data.test_dataloader()) == 1


def test_trainer_fits_validates_and_tests(make: Make, make_trainer: MakeTrainer) -> None:
    data, model = make(), Recorder()
    trainer = make_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(model, datamodule=data)
    assert len(model.evaluated) == 2 * len(data.val_dataloader())
    trainer.test(model, datamodule=data, verbose=False)
    assert len(model.evaluated) == 2 * len(data.val_dataloader()) + len(data.test_dataloader())
    make_trainer(max_epochs=1, overfit_batches=2).fit(Recorder(), datamodule=data)


def test_trainer_without_held_out_text(make: Make, make_trainer: MakeTrainer) -> None:
    data, model = make(valid_files=None, test_files=None), Recorder()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, datamodule=data)
    assert len(model.trained) == len(data.train_dataloader())
    for run, split in ((trainer.validate, "valid"), (trainer.test, "test")):
        with pytest.raises(ValueError, match=f"{split}_files"):
            run(model, datamodule=data, verbose=False)


def test_processes_read_different_text(make: Make) -> None:
    data = make()
    alone, held_out = inputs_of(list(data.train_dataloader())), len(data.val_dataloader())
    data.trainer = SimpleNamespace(world_size=2, global_rank=1, num_training_batches=1)
    second = inputs_of(list(data.train_dataloader()))
    assert alone[0].shape == second[0].shape
    assert not torch.equal(alone[0], second[0])
    assert len(data.val_dataloader()) < held_out


def test_resume_with_another_vocabulary(words: Make) -> None:
    state = words().state_dict()
    assert all(isinstance(value, (int, str)) for value in state.values())
    words().load_state_dict(state)
    with pytest.raises(ValueError, match=r"expects 11 tokens.*has 6 .*vocabulary_file"):
        words(max_vocab_size=6).load_state_dict(state)


def test_sizes(make: Make, words: Make) -> None:
    for name in ("batch_size", "eval_batch_size", "num_workers"):
        with pytest.raises(ValueError, match=name):
            make(**{name: -1})
    for name in ("sequence_length", "min_count", "max_vocab_size"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            words(**{name: 0})


def test_errors_leave_nothing(make: Make, words: Make, corpus: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"valid_files='no\*'"):
        make(valid_files="no*").prepare_data()
    assert not (corpus.parent / "cache").exists()
    with pytest.raises(ValueError, match="lower batch_size"):
        words(batch_size=200).prepare_data()
    with pytest.raises(ValueError, match="max_vocab_size=2"):
        _ = words(max_vocab_size=2).vocabulary


def test_vocabulary_file_decides(words: Make, corpus: Path) -> None:
    path = corpus / "words"
    path.write_text("<UNK>\n</S>\nw1\n")
    data = words(vocabulary_file=path, min_count=3)
    assert data.vocabulary.words == ["<UNK>", "</S>", "w1"]
    assert int(data.token_counts.sum()) == 300
    path.write_text("</S>\nw1\n")
    with pytest.raises(ValueError, match="vocabulary_file=.*'<UNK>'"):
        words(vocabulary_file=path).prepare_data()


@pytest.mark.parametrize(
    ("cls", "init_args"),
    [
        (TextFiles, {"train_files": ["a", "b*"], "valid_files": "c", "tokenizer": "words", "eos_token": None}),
        (OneBillionWord, {"data_dir": "here", "vocabulary_file": "words", "begin_token": None, "test_files": ["x"]}),
        (PythonDocs, {"include_installed": True, "min_count": 2, "cache_dir": "cache"}),
        (HuggingFaceText, {"tokenizer": "gpt2", "train_files": ["a", "b*"], "documents": "lines"}),
    ],
)
def test_configured_by_jsonargparse(cls: type, init_args: dict[str, Any]) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    name = f"lightning_embcompress.data.{cls.__name__}"
    config = parser.parse_object({"data": {"class_path": name, "init_args": {"batch_size": 3, **init_args}}})
    again = parser.instantiate_classes(parser.parse_string(parser.dump(config))).data
    for data in (parser.instantiate_classes(config).data, again):
        assert type(data) is cls
        assert data.batch_size == data.eval_batch_size == 3
    assert again.cache_dir == data.cache_dir


def test_vocabulary_size_can_be_linked(corpus: Path) -> None:
    class Model:
        def __init__(self, vocab_size: int) -> None:
            self.vocab_size = vocab_size

    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    parser.add_class_arguments(Model, "model")
    parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
    init_args = {"train_files": str(corpus / "train*.txt"), "cache_dir": str(corpus.parent / "cache"), "batch_size": 2}
    config = {"data": {"class_path": "lightning_embcompress.data.TextFiles", "init_args": init_args}}
    assert parser.instantiate_classes(parser.parse_object(config)).model.vocab_size == 11
