"""Tables of saved models whose rows stay in their files, and are read from there when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lightning_embcompress.compression.budget import parse_size
from lightning_embcompress.compression.plan import Plan, TablePlan
from lightning_embcompress.compression.records import check_layout, dtype_of
from lightning_embcompress.integrations.sources import Source, find_directory
from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.layers.compressed import CompressedEmbedding
from lightning_embcompress.methods.on_disk.table import RowsOnDisk, can_stay_on_disk
from lightning_embcompress.methods.registry import Factorization, factorization_from_spec
from lightning_embcompress.utils.chunk_sums import SUFFIX, ChunkSums
from lightning_embcompress.utils.progress import progress_bar, say_line
from lightning_embcompress.utils.tensor_files import TensorFile, TensorOnDisk

DEFAULT_CACHE = "64MB"


@dataclass(frozen=True)
class RowFiles:
    """The files of a model, to be read by rows.

    Attributes:
        name: What messages call them.
        tensors: Their tensors by their names.
        cache_bytes: Most bytes of decoded rows that are kept of every table.
    """

    name: str
    tensors: Mapping[str, TensorOnDisk]
    cache_bytes: int

    @classmethod
    def of(cls, source: Source, cache: str | int = DEFAULT_CACHE) -> RowFiles:
        """Open the files of a model.

        Their checksums are those of `NAME.sums` beside each file; where there is none they are computed now, so that
        what is read later is what is there now.

        Raises:
            ValueError: If one is damaged, or no file of safetensors.
        """
        tensors: dict[str, TensorOnDisk] = {}
        for path in source.weights:
            if path.suffix != ".safetensors":
                raise ValueError(
                    f"rows cannot be read from {str(path)!r}: save the model as safetensors, or load it with "
                    "rows='memory'"
                )
            file = TensorFile(path, _sums_of(path))
            tensors |= {name: file[name] for name in file.entries}
        return cls(repr(source.name), tensors, _check_cache(cache))

    def table(self, plan: TablePlan, dtype: torch.dtype | None = None, stored: Sequence[str] = ()) -> RowsOnDisk | None:
        """A table whose rows stay in the file; None if its method has nothing to be read by rows.

        Args:
            plan: What is recorded of it.
            dtype: Of its rows; None for that of the plan.
            stored: Under the names of which layers it may be in the files; none for that of the plan.

        Raises:
            ValueError: If the file does not hold the table.
        """
        empty = factorization_from_spec(plan.spec, dtype or dtype_of(plan.dtype), torch.device("meta"))
        if not can_stay_on_disk(empty):
            return None
        prefix = f"{self._stored([*stored, plan.name])}.factorization."
        own = {name.removeprefix(prefix): one for name, one in self.tensors.items() if name.startswith(prefix)}
        shapes = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in own.items()}
        check_layout(empty.state_dict(), shapes, prefix, self.name)
        try:
            rows = RowsOnDisk(empty, own, self.cache_bytes)
        except ValueError as error:
            raise ValueError(f"table {plan.name!r} of {self.name}: {error}") from error
        rows.provenance, rows.predicted_loss = plan.provenance, plan.predicted_loss
        return rows

    def _stored(self, paths: Sequence[str]) -> str:
        """Under which of some paths factors are in the files, with the name of a base model or without."""
        known = {name.partition(".factorization.")[0] for name in self.tensors if ".factorization." in name}
        near = [one for path in paths for one in known if one.endswith(f".{path}") or path.endswith(f".{one}")]
        return next((path for path in (*paths, *near) if path in known), paths[0])


def _sums_of(path: Path) -> ChunkSums:
    sums = path.with_name(path.name + SUFFIX)
    if sums.is_file():
        return ChunkSums.load(sums)
    with progress_bar(f"Checksums of {path.name}", total=None):
        return ChunkSums.of(path)


def tables_on_disk(
    plan: Plan,
    model: nn.Module,
    files: RowFiles,
    stored: Mapping[str, Sequence[str]] = MappingProxyType({}),
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> dict[str, RowsOnDisk]:
    """Tables whose rows stay in files, by their names: those that are looked up alone, and read by rows.

    Args:
        plan: Of a model in files.
        model: That model, before or after it is compressed.
        files: Where it is.
        stored: Under which layers' names tables may be there; none for their own.
        dtypes: What their rows are cast to; none for those of the plan.
    """
    found: dict[str, RowsOnDisk] = {}
    stay = []
    for table in plan.tables:
        layers = [model.get_submodule(path) for path in table.modules]
        if not all(isinstance(layer, AnyEmbedding | CompressedEmbedding) for layer in layers):
            stay.append(f"{table.name!r} (a softmax reads it)")
        elif (rows := files.table(table, dtypes.get(table.name), stored.get(table.name, ()))) is None:
            stay.append(f"{table.name!r} ({table.method} has nothing to be read by rows)")
        else:
            found[table.name] = rows
    if stay:
        say_line(f"In memory as a whole: {', '.join(stay)}")
    return found


_wanted: ContextVar[str | int | None] = ContextVar("rows_on_disk", default=None)


@contextmanager
def rows_on_disk(cache: str | int = DEFAULT_CACHE) -> Iterator[None]:
    """Let `from_pretrained` of transformers leave the rows of tables that are looked up alone in their files.

    Args:
        cache: Most bytes of decoded rows that are kept of every table, such as `"64MB"`.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> with rows_on_disk(cache="64MB"):  # doctest: +SKIP
        ...     model = AutoModelForCausalLM.from_pretrained("my_model-3bit")
    """
    _check_cache(cache)
    token = _wanted.set(cache)
    try:
        yield
    finally:
        _wanted.reset(token)


def rows_of_model(
    model: Any, plan: Plan, stored: Mapping[str, Sequence[str]], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Factorization[Any]]:
    """Tables of a model of transformers that is being loaded whose rows are to stay in its files, by their names.

    Args:
        model: The model.
        plan: Fitted to it.
        stored: Under which layers' names tables may be in the files.
        dtypes: What their rows are cast to.

    Raises:
        ValueError: If the files are not there.
    """
    cache = _wanted.get()
    if cache is None:
        return {}
    directory = str(model.name_or_path)
    if not Path(directory).is_dir():
        raise ValueError(
            f"rows can stay on disk of a model in a directory, and {directory!r} is none: download it, and give its "
            "directory"
        )
    # Transformers builds models on the meta device.
    with torch.device("cpu"):
        files = RowFiles.of(find_directory(Path(directory)), cache)
        return dict(tables_on_disk(plan, model, files, stored, dtypes))


def _check_cache(cache: str | int) -> int:
    return 0 if cache in (0, "0") else parse_size(cache)
