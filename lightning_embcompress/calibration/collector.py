"""Hooks at the tables of a model that sum up what goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_embcompress.calibration.calls import EmbeddingCall, HeadCall, HeadPieces, never_called, wide
from lightning_embcompress.calibration.causal import CausalModel
from lightning_embcompress.calibration.counts import Vocabulary, counts_by_table
from lightning_embcompress.calibration.products import TableProducts
from lightning_embcompress.calibration.words import WordMasks
from lightning_embcompress.layers.bags import AnyEmbedding, CompressedEmbeddingBag, pool_bag, read_bag
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.layers.pooling import bag_ids
from lightning_embcompress.layers.scaled_embeddings import scale_of
from lightning_embcompress.tables.automatic import vocabulary_size

# Of the loss in float16, so that its gradient is finite.
_LARGEST_HALF_SCALE = 2.0**15
_UNKNOWN_NUMBER = (
    "the number of targets is not known, because none of the tables is a head: let loss_fn give "
    "(mean loss, number of targets)"
)


class HeadReached(Exception):
    """Leaves a step at the moment a head is called, see `Collector.stopping_at_head`."""


class Collector:
    """Sums up tokens, hidden states, probabilities and gradients of a model, batch by batch.

    Entered, the model is in evaluation mode; afterwards it is as before. For every batch compute a loss, then call
    `add`: only gradients of what embeddings give and heads read are computed, none of parameters.

    Args:
        model: The module.
        tables: Paths of the modules of every table, see `find_layers`.
        token_counts: `[vocab_size]` counts, or such counts by the paths of tables; None to count the words that
            embeddings get. Tables with as many rows are of one vocabulary.
        in_halves: Whether to add up the moments of every second batch by themselves, too, for `expected_excess`.

    Raises:
        ValueError: If nothing of a vocabulary could be counted, or the counts do not fit the tables.
    """

    def __init__(
        self,
        model: nn.Module,
        tables: Sequence[Sequence[str]],
        token_counts: Any = None,
        *,
        in_halves: bool = False,
    ) -> None:
        """Check, and make room for the sums."""
        self.model = model
        self.tables = [list(modules) for modules in tables]
        layers = {path: model.get_submodule(path) for modules in tables for path in modules}
        self.embeddings = {
            p: layer for p, layer in layers.items() if isinstance(layer, AnyEmbedding | CompressedEmbedding)
        }
        self.heads = {path: layer for path, layer in layers.items() if isinstance(layer, nn.Linear | CompressedLinear)}
        self.sizes = {path: layer.num_embeddings for path, layer in self.embeddings.items()}
        self.sizes |= {path: layer.out_features for path, layer in self.heads.items()}
        self.given_counts = None if token_counts is None else _given_counts(token_counts, self.tables, self.sizes)
        counted = {self.sizes[path] for path in self.embeddings}
        # Sizes of the embeddings whose ids are counted for a table, which may be padded otherwise.
        self.vocabularies = {path: vocabulary_size(size, counted) or 0 for path, size in self.sizes.items()}
        for modules in self.tables:
            if token_counts is None and not self.vocabularies[modules[0]]:
                raise ValueError(
                    f"table {modules[0]!r} is read by no embedding whose ids could be counted: give token_counts, how "
                    "often every token occurs in the training data (torch.bincount(ids, minlength=vocab_size))"
                )
        # Tables that no layer reads as a softmax: something else may.
        self.products = {
            modules[0]: weight
            for modules in self.tables
            if not any(path in self.heads for path in modules)
            and (weight := getattr(layers[modules[0]], "weight", None)) is not None
        }
        self.sums: dict[tuple[str, str], Tensor] = {}
        for path, embedding in self.embeddings.items():
            self._make_sum("gradients", path, embedding.embedding_dim, embedding.embedding_dim)
            self._make_sum("gradient_energies", path, self.sizes[path])
        softmaxes = {path: head.in_features for path, head in self.heads.items()}
        softmaxes |= {path: self.embeddings[path].embedding_dim for path in self.products}
        for path, dim in softmaxes.items():
            self._make_sum("hidden", path, dim, dim)
            self._make_sum("hidden_mean", path, dim)
            self._make_sum("probabilities", path, self.sizes[path])
            self._make_sum("squared_probabilities", path, self.sizes[path])
        kept = [key for key, total in self.sums.items() if in_halves and total.dim() == 2]
        self.halves = {key: torch.zeros_like(self.sums[key]) for key in kept}
        self.counted = {size: torch.zeros(size, dtype=torch.long) for size in sorted(counted)}
        # Positions of a softmax, those with probabilities, and calls of embeddings.
        self.positions = dict.fromkeys(softmaxes, 0)
        self.scored = dict.fromkeys(softmaxes, 0)
        self.calls = dict.fromkeys(self.embeddings, 0)
        self.num_targets = 0
        self.batches = 0
        self.skipped = 0
        self.words = WordMasks(model, self.embeddings)
        self._embedding_calls: list[EmbeddingCall] = []
        self._head_calls: list[HeadCall] = []
        self._pieces: HeadPieces | None = None
        self._causal = CausalModel.of(model, self.heads)
        # A head multiplies with its weight by itself.
        self._within_head = self._stops = self._adds = False
        self._stack = ExitStack()

    def _make_sum(self, kind: str, path: str, *shape: int) -> None:
        device = next((parameter.device for parameter in self.model.get_submodule(path).parameters()), None)
        # It has no float64.
        device = torch.device("cpu") if device is None or device.type == "mps" else device
        self.sums[kind, path] = torch.zeros(shape, dtype=torch.float64, device=device)

    def __enter__(self) -> Self:
        """Hang up the hooks."""
        with ExitStack() as stack:
            stack.enter_context(_evaluating(self.model))
            for path, embedding in self.embeddings.items():
                seen = self._embedding_hook(path, embedding)
                # Before those of others: these may change the rows, and the gradient of the table's own is wanted.
                hook = embedding.register_forward_hook(seen, with_kwargs=True, prepend=True)
                stack.callback(hook.remove)
            for path, head in self.heads.items():
                stack.callback(head.register_forward_pre_hook(self._head_hook(path, head), with_kwargs=True).remove)
                stack.callback(head.register_forward_hook(self._logits_hook).remove)
            stack.enter_context(self.words.watching())
            if self.products:
                stack.enter_context(TableProducts(self.products, self._see_product, self._see_logits))
            # Compiled code would not know of the hooks, or be compiled anew with them.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.enable_grad())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Take down the hooks."""
        self._forget()
        self._stack.close()

    def _embedding_hook(self, path: str, layer: nn.Module) -> Callable[..., Any]:
        scale = layer.scale if isinstance(layer, CompressedEmbedding) else scale_of(layer)

        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            ids = arguments[0] if arguments else keywords["input"]
            bag = layer if isinstance(layer, nn.EmbeddingBag | CompressedEmbeddingBag) else None
            ids, rows = (ids, output.detach()) if bag is None else (bag_ids(ids), read_bag(bag, ids))
            factor = 1.0 if scale is None else scale.value
            padding = getattr(layer, "padding_idx", None)
            call = EmbeddingCall(path, rows.requires_grad_(), factor, ids, self.words.words(path, ids), padding)
            self._embedding_calls.append(call)
            # A copy: what comes after may change it in place.
            return rows.clone() if bag is None else pool_bag(bag, rows, *arguments, **keywords)

        return hook

    def _head_hook(self, path: str, layer: nn.Module) -> Callable[..., Any]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            if not self._stops and not torch.is_grad_enabled():
                return None
            hidden = arguments[0] if arguments else keywords["input"]
            if self._pieces is not None:
                self._pieces.reach(hidden, self.words.predicting(path, self._pieces.shape))
                return None
            self._within_head = True
            return (self._reach(path, layer.forward, hidden),), {}

        return hook

    def _reach(self, path: str, logits_of: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Note a call of a softmax; gives what it is to read."""
        if not self._stops:
            # A node of its own: there may be no embedding before the head, and other readers after it.
            hidden = hidden.view_as(hidden) if hidden.requires_grad else hidden.detach().requires_grad_()
        shape = hidden.shape[:-1]
        words, targets = self.words.predicting(path, shape), self.words.targets(shape)
        self._head_calls.append(HeadCall(path, logits_of, hidden, words, targets))
        if self._stops:
            raise HeadReached
        return hidden

    def _logits_hook(self, _: nn.Module, __: tuple[Any, ...], logits: Tensor) -> None:
        self._within_head = False
        if self._pieces is not None:
            self._pieces.give(logits)
        self._see_logits(logits)

    def _see_product(self, path: str, logits_of: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor | None:
        if self._within_head or self._adds or not (self._stops or torch.is_grad_enabled()):
            return None
        return self._reach(path, logits_of, hidden)

    def _see_logits(self, logits: Tensor) -> None:
        if torch.is_grad_enabled() and self._pieces is None:
            self._head_calls[-1].see_logits(logits)

    def begin(self, batch: Any) -> None:
        """Note the batch that is going through the model next, which may say what of it is padding."""
        self._forget()
        self.words.begin(batch)

    @property
    def reached_head(self) -> bool:
        """Whether a softmax was called since the last `add`, or the model has none."""
        return bool(self._head_calls) or not self.heads

    @property
    def knows_targets(self) -> bool:
        """Whether a softmax says how many targets there are."""
        return bool(self._head_calls or self.heads)

    @contextmanager
    def stopping_at_head(self) -> Iterator[None]:
        """Leave the block where it calls a head, which makes all of its positions targets; no gradients are needed."""
        self._stops = True
        try:
            with torch.no_grad():
                yield
        except HeadReached:
            pass
        finally:
            self._stops = False

    def add(self, loss: Any, num_targets: int | None = None) -> bool:
        """Add the batch whose loss was just computed, or skip it whole.

        Args:
            loss: Mean loss over the targets, a scalar; None for no loss.
            num_targets: Number of targets, if it is known; otherwise positions of the heads are counted.

        Returns:
            Whether it was added: everything about it is finite.

        Raises:
            ValueError: If the loss is no scalar, or does not come from the tables.
        """
        return self._counted(lambda: loss is not None and self._add(_checked_loss(loss), num_targets))

    def add_causal(self, arguments: Mapping[str, Any]) -> bool | None:
        """Run a batch through a causal language model, see `CausalModel`, and add it, or skip it whole.

        Args:
            arguments: Of the model, `labels` included.

        Returns:
            Whether it was added; None where the model is no such one, and the batch is still to be added.
        """
        if self._causal is None or not self._causal.fits(arguments):
            return None
        # The model may have been tried on some tokens.
        self._forget()
        (path,) = self.heads
        pieces = self._pieces = HeadPieces(path, self.sums, arguments["labels"].shape)
        try:
            found = self._causal.run(arguments, pieces.see)
        finally:
            self._pieces = None
        if found is None:
            self._forget()
            return None
        return self._counted(lambda: self._add_gradients(*found, [pieces], None))

    def _counted(self, add: Callable[[], bool]) -> bool:
        self.batches += 1
        self._adds = True
        try:
            added = add()
        finally:
            self._adds = False
            self._forget()
        self.skipped += not added
        return added

    def _forget(self) -> None:
        self._embedding_calls, self._head_calls = [], []
        self._within_head = False

    def _add(self, loss: Tensor, num_targets: int | None) -> bool:
        if not bool(torch.isfinite(loss.detach())):
            return False
        embedded, heads = self._embedding_calls, self._head_calls
        # Here, for those that are never called are found at the end.
        if not embedded and not any(call.reached.requires_grad for call in heads):
            return True
        if not loss.requires_grad:
            raise ValueError(
                f"the loss does not depend on the tables {', '.join(repr(table[0]) for table in self.tables)}: compute "
                "it with gradients enabled, from what the model gives"
            )
        # The mean loss times about the number of targets: float16 gradients of it do not vanish.
        positions = sum(len(call.hidden) for call in heads) or sum(call.rows[..., 0].numel() for call in embedded)
        scale = float(max(1, positions))
        if loss.dtype == torch.float16:
            scale = min(scale, _LARGEST_HALF_SCALE)
        return self._add_gradients(loss, torch.full_like(loss, scale), heads, num_targets, scale)

    def _add_gradients(
        self,
        output: Tensor,
        gradient: Tensor,
        heads: Sequence[HeadCall | HeadPieces],
        num_targets: int | None,
        scale: float | None = None,
    ) -> bool:
        """Go back to the embeddings from an output with its gradient, of the summed loss or `scale` times the mean."""
        embedded = self._embedding_calls
        inputs = [call.rows for call in embedded]
        inputs += [call.reached for call in heads if isinstance(call, HeadCall) and call.reached.requires_grad]
        gradients = torch.autograd.grad(output, inputs, gradient, allow_unused=True) if inputs else ()
        if num_targets is None and not heads:
            raise ValueError(never_called("head", next(iter(self.heads))) if self.heads else _UNKNOWN_NUMBER)
        parts: list[tuple[str, str, Tensor]] = []
        scored: list[tuple[str, int, bool]] = []
        with torch.autocast(output.device.type, enabled=False):
            for head in heads:
                count, moments = head.moments()
                parts += [(kind, head.path, moment) for kind, moment in moments.items()]
                scored.append((head.path, count, "probabilities" in moments))
            number = sum(count for _, count, _ in scored) if num_targets is None else num_targets
            of_sum = 1.0 if scale is None else number / scale
            for call, found in zip(embedded, gradients[: len(embedded)], strict=True):
                if found is not None:
                    flat = wide(found.reshape(-1, found.shape[-1])) * (call.scale * of_sum)
                    if call.padding is not None:
                        # Its row does not change.
                        flat = flat.where(call.ids.reshape(-1, 1) != call.padding, 0)
                    parts.append(("gradients", call.path, flat.T @ flat))
                    energies = flat.new_zeros(self.sizes[call.path])
                    energies.index_add_(0, call.ids.flatten(), flat.square().sum(dim=1))
                    parts.append(("gradient_energies", call.path, energies))
        if not all(bool(torch.isfinite(part).all()) for _, _, part in parts):
            return False
        for kind, path, part in parts:
            self.sums[kind, path] += part.to(self.sums[kind, path].device)
            if (kind, path) in self.halves and self.batches % 2:
                self.halves[kind, path] += part.to(self.sums[kind, path].device)
        for path, count, has_probabilities in scored:
            self.positions[path] += count
            self.scored[path] += count if has_probabilities else 0
        for call in embedded:
            self.calls[call.path] += 1
            if self.given_counts is None:
                size = self.sizes[call.path]
                words = self.words.settled(call.ids, call.words)
                self.counted[size] += torch.bincount(call.ids[words], minlength=size).cpu()
        self.num_targets += number
        return True


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients of parameters, which would keep what layers read; afterwards as before."""
    modes = [(part, part.training) for part in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dropouts: list[tuple[nn.RNNBase, float]] = []
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        for part in model.modules():
            # cuDNN has no backward pass in evaluation mode.
            if isinstance(part, nn.RNNBase) and any(parameter.is_cuda for parameter in part.parameters()):
                dropouts.append((part, part.dropout))
                part.training, part.dropout = True, 0.0
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for recurrent, dropout in dropouts:
            recurrent.dropout = dropout
        for part, mode in modes:
            part.training = mode


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"the loss must be a scalar tensor, the mean over the batch's targets; it is {what}")
    return loss


def _given_counts(token_counts: Any, tables: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Counts of the table of every module, whole numbers as such."""
    found = {}
    known = counts_by_table(token_counts, [Vocabulary(modules, sizes[modules[0]]) for modules in tables])
    for modules, counts in zip(tables, known, strict=True):
        wide = counts.double()
        found.update(dict.fromkeys(modules, counts.long() if torch.equal(wide, wide.round()) else wide))
    return found
