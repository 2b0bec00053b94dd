"""Which tables `auto` takes, by what a user of such a model expects, and what it says of those it leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from lightning_embcompress.compression.plan import compress
from lightning_embcompress.tables.finding import find_tables, large_and_dense


class _Model(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def _tied(model: _Model, projection: str, embedding: str) -> _Model:
    model.get_submodule(projection).weight = model.get_submodule(embedding).weight
    return model


def _transformer(vocab_size: int, context: int, width: int = 16, positions: str = "positions") -> _Model:
    """A language model whose layers are `width` and four times `width` wide."""
    layers = {
        f"block{index}": _Model(
            attention=nn.MultiheadAttention(width, 2),
            expand=nn.Linear(width, 4 * width),
            out=nn.Linear(4 * width, width),
        )
        for index in range(2)
    }
    embeddings = {"tokens": nn.Embedding(vocab_size, width), positions: nn.Embedding(context, width)}
    return _Model(**embeddings, **layers, pooler=nn.Linear(width, width), head=nn.Linear(width, vocab_size, bias=False))


_MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    # Words by their characters, and a softmax over words.
    "characters": (
        lambda: _Model(
            characters=nn.Embedding(120, 8),
            convolution=nn.Conv1d(8, 32, 3),
            highway=nn.Linear(32, 32),
            softmax=nn.Linear(32, 900),
        ),
        ["softmax"],
    ),
    "characters beside fewer words": (
        lambda: _Model(characters=nn.Embedding(120, 16), mix=nn.Linear(16, 16), softmax=nn.Linear(16, 900)),
        ["characters", "softmax"],
    ),
    "many labels": (
        lambda: _Model(words=nn.EmbeddingBag(500, 8), mix=nn.Linear(8, 8), labels=nn.Linear(8, 900)),
        ["words", "labels"],
    ),
    "speech": (lambda: _Model(recurrent=nn.LSTM(12, 16), tokens=nn.Linear(16, 300)), ["tokens"]),
    # A pair for the few labels, and an embedding of many words.
    "tagger": (
        lambda: _Model(words=nn.Embedding(900, 16), labels=nn.Embedding(20, 16), out=nn.Linear(32, 20)),
        ["words"],
    ),
    "padded embedding": (lambda: _Model(embedding=nn.Embedding(512, 8), head=nn.Linear(8, 500)), ["embedding", "head"]),
    "padded head": (lambda: _Model(embedding=nn.Embedding(500, 8), head=nn.Linear(8, 512)), ["embedding", "head"]),
    "translator": (
        lambda: _Model(source=nn.Embedding(700, 8), target=nn.Embedding(300, 8), out=nn.Linear(8, 300)),
        ["source", "target", "out"],
    ),
    "one vocabulary, untied": (
        lambda: _Model(source=nn.Embedding(300, 8), target=nn.Embedding(300, 8), out=nn.Linear(8, 300)),
        ["source", "target", "out"],
    ),
    "decoder tied": (
        lambda: _tied(
            _Model(source=nn.Embedding(300, 8), target=nn.Embedding(300, 8), out=nn.Linear(8, 300)), "out", "target"
        ),
        ["source", "target"],
    ),
    "two vocabularies": (
        lambda: _Model(a=nn.Embedding(300, 8), b=nn.Linear(8, 300), c=nn.Embedding(99, 8), d=nn.Linear(8, 99)),
        ["a", "b", "c", "d"],
    ),
    "recommender": (
        lambda: _Model(user=nn.Embedding(600, 8), item=nn.Embedding(200, 8), mix=nn.Linear(16, 8), out=nn.Linear(8, 1)),
        ["user", "item"],
    ),
    # As many positions as layers are wide, wider, and more of them than tokens.
    "context of a width": (lambda: _transformer(500, 16), ["tokens", "head"]),
    "context of another width": (lambda: _transformer(300, 64), ["tokens", "head"]),
    "long context": (lambda: _tied(_transformer(60, 200, positions="wpe"), "head", "tokens"), ["tokens"]),
    "encoder of bytes": (
        lambda: _Model(tokens=nn.Embedding(256, 16), pos_embedding=nn.Embedding(1024, 16), mix=nn.Linear(16, 16)),
        ["tokens"],
    ),
    "bag": (lambda: _Model(words=nn.EmbeddingBag(900, 8), classes=nn.Linear(8, 40)), ["words"]),
    "bag with a softmax": (lambda: _Model(words=nn.EmbeddingBag(300, 8), out=nn.Linear(8, 300)), ["words", "out"]),
    "bag with a dense layer": (lambda: nn.Sequential(nn.EmbeddingBag(900, 8), nn.Linear(8, 32)), ["0"]),
    # A hidden layer that happens to have as many rows.
    "text classifier": (
        lambda: _Model(words=nn.Embedding(300, 8), hidden=nn.Linear(8, 300), classes=nn.Linear(300, 4)),
        ["words"],
    ),
}


@pytest.mark.parametrize("kind", _MODELS)
def test_tables_that_a_user_expects(kind: str) -> None:
    make, expected = _MODELS[kind]
    assert [table.name for table in find_tables(make())] == expected


def _two(**layers: nn.Module) -> nn.Module:
    return _Model(student=_Model(**layers), teacher=_Model(**{n: type(m)(*_sizes(m)) for n, m in layers.items()}))


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, nn.Embedding)
    return layer.num_embeddings, layer.embedding_dim


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (_Model(a=nn.Linear(30, 20), b=nn.Linear(20, 10)), ["a", "b"]),
        (_Model(e=nn.Embedding(200, 8), one=nn.Linear(8, 200), two=nn.Linear(8, 200)), ["one", "two"]),
        (_two(words=nn.Embedding(200, 8), out=nn.Linear(8, 200)), ["student.out", "teacher.out"]),
    ],
)
def test_where_there_is_no_answer_all_candidates_are_named(model: nn.Module, names: list[str]) -> None:
    with pytest.raises(ValueError, match=".*".join(f"'{name}'" for name in names)):
        find_tables(model)


def test_of_many_candidates_the_largest_are_named() -> None:
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(30)), nn.Linear(30, 29), nn.Linear(29, 60))
    with pytest.raises(ValueError, match=r"'0' \(30, 30\); .*'31' \(60, 29\); and 20 others"):
        find_tables(model)


def test_what_is_large_and_stays_dense_is_said_with_the_way_to_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    layers = {"kinds": nn.Embedding(100, 8), "words": nn.Embedding(300, 8), "few": nn.Embedding(20, 8)}
    model = _Model(**layers, positions=nn.Embedding(64, 8), out=nn.Linear(8, 300), other=nn.Linear(8, 170))
    compress(model, "low_rank", ratio=1.5)
    said = capsys.readouterr().err
    assert said.splitlines() == [
        "Stays dense: 'kinds' (100, 8), 'other' (170, 8). To compress them too, name them: "
        "tables=['words', 'out', 'kinds', 'other']"
    ]
    # As it says.
    model = _Model(words=nn.Embedding(300, 8), kinds=nn.Embedding(100, 8), out=nn.Linear(8, 300))
    named = find_tables(model, ["words", "out", "kinds"])
    assert large_and_dense(model, named) == ""
    # Whoever names tables knows what is left.
    compress(model, "low_rank", ratio=1.5, tables=["words"])
    assert not capsys.readouterr().err
