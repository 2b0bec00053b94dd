"""A corpus, language models for it, and Trainers to fit them with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_embcompress.data import HuggingFaceText, TextFiles
from lightning_embcompress.modules import HuggingFaceCausalLM, LSTMLanguageModel

MakeTrainer = Callable[..., Trainer]


class InMemory(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def named(self, name: str) -> list[tuple[int | None, float]]:
        """Step and value of one metric."""
        return [(step, row[name]) for step, row in self.rows if name in row]


def _write(folder: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    for split, lines in (("train", 41), ("valid", 12)):
        # Falling frequency, five tokens a line with its end.
        ids = (40 ** torch.rand(lines, 4, generator=generator)).long()
        text = "\n".join(" ".join(f"w{number}" for number in line) for line in ids.tolist())
        (folder / f"{split}.txt").write_text(text + "\n")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.txt` and `valid.txt`, and the cache beside them."""
    folder = tmp_path_factory.mktemp("corpus")
    _write(folder)
    return folder


@pytest.fixture
def recurrent(corpus: Path) -> SimpleNamespace:
    """`data()` and `model()`: ten windows an epoch, with dropout and carried state."""

    def data(**changes: Any) -> TextFiles:
        sizes: dict[str, Any] = {"batch_size": 4, "eval_batch_size": 2, "sequence_length": 5}
        files = {"train_files": str(corpus / "train.txt"), "valid_files": str(corpus / "valid.txt")}
        return TextFiles(**{**files, **sizes, "cache_dir": corpus / "cache", **changes})

    vocab_size = data().vocab_size

    def model(**changes: Any) -> LSTMLanguageModel:
        seed_everything(0, verbose=False)
        sizes: dict[str, Any] = {"embedding_dim": 12, "hidden_size": 12, "num_layers": 2, "dropout": 0.3}
        return LSTMLanguageModel(**{"vocab_size": vocab_size, **sizes, **changes})

    return SimpleNamespace(data=data, model=model, vocab_size=vocab_size, folder=corpus)


@pytest.fixture
def transformer(corpus: Path) -> SimpleNamespace:
    """`data()` and `model()`: ten batches of shuffled blocks an epoch, the last one smaller, with dropout."""
    tokenizer = corpus / "tokenizer"
    if not tokenizer.is_dir():
        known = {"<|end|>": 0, "<unk>": 1, **{f"w{number}": number + 2 for number in range(40)}}
        words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>").save_pretrained(tokenizer)

    def data(**changes: Any) -> HuggingFaceText:
        sizes: dict[str, Any] = {"block_size": 9, "batch_size": 2, "documents": "lines"}
        files = {"train_files": str(corpus / "train.txt"), "valid_files": str(corpus / "valid.txt")}
        return HuggingFaceText(str(tokenizer), **{**files, **sizes, "cache_dir": corpus / "cache", **changes})

    def model(**changes: Any) -> HuggingFaceCausalLM:
        seed_everything(0, verbose=False)
        config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 12, "n_positions": 9}
        return HuggingFaceCausalLM(**{"config": config, "vocab_size": 42, **changes})

    return SimpleNamespace(data=data, model=model)


@pytest.fixture
def in_memory() -> type[InMemory]:
    """A logger that keeps what is logged."""
    return InMemory


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """A quiet Trainer on one CPU."""

    def make(*callbacks: Any, **changes: Any) -> Trainer:
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        quiet |= {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_checkpointing": False}
        quiet |= {"default_root_dir": tmp_path, "log_every_n_steps": 1}
        return Trainer(callbacks=list(callbacks), **{**quiet, **changes})

    return make
