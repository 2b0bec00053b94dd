"""What every way of storing a table has in common."""

from __future__ import annotations

import copy
import json
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from lightning_embcompress.factorizations.quantized import (
    Factor,
    FakeQuantizedFactor,
    PackedFactor,
    Quantization,
    State,
    in_place_of,
    pieces,
    whole,
)
from lightning_embcompress.solvers.division import deal
from lightning_embcompress.solvers.gram import compute_dtype, row_chunks, row_units
from lightning_embcompress.solvers.metric import Metric

# Name, dtype, shape and offsets of one tensor in the header of a safetensors file.
TENSOR_HEADER_BYTES = 96


# Elements of a piece of the table that is built on the way to the logits: 2 MiB of float32 stay in a core's cache.
_PIECE_ELEMENTS = 2**19


@dataclass(frozen=True)
class Options:
    """What a method can be told: subclasses add fields with defaults, and check their ranges when they are made."""

    size_options: ClassVar[tuple[str, ...]] = ()
    """Names of the options that say how large the factors are, in place of a ratio."""
    keeps_floats: ClassVar[bool] = False
    """Whether the bytes of a number are those of the table, so that only their count is to be decided."""

    @property
    def fixes_size(self) -> bool:
        """Whether the options leave nothing for a ratio to decide."""
        return any(getattr(self, name) is not None for name in self.size_options)

    @property
    def uses_metric(self) -> bool:
        """Whether a metric of what errors cost is made use of, by a method that takes one."""
        return True


def plain(value: Any) -> Any:
    """A value as JSON has it: of NumPy's scalars and arrays, and tensors, their numbers; of sequences, a list.

    Plans and checkpoints record the options that were given, and nothing is read from them but plain values.

    Example:
        >>> import numpy
        >>> plain({"ranks": (numpy.int64(3), 4)})
        {'ranks': [3, 4]}
    """
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return value


OptionsT = TypeVar("OptionsT", bound=Options)
"""The options of a method."""


