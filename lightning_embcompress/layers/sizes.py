"""Bytes of a model and of its tables, dense and as they are stored."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import nn

from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.layers.parametrized_weights import parametrized_bytes, parametrized_numbers
from lightning_embcompress.methods.registry import Factorization
from lightning_embcompress.methods.specs import dense_bytes
from lightning_embcompress.utils.storage import place_of

Placed: TypeAlias = tuple[tuple[str, ...], Factorization[Any]]
"""Paths of the modules that read a table, and what they read."""


def compressed_tables(model: nn.Module) -> list[Placed]:
    """Compressed tables of a model: paths of the modules that read one, and what they read.

    Returns:
        One entry a table in the order of `model.named_modules()`.
    """
    modules: dict[int, list[str]] = {}
    factorizations: dict[int, Factorization[Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CompressedLayer):
            modules.setdefault(id(module.factorization), []).append(path)
            factorizations[id(module.factorization)] = module.factorization
    return [(tuple(paths), factorizations[key]) for key, paths in modules.items()]


def table_shape(layer: nn.Module) -> tuple[int, int]:
    """`(vocab_size, dim)` of the table that an embedding or a head reads, compressed or dense."""
    if isinstance(layer, CompressedLayer):
        return layer.factorization.vocab_size, layer.factorization.dim
    assert isinstance(layer, AnyEmbedding | nn.Linear)
    return layer.weight.shape[0], layer.weight.shape[1]


def dense_table_bytes(factors: Factorization[Any]) -> int:
    """Bytes of a table before it was compressed; a table that became two is counted half in each."""
    parts = 1 if factors.provenance.get("untied") is None else 2
    return dense_bytes(factors.vocab_size, factors.dim, factors.dtype.itemsize) // parts


def model_bytes(model: nn.Module) -> dict[str, float]:
    """Bytes of a whole model as it would be dense and as it is stored, shared tensors counted once.

    Of a sharded model, too, it is all of it, and not the part of this process.

    Returns:
        `dense_bytes`, `stored_bytes`, their `ratio` and the `bits_per_weight` of all numbers, as in `report.json`.

    Example:
        >>> model_bytes(nn.Linear(10, 5, bias=False))
        {'dense_bytes': 200, 'stored_bytes': 200, 'ratio': 1.0, 'bits_per_weight': 32.0}
    """
    tables = [factors for _, factors in compressed_tables(model)]
    inside = {
        place_of(tensor)
        for module in model.modules()
        if isinstance(module, CompressedLayer)
        for tensor in module.factorization.state_dict(keep_vars=True).values()
    }
    # A shard counts as the whole tensor.
    tensors = {place_of(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    outside = [tensor for place, tensor in tensors.items() if place not in inside]
    rest, numbers = sum(tensor.nbytes for tensor in outside), sum(tensor.numel() for tensor in outside)
    other_dense, other_stored = parametrized_bytes(model)
    weights, in_their_place = parametrized_numbers(model)
    weights += numbers - in_their_place + sum(dense_table_bytes(one) // one.dtype.itemsize for one in tables)
    dense = rest - other_stored + other_dense + sum(map(dense_table_bytes, tables))
    stored = rest + sum(factors.stored_bytes() for factors in tables)
    return {
        "dense_bytes": dense,
        "stored_bytes": stored,
        "ratio": dense / stored if stored else 1.0,
        "bits_per_weight": 8 * stored / weights if weights else 0.0,
    }
