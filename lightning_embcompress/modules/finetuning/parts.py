"""The parts of a model that is fine-tuned: its tables, its backbone, and calls of the tables' layers in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_embcompress.calibration.reading_modules import find_layers
from lightning_embcompress.callbacks.passes import step_arguments
from lightning_embcompress.layers.bags import AnyEmbedding
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLayer, CompressedLinear
from lightning_embcompress.layers.sizes import table_shape
from lightning_embcompress.methods.quantizers.factors import FakeQuantizer
from lightning_embcompress.tables.automatic import is_one_vocabulary

Freeze: TypeAlias = Literal["backbone", "factors", "rows"]
"""The part of a model that is not trained: everything but its tables, its tables, or all but what their rows share."""


# A model's names of what a fine-tuning has frozen in it, under which it keeps them itself: also in a copy.
_FROZEN = "_embcompress_frozen"


class Parts:
    """Where the tables of a model are; the layers themselves may be replaced by others at any time.

    Args:
        model: The model.
        tables: `auto`, or paths of modules, see `lightning_embcompress.tables.finding.find_tables`.

    Attributes:
        tables: For every table the paths of its modules.

    Raises:
        ValueError: If no table can be found, or the tables are of different vocabularies.
    """

    def __init__(self, model: nn.Module, tables: str | Sequence[str] = "auto") -> None:
        """Find them."""
        self.tables = find_layers(model, tables)
        sizes = {path: table_shape(model.get_submodule(path))[0] for paths in self.tables for path in paths}
        if not is_one_vocabulary(sizes.values()):
            listed = ", ".join(f"{path!r} {size}" for path, size in sizes.items())
            raise ValueError(
                f"The tables have different numbers of rows ({listed}), but a language model has one vocabulary: name"
                f" those of it, as in tables=[{next(iter(sizes))!r}]."
            )
        # One of them may be padded.
        self.vocab_size = min(sizes.values())

    @property
    def paths(self) -> list[str]:
        """Of all layers that read a table."""
        return [path for paths in self.tables for path in paths]

    def embeddings(self, model: nn.Module) -> list[nn.Module]:
        """The layers that look rows up."""
        layers = [model.get_submodule(path) for path in self.paths]
        return [layer for layer in layers if isinstance(layer, AnyEmbedding | CompressedEmbedding)]

    def head(self, model: nn.Module) -> nn.Module | None:
        """The layer that computes logits; None if there is none."""
        layers = [model.get_submodule(path) for path in self.paths]
        return next((layer for layer in layers if isinstance(layer, nn.Linear | CompressedLinear)), None)

    def split(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of the backbone, and those of the tables' layers with their biases, as the model orders them."""
        inside = {id(p) for path in self.paths for p in model.get_submodule(path).parameters()}
        backbone = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        return backbone, [parameter for parameter in model.parameters() if id(parameter) in inside]

    def members(self, model: nn.Module, part: Freeze | None) -> set[int]:
        """Identities of the parameters of a part; none of no part."""
        backbone, factors = self.split(model)
        layers = [model.get_submodule(path) for path in self.paths] if part == "rows" else []
        own = [
            parameter
            for layer in layers
            for name, parameter in layer.named_parameters()
            if not isinstance(layer, CompressedLayer) or "coefficients" in name
        ]
        parts = {"backbone": backbone, "factors": factors, "rows": [*backbone, *own]}
        return {id(parameter) for parameter in parts.get(str(part), [])}

    def freeze(self, model: nn.Module, part: Freeze | None) -> None:
        """Stop training a part of a model.

        Raises:
            ValueError: If nothing is left to train.
        """
        chosen = self.members(model, part)
        frozen = model.__dict__.setdefault(_FROZEN, [])
        for name, parameter in model.named_parameters():
            if id(parameter) in chosen and parameter.requires_grad:
                parameter.requires_grad_(False)
                frozen.append(name)
        if part == "factors":
            if not any(parameter.requires_grad for parameter in self.split(model)[0]):
                raise ValueError(
                    "freeze='factors' leaves nothing to train: no other parameter of the model is trainable."
                )
            return
        layers = [model.get_submodule(path) for path in self.paths]
        tables = [layer.factorization if isinstance(layer, CompressedLayer) else layer for layer in layers]
        if not any(parameter.requires_grad for table in tables for parameter in table.parameters()):
            raise ValueError(
                f"The tables {', '.join(map(repr, self.paths))} have no parameters that can be trained with"
                f" freeze={part!r}, as is so once they are packed. Fine-tune the model as it was before it was"
                " converted, or set freeze='factors' to train the backbone alone."
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
    # Ranges that stay what they are.
    quantized = [one for one in model.modules() if isinstance(one, FakeQuantizer)]
    meant = parts.members(model, part) | {id(one.scales) for one in quantized}
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


def table_rows(layer: nn.Module, ids: Tensor) -> Tensor:
    """Rows of the table that an embedding or a head reads, without the scale that an embedding may have.

    Args:
        layer: Dense or compressed.
        ids: `[n]`.

    Returns:
        `[n, dim]`.
    """
    if isinstance(layer, CompressedLayer):
        rows: Tensor = layer.factorization.rows(ids)
        return rows
    assert isinstance(layer, AnyEmbedding | nn.Linear)
    return F.embedding(ids, layer.weight)


def own_step(model: LightningModule, batch: Any, batch_idx: int) -> Any:
    """Call the `training_step` of a module, which may leave the index of the batch out."""
    return model.training_step(*step_arguments(model.training_step, batch, batch_idx))


@dataclass
class Seen:
    """Calls of the tables' layers in a step, in their order.

    Attributes:
        ids: `[*]` tokens of every call of an embedding.
        hidden: `[*, dim]` hidden states of every call of the head, with their gradients.
        logits: Where the gradients of the head's logits are found, also once these are overwritten.
    """

    ids: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    logits: list[GradientEdge] = field(default_factory=list)

    def hidden_states(self, model: nn.Module) -> Tensor:
        """`[N, dim]`, all inputs of the head.

        Raises:
            ValueError: If it was not called.
        """
        if not self.hidden:
            raise ValueError(
                f"The training_step of {type(model).__name__} does not call a head among its tables, so that nothing"
                " can be distilled: compute the logits by calling the layer, and name it in tables."
            )
        return torch.cat([hidden.flatten(0, -2) for hidden in self.hidden])

    def is_scored(self, loss: Tensor) -> Tensor:
        """`[N]`, the positions of the hidden states whose logits a loss reads: elsewhere its gradient is zero.

        The loss is differentiated by the logits once, and its graph is kept for the backward pass.

        Raises:
            ValueError: If the loss does not come from the logits.
        """
        gradients = torch.autograd.grad(loss, self.logits, torch.ones_like(loss), retain_graph=True, allow_unused=True)
        found = [gradient.flatten(0, -2).ne(0).any(-1) for gradient in gradients if gradient is not None]
        if len(found) < len(self.hidden):
            raise ValueError(
                "the loss of the training_step does not come from the logits that its head gives, so that the positions"
                " to distil at are not known: compute the logits by calling the head, and the loss from them."
            )
        return torch.cat(found)


@contextmanager
def watch(model: nn.Module, parts: Parts, head: bool) -> Iterator[Seen]:
    """Note what passes the tables of a model while one of its steps runs.

    Args:
        model: The model.
        parts: Where its tables are.
        head: Whether calls of the head are noted besides those of embeddings.
    """
    seen = Seen()

    def see_ids(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.ids.append((arguments[0] if arguments else next(iter(keywords.values()))).detach())

    def see_head(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], logits: Tensor) -> None:
        seen.hidden.append(arguments[0] if arguments else next(iter(keywords.values())))
        if logits.requires_grad:
            seen.logits.append(get_gradient_edge(logits))

    layer = parts.head(model) if head else None
    with ExitStack() as stack:
        for embedding in parts.embeddings(model):
            stack.callback(embedding.register_forward_pre_hook(see_ids, with_kwargs=True).remove)
        if layer is not None:
            stack.callback(layer.register_forward_hook(see_head, with_kwargs=True).remove)
        yield seen
