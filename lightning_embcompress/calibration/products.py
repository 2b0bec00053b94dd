"""Softmaxes that are no layers: products with the weight of an embedding, seen while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_embcompress.layers.table_weight import TableWeight

_PRODUCTS = ("linear", "matmul", "__matmul__", "mm")


class TableProducts(TorchFunctionMode):
    """Within it, products of hidden states with whole tables are reported: `F.linear(h, w)`, `h @ w.T`.

    Args:
        weights: Path of a layer to the weight `[vocab_size, dim]` that it reads.
        before: Called with the path, the function that gives logits of hidden states, and the hidden states; gives
            those that are multiplied in their place, or None for what is no softmax of its own.
        after: Called with the logits.
    """

    def __init__(
        self,
        weights: Mapping[str, Any],
        before: Callable[[str, Callable[[Tensor], Tensor], Tensor], Tensor | None],
        after: Callable[[Tensor], None],
    ) -> None:
        """Know the tables by their weights."""
        super().__init__()
        self._paths = {id(_table(weight)): path for path, weight in weights.items()}
        self._weights = dict(weights)
        self._before, self._after = before, after
        self._warned: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and look whether it multiplies with a table."""
        keywords = dict(kwargs or {})
        read = [one for one in (*args, *keywords.values()) if isinstance(one, Tensor) and self._path(one)]
        if not read:
            return func(*args, **keywords)
        name = getattr(func, "__name__", "")
        path = self._path(read[0])
        hidden, logits_of = self._product(path, name, read[0], func, args, keywords)
        if logits_of is None:
            found = func(*args, **keywords)
            if isinstance(found, Tensor) and not self._path(found) and name not in ("embedding", "embedding_bag"):
                self._say(path, name, found)
            return found
        states = self._before(path, logits_of, hidden)
        if states is None:
            return func(*args, **keywords)
        logits = logits_of(states)
        self._after(logits)
        return logits

    def _path(self, tensor: Tensor) -> str:
        """Path of the layer whose weight a tensor is, or is a view of; nothing for others."""
        return self._paths.get(id(_table(tensor))) or self._paths.get(id(getattr(tensor, "_base", None)), "")

    def _product(
        self, path: str, name: str, weight: Tensor, func: Any, args: Any, keywords: Mapping[str, Any]
    ) -> tuple[Any, Callable[[Tensor], Tensor] | None]:
        """What is multiplied with a whole table, and the function that gives logits; None where nothing is."""
        place = 0
        turned = tuple(weight.shape) == tuple(self._weights[path].shape)[::-1]
        if name == "einsum":
            place = _multiplied(args, weight)
            is_product = bool(place) and not turned
        else:
            is_product = name in _PRODUCTS and turned == (name != "linear")
        hidden: Any = args[place] if args else keywords.get("input")
        if not is_product or hidden is weight or (not turned and weight.shape != self._weights[path].shape):
            return hidden, None

        def logits_of(states: Tensor) -> Tensor:
            if not args:
                return cast(Tensor, func(**{**keywords, "input": states}))
            if states.dim() != hidden.dim() and name == "einsum":
                # Of some of the positions, which have no letters of their own.
                return F.linear(states, weight)
            read = [*args[:place], states, *args[place + 1 :]]
            return cast(Tensor, func(*read, **keywords))

        return hidden, logits_of

    def _say(self, path: str, name: str, found: Tensor) -> None:
        """Warn once of a table that is read in a way that nobody can follow, if that may be for logits."""
        if found.dim() < 2 or path in self._warned or not found.is_floating_point() or name.startswith("__get"):
            return
        self._warned.add(path)
        rank_zero_warn(
            f"the weight of {path!r} is read by {name!r}, which the statistics do not follow: they see its lookups, "
            "and products of hidden states with all of it, such as F.linear(h, weight), but nothing else"
        )


def _table(tensor: Any) -> Any:
    """What a weight is of: that of a compressed layer stands for its factors, however it is read."""
    # One that is just being made is of nothing yet.
    view = vars(tensor).get("view_of") if isinstance(tensor, TableWeight) else None
    return tensor if view is None else view.table


def _multiplied(args: Any, weight: Tensor) -> int:
    """Which argument of `einsum` are hidden states, in a product `...d, vd -> ...v` with a table; 0 for none."""
    if len(args) != 3 or not isinstance(args[0], str):
        return 0
    inputs, _, output = args[0].replace(" ", "").partition("->")
    of_hidden, of_weight = inputs.split(",") if args[2] is weight else inputs.split(",")[::-1]
    is_product = len(of_weight) == 2 and of_hidden[-1:] == of_weight[1] and output == of_hidden[:-1] + of_weight[0]
    return (1 if args[2] is weight else 2) if is_product else 0
