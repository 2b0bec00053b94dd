"""Causal language models of transformers, whose logits are computed a few positions at a time.

All logits of a batch are `positions × vocab_size` numbers, and their gradient as many: 2 GB for a block of 1,024 tokens
of a vocabulary of 262,144. But a head reads each position alone. So the body runs once, then the head on some positions
after others, each time back to their hidden states, and then one backward pass through the body has them all.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_embcompress.calibration.recomputing import calling, kept_bytes, recomputing, stacked_layers
from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX
from lightning_embcompress.tables.transformers_models import pretrained_models
from lightning_embcompress.utils.devices import free_memory

# Logits of a piece. The table is read once for each, so that a piece has at least some hundred positions where their
# logits are no more than the most.
_CPU_ELEMENTS, _ELEMENTS = 2**24, 2**26
_POSITIONS, _MOST_ELEMENTS = 256, 2**26
# Tokens on which a model is asked what its loss is, and how exactly that is to be found again.
_FEW, _SAME = 16, 1e-4
# Of the free memory, what layers may keep for the way back.
_SHARE = 0.7


class CausalModel:
    """A causal language model of transformers whose head is one of the tables, see `CausalModel.of`.

    Args:
        model: The model.
        bodies: Modules of which the first that is called gives the hidden states.
        vocab_size: Of its logits.
    """

    def __init__(self, model: Any, bodies: Sequence[nn.Module], vocab_size: int) -> None:
        """Keep the parts."""
        self._model = model
        self._bodies = bodies
        self._vocab_size = vocab_size
        # A cache is for reading on.
        reads_on = "use_cache" in inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if reads_on else {}
        self._is_known: bool | None = None
        self._token_bytes = 0
        self._recomputes = False

    @classmethod
    def of(cls, model: nn.Module, heads: Mapping[str, nn.Module]) -> CausalModel | None:
        """Recognize a model of transformers with one head, beside a body that knows nothing of it; None for any other.

        Args:
            model: What is called with batches.
            heads: Paths of its heads to the layers.
        """
        whole: Any = pretrained_models(model).get("")
        if whole is None or len(heads) != 1 or getattr(whole.config, "is_encoder_decoder", False):
            return None
        (head,) = heads.values()
        parts = dict.fromkeys((whole.base_model, whole.get_decoder()))
        bodies = [part for part in parts if head not in part.modules()]
        return cls(whole, bodies, int(cast(Any, head).out_features)) if bodies else None

    def fits(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a batch can be run piece by piece.

        The first time the loss on its first tokens is compared with the one that the model itself computes: they differ
        where labels are not the next tokens, where the loss has other parts, or where something between the body and
        the logits looks at several positions.

        Args:
            arguments: Of the model; without `input_ids` and `labels` of one shape it does not fit.
        """
        ids, labels = (arguments.get(name) for name in ("input_ids", "labels"))
        if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.shape != labels.shape or ids.dim() != 2:
            return False
        if self._is_known is None:
            few = ids[:1, :_FEW]
            self._is_known = self._is_confirmed(few)
            if self._is_known:
                body = self._bodies[0]
                kept = kept_bytes(self._model, lambda: body(input_ids=few, **self._options))
                self._token_bytes = kept // few.numel()
        return self._is_known

    def _is_short_of_memory(self, ids: Tensor) -> bool:
        """Whether what layers compute on a batch is too much to be kept; then it is for all that follow."""
        free, needed = free_memory(ids.device), self._token_bytes * ids.numel()
        if not self._recomputes and free is not None and needed > _SHARE * free:
            self._recomputes = True
            rank_zero_info(
                f"The layers keep {needed / 1e9:.1f} GB of a batch of {ids.numel():,} tokens for the way back, and "
                f"{free / 1e9:.1f} GB are free: they are computed twice instead"
            )
        return self._recomputes

    @torch.no_grad()
    def _is_confirmed(self, ids: Tensor) -> bool:
        wanted: Any = getattr(self._model(input_ids=ids, labels=ids, **self._options), "loss", None)
        targets, places = _targets(ids)
        sums: list[Tensor] = []
        for logits, _, piece in self._pieces({"input_ids": ids}, places, len(places) // 2 + 1, _Body()):
            if logits is None or wanted is None:
                return False
            scores = logits[0].to(compute_dtype(logits.dtype))
            sums.append(nn.functional.cross_entropy(scores, targets[piece].to(logits.device), reduction="sum"))
        return bool(torch.isclose(torch.stack(sums).sum() / len(places), wanted.to(sums[0]), rtol=_SAME, atol=0))

    def run(
        self, arguments: Mapping[str, Any], see: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Run a batch forward, and back to the hidden states that the body gives.

        Args:
            arguments: Of the model, `labels` `[batch, length]` included.
            see: Called for each piece with the logits `[N, vocab_size]` and targets `[N]` of some positions, and which
                those are of all `batch × length`; gives the gradient of the summed loss at the logits.

        Returns:
            The hidden states, `[batch, length, dim]`, and the gradient there of the loss summed over all targets. None
            if they are of other positions than the labels.
        """
        given = {name: value for name, value in arguments.items() if name != "labels"}
        labels = arguments["labels"]
        positions = _positions(self._vocab_size, labels.device)
        targets, places = _targets(labels)
        body = _Body()
        gradient: Tensor | None = None
        body.layers = stacked_layers(self._model) if self._is_short_of_memory(labels) else ()
        for logits, leaf, piece in self._pieces(given, places, positions, body):
            if logits is None or body.states is None or body.states.shape[:-1] != labels.shape:
                return None
            gradient = torch.zeros_like(body.states) if gradient is None else gradient
            if len(places):
                at_logits = see(logits[0], targets[piece].to(logits.device), piece)
                (found,) = torch.autograd.grad(logits, leaf, at_logits.unsqueeze(0))
                gradient.flatten(0, -2)[piece.to(gradient.device)] = found[0]
        return None if body.states is None or gradient is None else (body.states, gradient)

    def _pieces(
        self, given: Mapping[str, Any], places: Tensor, positions: int, body: _Body
    ) -> Iterator[tuple[Tensor | None, Tensor, Tensor]]:
        """Logits `[1, N, vocab_size]`, the hidden states that they come from, and which positions these are.

        None for logits if the model does not give them for these positions.
        """
        # Without a target one position is as good as none.
        for piece in torch.split(places if len(places) else places.new_zeros(1), positions):
            body.places = piece
            with self._replayed(body):
                logits = getattr(self._model(**given, **self._options), "logits", None)
            fits = body.states is not None and isinstance(logits, Tensor) and logits.shape[:-1] == (1, len(piece))
            yield logits if fits else None, body.leaf, piece

    @contextmanager
    def _replayed(self, body: _Body) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._bodies:
                stack.enter_context(calling(part, partial(body.forward, part)))
            yield


class _Body:
    """What a body gave, some positions of which it gives again and again."""

    def __init__(self) -> None:
        self.places: Tensor
        self.layers: Sequence[nn.Module] = ()
        self.states: Tensor | None = None
        self.leaf = torch.empty(0)
        self._part: nn.Module | None = None
        self._output: Any = None

    def forward(self, part: nn.Module, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        if self._part is None:
            self._part = part
            with recomputing(self.layers):
                self._output = forward(*arguments, **keywords)
            self.states = self._output[0]
        elif self._part is not part:
            # Within the one that is called first.
            return forward(*arguments, **keywords)
        assert self.states is not None
        flat = self.states.detach().flatten(0, -2)
        self.leaf = flat[self.places.to(flat.device)].unsqueeze(0).requires_grad_()
        if not isinstance(self._output, MutableMapping):
            return (self.leaf, *self._output[1:])
        output = copy.copy(self._output)
        output[next(iter(output))] = self.leaf
        return output


def _targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """What is predicted at each of the `batch × length` positions, and which of them have a target."""
    targets = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].flatten()
    return targets, (targets != IGNORE_INDEX).nonzero().flatten()


def _positions(vocab_size: int, device: torch.device) -> int:
    """Of a piece."""
    elements = _CPU_ELEMENTS if device.type == "cpu" else _ELEMENTS
    return max(1, elements // vocab_size, min(_POSITIONS, _MOST_ELEMENTS // vocab_size))
