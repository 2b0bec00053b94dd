"""Tokens that a model depends on however seldom a text has them: ends, beginnings, masks, and those a user names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_embcompress.calibration.counts import count_of_common_token
from lightning_embcompress.methods.config import nearest
from lightning_embcompress.tables.finding import Table
from lightning_embcompress.tables.transformers_models import is_within, pretrained_models

KeepRows: TypeAlias = Sequence[int] | Mapping[str, Sequence[int]] | None
"""Ids whose rows are to be kept finely, in every table or by the path of one."""

_ENDINGS = ("_token_id", "_token_ids", "_token_index")
_OF_TOKENIZERS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def special_tokens(model: nn.Module, table: Table) -> dict[int, str]:
    """Ids that models of transformers and tokenizers within a module give a meaning of their own, by their names.

    Args:
        model: The module.
        table: Whose vocabulary is meant: a model of transformers speaks of tables that it holds, and of those that have
            as many rows.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_embcompress.tables.finding import find_tables
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50, bos_token_id=48, eos_token_id=49)
        >>> model = GPT2LMHeadModel(config)
        >>> special_tokens(model, find_tables(model)[0])
        {48: 'bos', 49: 'eos'}
    """
    found: dict[int, list[str]] = {}
    for path, part in pretrained_models(model).items():
        configs = [part.config, part.config.get_text_config(), getattr(part, "generation_config", None)]
        inside = any(is_within(name, path) for name in table.modules)
        if inside or any(getattr(config, "vocab_size", None) == table.shape[0] for config in configs):
            for config in configs:
                _add(found, {} if config is None else config.to_dict())
    for part in model.modules():
        for value in vars(part).values():
            # Whatever it is that cuts text for the model.
            if hasattr(value, "all_special_ids") and hasattr(value, "eos_token_id"):
                _add(found, tokens_of_tokenizer(value))
    return {token: ", ".join(names) for token, names in sorted(found.items()) if token < table.shape[0]}


def tokens_of_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Ids of the special tokens that a tokenizer of transformers names, as a config would have them."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in _OF_TOKENIZERS}


def _add(found: dict[int, list[str]], record: Mapping[str, Any]) -> None:
    for key, value in record.items():
        name = next((key.removesuffix(ending) for ending in _ENDINGS if key.endswith(ending)), None)
        for token in value if isinstance(value, list | tuple) else [value]:
            if name is not None and type(token) is int and token >= 0 and name not in found.setdefault(token, []):
                found[token].append(name)


def rows_to_keep(table: Table, keep_rows: KeepRows, tables: Sequence[Table]) -> list[int]:
    """Ids that a user has named for a table.

    Args:
        table: The table.
        keep_rows: What was named.
        tables: All tables that are compressed.

    Raises:
        ValueError: If a table or a row of this one does not exist.
    """
    named: Iterable[Any] = ()
    if isinstance(keep_rows, Mapping):
        paths = [path for one in tables for path in one.modules]
        if unknown := [name for name in keep_rows if name not in paths]:
            raise ValueError(
                f"keep_rows name {unknown[0]!r}{nearest(str(unknown[0]), paths)}, but the tables are "
                f"{', '.join(repr(one.name) for one in tables)}"
            )
        named = [token for path in table.modules for token in keep_rows.get(path, ())]
    elif keep_rows is not None:
        named = keep_rows
    tokens = torch.as_tensor(list(named)).tolist()
    for token in tokens:
        if type(token) is not int or not 0 <= token < table.shape[0]:
            raise ValueError(
                f"keep_rows must be ids from 0 to {table.shape[0] - 1}, the last row of table {table.name!r}; one is "
                f"{token!r}"
            )
    return tokens


def protected_counts(token_counts: Tensor, special: Mapping[int, str], padding: Sequence[int] = ()) -> Tensor:
    """Counts in which no special token is rarer than a common word, and say so of those that the text lacks.

    Args:
        token_counts: `[vocab_size]` how often every token occurs.
        special: Ids, and what they are.
        padding: Ids whose rows are constants, of which nothing can be lost.

    Returns:
        `[vocab_size]`, the counts themselves where nothing is to be changed.
    """
    common = count_of_common_token(token_counts)
    rare = [token for token in sorted(special) if token not in padding and token_counts[token] < common]
    if not rare:
        return token_counts
    raised = token_counts.clone()
    raised[rare] = common
    if missing := [f"{token} ({special[token]})" for token in rare if not token_counts[token]]:
        rank_zero_info(
            f"Tokens that the counted text lacks, but that the model may depend on: {', '.join(missing)}; they are "
            f"weighed as a common word is, which occurs {common:,} times."
        )
    return raised
