"""The modules that read the tables of a model, dense or compressed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.layers.scaled_embeddings import scale_of
from lightning_embcompress.tables.finding import all_modules, find_tables


def find_layers(model: nn.Module, tables: str | Sequence[str] = "auto") -> list[list[str]]:
    """Find the modules that read the tables of a model, dense or compressed.

    Args:
        model: The module.
        tables: `auto`, or paths of modules, see `find_tables`; of a model with compressed tables `auto` takes these,
            and dense tables of the same number of rows.

    Returns:
        For every table the paths of its modules, each module once.

    Raises:
        ValueError: See `find_tables`.

    Example:
        >>> find_layers(nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8), nn.Linear(8, 100)))
        [['0'], ['2']]
    """
    named = all_modules(model)
    compressed = {path: layer for path, layer in named.items() if isinstance(layer, CompressedLayer)}
    if isinstance(tables, str) and tables != "auto":
        tables = [tables]
    if tables == "auto" and compressed:
        sizes = {layer.factorization.vocab_size for layer in compressed.values()}
        paths = [*compressed, *(path for path, layer in named.items() if _reads(layer, sizes))]
    elif tables == "auto":
        return _once(named, [list(table.modules) for table in find_tables(model)])
    else:
        paths = list(tables)
    chosen = {id(compressed[path].factorization): path for path in paths if path in compressed}
    found = [[path for path, layer in compressed.items() if id(layer.factorization) == identity] for identity in chosen]
    dense = [path for path in paths if path not in compressed]
    if dense or not paths:
        found += [list(table.modules) for table in find_tables(model, dense)]
    order = list(named)
    return _once(named, sorted(found, key=lambda modules: order.index(modules[0])))


def _reads(layer: nn.Module, sizes: set[int]) -> bool:
    if isinstance(layer, AnyEmbedding):
        known = type(layer) in (nn.Embedding, nn.EmbeddingBag) or scale_of(layer) is not None
        return layer.num_embeddings in sizes and known
    return type(layer) is nn.Linear and layer.out_features in sizes


def _once(named: dict[str, nn.Module], tables: list[list[str]]) -> list[list[str]]:
    """Without the further paths of modules that are registered several times."""
    return [list({id(named[path]): path for path in reversed(modules)}.values())[::-1] for modules in tables]
