"""What every way of storing a table has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.constant_rows import ConstantRows, constant_logits
from lightning_embcompress.methods.numerics.gram import compute_dtype, row_chunks, row_units
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.quantizers.factors import PackedFactor
from lightning_embcompress.methods.specs import padding_bytes, padding_record, plain, stored_bytes
from lightning_embcompress.methods.states import QuantizationStates
from lightning_embcompress.methods.tiles import Tiles, tiles_of_rows
from lightning_embcompress.utils.division import deal

ConfigT = TypeVar("ConfigT", bound=MethodConfig)
"""The config of a method."""
ConfigT_co = TypeVar("ConfigT_co", bound=MethodConfig, covariant=True)
"""The same where it is only read."""


@dataclass(frozen=True)
class Problem(Generic[ConfigT_co]):
    """A table that is to be approximated, see `Factorization.decompose`.

    Attributes:
        weight: `[vocab_size, dim]` table.
        max_bytes: Most stored bytes.
        token_counts: `[vocab_size]` how often every token occurs.
        config: The method's config.
        advance: Called with shares of the work that add up to 1.
        metric: What an error costs.
    """

    weight: Tensor
    max_bytes: int
    token_counts: Tensor | None
    config: ConfigT_co
    advance: Callable[[float], None]
    metric: Metric | None


class Factorization(ConstantRows, QuantizationStates, ABC, Generic[ConfigT]):
    """A table `W ∈ R^{vocab_size × dim}`, stored in fewer bytes, that is read by rows or multiplied from the right.

    One instance serves an embedding (`rows`), a softmax projection (`logits`), or both at once when they are tied.
    The table itself is never built while training or predicting.

    A new method subclasses this in a folder of its own, implements the abstract methods, and gets one line in
    `lightning_embcompress.methods.registry.METHODS`.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
    """

    kind: ClassVar[str]
    """Name under which `spec()` records the class."""
    config_class: ClassVar[type[Any]]
    """The config of its method, and the one where none is given; all fields have defaults."""
    entries: ClassVar[tuple[str, ...]] = ()
    """Attributes that the structure records beside kind and shape."""
    divides: ClassVar[bool] = False
    """Whether its solver divides a table's work over processes, see `utils.division`."""
    streams: ClassVar[bool] = False
    """Whether it can be found in memory that does not grow with the rows but for a few bytes each, see `outline`."""
    row_factors: ClassVar[tuple[str, ...]] = ()
    """What of it is read by rows, and may stay in a file, see `methods.on_disk`."""
    weight_of_layers: Any = None
    """What layers that read it answer with as their weight, once it was asked for; see `layers.table_weight`."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        """Keep the shape."""
        super().__init__()
        self.vocab_size = vocab_size
        self.dim = dim
        self.predicted_loss: float | None = None
        """What the mean loss is predicted to grow by for the errors, in nats; None if that is not known."""
        self.provenance: dict[str, Any] = {}
        """How the factors were found (method, options, error), as JSON; kept in plans."""

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles have: not the weight of layers, which knows this one."""
        return {name: value for name, value in self.__dict__.items() if name != "weight_of_layers"}

    @abstractmethod
    def rows(self, ids: Tensor, sparse: bool = False) -> Tensor:
        """Rows of the table.

        Args:
            ids: `[*]` token ids.
            sparse: Whether the gradients of all factors are sparse tensors: of a factor with rows for every token with
                the rows of these ids alone.

        Returns:
            `[*, dim]` in the dtype of the factors.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Product of hidden states with all rows, `h Wᵀ`.

        Args:
            hidden: `[*, dim]`.

        Returns:
            `[*, vocab_size]` in vocabulary order.
        """

    @property
    def storage_order(self) -> Tensor | None:
        """`[vocab_size]` where the row of every id is kept; None where it is the id itself."""
        return None

    def logits_in_storage_order(self, hidden: Tensor) -> Tensor:
        """The same product in the order in which the rows are kept: column `storage_order[i]` is that of id `i`.

        Of many states bringing all logits into the order of ids, and their gradients back, can take as long as the
        product itself: a loss looks for its targets where they are.
        """
        return self.logits(hidden)

    def structure(self) -> dict[str, Any]:
        """The structure of the factors without their values, as JSON: enough for `from_spec` to build it empty."""
        own = {name: plain(getattr(self, name)) for name in self.entries}
        return {"kind": self.kind, "vocab_size": self.vocab_size, "dim": self.dim, **own}

    def spec(self) -> dict[str, Any]:
        """The structure, how the factors are quantized if they are, and which rows are constant, as JSON."""
        spec = self.structure()
        if self.quantization is not None:
            spec["quantization"] = self.quantization.record(self.state)
        if self.padding_ids:
            spec["padding"] = padding_record(self.padding_ids, self.padding_rows is not None)
        return spec

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None) -> Self:
        """Build an empty structure that is ready to be loaded into.

        Args:
            spec: What `structure()` returned.
            dtype: Dtype of the factors.
            device: Device of the factors.

        Raises:
            ValueError: If the structure is not possible.
        """

    @classmethod
    @abstractmethod
    def smallest_bytes(cls, vocab_size: int, dim: int, itemsize: int, config: ConfigT | None = None) -> int:
        """Fewest bytes that a table of this shape can be stored in with this config.

        Where the config fixes the size, these are the bytes it takes.

        Raises:
            ValueError: If an option does not fit the shape.
        """

    @classmethod
    @torch.no_grad()
    def decompose(
        cls,
        weight: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        config: ConfigT | None = None,
        advance: Callable[[float], None] = lambda _: None,
        metric: Metric | None = None,
    ) -> Self:
        """Approximate a trained table in at most `max_bytes` stored bytes.

        Args:
            weight: `[vocab_size, dim]` table; it is only read.
            max_bytes: Most bytes that `stored_bytes()` of the result may be; where the config fixes the size, what
                `smallest_bytes` says.
            token_counts: `[vocab_size]` how often every token occurs in the training data.
            config: The method's config; None for the defaults of `config_class`.
            advance: Called with shares of the work that add up to 1.
            metric: What an error costs, for methods that use it (`MethodConfig.uses_metric`).

        Returns:
            The factorization, in the table's dtype and on its device.

        Raises:
            ValueError: If the bytes do not hold the table, or a field of the config does not fit its shape.
        """
        return cls._decompose(Problem(weight, max_bytes, token_counts, config or cls.config_class(), advance, metric))

    @classmethod
    @abstractmethod
    def _decompose(cls, problem: Problem[ConfigT]) -> Self:
        """What `decompose` returns."""

    @classmethod
    def outline(cls, problem: Problem[ConfigT]) -> Self:
        """Solve a table but for what there is for every row: tensors that hold that are on the meta device.

        For methods that stream. The table may be one in a file, see `utils.tensor_files`: it is read a few rows at a
        time. What `decompose` finds is this, filled.

        Args:
            problem: As of `decompose`.

        Raises:
            ValueError: As `decompose`.
        """
        raise NotImplementedError(f"{cls.__name__} does not stream")

    def filling(self, problem: Problem[ConfigT]) -> Callable[[slice], None]:
        """Gives what fills tensors that were on the meta device, and now have memory of zeros, from rows of the table.

        Args:
            problem: As of `outline`.

        Returns:
            Called with windows of rows, one after the other from the first; the last one may be filled once more.
        """
        raise NotImplementedError(f"{type(self).__name__} does not stream")

    @property
    def window_multiple(self) -> int:
        """Of how many rows windows are to be multiples that are filled, see `filling`."""
        return 1

    @torch.no_grad()
    def refined(
        self,
        target: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        config: ConfigT | None = None,
        advance: Callable[[float], None] = lambda _: None,
        metric: Metric | None = None,
    ) -> Self:
        """Solve again for a table that has changed, starting from the structure there is.

        Args:
            target: `[vocab_size, dim]` table to approximate.
            max_bytes: As for `decompose`.
            token_counts: As for `decompose`.
            config: As for `decompose`.
            advance: As for `decompose`.
            metric: As for `decompose`.

        Returns:
            `self`, written in place, where the shapes stay what they are; otherwise a new factorization.
        """
        config = config or self.config_class()
        with self.without_padding() as (ids, rows):
            most = max_bytes - padding_bytes(ids, rows)
            found = self._refine(Problem(target, most, token_counts, config, advance, metric))
        found.keep_padding(ids, rows)
        return found

    @abstractmethod
    def _refine(self, problem: Problem[ConfigT]) -> Self:
        """What `refined` returns."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors, and of the rows that they give."""
        return self._example.dtype

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self._example.device

    @property
    def _example(self) -> Tensor:
        # Every call asks, and `parameters()` takes as long as a lookup.
        for module in (self, *filter(None, self._modules.values())):
            for parameter in module._parameters.values():
                if parameter is not None:
                    return parameter
        for parameter in self.parameters():
            return parameter
        return next(module.unit for module in self.modules() if isinstance(module, PackedFactor))

    @torch.no_grad()
    def materialize(self) -> Tensor:
        """The whole table, `[vocab_size, dim]`: for leaving the compressed form, never for using it."""
        out = torch.empty(self.vocab_size, self.dim, dtype=self.dtype, device=self.device)
        for chunk in row_chunks(self.vocab_size, self.dim):
            out[chunk] = self.rows(torch.arange(chunk.start, chunk.stop, device=self.device))
        for token, row in self.constants():
            out[token] = row
        return out

    def tiles(self, hidden: Tensor, tile_rows: int) -> Tiles:
        """All logits, a tile of the vocabulary at a time, in the order in which the table is kept.

        Args:
            hidden: `[N, dim]`.
            tile_rows: Most rows of a tile.

        Returns:
            Tiles, and what they read; factors that are prepared for quantization are rounded here, once.
        """
        whole: Factorization[Any] = self
        if self.is_prepared:
            whole, values = self.plain()
            for name, value in values.items():
                module, _, own = name.rpartition(".")
                whole.get_submodule(module)._parameters[own] = value  # type: ignore[assignment]
        tiles = whole._tiles(hidden, tile_rows)
        for token, row in self.constants():
            tiles = tiles.with_logits(token, constant_logits(hidden, row))
        return tiles

    def _tiles(self, hidden: Tensor, tile_rows: int) -> Tiles:
        """Those of one that is not prepared; to be overridden where tokens have numbers of their own."""
        return tiles_of_rows(self, hidden, tile_rows)

    def lay_out(self) -> bool:
        """Lay out what is multiplied with states, in place, see `optimize_for_inference`.

        Returns:
            Whether it is laid out: of most methods nothing but factors can be, which the layer does.
        """
        return False

    def stored_bytes(self) -> int:
        """Bytes on disk: every tensor of the state dict, its entry in the file's header, and the structure."""
        return stored_bytes(
            sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values()),
            len(self.state_dict()),
            self.spec(),
        )

    @torch.no_grad()
    def weighted_error(self, target: Tensor, weights: Tensor) -> float:
        """Relative weighted error `Σ_i q_i ‖w_i − ŵ_i‖² / Σ_i q_i ‖w_i‖²` (GroupReduce, eq. 2).

        Processes share the rows, see `utils.division`.

        Args:
            target: `[vocab_size, dim]` table that is approximated.
            weights: `[vocab_size]` row weights `q`.
        """
        dtype = compute_dtype(target.dtype)
        units = row_units(self.vocab_size, self.dim)
        # Of every chunk, what is lost and what there was.
        sums = [torch.zeros(len(chunks), 2, dtype=torch.float64) for chunks in units]

        def compute(unit: int) -> None:
            for index, chunk in enumerate(units[unit]):
                part = target[chunk].to(self.device, dtype)
                approximation = self.rows(torch.arange(chunk.start, chunk.stop, device=self.device)).to(dtype)
                weight = weights[chunk].to(part)
                sums[unit][index, 0] = ((part - approximation).square().sum(dim=1) * weight).sum()
                sums[unit][index, 1] = (part.square().sum(dim=1) * weight).sum()

        deal([[part] for part in sums], [len(part) for part in sums], compute)
        lost = total = 0.0
        for chunk_lost, chunk_total in torch.cat(sums).tolist():
            lost, total = lost + chunk_lost, total + chunk_total
        return lost / total if total > 0 else 0.0

    @torch.no_grad()
    def loss_in(self, metric: Metric, target: Tensor) -> float:
        """What the mean loss is predicted to grow by for the errors, `½ Σ_i q_i δ_iᵀ M δ_i`, in nats.

        Processes share the rows, see `utils.division`.

        Args:
            metric: What an error costs.
            target: `[vocab_size, dim]` table that is approximated.
        """

        def rows(chunk: slice) -> Tensor:
            return self.rows(torch.arange(chunk.start, chunk.stop, device=self.device))

        return metric.loss(target, rows)

    def extra_repr(self) -> str:
        """Shape for `print(module)`."""
        return f"vocab_size={self.vocab_size}, dim={self.dim}"