class Factorization(nn.Module, ABC, Generic[OptionsT]):
    """A table `W ∈ R^{vocab_size × dim}`, stored in fewer bytes, that is read by rows or multiplied from the right.

    One instance serves an embedding (`rows`), a softmax projection (`logits`), or both at once when they are tied.
    The table itself is never built while training or predicting.

    A new method subclasses this in a file of its own, implements the abstract methods, and gets one line in
    `lightning_embcompress.factorizations.METHODS`.

    Args:
        vocab_size: Rows of the table.
        dim: Columns of the table.
    """

    kind: ClassVar[str]
    """Name under which `spec()` records the class."""
    options_class: ClassVar[type[Any]]
    """The dataclass of its options; all of them have defaults."""
    uses_metric: ClassVar[bool] = False
    """Whether `decompose` and `refined` take a `metric`, what an error costs (see `solvers.metric`)."""
    shared_factors: ClassVar[tuple[str, ...]] = ()
    """Names of the factors that all tokens share, of a class in which tokens have numbers of their own beside them."""
    divides: ClassVar[bool] = False
    """Whether its solver divides a table's work over processes, see `solvers.division`."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        """Keep the shape."""
        super().__init__()
        self.vocab_size = vocab_size
        self.dim = dim
        self.predicted_loss: float | None = None
        """What the mean loss is predicted to grow by for the errors, in nats; None if that is not known."""
        self.provenance: dict[str, Any] = {}
        """How the factors were found (method, options, error), as JSON; kept in plans."""
        self.quantization: Quantization | None = None
        """How the factors are quantized; None for those that are as they were found."""
        self.state: State = "fake"
        """Whether they train, or are packed; of factors that are quantized."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the table.

        Args:
            ids: `[*]` token ids.

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

    @abstractmethod
    def structure(self) -> dict[str, Any]:
        """The structure of the factors without their values, as JSON: enough for `from_spec` to build it empty."""

    def spec(self) -> dict[str, Any]:
        """The structure, and how the factors are quantized if they are, as JSON."""
        if self.quantization is None:
            return self.structure()
        return {**self.structure(), "quantization": self.quantization.record(self.state)}

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
    def smallest_bytes(cls, vocab_size: int, dim: int, itemsize: int, options: OptionsT | None = None) -> int:
        """Fewest bytes that a table of this shape can be stored in with these options.

        Where the options fix the size, these are the bytes it takes.

        Raises:
            ValueError: If an option does not fit the shape.
        """

    @classmethod
    @abstractmethod
    def decompose(
        cls,
        weight: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: OptionsT | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Factorization[Any]:
        """Approximate a trained table in at most `max_bytes` stored bytes.

        Args:
            weight: `[vocab_size, dim]` table; it is only read.
            max_bytes: Most bytes that `stored_bytes()` of the result may be; where the options fix the size, what
                `smallest_bytes` says.
            token_counts: `[vocab_size]` how often every token occurs in the training data.
            options: The method's own; None for its defaults.
            advance: Called with shares of the work that add up to 1.

        Returns:
            The factorization, in the table's dtype and on its device.
        """

    @abstractmethod
    def refined(
        self,
        target: Tensor,
        max_bytes: int,
        token_counts: Tensor | None = None,
        options: OptionsT | None = None,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """Solve again for a table that has changed, starting from the structure there is.

        Args:
            target: `[vocab_size, dim]` table to approximate.
            max_bytes: As for `decompose`.
            token_counts: As for `decompose`.
            options: As for `decompose`.
            advance: As for `decompose`.

        Returns:
            `self`, written in place, where the shapes stay what they are; otherwise a new factorization.
        """

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
        for parameter in self.parameters():
            return parameter
        return next(module.unit for module in self.modules() if isinstance(module, PackedFactor))

    def whole_factors(self) -> list[Tensor]:
        """All factors, in the order of `parameters()` of those that are not quantized."""
        own = [parameter for parameter in self._parameters.values() if parameter is not None]
        return [*own, *(whole(part) for child in self.children() for part in _parts(child))]

    @property
    def may_train(self) -> bool:
        """Whether what takes its place is to train: not if its parameters were frozen; packed integers have none."""
        trains = [parameter.requires_grad for parameter in self.parameters()]
        return any(trains) or not trains

    @property
    def num_values(self) -> int:
        """Numbers that the table is made of, packed or not."""
        packed = sum(module.shape.numel() for module in self.modules() if isinstance(module, PackedFactor))
        return packed + sum(parameter.numel() for parameter in self.parameters())

    @property
    def is_prepared(self) -> bool:
        """Whether it trains what will be stored in fewer bits: `converted` gives that."""
        return self.quantization is not None and self.state != "packed"

    @property
    def is_packed(self) -> bool:
        """Whether its factors are packed integers, which do not train."""
        return self.quantization is not None and self.state == "packed"

    def prepared(self, quantization: Quantization) -> Factorization[Any]:
        """Let it train as it will be once its factors are stored in fewer bits.

        The parameters stay the same objects, in the same order. Factors whose product is the table are balanced first
        (`balance`), so that their numbers, not their product, are others.

        Args:
            quantization: How they will be stored.

        Returns:
            `self`; of some classes another factorization, with other parameters.

        Raises:
            ValueError: If it is prepared, or packed already.
        """
        if self.quantization is None:
            self.balance()
        self.hold(quantization, "fake")
        return self

    def balance(self) -> None:
        """Move scale and directions between factors so that less is lost when they are rounded, in place.

        The table stays the same, see `solvers.balance`; for methods without such factors nothing is done.
        """

    def hold(self, quantization: Quantization, state: State) -> None:
        """Put what is quantized in the place of the parameters.

        Args:
            quantization: How they are quantized.
            state: Whether they train. With `"packed"` they are empty, ready to be loaded into.

        Raises:
            ValueError: If they are quantized already.
        """
        if self.quantization is not None:
            raise ValueError(f"its factors are {'packed' if self.is_packed else 'prepared for quantization'} already")

        def make(name: str, parameter: nn.Parameter) -> nn.Module:
            of = quantization.shared if name in self.shared_factors else quantization
            return in_place_of(parameter, of, state)

        self._replace_factors(make)
        self.quantization, self.state = quantization, state

    def _replace_factors(self, make: Callable[[str, Any], nn.Module]) -> None:
        modules: dict[str, nn.Module | None] = {name: make(name, own) for name, own in self._parameters.items()}
        for name, child in self._modules.items():
            parts = [make(name, part) for part in _parts(child)]
            modules[name] = nn.ModuleList(parts) if isinstance(child, _LISTS) else parts[0]
        self._parameters, self._modules = {}, modules

    @torch.no_grad()
    def converted(self) -> Factorization[Any]:
        """What it is once it is not trained any more: packed integers; this one stays as it is.

        Raises:
            ValueError: If it is not prepared.
        """
        if not self.is_prepared:
            raise ValueError("there is nothing to convert: it is not prepared for quantization")
        packed = self._copied()
        packed._replace_factors(lambda _, factor: factor.packed())
        packed.state = "packed"
        return packed

    def _copied(self) -> Self:
        """Another one that has the same parameters."""
        other = copy.copy(self)
        for name in ("_parameters", "_modules"):
            other.__dict__[name] = dict(self.__dict__[name])
        # Loading writes in place: an index that both had would be that of one of them.
        buffers = {name: None if tensor is None else tensor.clone() for name, tensor in self._buffers.items()}
        other.__dict__["_buffers"] = buffers
        other.provenance = dict(self.provenance)
        return other

    @torch.no_grad()
    def quantized(self, quantization: Quantization, metric: Metric | None = None) -> Factorization[Any]:
        """Packed integers without training; this one stays as it is.

        Args:
            quantization: How factors are stored.
            metric: What an error costs; of methods that have no use for it, every factor is rounded by itself.

        Raises:
            ValueError: If it is prepared, or packed already.
        """
        return self._copied().prepared(quantization).converted()

    def plain(self) -> tuple[Factorization[Any], dict[str, Tensor]]:
        """What reads the same without a quantization, for those who read all of it many times at once.

        Returns:
            A factorization of numbers, and the values that its parameters are to have, by their names: computed here,
            once, with a gradient to the parameters of this one.

        Raises:
            ValueError: If it is not prepared.
        """
        if not self.is_prepared:
            raise ValueError("it is not prepared for quantization, and has no other form to be read in")
        # For a moment: it shares all there is.
        plain = copy.copy(self)
        plain.__dict__["_parameters"], plain.__dict__["_modules"] = {}, {}
        for name, child in self._modules.items():
            weights = [part.weight for part in _parts(child)]
            setattr(plain, name, nn.ParameterList(weights) if isinstance(child, _LISTS) else weights[0])
        plain.quantization = None
        values = {}
        for name, child in self._modules.items():
            for index, part in enumerate(_parts(child)):
                values[f"{name}.{index}" if isinstance(child, _LISTS) else name] = whole(part)
        return plain, values

    def freeze_ranges(self) -> None:
        """Keep the scales of all groups as they are from now on.

        Raises:
            ValueError: If it is not prepared.
        """
        if not self.is_prepared:
            raise ValueError("there are no ranges to freeze: it is not prepared for quantization")
        for module in self.modules():
            if isinstance(module, FakeQuantizedFactor):
                module.freeze()
        self.state = "frozen"

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The whole table, `[vocab_size, dim]`: for leaving the compressed form, never for using it."""
        out = torch.empty(self.vocab_size, self.dim, dtype=self.dtype, device=self.device)
        for chunk in row_chunks(self.vocab_size, self.dim):
            out[chunk] = self.rows(torch.arange(chunk.start, chunk.stop, device=self.device))
        return out

    def logits_of_rows(
        self,
        hidden: Tensor,
        rows: Callable[..., Tensor],
        *factors: Tensor,
        by_row: Factor | None = None,
        step: int | None = None,
    ) -> Tensor:
        """`h Wᵀ` for methods whose rows cost less to compute than to multiply with: a piece of the table at a time.

        A piece is computed, multiplied and forgotten, and computed again in the backward pass: the table as a whole
        is never there.

        Args:
            hidden: `[*, dim]`.
            rows: Computes the rows from `start` to `stop` when called with `(start, stop, *factors)`. It must not read
                other parameters: in the backward pass they may be others.
            *factors: What it reads.
            by_row: `[vocab_size, *]`, a factor with a row for every token, of which it only gets those from `start` to
                `stop`, before the other factors: the gradient of a slice that it takes itself is as large as the whole.
            step: Rows of a piece; None for as many as stay in the cache, and at most a quarter of the table.

        Returns:
            `[*, vocab_size]`.
        """
        step = step or min(max(1, _PIECE_ELEMENTS // self.dim), -(-self.vocab_size // 4))

        def piece(states: Tensor, start: int, *read: Tensor) -> Tensor:
            stop = min(start + step, self.vocab_size)
            if isinstance(by_row, PackedFactor):
                # Unpacked here, and again in the backward pass: it is never there as a whole.
                read = (by_row.rows(torch.arange(start, stop, device=self.device)), *read)
            return F.linear(states, rows(start, stop, *read))

        starts = list(range(0, self.vocab_size, step))
        own: list[tuple[Tensor, ...]] = [()] * len(starts)
        if by_row is not None and not isinstance(by_row, PackedFactor):
            own = [(part,) for part in pieces(by_row, step)]
        if torch.is_grad_enabled() and not is_exporting():
            outputs = [
                checkpoint(piece, hidden, start, *part, *factors, use_reentrant=False)
                for start, part in zip(starts, own, strict=True)
            ]
        else:
            outputs = [piece(hidden, start, *part, *factors) for start, part in zip(starts, own, strict=True)]
        return torch.cat(outputs, dim=-1)

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

        Processes share the rows, see `solvers.division`.

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

        Processes share the rows, see `solvers.division`.

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


_LISTS = nn.ParameterList | nn.ModuleList


def _parts(child: Any) -> list[Any]:
    """Factors of a list of them, or the one that it is."""
    return list(child) if isinstance(child, _LISTS) else [child]


def stored_bytes(tensor_bytes: int, num_tensors: int, spec: dict[str, Any]) -> int:
    """Bytes that tensors and their structure take in a file."""
    return tensor_bytes + num_tensors * TENSOR_HEADER_BYTES + len(json.dumps(spec, separators=(",", ":")))


def dense_bytes(vocab_size: int, dim: int, itemsize: int) -> int:
    """Bytes of a table as it is."""
    return vocab_size * dim * itemsize


# Torch counts elements in 64 bits.
_MOST = 2**62


def integer(spec: dict[str, Any], name: str, least: int = 0) -> int:
    """Read an integer from a structure that came from a file.

    Raises:
        ValueError: If it is missing, something else, or out of its range.
    """
    value = spec.get(name)
    # A bool is an int to Python.
    if type(value) is not int or not least <= value <= _MOST:
        wanted = "a positive integer" if least == 1 else f"an integer from {least} up"
        raise ValueError(f"the structure's {name!r} must be {wanted}, it is {reprlib.repr(value)}")
    return value


def positive_integers(spec: dict[str, Any], *names: str) -> list[int]:
    """Read positive integers from a structure that came from a file.

    Raises:
        ValueError: If one is missing or is not a positive integer.
    """
    return [integer(spec, name, least=1) for name in names]


def integers(spec: dict[str, Any], name: str, most_entries: int = 65) -> list[int]:
    """Read a list of integers that are not negative from a structure that came from a file.

    Args:
        spec: The structure.
        name: Which of its entries.
        most_entries: How many there can be: 64 modes of two have more elements than can be counted, and one more rank.

    Raises:
        ValueError: If it is missing, something else, or has values that are out of their range.
    """
    value = spec.get(name)
    if not isinstance(value, list) or not all(type(number) is int and 0 <= number <= _MOST for number in value):
        raise ValueError(
            f"the structure's {name!r} must be a list of integers that are not negative, it is {reprlib.repr(value)}"
        )
    if len(value) > most_entries:
        raise ValueError(f"the structure's {name!r} must have at most {most_entries} entries, it has {len(value)}")
    return value


def is_exporting() -> bool:
    """Whether a graph is being made that must not depend on values: distinct ids cannot be told from others there."""
    # Older versions of torch tell no difference between exporting and compiling.
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return bool(exporting())
