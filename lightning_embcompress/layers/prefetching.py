"""Rows of tables on disk, read while the batch before is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_embcompress.layers.compressed import CompressedEmbedding
from lightning_embcompress.methods.on_disk.table import RowsOnDisk

Batch = TypeVar("Batch")


def _ids_of(batch: Any) -> Tensor:
    """Ids of a batch: `input_ids` of a mapping, the first of several tensors, or the batch itself."""
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids")
    if isinstance(batch, Sequence) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise ValueError(f"ids cannot be told in a {type(batch).__name__}: give ids, which gets a batch and gives them")
    return batch


def prefetched(
    batches: Iterable[Batch], model: nn.Module, ids: Callable[[Batch], Tensor] | Mapping[str, Any] = _ids_of
) -> Iterator[Batch]:
    """Go through the batches of a loader, while the rows of the next one are read from disk in another thread.

    Args:
        batches: Of a data loader.
        model: With embeddings whose rows stay in files, see `load_compressed`.
        ids: Called with a batch, gives the ids that will be looked up; by default `input_ids` of a mapping, the first
            of several tensors, or the batch itself. Of several tables, such functions by the paths of their layers.

    Yields:
        The batches, as they are.

    Raises:
        ValueError: If ids cannot be told in a batch, or there is no such layer.

    Example:
        >>> import torch
        >>> batches = [torch.tensor([[1, 2]]), torch.tensor([[3, 2]])]
        >>> len(list(prefetched(batches, nn.Embedding(10, 4))))
        2
    """
    tables = {
        path: layer.factorization
        for path, layer in model.named_modules()
        if isinstance(layer, CompressedEmbedding) and isinstance(layer.factorization, RowsOnDisk)
    }
    by_path = ids if isinstance(ids, Mapping) else dict.fromkeys(tables, ids)
    if unknown := sorted(by_path.keys() - tables.keys()):
        raise ValueError(f"ids names {unknown[0]!r}, which is no embedding whose rows are on disk: {sorted(tables)}")
    waiting: list[Batch] = []
    for batch in batches:
        for path, of_batch in by_path.items():
            tables[path].prefetch(of_batch(batch))
        waiting.append(batch)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
