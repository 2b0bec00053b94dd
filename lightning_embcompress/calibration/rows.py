"""Batches as data sets give them: lists in the place of tensors, and single rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def as_batch(batch: Any, model: Callable[..., Any] | None = None) -> Any:
    """What a model is called with, for what a data set gives.

    A row of a `datasets.Dataset` becomes a batch of one; what the collate function of a DataLoader has made of such
    rows, which are lists, a batch of all of them. Other batches stay as they are.

    Args:
        batch: A mapping of names to tensors or lists of numbers, or anything else.
        model: What is called with it; columns of rows that its `forward` does not name are left out, as those of text.

    Raises:
        ValueError: If rows are of different lengths, or hold no `input_ids`.

    Example:
        >>> as_batch({"text": "so it goes", "input_ids": [7, 3, 9], "attention_mask": [1, 1, 1]})
        {'input_ids': tensor([[7, 3, 9]]), 'attention_mask': tensor([[1, 1, 1]])}
    """
    if not isinstance(batch, Mapping):
        return batch
    ids = batch.get("input_ids")
    is_row = (isinstance(ids, Tensor) and ids.dim() == 1) or _depth(ids) == 1
    if ids is None and any(isinstance(value, str | list) for value in batch.values()):
        raise ValueError(
            f"a row of the data has the columns {', '.join(map(repr, batch))} and no 'input_ids': tokenize the text "
            "first, as in dataset.map(lambda row: tokenizer(row['text'])), or give loss_fn"
        )
    if not is_row and not isinstance(ids, list):
        return batch
    tensors = {}
    for name, value in batch.items():
        is_text = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str))
        if is_text or (model is not None and name not in inspect.signature(model).parameters):
            continue
        tensor = _tensor(name, value)
        tensors[name] = tensor.unsqueeze(0) if is_row and isinstance(tensor, Tensor) else tensor
    return tensors


def _depth(value: Any) -> int:
    """How deep lists of numbers are nested; 0 for what is no list of numbers."""
    if not isinstance(value, list) or not value:
        return 0
    return 1 if isinstance(value[0], int | float) else 1 + _depth(value[0]) if isinstance(value[0], list) else 0


def _tensor(name: str, value: Any) -> Any:
    if not isinstance(value, list | int | float):
        return value
    lists = value if isinstance(value, list) else []
    if lists and isinstance(lists[0], Tensor):
        if all(one.shape == lists[0].shape for one in lists):
            # A collate function has put what stood at one place of all rows together.
            return torch.stack(lists, dim=-1)
    elif not lists or not isinstance(lists[0], list) or len({len(one) for one in lists}) == 1:
        return torch.tensor(value)
    raise ValueError(
        f"the rows of {name!r} have different lengths ({', '.join(str(len(one)) for one in lists[:5])}, ...): give "
        "them to a DataLoader whose collate function pads, such as transformers.DataCollatorWithPadding(tokenizer)"
    )
