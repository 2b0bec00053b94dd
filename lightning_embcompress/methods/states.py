"""The states of a factorization that is quantized: as it was found, prepared for training, packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.quantizers.factors import FakeQuantizedFactor, PackedFactor, materialize
from lightning_embcompress.methods.quantizers.quantization import Quantization, State

if TYPE_CHECKING:
    from lightning_embcompress.methods.base import Factorization


class QuantizationStates(nn.Module):
    """What a `Factorization` does to be stored in fewer bits, and how its factors are listed in every state.

    `prepared` lets it train as it will be, `converted` packs what was trained, `quantized` packs without training.
    Parameters are replaced by modules of the same names, see `quantizers.factors`.
    """

    shared_factors: ClassVar[tuple[str, ...]] = ()
    """Names of the factors that all tokens share, of a class in which tokens have numbers of their own beside them."""
    provenance: dict[str, Any]
    """How the factors were found, see `Factorization`."""
    _trained: bool = True
    """Whether numbers that take the place of packed integers are to train."""

    def __init__(self) -> None:
        """As the factors are found."""
        super().__init__()
        self.quantization: Quantization | None = None
        """How the factors are quantized; None for those that are as they were found."""
        self.state: State = "fake"
        """Whether they train, or are packed; of factors that are quantized."""

    def whole_factors(self, sparse: bool = False) -> list[Tensor]:
        """All factors, in the order of `parameters()` of those that are not quantized; see `whole`."""
        own = [parameter for parameter in self._parameters.values() if parameter is not None]
        parts = [part for child in self.children() for part in _parts(child)]
        return [materialize(factor, sparse) for factor in [*own, *parts]]

    @property
    def may_train(self) -> bool:
        """Whether what takes its place is to train: not if its parameters are frozen, or were before it was packed."""
        trains = [parameter.requires_grad for parameter in self.parameters()]
        return any(trains) if trains else self._trained

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze it or let it train; packed integers keep it in mind for what takes their place."""
        self._trained = requires_grad
        return super().requires_grad_(requires_grad)

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
        return cast("Factorization[Any]", self)

    def balance(self) -> None:
        """Move scale and directions between factors so that less is lost when they are rounded, in place.

        The table stays the same, see `numerics.balance`; for methods without such factors nothing is done.
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
            if state == "packed":
                return PackedFactor(parameter.shape, of, parameter.dtype, parameter.device)
            return FakeQuantizedFactor(parameter, of, frozen=state == "frozen")

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
        packed._trained = self.may_train
        packed._replace_factors(lambda _, factor: factor.packed())
        packed.state = "packed"
        return cast("Factorization[Any]", packed)

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
                values[f"{name}.{index}" if isinstance(child, _LISTS) else name] = materialize(part)
        return cast("Factorization[Any]", plain), values

    def freeze_ranges(self) -> None:
        """Keep the scales of all groups as they are from now on.

        Raises:
            ValueError: If it is not prepared.
        """
        if not self.is_prepared:
            raise ValueError("there are no ranges to freeze: it is not prepared for quantization")
        for module in self.modules():
            if isinstance(module, FakeQuantizedFactor):
                module.freeze(module.weight)
        self.state = "frozen"


_LISTS = nn.ParameterList | nn.ModuleList


def _parts(child: Any) -> list[Any]:
    """Factors of a list of them, or the one that it is."""
    return list(child) if isinstance(child, _LISTS) else [child]
