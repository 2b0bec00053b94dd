"""A compressed table as a matrix: products with it and rows of it, as it is or transposed, detached or cast."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.registry import Factorization


@dataclass(frozen=True)
class TableView:
    """How a table is read where nobody may build it.

    Attributes:
        table: The table.
        transposed: Whether it is the matrix `[dim, vocab_size]`, and not `[vocab_size, dim]`.
        detached: Whether factors get no gradient.
        dtype: What factors are cast to before they are read; None for their own.
        device: Where results are put, whatever the table is multiplied with; None for the device of the factors.
    """

    table: Factorization[Any]
    transposed: bool = False
    detached: bool = False
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        size = (self.table.vocab_size, self.table.dim)
        return size[::-1] if self.transposed else size

    @property
    def read_dtype(self) -> torch.dtype:
        """Dtype of rows."""
        return self.dtype or self.table.dtype

    @property
    def read_device(self) -> torch.device:
        """Device of rows."""
        return self.device or self.table.device

    @property
    def is_plain(self) -> bool:
        """Whether it is the table as a layer has it."""
        return not (self.transposed or self.detached or self.dtype or self.device)

    @property
    def trains(self) -> bool:
        """Whether any factor gets a gradient."""
        return not self.detached and any(parameter.requires_grad for parameter in self.table.parameters())

    def turned(self) -> TableView:
        """The transposed matrix."""
        return replace(self, transposed=not self.transposed)

    def right_of(self, left: Tensor) -> Tensor:
        """`left @ matrix`."""
        return self._read("score", left) if self.transposed else self._mixture(left)

    def left_of(self, right: Tensor) -> Tensor:
        """`matrix @ right`."""
        turned = self.turned()
        return turned.right_of(right) if right.ndim == 1 else turned.right_of(right.mT).mT

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the table, `[*, dim]` for ids `[*]`."""
        # As in `CompressedEmbedding`: a lookup is no product.
        with torch.autocast(ids.device.type, enabled=False):
            return self._read("read", ids)

    def item(self, index: Any) -> Tensor | None:
        """`matrix[index]` where these are rows of the table, or slices of rows; otherwise None."""
        first, *others = index if isinstance(index, tuple) else (index,)
        if self.transposed or first is None or first is Ellipsis:
            return None
        if not all(isinstance(one, int | slice) or one is Ellipsis for one in others):
            return None
        size, device = self.shape[0], self.table.device
        if isinstance(first, slice):
            ids = torch.arange(*first.indices(size), device=device)
            # Columns of all rows are no rows.
            if others and len(ids) == size:
                return None
        else:
            ids = torch.as_tensor(first).to(device)
            if ids.dtype in (torch.bool, torch.uint8):
                ids = ids.bool().nonzero().squeeze(-1)
            ids = torch.where(ids < 0, ids + size, ids)
        rows = self.rows(ids)
        return rows[(*(slice(None) for _ in range(ids.ndim)), *others)] if others else rows

    def einsum(self, letters: str, other: Tensor, of_other: str, output: str) -> Tensor | None:
        """A product in Einstein's notation, if one letter of the matrix is summed over; otherwise None.

        Args:
            letters: Two, of the matrix.
            other: What it is multiplied with.
            of_other: A letter for each of its dimensions.
            output: A letter for each dimension of the result.
        """
        summed = [letter for letter in letters if letter in of_other and letter not in output]
        free = [letter for letter in letters if letter in output and letter not in of_other]
        if len(set(letters)) != 2 or len(summed) != 1 or len(free) != 1 or len(set(of_other)) != other.ndim:
            return None
        kept = of_other.replace(summed[0], "")
        if sorted(kept + free[0]) != sorted(output):
            return None
        left = other.permute(*(of_other.index(letter) for letter in kept + summed[0]))
        turned = self if letters[0] == summed[0] else self.turned()
        return turned.right_of(left).permute(*((kept + free[0]).index(letter) for letter in output))

    def _mixture(self, shares: Tensor) -> Tensor:
        """`shares @ table`: a piece of the table is built, multiplied and forgotten, and built again for gradients."""
        if shares.shape[-1] != self.shape[0]:
            raise ValueError(f"cannot multiply a tensor of shape {tuple(shares.shape)} with a table of {self.shape}")

        def product(shares: Tensor, start: int, stop: int) -> Tensor:
            return shares @ self._read("read", torch.arange(start, stop, device=shares.device))

        total: Any = 0
        for chunk in row_chunks(*self.shape):
            total = total + checkpoint(product, shares[..., chunk], chunk.start, chunk.stop, use_reentrant=False)
        return cast(Tensor, total)

    def _read(self, method: str, argument: Tensor) -> Tensor:
        """What `read` or `score` of the factorization give."""
        table = self.table
        if self.device is not None:
            argument = argument.to(table.device)
        if self.dtype is None and not (self.detached and torch.is_grad_enabled()):
            result: Tensor = getattr(table, method)(argument)
        else:
            tensors = {**dict(table.named_parameters()), **dict(table.named_buffers())}
            read = {f"table.{name}": self._seen(tensor, self.read_dtype) for name, tensor in tensors.items()}
            result = functional_call(_Reading(table), read, (method, argument))
        return result if self.device is None else result.to(self.device)

    def _seen(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        tensor = tensor.detach() if self.detached else tensor
        return tensor.to(dtype) if tensor.is_floating_point() else tensor


class _Reading(nn.Module):
    """Calls a method of a factorization where `functional_call` calls a module."""

    def __init__(self, table: Factorization[Any]) -> None:
        super().__init__()
        self.table = table

    def forward(self, method: str, argument: Tensor) -> Any:
        return getattr(self.table, method)(argument)
