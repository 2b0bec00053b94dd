"""Which tables of a model are taken where nobody has named them: those that it names, and those that shapes tell."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.tables.transformers_models import is_second_table, pretrained_models, vocabulary_layers

# A vocabulary is small, and not looked at, if its tables have less than this part of the weights of the largest.
_LARGE = 0.1
# Embedding and softmax are often padded to different round numbers of rows.
_PADDING = 0.1
# Shapes cannot tell positions from tokens, but names do.
_POSITIONS = re.compile(r"(?:^|[._])(?:wpe|pos(?:ition\w*|emb\w*|enc\w*)?)(?:$|[._])")
# As many candidates are named where it is not clear which is meant.
_MOST_SHOWN = 12


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A weight of embeddings or projections, and the layers that read it."""

    path: str
    weight: Tensor
    layers: list[nn.Module]

    @property
    def rows(self) -> int:
        layer = self.layers[0]
        return int(getattr(layer, "num_embeddings", getattr(layer, "out_features", len(self.weight))))

    @property
    def size(self) -> int:
        """Number of weights; the tensor itself may be packed."""
        layer = self.layers[0]
        return self.rows * int(getattr(layer, "embedding_dim", getattr(layer, "in_features", self.weight.shape[-1])))

    @property
    def is_embedding(self) -> bool:
        return any(not isinstance(layer, nn.Linear) for layer in self.layers)

    @property
    def is_projection(self) -> bool:
        return any(isinstance(layer, nn.Linear) for layer in self.layers)


def _candidates(named: Mapping[str, nn.Module], also: Collection[nn.Module] = ()) -> list[_Candidate]:
    """The weights of all embeddings and projections, and of other layers that are tables all the same."""
    found: dict[int, _Candidate] = {}
    paths: dict[nn.Module, str] = {}
    for path, module in named.items():
        if (isinstance(module, AnyEmbedding | nn.Linear) or module in also) and not isinstance(module, CompressedLayer):
            paths.setdefault(module, path)
    for module, path in paths.items():
        # Of a parametrized weight every access gives another tensor.
        weight: Any = module.weight
        if not is_lazy(weight):
            found.setdefault(id(weight), _Candidate(path, weight, [])).layers.append(module)
    return list(found.values())


def vocabulary_size(rows: int, sizes: Collection[int]) -> int | None:
    """Tell which vocabulary a table belongs to that may be padded, or may not be where others are.

    Args:
        rows: Of the table.
        sizes: Of the vocabularies.

    Returns:
        The nearest of the sizes, if it is near enough to be that of the same vocabulary.

    Example:
        >>> vocabulary_size(50_304, [50_257, 1024]), vocabulary_size(512, [50_257, 1024])
        (50257, None)
    """
    nearest = min(sizes, key=lambda size: abs(size - rows), default=0)
    return nearest if sizes and abs(nearest - rows) <= _PADDING * nearest else None


def is_one_vocabulary(sizes: Collection[int]) -> bool:
    """Whether tables of so many rows may all have the same words, some of them padded.

    Example:
        >>> is_one_vocabulary([50_304, 50_257]), is_one_vocabulary([50_304, 512])
        (True, False)
    """
    return all(vocabulary_size(size, [max(sizes)]) is not None for size in sizes)


