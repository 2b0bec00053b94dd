"""Replacing the tables of a model, and putting them back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_embcompress.layers.bags import CompressedEmbeddingBag
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLayer, CompressedLinear
from lightning_embcompress.layers.scaled_embeddings import scale_of
from lightning_embcompress.methods.registry import Factorization
from lightning_embcompress.methods.specs import dense_bytes
from lightning_embcompress.tables.attachments import carry_over, check_attachments, exchange_references
from lightning_embcompress.tables.finding import all_modules
from lightning_embcompress.tables.listeners import layers_replaced


def replace_table(
    model: nn.Module, modules: Sequence[str], factorization: Factorization[Any], for_a_while: bool = False
) -> None:
    """Put compressed layers that share one factorization in the place of the modules that read a table.

    Bias, `padding_idx`, `max_norm`, `sparse`, the scale of a scaled embedding and all that others have attached to a
    layer (`carry_over`) stay what they were; `check_replaceable` has to come before. A layer that was compiled by
    `layer.compile()` is followed by one that is not, and it is said.

    Args:
        model: The module that holds them.
        modules: Paths of the modules; dense or compressed already.
        factorization: What they read from now on.
        for_a_while: Whether `put_back` will follow, so that nothing is to be said.
    """
    if not for_a_while:
        _say_compiled(model, modules)
    layers: dict[str, nn.Module] = {}
    for path in modules:
        old = model.get_submodule(path)
        if isinstance(old, nn.EmbeddingBag | CompressedEmbeddingBag):
            layers[path] = CompressedEmbeddingBag(
                factorization,
                old.mode,
                old.padding_idx,
                old.max_norm,
                old.norm_type,
                sparse=old.sparse,
                include_last_offset=old.include_last_offset,
            )
        elif isinstance(old, nn.Embedding | CompressedEmbedding):
            scale = old.scale if isinstance(old, CompressedEmbedding) else scale_of(old)
            layers[path] = CompressedEmbedding(
                factorization, old.padding_idx, old.max_norm, old.norm_type, scale, sparse=old.sparse
            )
        else:
            assert isinstance(old, nn.Linear | CompressedLinear)
            layers[path] = CompressedLinear(factorization, old.bias)
    put_back(model, layers)


def restore_dense(model: nn.Module, fill: bool = True) -> None:
    """Turn every compressed layer of a model back into what it was, an `nn.Embedding` say, ties kept.

    Args:
        model: The module that holds them.
        fill: Compute the weights from the factors; those of a table that was untied stay two. False leaves them empty,
            to be loaded into, and ties again what was untied.

    Raises:
        ValueError: If there is no memory for a table, or as `check_replaceable`; the model is as it was.
    """
    weights: dict[Any, nn.Parameter] = {}
    compressed: list[tuple[str, CompressedLayer, nn.Parameter]] = []
    for path, old in all_modules(model).items():
        if not isinstance(old, CompressedLayer):
            continue
        check_attachments(f"layer {path!r}", old)
        table = old.factorization
        # Two tables that were one have two values now; what is loaded into them has one.
        key = None if fill else table.provenance.get("untied")
        key = id(table) if key is None else key
        if key not in weights:
            _check_memory(path, table)
            values = table.materialize() if fill else torch.empty(table.vocab_size, table.dim, dtype=table.dtype)
            weights[key] = nn.Parameter(values.to(table.device), requires_grad=table.may_train)
        compressed.append((path, old, weights[key]))
    _say_compiled(model, [path for path, _, _ in compressed])
    layers: dict[str, nn.Module] = {}
    for path, old, weight in compressed:
        table = old.factorization
        new: nn.Module
        if isinstance(old, CompressedEmbedding):
            if isinstance(old, CompressedEmbeddingBag):
                new = old.dense(weight)
            elif old.scale is not None:
                new = old.scale.dense(weight, old.padding_idx)
            else:
                new = nn.Embedding(table.vocab_size, table.dim, padding_idx=old.padding_idx, _weight=weight)
                new.weight = weight
            new.max_norm, new.norm_type, new.sparse = old.max_norm, old.norm_type, old.sparse
        else:
            assert isinstance(old, CompressedLinear)
            # Made on the meta device: its own weight is thrown away at once.
            new = nn.Linear(table.dim, table.vocab_size, bias=False, device="meta")
            new.weight = weight
            new.register_parameter("bias", old.bias)
        layers[path] = new
    put_back(model, layers)


def _check_memory(path: str, table: Factorization[Any]) -> None:
    """Ask for the memory of a dense table: a few factors can stand for one of 10¹² rows."""
    try:
        torch.empty(table.vocab_size, table.dim, dtype=table.dtype, device=table.device)
    except RuntimeError as error:
        gigabytes = dense_bytes(table.vocab_size, table.dim, table.dtype.itemsize) / 1e9
        raise ValueError(
            f"table {path!r} cannot be made dense: its {table.vocab_size} x {table.dim} numbers would take "
            f"{gigabytes:,.0f} GB of memory, which this machine does not have; keep it compressed, or use a machine "
            "with more memory"
        ) from error


def put_back(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put layers in the places of others, whose attachments go over to them.

    Args:
        model: The module that holds the others.
        layers: The layers by their paths: new ones, or those that were there before `restore_dense` or `replace_table`.
    """
    successors: dict[nn.Module, nn.Module] = {}
    for path, layer in layers.items():
        old = model.get_submodule(path)
        carry_over(old, layer)
        successors.setdefault(old, layer)
        parent_path, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, layer)
    exchange_references(model, successors)
    layers_replaced(model)


def check_replaceable(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse layers with attachments that cannot go over to others, before anything is changed.

    Args:
        model: The module that holds them.
        paths: Of the layers.

    Raises:
        ValueError: Naming the layer, as `check_attachments`.
    """
    for path in paths:
        check_attachments(f"layer {path!r}", model.get_submodule(path))


def _say_compiled(model: nn.Module, paths: Sequence[str]) -> None:
    """Name the layers that are compiled, before others take their places.

    Those cannot be compiled for the user: a module does not keep the arguments, such as the backend, that it was
    compiled with.
    """
    compiled = [path for path in paths if model.get_submodule(path)._compiled_call_impl is not None]
    if compiled:
        calls = ", ".join(f".{path}.compile()" for path in compiled)
        rank_zero_info(
            f"Not compiled any more: {', '.join(map(repr, compiled))}, replaced by new layers. To compile those, call "
            f"{calls} on the model, with the arguments you gave before."
        )
