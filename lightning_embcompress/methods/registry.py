"""Ways of storing a table, and the registry of the methods that find them."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from lightning_embcompress.methods.base import Factorization
from lightning_embcompress.methods.full_table import FullTable
from lightning_embcompress.methods.group_reduce.factorization import BlockLowRank, GroupReduceOptions
from lightning_embcompress.methods.low_rank.factorization import LowRank, LowRankOptions
from lightning_embcompress.methods.product_quantization.factorization import (
    ProductQuantization,
    ProductQuantizationOptions,
)
from lightning_embcompress.methods.quantizers.quantization import Quantization
from lightning_embcompress.methods.shared_basis.factorization import SharedBasisBlocks, TransformCodingOptions
from lightning_embcompress.methods.specs import dense_bytes, plain
from lightning_embcompress.methods.tensor_train.factorization import TensorTrain, TensorTrainOptions
from lightning_embcompress.methods.tensor_train_matrix.factorization import TensorTrainMatrix, TensorTrainMatrixOptions
from lightning_embcompress.methods.tensorly.cp import CP, CPOptions
from lightning_embcompress.methods.tensorly.tucker import Tucker, TuckerOptions
from lightning_embcompress.methods.transform_coding.latent_codes import LatentCodes

__all__ = [
    "AUTOMATIC",
    "AUTOMATIC_METHODS",
    "CP",
    "METHODS",
    "BlockLowRank",
    "CPOptions",
    "Factorization",
    "FullTable",
    "GroupReduceOptions",
    "LatentCodes",
    "LowRank",
    "LowRankOptions",
    "Method",
    "ProductQuantization",
    "ProductQuantizationOptions",
    "Quantization",
    "SharedBasisBlocks",
    "TensorTrain",
    "TensorTrainMatrix",
    "TensorTrainMatrixOptions",
    "TensorTrainOptions",
    "TransformCodingOptions",
    "Tucker",
    "TuckerOptions",
    "check_spec",
    "factorization_from_spec",
    "get_method",
]


@dataclass(frozen=True)
class Method:
    """A way to compress a table, by the name it has in callbacks, recipes and `compress`.

    Attributes:
        factorization: The class that stores the table.
        description: One line for lists.
        needs_counts: Whether rows are weighted by token counts.
        fixed: Options of the factorization that the method's name stands for.
        others: Other classes that store what it finds, depending on its options.
    """

    factorization: type[Factorization[Any]]
    description: str
    needs_counts: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[type[Factorization[Any]], ...] = ()

    @property
    def kinds(self) -> list[str]:
        """Kinds of factorization that it may give."""
        return [kind.kind for kind in (self.factorization, *self.others)]

    @property
    def option_names(self) -> list[str]:
        """Names of its options."""
        return [option.name for option in fields(self.factorization.options_class) if option.name not in self.fixed]

    def options(self, **given: Any) -> Any:
        """Make the options of the factorization from those given and those that are fixed.

        Raises:
            ValueError: If the method has no option of a given name, or a value is out of its range.
        """
        names = self.option_names
        for name in given:
            if name not in names:
                raise ValueError(
                    f"unknown option {name!r}{nearest(name, names)}; the method has {', '.join(names) or 'none'}"
                )
        return self.factorization.options_class(**plain(given), **self.fixed)


METHODS: dict[str, Method] = {
    "cp": Method(CP, "The folded table as a sum of outer products (CP), a baseline"),
    "group_reduce": Method(
        BlockLowRank,
        "Frequency groups, each of a low rank of its own (GroupReduce)",
        True,
        others=(SharedBasisBlocks,),
    ),
    "low_rank": Method(LowRank, "Truncated SVD of the whole table", fixed={"weighted": False}),
    "product_quantization": Method(
        ProductQuantization, "Rows put together from the centroids of their parts (PQ, MGQE)", True
    ),
    "tensor_train": Method(TensorTrain, "A tensor train for the vector of every token (TensorGPT)"),
    "tensor_train_matrix": Method(TensorTrainMatrix, "One tensor train for the whole table (TT embedding)"),
    "transform_coding": Method(
        SharedBasisBlocks,
        "Frequency groups in one basis of the loss, each component at a width of its own",
        True,
        others=(LatentCodes,),
    ),
    "tucker": Method(Tucker, "The folded table as a core and a factor a mode (Tucker), a baseline"),
    "weighted_low_rank": Method(LowRank, "Truncated SVD, rows weighted by frequency", True, fixed={"weighted": True}),
}


AUTOMATIC = "auto"
"""In place of a method's name: for every table the one of `AUTOMATIC_METHODS` of the least predicted loss."""
AUTOMATIC_METHODS = ("transform_coding", "group_reduce", "product_quantization")


def get_method(name: str) -> Method:
    """Look a method up by its name; `auto` has the options and the sizes of the first of `AUTOMATIC_METHODS`.

    Raises:
        ValueError: If there is none of that name; the nearest ones are named.
    """
    if name == AUTOMATIC:
        return replace(METHODS[AUTOMATIC_METHODS[0]], fixed={"groups": None, "refine_rounds": 5, "bits": None})
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{nearest(name, METHODS)}; methods are {', '.join(METHODS)}")
    return METHODS[name]


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
    quantization = structure.pop("quantization", None)
    empty = _kinds()[spec["kind"]].from_spec(structure, dtype, device)
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


def nearest(name: str, known: Iterable[str]) -> str:
    """The part of an error message that proposes what was probably meant, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=2)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
