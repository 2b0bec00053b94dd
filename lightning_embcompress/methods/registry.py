"""Ways of storing a table, and the registry of the methods that find them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_embcompress.methods.automatic.config import AutomaticConfig
from lightning_embcompress.methods.base import Factorization
from lightning_embcompress.methods.config import MethodConfig, nearest
from lightning_embcompress.methods.folded.config import CPConfig, TuckerConfig
from lightning_embcompress.methods.folded.factorization import CP, Tucker
from lightning_embcompress.methods.full_table import FullTable
from lightning_embcompress.methods.group_reduce.config import GroupReduceConfig
from lightning_embcompress.methods.group_reduce.factorization import BlockLowRank
from lightning_embcompress.methods.low_rank.config import LowRankConfig, WeightedLowRankConfig
from lightning_embcompress.methods.low_rank.factorization import LowRank
from lightning_embcompress.methods.product_quantization.config import ProductQuantizationConfig
from lightning_embcompress.methods.product_quantization.factorization import ProductQuantization
from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.methods.shared_basis.config import SharedBasisConfig
from lightning_embcompress.methods.shared_basis.factorization import SharedBasisBlocks
from lightning_embcompress.methods.specs import checked_padding, dense_bytes
from lightning_embcompress.methods.tensor_train.config import TensorTrainConfig
from lightning_embcompress.methods.tensor_train.factorization import TensorTrain
from lightning_embcompress.methods.tensor_train_matrix.config import TensorTrainMatrixConfig
from lightning_embcompress.methods.tensor_train_matrix.factorization import TensorTrainMatrix
from lightning_embcompress.methods.transform_coding.config import TransformCodingConfig
from lightning_embcompress.methods.transform_coding.latent_codes import LatentCodes

__all__ = [
    "CP",
    "DEFAULT_METHOD",
    "METHODS",
    "BlockLowRank",
    "Factorization",
    "FullTable",
    "GroupReduceConfig",
    "LatentCodes",
    "LowRank",
    "LowRankConfig",
    "Method",
    "MethodConfig",
    "ProductQuantization",
    "ProductQuantizationConfig",
    "Quantization",
    "SharedBasisBlocks",
    "SharedBasisConfig",
    "TensorTrain",
    "TensorTrainConfig",
    "TensorTrainMatrix",
    "TensorTrainMatrixConfig",
    "TransformCodingConfig",
    "Tucker",
    "WeightedLowRankConfig",
    "check_spec",
    "factorization_from_spec",
    "get_config",
    "get_method",
    "nearest",
]


@dataclass(frozen=True)
class Method:
    """A way to compress a table: its config, and how it stores what it finds.

    Attributes:
        config: What the method can be told; its class attributes say what generic code has to know of it.
        factorization: The class that stores the table.
        others: Other classes that store what it finds, depending on its config.
    """

    config: type[MethodConfig]
    factorization: type[Factorization[Any]]
    others: tuple[type[Factorization[Any]], ...] = ()

    @property
    def kinds(self) -> list[str]:
        """Kinds of factorization that it may give."""
        return [kind.kind for kind in (self.factorization, *self.others)]


def _by_name(*methods: Method) -> dict[str, Method]:
    return {method.config.method: method for method in methods}


METHODS: dict[str, Method] = _by_name(
    Method(CPConfig, CP),
    Method(GroupReduceConfig, BlockLowRank),
    Method(LowRankConfig, LowRank),
    Method(ProductQuantizationConfig, ProductQuantization),
    Method(SharedBasisConfig, SharedBasisBlocks),
    Method(TensorTrainConfig, TensorTrain),
    Method(TensorTrainMatrixConfig, TensorTrainMatrix),
    Method(TransformCodingConfig, SharedBasisBlocks, (LatentCodes,)),
    Method(TuckerConfig, Tucker),
    Method(WeightedLowRankConfig, LowRank),
)
"""Methods by their names; a new one is a folder of its own and a line here."""
CHOOSERS: dict[str, Method] = _by_name(Method(AutomaticConfig, SharedBasisBlocks))
"""Names that stand for the best of several methods; sizes are those of the first."""
DEFAULT_METHOD = TransformCodingConfig.method
"""The method where none is named."""


def get_method(name: str) -> Method:
    """Look a method up by its name.

    Raises:
        ValueError: If there is none of that name; the nearest ones are named.
    """
    found = METHODS.get(name) or CHOOSERS.get(name)
    if found is None:
        names = [*METHODS, *CHOOSERS]
        raise ValueError(f"unknown method {name!r}{nearest(name, names)}; methods are {', '.join(names)}")
    return found


def get_config(method: MethodConfig | str, **options: Any) -> MethodConfig:
    """Make the config of a method from its name and options, or take one that is made already.

    Raises:
        ValueError: If there is no such method or option, a value is out of its range, or options are given beside a
            config.

    Example:
        >>> get_config("low_rank", rank=8)
        LowRankConfig(rank=8)
    """
    if isinstance(method, str):
        return get_method(method).config.from_options(**options)
    if options:
        raise ValueError(f"options {sorted(options)} are given beside {method}: make them fields of the config")
    return method


def factorization_from_spec(
    spec: Mapping[str, Any], dtype: torch.dtype, device: torch.device | None = None
) -> Factorization[Any]:
    """Build an empty factorization of whatever class its structure names.

    Raises:
        ValueError: If the class is unknown or the structure is not possible.
    """
    check_spec(spec)
    return _empty(spec, dtype, device)


def _empty(spec: Mapping[str, Any], dtype: torch.dtype, device: torch.device | None) -> Factorization[Any]:
    structure = dict(spec)
    quantization, padding = structure.pop("quantization", None), structure.pop("padding", None)
    empty = _kinds()[spec["kind"]].from_spec(structure, dtype, device)
    if padding is not None:
        ids, stored = checked_padding(padding, empty.vocab_size)
        empty.keep_padding(ids, torch.zeros(len(ids), empty.dim) if stored else None)
    if quantization is not None:
        empty.hold(*Quantization.from_record(quantization))
    return empty


def check_spec(spec: Mapping[str, Any]) -> None:
    """Check a structure that came from a file, without allocating memory for it.

    Raises:
        ValueError: If the class is unknown, an entry is missing, unknown, of a wrong type or out of its range, or the
            factors would be larger than the table they stand for.
    """
    kinds, kind = _kinds(), spec.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"unknown kind of factorization {reprlib.repr(kind)}; known are {', '.join(kinds)}")
    try:
        # In the widest dtype, beside which packed integers count least: a model may have been cast after compression.
        empty = _empty(spec, torch.float64, torch.device("meta"))
    except (RuntimeError, OverflowError, TypeError) as error:
        # Sizes beyond what torch counts, for which it has all of these.
        raise ValueError(f"the structure of a {kind} is not possible: {str(error)[:200]}") from error
    except ValueError as error:
        # Lists may be long.
        raise ValueError(str(error) if len(str(error)) <= 500 else f"{str(error)[:500]} ...") from error
    own = empty.spec()
    if own != spec:
        names = own.keys() ^ spec.keys() or [name for name in own if own[name] != spec[name]]
        raise ValueError(
            f"the structure of a {kind} must have the entries {', '.join(own)}, and no others; look at "
            f"{reprlib.repr(sorted(map(str, names)))}"
        )
    needed = sum(tensor.nbytes for tensor in empty.state_dict().values())
    # What trains for fewer bits may have a number for every one of the table, and a little beside them.
    most = dense_bytes(empty.vocab_size, empty.dim, torch.float64.itemsize) * (2 if empty.is_prepared else 1)
    if needed > most:
        raise ValueError(
            f"the structure of a {kind} for a table of {empty.vocab_size} x {empty.dim} would take more memory than "
            "the table itself: the file is damaged or was made to exhaust memory"
        )


def _kinds() -> dict[str, type[Factorization[Any]]]:
    found: list[type[Factorization[Any]]] = []
    for method in METHODS.values():
        found += (method.factorization, *method.others)
    # Dense tables that are quantized as they are come of no method.
    found.append(FullTable)
    return {one.kind: one for one in found}
