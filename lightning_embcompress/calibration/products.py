"""Softmaxes that are no layers: products with the weight of an embedding, seen while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
        self._paths = {id(weight): path for path, weight in weights.items()}
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
        hidden: Any = args[0] if args else keywords.get("input")
        if name not in _PRODUCTS or hidden is read[0] or not self._is_whole(path, read[0], name == "linear"):
            found = func(*args, **keywords)
            if isinstance(found, Tensor) and not self._path(found) and name not in ("embedding", "embedding_bag"):
                self._say(path, name, found)
            return found

        def logits_of(states: Tensor) -> Tensor:
            logits: Tensor = func(states, *args[1:], **keywords) if args else func(**{**keywords, "input": states})
            return logits

        states = self._before(path, logits_of, hidden)
        if states is None:
            return func(*args, **keywords)
        logits = logits_of(states)
        self._after(logits)
        return logits

    def _path(self, tensor: Tensor) -> str:
        """Path of the layer whose weight a tensor is, or is a view of; nothing for others."""
        return self._paths.get(id(tensor)) or self._paths.get(id(getattr(tensor, "_base", None)), "")

    def _is_whole(self, path: str, tensor: Tensor, by_rows: bool) -> bool:
        shape = tuple(self._weights[path].shape)
        return tuple(tensor.shape) == (shape if by_rows else shape[::-1])

    def _say(self, path: str, name: str, found: Tensor) -> None:
        """Warn once of a table that is read in a way that nobody can follow, if that may be for logits."""
        if found.dim() < 2 or path in self._warned or not found.is_floating_point() or name.startswith("__get"):
            return
        self._warned.add(path)
        rank_zero_warn(
            f"the weight of {path!r} is read by {name!r}, which the statistics do not follow: they see its lookups, "
            "and products F.linear(h, weight) and h @ weight.T with all of it as a softmax, but nothing else"
        )
