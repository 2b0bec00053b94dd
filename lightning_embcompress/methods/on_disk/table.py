"""A compressed table whose rows stay in its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from lightning_embcompress.methods.base import Factorization, Problem
from lightning_embcompress.methods.blocks import RowBlocks
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.on_disk.block_places import BlockPlaces
from lightning_embcompress.methods.on_disk.factors import CodesOnDisk, FactorOnDisk, PackedFactorOnDisk
from lightning_embcompress.methods.on_disk.row_cache import RowCache
from lightning_embcompress.methods.quantizers.factors import PackedFactor
from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.methods.registry import factorization_from_spec
from lightning_embcompress.methods.shared_basis.storage import SharedBasisStorage
from lightning_embcompress.utils.devices import on_cpu
from lightning_embcompress.utils.storage import set_tensor
from lightning_embcompress.utils.tensor_files import TensorOnDisk


class RowsOnDisk(Factorization[MethodConfig]):
    """A table for lookups, of which the codes or coefficients of rows stay in the file and are read when asked for.

    What all rows share (basis, levels, means) is in memory, and so is a cache of the rows that were asked for last.
    Structure, state dict and what is saved are those of the table in memory; it does not train.

    Args:
        table: The structure, on the meta device.
        tensors: Its state dict in files, by the same names.
        cache_bytes: Most bytes of rows that are kept decoded.

    Raises:
        ValueError: If its method has nothing to be read by rows, or the file is damaged.
    """

    kind = "rows_on_disk"

    def __init__(self, table: Factorization[Any], tensors: Mapping[str, TensorOnDisk], cache_bytes: int) -> None:
        """Read what all rows share."""
        super().__init__(table.vocab_size, table.dim)
        if not can_stay_on_disk(table):
            raise ValueError(f"{type(table).__name__} has no factor that is read by rows: load it to memory")
        self._bytes, self._spec = table.stored_bytes(), table.spec()
        # Whatever the default device.
        with on_cpu():
            self._by_rows(table, tensors)
        self.table = table.requires_grad_(False)
        self.keep_padding(table.padding_ids, table.padding_rows)
        self._cache_bytes = cache_bytes
        self.cache = RowCache(self._read, self._capacity())
        self._kept_as = (self.dtype, self.device)

    def _capacity(self) -> int:
        """Rows that the cache has room for."""
        return min(self.vocab_size, self._cache_bytes // max(1, self.dim * self.dtype.itemsize))

    def _by_rows(self, table: Any, tensors: Mapping[str, TensorOnDisk]) -> None:
        """Let what is read by rows stay in the file, and read all else."""
        codes = tensors.get("packed_codes") if isinstance(table, SharedBasisStorage) else None
        for name, tensor in tensors.items():
            if name.partition(".")[0] not in table.row_factors:
                set_tensor(
                    table, name, tensor.read().to(table.dtype if tensor.dtype.is_floating_point else tensor.dtype)
                )
        if codes is not None:
            del table._buffers["packed_codes"]
            table.packed_codes = CodesOnDisk(codes, table.layout)
        for name in table.row_factors:
            factor = table._modules.get(name, table._parameters.get(name))
            if isinstance(factor, nn.ParameterList | nn.ModuleList):
                parts = [_on_disk(part, f"{name}.{place}", tensors) for place, part in enumerate(factor)]
                table._modules[name] = nn.ModuleList(parts)
            elif factor is not None and codes is None:
                table._parameters.pop(name, None)
                table._modules[name] = _on_disk(factor, name, tensors)
        self.places = None
        if isinstance(table, RowBlocks):
            self.places = BlockPlaces(table.packed_block_index, table.sizes)
        for part in table.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_meta:
                    part._buffers[name] = torch.empty(0, dtype=buffer.dtype)

    @torch.no_grad()
    def _read(self, ids: Tensor) -> Tensor:
        """`[n, dim]` rows of `[n]` distinct ids, on the CPU."""
        table: Any = self.table
        if self.places is None:
            rows: Tensor = table.rows(ids)
        elif isinstance(table, SharedBasisStorage) and table.is_coded:
            rows = table.rows_of_places(self.places.of(ids))
        else:
            rows = table.rows_at(self.places.of(ids))
        return rows.cpu()

    @torch.no_grad()
    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """See `Factorization.rows`; without a gradient.

        Raises:
            IndexError: If an id is out of range.
            ValueError: If the file is not what was written.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise IndexError(
                f"ids are from {int(ids.min())} to {int(ids.max())}, the table has {self.vocab_size} rows: is the "
                "vocabulary another one?"
            )
        if self._kept_as != (now := (self.dtype, self.device)):
            # The model was cast.
            self.cache.clear(self._capacity())
            self._kept_as = now
        with on_cpu():
            return self.cache.rows(ids.cpu()).to(ids.device)

    def prefetch(self, ids: Tensor) -> None:
        """Begin to read rows that will be asked for, in another thread."""
        self.cache.prefetch(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Factorization.logits`; the whole file is read, a few rows at a time."""
        parts = [F.linear(hidden, rows.to(hidden.device)) for rows in self._all_rows()]
        return torch.cat(parts, dim=-1)

    def materialize(self) -> Tensor:
        """See `Factorization.materialize`."""
        out = torch.cat(list(self._all_rows())).to(self.device)
        for token, row in self.constants():
            out[token] = row
        return out

    def _all_rows(self) -> Any:
        for chunk in row_chunks(self.vocab_size, self.dim):
            with on_cpu():
                rows = self._read(torch.arange(chunk.start, chunk.stop))
            yield rows

    def structure(self) -> dict[str, Any]:
        """That of the table."""
        return dict(self._spec)

    def spec(self) -> dict[str, Any]:
        """That of the table."""
        return dict(self._spec)

    def stored_bytes(self) -> int:
        """Those of the table."""
        return self._bytes

    def state_dict(self, *args: Any, **arguments: Any) -> Any:
        """That of the table, read from its file."""
        return self.table.state_dict(*args, **arguments)

    @property
    def is_packed(self) -> bool:
        """Whether the table is."""
        return bool(self.table.is_packed)

    @property
    def num_values(self) -> int:
        """See `Factorization.num_values`."""
        return factorization_from_spec(self._spec, self.dtype, torch.device("meta")).num_values

    def prepared(self, quantization: Quantization) -> NoReturn:
        """Refuse: it does not train."""
        raise ValueError(_REFUSAL)

    def quantized(self, quantization: Quantization, metric: Any = None) -> NoReturn:
        """Refuse: its numbers are not in memory."""
        raise ValueError(_REFUSAL)

    def _refine(self, problem: Problem[MethodConfig]) -> NoReturn:
        raise ValueError(_REFUSAL)

    @classmethod
    def _decompose(cls, problem: Problem[MethodConfig]) -> Self:
        raise NotImplementedError("rows on disk are loaded, not solved")

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Refuse: what is built from a structure is in memory."""
        raise NotImplementedError("rows on disk are loaded, not built")

    @classmethod
    def smallest_bytes(cls, vocab_size: int, dim: int, itemsize: int, config: MethodConfig | None = None) -> int:
        """Refuse: it is no method."""
        raise NotImplementedError("rows on disk are loaded, not solved")


_REFUSAL = "its rows are read from a file, and can be neither trained nor quantized: load it with rows='memory'"


def can_stay_on_disk(table: Factorization[Any]) -> bool:
    """Whether there is something in a table's file to be read by rows: not of tensor trains, nor of what trains."""
    return bool(table.row_factors) and not table.is_prepared


def _on_disk(factor: Any, name: str, tensors: Mapping[str, TensorOnDisk]) -> nn.Module:
    if isinstance(factor, PackedFactor):
        return PackedFactorOnDisk(factor, tensors[f"{name}.codes"], tensors[f"{name}.scales"])
    return FactorOnDisk(tensors[name], factor.dtype)
