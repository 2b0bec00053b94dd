"""What the weight of a compressed layer does not answer, and rows of it that nobody may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class WeightError(TypeError):
    """Something needs the numbers of a compressed table."""


class ReadRows(Tensor):
    """Rows that were read, which nobody may change in the belief that the table changes with them."""

    weight: Any
    """What they are rows of."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute with plain tensors; refuse changes in place."""
        name, given = function_name(func), dict(kwargs or {})
        plain = tree_map(lambda one: one.as_subclass(Tensor) if isinstance(one, ReadRows) else one, (args, given))
        if isinstance(args[0] if args else None, ReadRows) and is_in_place(name):
            return refused(name, (args[0].weight,), {})
        return func(*plain[0], **plain[1])


def function_name(func: Any) -> str:
    """The name of a function, or of the property that it gets or sets."""
    name = str(getattr(func, "__name__", func))
    return str(func.__self__.__name__) if name in ("__get__", "__set__") else name


def is_in_place(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def refused(name: str, args: Any, given: Mapping[str, Any]) -> Any:
    """Raise for what needs numbers; what is changed in place on the meta device stays as it is."""
    values = [*args, *given.values()]
    weight = next((one for one in tree_leaves(values) if hasattr(one, "view_of")), None)
    stored = "its table is stored as factors"
    if weight is not None:
        table = weight.view_of.table
        on_meta = weight.view_of.read_device.type == "meta"
        if is_in_place(name) and values[0] is weight and on_meta:
            return weight
        stored = f"its table of {table.vocab_size} x {table.dim} is stored as {type(table).__name__}"
    raise WeightError(
        f"{name} cannot read or change the weight of a compressed layer: {stored}, and has no numbers of its own. It "
        "can be multiplied with (F.linear, @) and read by rows (F.embedding, weight[ids]); optimizers and hooks take "
        "layer.parameters(), and layer.factorization.materialize() builds a copy of the table, which does not train. "
        "For anything else keep the layer dense"
    )
