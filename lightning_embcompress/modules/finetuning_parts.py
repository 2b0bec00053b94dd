"""The parts of a model that is fine-tuned: its tables and its backbone, and what goes through the tables in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from lightning_embcompress.calibration.collector import find_layers
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLayer, CompressedLinear
from lightning_embcompress.methods.quantizers.factors import FakeQuantizer
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX

Freeze: TypeAlias = Literal["backbone", "factors"]
"""The part of a model that is not trained: everything but its tables, or its tables."""


# A model's names of what a fine-tuning has frozen in it, under which it keeps them itself: also in a copy.
_FROZEN = "_embcompress_frozen"


class Parts:
    """Where the tables of a model are; the layers themselves may be replaced by others at any time.

    Args:
        model: The model.
        tables: `auto`, or paths of modules, see `lightning_embcompress.tables.replacement.find_tables`.

    Attributes:
        tables: For every table the paths of its modules.

    Raises:
        ValueError: If no table can be found, or the tables are of different vocabularies.
    """

    def __init__(self, model: nn.Module, tables: str | Sequence[str] = "auto") -> None:
        """Find them."""
        self.tables = find_layers(model, tables)
        sizes = {path: rows_of(model.get_submodule(path)) for paths in self.tables for path in paths}
        if len(set(sizes.values())) != 1:
            listed = ", ".join(f"{path!r} {size}" for path, size in sizes.items())
            raise ValueError(
                f"The tables have different numbers of rows ({listed}), but a language model has one vocabulary: name"
                f" those of it, as in tables=[{next(iter(sizes))!r}]."
            )
        self.vocab_size = next(iter(sizes.values()))

    @property
    def paths(self) -> list[str]:
        """Of all layers that read a table."""
        return [path for paths in self.tables for path in paths]

    def embeddings(self, model: nn.Module) -> list[nn.Module]:
        """The layers that look rows up."""
        layers = [model.get_submodule(path) for path in self.paths]
        return [layer for layer in layers if isinstance(layer, nn.Embedding | CompressedEmbedding)]

    def head(self, model: nn.Module) -> nn.Module | None:
        """The layer that computes logits; None if there is none."""
        layers = [model.get_submodule(path) for path in self.paths]
        return next((layer for layer in layers if isinstance(layer, nn.Linear | CompressedLinear)), None)

    def split(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of the backbone, and those of the tables' layers with their biases, as the model orders them."""
        inside = {id(p) for path in self.paths for p in model.get_submodule(path).parameters()}
        backbone = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        return backbone, [parameter for parameter in model.parameters() if id(parameter) in inside]

    def freeze(self, model: nn.Module, part: Freeze | None) -> None:
        """Stop training a part of a model.

        Raises:
            ValueError: If nothing is left to train.
        """
        backbone, factors = self.split(model)
        chosen = {id(parameter) for parameter in {"backbone": backbone, "factors": factors}.get(str(part), [])}
        frozen = model.__dict__.setdefault(_FROZEN, [])
        for name, parameter in model.named_parameters():
            if id(parameter) in chosen and parameter.requires_grad:
                parameter.requires_grad_(False)
                frozen.append(name)
        if part == "factors":
            if not any(parameter.requires_grad for parameter in backbone):
                raise ValueError(
                    "freeze='factors' leaves nothing to train: no other parameter of the model is trainable."
                )
            return
        layers = [model.get_submodule(path) for path in self.paths]
        tables = [layer.factorization if isinstance(layer, CompressedLayer) else layer for layer in layers]
        if not any(parameter.requires_grad for table in tables for parameter in table.parameters()):
            raise ValueError(
                f"The tables {', '.join(map(repr, self.paths))} have no parameters that can be trained, as is so once"
                " they are packed. Fine-tune the model as it was before it was converted, or set freeze='factors' to"
                " train the backbone alone."
            )

    def groups(
        self, model: nn.Module, backbone_learning_rate: float | None, factor_learning_rate: float | None
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: the backbone, then the tables.

        Both are always there, with everything that is frozen too, which no optimizer steps: so a run can be resumed
        with another part frozen, and the state of every parameter is found.
        """
        backbone, factors = self.split(model)
        groups: list[dict[str, Any]] = [{"params": backbone}, {"params": factors}]
        for group, rate in zip(groups, (backbone_learning_rate, factor_learning_rate), strict=True):
            if rate is not None:
                group["lr"] = rate
        return groups


def unfreeze(model: nn.Module) -> None:
    """Train again what an earlier fine-tuning of the same module has frozen."""
    known = tuple(f"{name}." for name in model.__dict__.pop(_FROZEN, []))
    for name, parameter in model.named_parameters():
        # Where quantization was prepared since, what was a parameter is a module of about the same name.
        if parameter.is_floating_point() and f"{name.replace('.parametrizations.', '.')}.".startswith(known):
            parameter.requires_grad_(True)


def warn_of_frozen(model: nn.Module, parts: Parts, part: Freeze | None) -> None:
    """Say which parameters of a model are not trained, besides those that are to be frozen."""
    backbone, factors = parts.split(model)
    meant = {id(parameter) for parameter in {"backbone": backbone, "factors": factors}.get(str(part), [])}
    # Ranges that stay what they are.
    quantized = [one for one in model.modules() if isinstance(one, FakeQuantizer)]
    meant |= {id(one.scales) for one in quantized}
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not parameter.requires_grad and id(parameter) not in meant
    ]
    if names:
        rank_zero_warn(
            f"{len(names)} parameters of {type(model).__name__} are frozen and stay so, although freeze={part!r}:"
            f" {', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}. To train them call"
            " requires_grad_(True) of the model before."
        )


def rows_of(layer: nn.Module) -> int:
    """Number of rows of the table that a layer reads."""
    if isinstance(layer, CompressedLayer):
        return layer.factorization.vocab_size
    assert isinstance(layer, nn.Embedding | nn.Linear)
    return layer.weight.shape[0]


def table_rows(layer: nn.Module, ids: Tensor) -> Tensor:
    """Rows of the table that a layer reads, dense or compressed, as they are stored.

    Args:
        layer: An embedding or a head.
        ids: `[n]`.

    Returns:
        `[n, dim]`.
    """
    if isinstance(layer, CompressedLayer):
        rows: Tensor = layer.factorization.rows(ids)
        return rows
    assert isinstance(layer, nn.Embedding | nn.Linear)
    return F.embedding(ids, layer.weight)


class Watch(TorchFunctionMode):
    """Notes what goes through the tables of a model while one of its steps runs, whatever the model is.

    Args:
        model: The model.
        parts: Where its tables are.
        head: Whether hidden states and targets are noted besides ids.
        on_loss: Called with logits `[n, vocab_size]` and targets `[n]` of every cross-entropy over the vocabulary, at
            once: later they may have been written over.

    Attributes:
        ids: `[*]` of every call of an embedding.
        hidden: `[*, d]` of every call of the head, with their gradients.
        scored: Targets `[n]` of every cross-entropy over the vocabulary; -100 where there are none.
    """

    def __init__(
        self, model: nn.Module, parts: Parts, head: bool, on_loss: Callable[[Tensor, Tensor], None] | None = None
    ) -> None:
        """Note nothing yet."""
        super().__init__()
        self.model, self.parts, self.with_head = model, parts, head
        self.ids: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self.scored: list[Tensor] = []
        self.on_loss = on_loss
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Begin to note."""
        for embedding in self.parts.embeddings(self.model):
            handle = embedding.register_forward_pre_hook(self._see_ids, with_kwargs=True)
            self._stack.callback(handle.remove)
        if self.with_head:
            head = self.parts.head(self.model)
            if head is not None:
                self._stack.callback(head.register_forward_pre_hook(self._see_hidden, with_kwargs=True).remove)
            # Every function of torch passes through it: only where it is needed.
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop it."""
        if self.with_head:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()

    def _see_ids(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.ids.append((arguments[0] if arguments else next(iter(keywords.values()))).detach())

    def _see_hidden(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.hidden.append(arguments[0] if arguments else next(iter(keywords.values())))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the cross-entropies that the step computes."""
        if func in (F.cross_entropy, F.nll_loss):
            self._see_loss(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _see_loss(
        self,
        input: Tensor,
        target: Tensor,
        weight: Any = None,
        size_average: Any = None,
        ignore_index: int = IGNORE_INDEX,
        *_: Any,
        **__: Any,
    ) -> None:
        if input.dim() < 2 or input.shape[1] != self.parts.vocab_size or target.is_floating_point():
            return
        targets = target.masked_fill(target == ignore_index, IGNORE_INDEX).flatten()
        self.scored.append(targets)
        if self.on_loss is not None:
            self.on_loss(input.detach().movedim(1, -1).flatten(0, -2), targets)

    @property
    def targets(self) -> Tensor | None:
        """`[N]` target ids of all hidden states in their order; None where that is not known."""
        number = sum(hidden.shape[:-1].numel() for hidden in self.hidden)
        return _joined(self.scored) if self.scored and sum(map(len, self.scored)) == number else None

    def hidden_states(self) -> Tensor:
        """`[N, d]`, what the head has read.

        Raises:
            ValueError: If it was not called.
        """
        if not self.hidden:
            raise ValueError(
                f"The step of {type(self.model).__name__} does not call a head among {self.parts.paths}, so that"
                " nothing can be distilled: compute the logits by calling the layer, and name it in tables."
            )
        return _joined([hidden.flatten(0, -2) for hidden in self.hidden])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
