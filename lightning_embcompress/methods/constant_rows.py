"""Rows of a table that nothing moves: those of padding, which an embedding promises to leave as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConstantRows(nn.Module):
    """What a `Factorization` does to give some rows as they were, though factors move with all tokens that share them.

    `read` and `score` are what layers call; `rows` and `logits` know of factors alone.
    """

    padding_ids: tuple[int, ...] = ()
    """Tokens whose rows are constant."""
    padding_rows: Tensor | None

    def __init__(self) -> None:
        """No row is constant yet."""
        super().__init__()
        self.register_buffer("padding_rows", None)

    def keep_padding(self, ids: Sequence[int], rows: Tensor | None) -> None:
        """Let rows of the table be constants.

        Args:
            ids: Tokens.
            rows: `[len(ids), dim]`; None for zeros, which take no memory.
        """
        table: Any = self
        self.padding_ids = tuple(ids)
        self.padding_rows = None if rows is None else rows.detach().to(table.device, table.dtype, copy=True)

    def inherit(self, other: Any) -> None:
        """Take over how another form of the same table was found, and its constant rows."""
        table: Any = self
        table.provenance, table.predicted_loss = dict(other.provenance), other.predicted_loss
        self.keep_padding(other.padding_ids, other.padding_rows)

    @contextmanager
    def without_padding(self) -> Iterator[tuple[tuple[int, ...], Tensor | None]]:
        """No constant rows in the block, for a solver, which has no part in them; gives their tokens and them."""
        ids, rows = self.padding_ids, self._buffers.get("padding_rows")
        self.keep_padding((), None)
        try:
            yield ids, rows
        finally:
            self.keep_padding(ids, rows)

    def constants(self) -> Iterator[tuple[int, Tensor]]:
        """Tokens whose rows are constant, and their rows."""
        table: Any = self
        for place, token in enumerate(self.padding_ids):
            zeros = torch.zeros((), dtype=table.dtype, device=table.device).expand(table.dim)
            yield token, zeros if self.padding_rows is None else self.padding_rows[place]

    def read(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows as layers give them: `rows`, but those that are constant as they are, without a gradient."""
        table: Any = self
        rows: Tensor = table.rows(ids, sparse=sparse)
        for token, row in self.constants():
            rows = torch.where((ids == token).unsqueeze(-1), row.to(rows.dtype), rows)
        return rows

    def score(self, hidden: Tensor, in_storage_order: bool = False) -> Tensor:
        """Logits as layers give them: products with `read` of all tokens, `[*, vocab_size]`."""
        table: Any = self
        logits: Tensor = table.logits_in_storage_order(hidden) if in_storage_order else table.logits(hidden)
        for token, row in self.constants():
            order = table.storage_order if in_storage_order else None
            place = token if order is None else order[token]
            logits[..., place] = constant_logits(hidden, row).to(logits.dtype)
        return logits


def constant_logits(hidden: Tensor, row: Tensor) -> Tensor:
    """Logits of a token whose row is constant, `[*, dim] -> [*]`."""
    return F.linear(hidden, row.to(hidden.dtype).unsqueeze(0)).squeeze(-1)
