"""A corpus, language models for it, and Trainers to fit them with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_embcompress.data import HuggingFaceText, TextFiles
from lightning_embcompress.modules import HuggingFaceCausalLM, LSTMLanguageModel
from toys import save_word_tokenizer


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
        save_word_tokenizer(tokenizer, [f"w{number}" for number in range(40)])

    def data(**changes: Any) -> HuggingFaceText:
        sizes: dict[str, Any] = {"block_size": 9, "batch_size": 2, "documents": "lines"}
        files = {"train_files": str(corpus / "train.txt"), "valid_files": str(corpus / "valid.txt")}
        return HuggingFaceText(str(tokenizer), **{**files, **sizes, "cache_dir": corpus / "cache", **changes})

    def model(**changes: Any) -> HuggingFaceCausalLM:
        seed_everything(0, verbose=False)
        config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 12, "n_positions": 9}
        return HuggingFaceCausalLM(**{"config": config, "vocab_size": 42, **changes})

    return SimpleNamespace(data=data, model=model)