def choose_tables(named: Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """Choose the tables of a model by the rules of `find_tables`.

    Args:
        named: All modules of the model by their paths, itself by `""`.

    Returns:
        A path and the weight of every table, in the order of the model.

    Raises:
        ValueError: If nothing is found, or it is not clear which candidates are meant.
    """
    model = named[""]
    said = vocabulary_layers(model)
    layers = {layer for pair in said.values() for layer in pair[0] + pair[1]}
    inside = {module for path in said for module in model.get_submodule(path).modules()}
    compressed = [path for path, module in named.items() if isinstance(module, CompressedLayer)]
    candidates = _candidates(named, layers)
    certain = [
        one
        for one in candidates
        if layers.intersection(one.layers)
        or (one.is_embedding and one.is_projection and inside.intersection(one.layers))
    ]
    if not any(one.is_projection for one in certain):
        # Some hide their softmax from those who would tie it.
        sizes = {one.rows for one in certain}
        heads = [
            one for one in candidates if one.rows in sizes and inside.issuperset(one.layers) and one not in certain
        ]
        readers = _readers(named)
        heads = [one for one in heads if one.is_projection and not readers[one.rows].difference(one.layers)]
        certain += heads if len(heads) == 1 else []
    # Looked up beside the words, and worth it.
    least = _LARGE * max((one.size for one in certain), default=0)
    second = [
        one
        for one in candidates
        if one not in certain and one.size >= least and inside.issuperset(one.layers) and is_second_table(one.path)
    ]
    outside = [one for one in candidates if one not in certain and not inside.intersection(one.layers)]
    chosen = certain + second + _by_shape(outside, certain, named, only_pairs=bool(compressed))
    if any(isinstance(layer, CompressedLayer) for layer in layers) or (compressed and not chosen):
        raise ValueError(
            f"the model's tables {', '.join(map(repr, compressed))} are compressed already: restore them with "
            "densify(model) first, or name the modules to compress beside them, as in tables=['encoder']"
        )
    shares = [{one for one in certain if set(pair[0] + pair[1]).intersection(one.layers)} for pair in said.values()]
    if any(not share & shares[0] for share in shares):
        raise _ambiguous("models side by side, of which any may be meant", certain)
    if not candidates:
        raise ValueError(
            "found no table: the model has neither an nn.Embedding, an nn.EmbeddingBag nor an nn.Linear. "
            "Layers that are built in `configure_model` exist only once the Trainer has called it"
        )
    if not chosen:
        raise _ambiguous("candidates, none of which can be told to be the softmax", candidates)
    return [(one.path, one.weight) for one in candidates if one in chosen]


def _of_transformers(named: Mapping[str, nn.Module]) -> set[nn.Module]:
    return {module for model in pretrained_models(named[""]).values() for module in model.modules()}


def _by_shape(
    candidates: Sequence[_Candidate], certain: Sequence[_Candidate], named: Mapping[str, nn.Module], only_pairs: bool
) -> list[_Candidate]:
    """The tables among layers of which nothing is known but their shapes, see `find_tables`.

    Args:
        candidates: The embeddings and projections of which nothing is known.
        certain: Tables that are known.
        named: All modules by their paths.
        only_pairs: Whether a layer alone may be what was left dense when others were compressed.
    """
    embeddings = [one for one in candidates if one.is_embedding]
    embeddings = [one for one in embeddings if one.is_projection or not _POSITIONS.search(one.path)]
    readers = _readers(named)
    # What another layer reads is hidden, and no logits.
    heads = [one for one in candidates if not one.is_embedding and not readers[one.rows].difference(one.layers)]
    # Models of transformers that do not say what they have have seldom words: nothing is guessed but equal sizes.
    guessed = _of_transformers(named)
    # Embeddings and the softmax of every vocabulary, by its size.
    vocabularies: dict[int, list[_Candidate]] = {}
    for one in embeddings:
        vocabularies.setdefault(one.rows, []).append(one)
    sizes = set(vocabularies)
    if not any(one.is_projection for one in certain):
        sizes |= {one.rows for one in certain}
    for head in heads:
        size = vocabulary_size(head.rows, sizes)
        if size is not None and (size == head.rows or guessed.isdisjoint(head.layers)):
            vocabularies.setdefault(size, []).append(head)
    known = [one.rows for one in certain]
    known += [size for size, tables in vocabularies.items() if any(one.is_projection for one in tables)]
    vocabularies = {
        size: tables
        for size, tables in vocabularies.items()
        if size in known or (size > max(known, default=0) and not only_pairs)
    }
    largest = max((one.size for tables in (certain, *vocabularies.values()) for one in tables), default=0)
    heads = [one for one in heads if guessed.isdisjoint(one.layers)]
    if not known and not only_pairs and heads:
        widest = max(heads, key=lambda head: head.rows)
        others = [one for one in candidates if one is not widest]
        most = 1.0 if any(one.is_embedding for one in others) else _LARGE
        if all(one.rows < widest.rows and one.size < most * widest.size for one in others):
            vocabularies[widest.rows] = [widest]
            largest = widest.size
    chosen = []
    for size, tables in vocabularies.items():
        if size not in known and any(guessed.intersection(one.layers) for one in tables):
            continue
        if max(one.size for one in tables) >= _LARGE * largest:
            softmaxes = [one for one in tables if one.is_projection]
            if len(softmaxes) > 1:
                raise _ambiguous("projections of the same vocabulary size", softmaxes)
            chosen += tables
    return chosen


def _readers(named: Mapping[str, nn.Module]) -> defaultdict[int, set[nn.Module]]:
    """Layers by how many numbers they read at a position."""
    found: defaultdict[int, set[nn.Module]] = defaultdict(set)
    for module in named.values():
        for name in ("in_features", "input_size", "in_channels"):
            if isinstance(width := getattr(module, name, None), int):
                found[width].add(module)
    return found


def _ambiguous(what: str, candidates: Sequence[_Candidate]) -> ValueError:
    shown = candidates
    if len(candidates) > _MOST_SHOWN:
        likely = sorted(candidates, key=lambda one: (one.is_embedding, one.size), reverse=True)[:_MOST_SHOWN]
        shown = [one for one in candidates if one in likely]
    listed = "; ".join(f"{one.path!r} {tuple(one.weight.shape)}" for one in shown)
    listed += f"; and {len(candidates) - len(shown)} others" if shown is not candidates else ""
    return ValueError(f"found two or more {what}: {listed}. Name the modules to compress, as in tables=['encoder']")


def large_beside(named: Mapping[str, nn.Module], weights: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """Find what is large beside some tables of a model, and may be a table too.

    Args:
        named: All modules of the model by their paths.
        weights: Of the tables.

    Returns:
        Shapes by paths.
    """
    candidates = [one for one in _candidates(named) if not _POSITIONS.search(one.path)]
    inside, readers = _of_transformers(named), _readers(named)
    rows = Counter(one.rows for one in candidates if one.is_projection)
    sizes = {len(weight) for weight in weights}

    def is_softmax(one: _Candidate) -> bool:
        # Layers of a backbone are several, or read by others.
        alone = rows[one.rows] == 1 and one.rows**2 > one.size and inside.isdisjoint(one.layers)
        return (alone or one.rows in sizes) and not readers[one.rows].difference(one.layers)

    return {
        one.path: tuple(one.weight.shape)
        for one in candidates
        if all(one.weight is not weight for weight in weights)
        and one.size >= _LARGE * max(weight.numel() for weight in weights)
        and (one.is_embedding or is_softmax(one))
    }
