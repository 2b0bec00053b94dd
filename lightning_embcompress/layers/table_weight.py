"""The weight of a compressed layer: a tensor without numbers, which answers as the table does where it can.

Code that was written for dense layers reads `head.weight.dtype`, ties by `F.linear(hidden, embedding.weight)` and
multiplies with `embedding.weight.T`. A `TableWeight` has the shape, dtype and device of the table, and hands what only
reads rows or multiplies with all of them to the factorization, whose factors get the gradients. Whatever else needs
the numbers of the table is refused by a `TypeError`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_embcompress.layers.table_view import TableView
from lightning_embcompress.layers.weight_answers import WeightAnswers
from lightning_embcompress.layers.weight_refusals import function_name, refused
from lightning_embcompress.methods.registry import Factorization


class TableWeight(WeightAnswers, Tensor):  # type: ignore[misc,override]
    """What stands for the table of a compressed layer where others read its `weight`.

    Its numbers are nowhere, so that it is in no `parameters()`, state dict or optimizer. It gives

    - its shape, dtype, device and whether it trains, which `requires_grad_` decides for the factors;
    - logits for `F.linear(hidden, weight, bias)`, `hidden @ weight.T`, `torch.einsum("bsd,vd->bsv", hidden, weight)`;
    - rows for `F.embedding(ids, weight)`, `weight[ids]`, `weight.index_select(0, ids)`, and bags of them for
      `F.embedding_bag(ids, weight)`;
    - mixtures of all rows for `probabilities @ weight`;
    - itself read otherwise for `.T`, `.detach()`, `.data`, `.to(dtype or device)`;
    - dense tensors like it for `torch.zeros_like(weight)` and `weight.new_zeros(...)`.

    Everything else raises a `TypeError`. Of a table on the meta device, changes in place do nothing, as there.

    Args:
        view: How the table is read.

    Example:
        >>> from lightning_embcompress.layers.compressed import CompressedEmbedding
        >>> from lightning_embcompress.methods.registry import LowRank
        >>> embedding = CompressedEmbedding(LowRank.decompose(torch.randn(100, 16), 4000))
        >>> hidden = embedding(torch.tensor([1, 2]))
        >>> torch.nn.functional.linear(hidden, embedding.weight).shape, (hidden @ embedding.weight.T).shape
        (torch.Size([2, 100]), torch.Size([2, 100]))
        >>> embedding.weight.sum()  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        WeightError: sum cannot read or change the weight of a compressed layer
    """

    # What transformers asks before it initializes a weight.
    _is_hf_initialized = True
    made_for: tuple[torch.dtype, torch.device]
    """What it says its dtype and device are."""

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __new__(cls, view: TableView) -> Self:
        """Make one, without storage."""
        # One that was made in inference mode could not be saved for a backward pass later.
        with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
            made: Any = torch.Tensor._make_wrapper_subclass(
                cls, view.shape, dtype=view.read_dtype, device=view.read_device, requires_grad=not view.detached
            )
            if not view.detached:
                # Whoever computes gradients by himself, as fused losses do, would return that of a whole table.
                # `register_hook` asks whether factors train, which may change.
                made._backward_hooks = OrderedDict({0: _refuse_gradient})
        made.view_of, made.made_for = view, (view.read_dtype, view.read_device)
        return cast(Self, made)

    @staticmethod
    def made(view: TableView) -> Any:
        """Another one; while `torch.compile` traces a function, what it can make."""
        return _TracedWeight(view) if torch.compiler.is_dynamo_compiling() else TableWeight(view)

    def __deepcopy__(self, memo: dict[int, Any]) -> TableWeight:
        """The weight of a copy of the factorization."""
        copied: TableWeight = TableWeight(copy.deepcopy(self.view_of, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """How the table is read."""
        return TableWeight, (self.view_of,)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Refuse what goes around `__torch_function__`."""
        return refused(function_name(func), args, kwargs or {})


class _TracedWeight(WeightAnswers):
    """The same while `torch.compile` traces a function, which cannot make tensors without storage."""

    def __init__(self, view: TableView) -> None:
        self.view_of = view
        self.dtype, self.device, self.shape = view.read_dtype, view.read_device, torch.Size(view.shape)

    made = staticmethod(TableWeight.made)


def table_weight(table: Factorization[Any]) -> TableWeight:
    """The weight of a factorization: one object for all layers that share it, for as long as it is not cast or moved.

    Its factorization has it as an attribute, which copies and files of it leave out.
    """
    known: TableWeight | None = table.weight_of_layers
    # A shallow copy of a module has the attributes of another one.
    is_own = known is not None and known.view_of.table is table and known.made_for == (table.dtype, table.device)
    if known is None or not is_own:
        known = table.weight_of_layers = TableWeight(TableView(table))
    return known


def _refuse_gradient(gradient: Tensor) -> None:
    raise TypeError(
        f"a gradient of a whole table, {tuple(gradient.shape)}, was computed for the weight of a compressed layer, as "
        "fused losses do, and has no way to its factors: call the layer, and compute the loss from its logits, or use "
        "lightning_embcompress.layers.full_softmax.head_softmax_loss(head, hidden, targets)"
    )
