"""Models that other libraries save by themselves, and would not load again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from lightning_embcompress import compress, densify, load_compressed, save_compressed
from toys import gpt2

_IDS = torch.arange(12).view(2, 6)


class _OnTheHub(nn.Module, PyTorchModelHubMixin):
    def __init__(self, vocab_size: int = 300) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(vocab_size, 16), nn.Linear(16, vocab_size)

    def forward(self, ids: Any) -> Any:
        return self.decoder(self.encoder(ids))


class _AroundAModel(nn.Module, PyTorchModelHubMixin):
    def __init__(self) -> None:
        super().__init__()
        self.model = gpt2()


class _SavesItself(_OnTheHub):
    def _save_pretrained(self, save_directory: Path) -> None:
        save_compressed(self, save_directory / "compressed")


def test_what_the_hub_mixin_would_not_load_is_not_saved(tmp_path: Path) -> None:
    model = _OnTheHub()
    compress(model, "low_rank", ratio=2)
    for saved in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="_OnTheHub .*'encoder'.*save_compressed"):
            saved.save_pretrained(tmp_path / "refused")
    save_compressed(model, tmp_path / "compressed")
    other = _OnTheHub()
    load_compressed(tmp_path / "compressed", other)
    assert torch.equal(other(_IDS), model(_IDS))
    densify(model)
    model.save_pretrained(tmp_path / "dense")
    assert "_save_pretrained" not in vars(model)
    torch.testing.assert_close(_OnTheHub.from_pretrained(tmp_path / "dense")(_IDS), model(_IDS))


def test_a_file_that_was_written_all_the_same_is_not_loaded(tmp_path: Path) -> None:
    model = _OnTheHub()
    compress(model, "low_rank", ratio=2)
    PyTorchModelHubMixin._save_pretrained(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"encoder.weight"):
        _OnTheHub.from_pretrained(tmp_path, strict=False)


def test_the_models_own_way_is_left_alone(tmp_path: Path) -> None:
    model = _SavesItself()
    compress(model, "low_rank", ratio=2)
    model.save_pretrained(tmp_path)
    other = _SavesItself()
    load_compressed(tmp_path / "compressed", other)
    assert torch.equal(other(_IDS), model(_IDS))


def test_tables_of_a_model_of_transformers_within(tmp_path: Path) -> None:
    # Its own weights would be lost in the same way: the mixin writes the state dict of the whole.
    outer = _AroundAModel()
    compress(outer, "low_rank", ratio=2)
    with pytest.raises(ValueError, match=r"'model.transformer.wte'"):
        outer.save_pretrained(tmp_path / "refused")
    outer.model.save_pretrained(tmp_path / "model")


def _sentences(kind: str) -> Any:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    if kind == "words":
        from sentence_transformers.models.tokenizer import WhitespaceTokenizer

        words = models.WordEmbeddings(WhitespaceTokenizer([f"w{i}" for i in range(500)]), torch.randn(500, 32))
        modules = [words, models.Pooling(32)]
    else:
        modules = [models.Pooling(32), models.Dense(32, 500)]
    return library.SentenceTransformer(modules=modules, device="cpu")


@pytest.mark.parametrize(("kind", "table"), [("words", "0.emb_layer"), ("dense", "1.linear")])
def test_modules_of_sentence_transformers(kind: str, table: str, tmp_path: Path) -> None:
    model = _sentences(kind)
    compress(model, "low_rank", ratio=2, tables=[table])
    for part in (model, model[int(table[0])]):
        with pytest.raises(ValueError, match="cannot be saved by sentence_transformers"):
            part.save(str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    save_compressed(model, tmp_path / "compressed")
    other = _sentences(kind)
    load_compressed(tmp_path / "compressed", other)
    for one, same in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(one, same)
    densify(model)
    model.save(str(tmp_path / "dense"))
