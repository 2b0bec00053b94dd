from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_embcompress.data import OneBillionWord, PythonDocs, TextFiles, TokenStreamDataModule


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "corpus"
    directory.mkdir()
    for name, lines in (("train", 60), ("valid", 20), ("test", 20)):
        words = [f"w{number % 7} w{number % 3} {name} ." for number in range(lines)]
        (directory / f"{name}.txt").write_text("\n".join(words) + "\n")
    return directory


def make(corpus: Path, **options: Any) -> TextFiles:
    files = {f"{split}_files": str(corpus / f"{split}.txt") for split in ("train", "valid", "test")}
    defaults = {"batch_size": 4, "sequence_length": 5, "cache_dir": corpus.parent / "cache"}
    return TextFiles(**{**files, **defaults, **options})


class Recorder(LightningModule):
    """Keeps the batches it sees, and has something to train."""

    def __init__(self, vocab_size: int = 1) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []
        self.evaluated: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch[0])
        return self.weight.sum()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluated.append(batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluated.append(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(tmp_path: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=tmp_path, num_sanity_val_steps=0, **{**quiet, **options})


def test_description_opens_nothing(corpus: Path) -> None:
    data = make(corpus, train_files="no*")
    # Lightning's own description asks every loader.
    assert str(data) == "TextFiles(batch_size=4, sequence_length=5)"
    assert "TextFiles" in repr(data)
    assert not (corpus.parent / "cache").exists()


def test_files_have_to_be_named() -> None:
    class Nothing(TokenStreamDataModule):
        pass

    with pytest.raises(TypeError, match="abstract.*files"):
        Nothing()  # type: ignore[abstract]


def test_properties_before_setup(corpus: Path) -> None:
    data = make(corpus)
    assert data.vocab_size == len(data.vocabulary) == 7 + 5 - 1
    assert data.token_counts.dtype == torch.int64
    assert data.token_counts.shape == (data.vocab_size,)
    assert int(data.token_counts.sum()) == 60 * 5
    assert data.vocabulary.counts is not None
    assert data.token_counts.tolist() == data.vocabulary.counts.tolist()
    # "valid" is a word of its own only in held-out text.
    assert "valid" not in data.vocabulary


def test_loaders(corpus: Path) -> None:
    data = make(corpus, eval_batch_size=1, sequence_length=1000)
    data.prepare_data()
    data.setup()
    ((inputs, targets),) = list(data.train_dataloader())
    assert inputs.shape == (4, (300 - 1) // 4)
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    ((inputs, targets),) = list(loader)
    text = (corpus / "valid.txt").read_text().replace("\n", " </S> ").split()
    assert targets.flatten().tolist() == data.vocabulary.encode(text[1:])
    assert len(data.test_dataloader()) == 1


def test_trainer_without_held_out_text(corpus: Path, tmp_path: Path) -> None:
    data = make(corpus, valid_files=None, test_files=None)
    model = Recorder()
    trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    assert len(model.seen) == len(data.train_dataloader())
    for run, split in ((trainer.validate, "valid"), (trainer.test, "test")):
        with pytest.raises(ValueError, match=f"no {split} text: name its files with {split}_files"):
            run(model, datamodule=data, verbose=False)


def test_trainer_fits_validates_and_tests(corpus: Path, tmp_path: Path) -> None:
    data = make(corpus)
    model = Recorder()
    trainer = make_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    assert len(model.evaluated) == 2 * len(data.val_dataloader())
    trainer.test(model, datamodule=data, verbose=False)
    overfit = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False, overfit_batches=2)
    overfit.fit(Recorder(), datamodule=data)


class SaveAfter(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("limit", [None, 6])
@pytest.mark.parametrize("step", [4, 6, 9, 20])
def test_resume_in_the_middle_of_an_epoch(corpus: Path, tmp_path: Path, step: int, limit: int | None) -> None:
    path = tmp_path / "middle.ckpt"
    options = {"max_epochs": 4, "limit_train_batches": limit, "enable_checkpointing": False}
    whole = Recorder()
    make_trainer(tmp_path, callbacks=[SaveAfter(step, path)], **options).fit(whole, datamodule=make(corpus))
    resumed = Recorder()
    make_trainer(tmp_path, **options).fit(resumed, datamodule=make(corpus), ckpt_path=path)
    assert len(resumed.seen) == len(whole.seen) - step
    assert all(torch.equal(first, second) for first, second in zip(resumed.seen, whole.seen[step:], strict=True))


def test_resume_with_another_vocabulary(corpus: Path) -> None:
    data = make(corpus)
    state = data.state_dict()
    assert all(isinstance(value, (int, str)) for value in state.values())
    make(corpus).load_state_dict(state)
    with pytest.raises(ValueError, match="expects 11 words.*has 6") as error:
        make(corpus, max_vocab_size=6).load_state_dict(state)
    assert "vocabulary_file" in str(error.value)


def test_streams_follow_the_number_of_processes(corpus: Path) -> None:
    class FakeTrainer:
        world_size, global_rank = 2, 1

    data = make(corpus)
    alone = next(iter(data.train_dataloader()))[0]
    data.trainer = FakeTrainer()  # type: ignore[assignment]
    second = next(iter(data.train_dataloader()))[0]
    assert alone.shape == second.shape
    assert not torch.equal(alone, second)


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "sequence_length", "min_count", "max_vocab_size"])
def test_sizes_below_one(corpus: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        make(corpus, **{name: 0})


def test_errors_leave_nothing(corpus: Path) -> None:
    with pytest.raises(ValueError, match="num_workers=-1"):
        make(corpus, num_workers=-1)
    with pytest.raises(FileNotFoundError, match=r"valid_files='no\*' matches no file"):
        make(corpus, valid_files="no*").prepare_data()
    assert not (corpus.parent / "cache").exists()
    with pytest.raises(ValueError, match="lower batch_size"):
        make(corpus, batch_size=200).prepare_data()
    assert {path.suffix for path in (corpus.parent / "cache").iterdir()} <= {".lock"}
    with pytest.raises(ValueError, match="max_vocab_size=2"):
        _ = make(corpus, max_vocab_size=2).vocabulary


def test_vocabulary_file_decides(corpus: Path) -> None:
    path = corpus / "words"
    path.write_text("<UNK>\n</S>\nw1\n")
    data = make(corpus, vocabulary_file=path, min_count=3)
    assert data.vocabulary.words == ["<UNK>", "</S>", "w1"]
    assert int(data.token_counts.sum()) == 300
    path.write_text("</S>\nw1\n")
    with pytest.raises(ValueError, match="vocabulary_file=.*no '<UNK>'"):
        make(corpus, vocabulary_file=path).prepare_data()


@pytest.mark.parametrize(
    ("cls", "init_args"),
    [
        (TextFiles, {"train_files": ["a", "b*"], "valid_files": "c", "tokenizer": "words", "eos_token": None}),
        (OneBillionWord, {"data_dir": "here", "vocabulary_file": "words", "begin_token": None, "test_files": ["x"]}),
        (PythonDocs, {"include_installed": True, "min_count": 2, "cache_dir": "cache"}),
    ],
)
def test_configured_by_jsonargparse(cls: type[TokenStreamDataModule], init_args: dict[str, Any]) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    name = f"lightning_embcompress.data.{cls.__name__}"
    config = parser.parse_object({"data": {"class_path": name, "init_args": {"batch_size": 3, **init_args}}})
    data = parser.instantiate_classes(config).data
    assert type(data) is cls
    assert data.batch_size == 3
    again = parser.instantiate_classes(parser.parse_string(parser.dump(config))).data
    assert again.cache_dir == data.cache_dir


def test_vocabulary_size_can_be_linked(corpus: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    parser.add_class_arguments(Recorder, "model")
    parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
    init_args = {"train_files": str(corpus / "train.txt"), "cache_dir": str(corpus.parent / "cache"), "batch_size": 2}
    config = parser.parse_object(
        {"data": {"class_path": "lightning_embcompress.data.TextFiles", "init_args": init_args}}
    )
    assert parser.instantiate_classes(config).model.vocab_size == 11
