"""Folders of sentence-transformers, whose modules beside the model nobody here knows, compressed from the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from lightning_embcompress import compress, densify
from lightning_embcompress.cli import main as cli
from lightning_embcompress.compression.plan import plan_of

_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(195))]
_TEXTS = ["w1 w2 w3", "w7", "w9 w1 w4 w100 w180"]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A transformer, a pooling of the first token, a projection with weights of its own, and a normalization."""
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(_WORDS), **sizes)).save_pretrained(tmp_path / "bert")
    (tmp_path / "vocab.txt").write_text("\n".join(_WORDS))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    kinds = pytest.importorskip("sentence_transformers.models")
    modules = [kinds.Transformer(str(tmp_path / "bert")), kinds.Pooling(32, pooling_mode="cls")]
    modules += [kinds.Dense(32, 16), kinds.Normalize()]
    return library.SentenceTransformer(modules=modules, device="cpu")


def test_the_modules_after_the_model_are_kept(model: Any, tmp_path: Path) -> None:
    source, small, dense = (str(tmp_path / name) for name in ("source", "small", "dense"))
    model.save(source)
    assert cli.main(["compress", source, small, "--method", "low_rank", "--ratio", "1.5"]) == 0
    # Whoever does not import the package loads all but the table, and is told.
    assert not [name for name in load_file(f"{small}/model.safetensors") if name.endswith("word_embeddings.weight")]
    loaded = type(model)(small, device="cpu")
    assert len(plan_of(loaded).tables) == 1
    assert [type(module) for module in loaded] == [type(module) for module in model]
    assert loaded[1].pooling_mode == "cls"
    assert torch.equal(loaded[2].linear.weight, model[2].linear.weight)
    vectors = loaded.encode(_TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(_TEXTS)))
    assert (vectors - model.encode(_TEXTS, convert_to_tensor=True)).norm() > 0
    # As the library itself saves it, and made dense again.
    loaded.save(str(tmp_path / "saved"))
    again = type(model)(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(again.encode(_TEXTS, convert_to_tensor=True), vectors)
    assert cli.main(["densify", small, dense]) == 0
    densify(again)
    for one in (again, type(model)(dense, device="cpu")):
        torch.testing.assert_close(one.encode(_TEXTS, convert_to_tensor=True), vectors)


def test_static_embeddings_are_the_table_and_not_the_layer_after_them() -> None:
    library = pytest.importorskip("sentence_transformers")
    kinds = pytest.importorskip("sentence_transformers.models")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(_WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    modules = [kinds.StaticEmbedding(tokenizer, embedding_dim=32), kinds.Dense(32, 64), kinds.Normalize()]
    model = library.SentenceTransformer(modules=modules, device="cpu")
    plan = compress(model, "low_rank", ratio=2)
    assert [table.modules for table in plan.tables] == [("0.embedding",)]
    texts = [*_TEXTS, "", "unknown words"]
    found = model.encode(texts, convert_to_tensor=True)
    densify(model)
    torch.testing.assert_close(model.encode(texts, convert_to_tensor=True), found)
