"""Hooks at the tables of a model that sum up what goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import Self

from lightning_embcompress.calibration.calls import EmbeddingCall, HeadCall, wide
from lightning_embcompress.calibration.counts import checked_counts
from lightning_embcompress.layers.bags import AnyEmbedding, CompressedEmbeddingBag, pool, rows_of_bag
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLayer, CompressedLinear
from lightning_embcompress.layers.scaled_embeddings import scale_of
from lightning_embcompress.tables.finding import all_modules, find_tables
from lightning_embcompress.utils.division import sum_over_processes

# Of the loss in float16, so that its gradient is finite.
_LARGEST_HALF_SCALE = 2.0**15
_UNKNOWN_NUMBER = (
    "the number of targets is not known, because none of the tables is a head: let loss_fn give "
    "(mean loss, number of targets)"
)


class HeadReached(Exception):
    """Leaves a step at the moment a head is called, see `Collector.stopping_at_head`."""


def find_layers(model: nn.Module, tables: str | Sequence[str] = "auto") -> list[list[str]]:
    """Find the modules that read the tables of a model, dense or compressed.

    Args:
        model: The module.
        tables: `auto`, or paths of modules, see `find_tables`; of a model with compressed tables `auto` takes these,
            and dense tables of the same number of rows.

    Returns:
        For every table the paths of its modules, each module once.

    Raises:
        ValueError: See `find_tables`.

    Example:
        >>> find_layers(nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8), nn.Linear(8, 100)))
        [['0'], ['2']]
    """
    named = all_modules(model)
    compressed = {path: layer for path, layer in named.items() if isinstance(layer, CompressedLayer)}
    if isinstance(tables, str) and tables != "auto":
        tables = [tables]
    if tables == "auto" and compressed:
        sizes = {layer.factorization.vocab_size for layer in compressed.values()}
        paths = [*compressed, *(path for path, layer in named.items() if _reads(layer, sizes))]
    elif tables == "auto":
        return _once(named, [list(table.modules) for table in find_tables(model)])
    else:
        paths = list(tables)
    chosen = {id(compressed[path].factorization): path for path in paths if path in compressed}
    found = [[path for path, layer in compressed.items() if id(layer.factorization) == identity] for identity in chosen]
    dense = [path for path in paths if path not in compressed]
    if dense or not paths:
        found += [list(table.modules) for table in find_tables(model, dense)]
    order = list(named)
    return _once(named, sorted(found, key=lambda modules: order.index(modules[0])))


def _reads(layer: nn.Module, sizes: set[int]) -> bool:
    if isinstance(layer, AnyEmbedding):
        known = type(layer) in (nn.Embedding, nn.EmbeddingBag) or scale_of(layer) is not None
        return layer.num_embeddings in sizes and known
    return type(layer) is nn.Linear and layer.out_features in sizes


def _once(named: dict[str, nn.Module], tables: list[list[str]]) -> list[list[str]]:
    """Without the further paths of modules that are registered several times."""
    return [list({id(named[path]): path for path in reversed(modules)}.values())[::-1] for modules in tables]


class Collector:
    """Sums up tokens, hidden states, probabilities and gradients of a model, batch by batch.

    Entered, the model is in evaluation mode; afterwards it is as before. For every batch compute a loss, then call
    `add`: only gradients of what embeddings give and heads read are computed, none of parameters.

    Args:
        model: The module.
        tables: Paths of the modules of every table, see `find_layers`.
        token_counts: `[vocab_size]` counts; None to count the ids that embeddings get.

    Raises:
        ValueError: If the tables have different numbers of rows, or the counts do not fit them.
    """

    def __init__(self, model: nn.Module, tables: Sequence[Sequence[str]], token_counts: Any = None) -> None:
        """Check, and make room for the sums."""
        self.model = model
        self.tables = [list(modules) for modules in tables]
        layers = {path: model.get_submodule(path) for modules in tables for path in modules}
        self.embeddings = {
            p: layer for p, layer in layers.items() if isinstance(layer, AnyEmbedding | CompressedEmbedding)
        }
        self.heads = {path: layer for path, layer in layers.items() if isinstance(layer, nn.Linear | CompressedLinear)}
        sizes = {path: layer.num_embeddings for path, layer in self.embeddings.items()}
        sizes |= {path: layer.out_features for path, layer in self.heads.items()}
        if len(set(sizes.values())) != 1:
            listed = ", ".join(f"{path!r} {size}" for path, size in sizes.items())
            raise ValueError(
                f"the tables have different numbers of rows ({listed}), but statistics are of one vocabulary: collect "
                f"them for each by itself, as in tables=[{next(iter(sizes))!r}]"
            )
        self.vocab_size = next(iter(sizes.values()))
        self.given_counts = (
            None if token_counts is None else _checked_counts(token_counts, self.tables[0][0], self.vocab_size)
        )
        if token_counts is None and not self.embeddings:
            raise ValueError(
                f"table {self.tables[0][0]!r} is read by no embedding whose ids could be counted: give token_counts, "
                "how often every token occurs in the training data (torch.bincount(ids, minlength=vocab_size))"
            )
        self.sums: dict[tuple[str, str], Tensor] = {}
        for path, embedding in self.embeddings.items():
            self._make_sum("gradients", path, embedding.embedding_dim, embedding.embedding_dim)
            self._make_sum("gradient_energies", path, self.vocab_size)
        for path, head in self.heads.items():
            self._make_sum("hidden", path, head.in_features, head.in_features)
            self._make_sum("hidden_mean", path, head.in_features)
            self._make_sum("probabilities", path, self.vocab_size)
            self._make_sum("squared_probabilities", path, self.vocab_size)
        self.counted = torch.zeros(self.vocab_size, dtype=torch.long)
        # Positions of a head, those with probabilities, and calls of embeddings.
        self.positions = dict.fromkeys(self.heads, 0)
        self.scored = dict.fromkeys(self.heads, 0)
        self.calls = dict.fromkeys(self.embeddings, 0)
        self.num_targets = 0
        self.batches = 0
        self.skipped = 0
        self._embedding_calls: list[EmbeddingCall] = []
        self._head_calls: list[HeadCall] = []
        self._stops = False
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
            if isinstance(layer, nn.EmbeddingBag | CompressedEmbeddingBag):
                ids, rows = rows_of_bag(layer, ids)
                self._embedding_calls.append(EmbeddingCall(path, rows, 1.0, ids))
                return pool(layer, rows, *arguments, **keywords)
            rows = output.detach().requires_grad_()
            self._embedding_calls.append(EmbeddingCall(path, rows, 1.0 if scale is None else scale.value, ids))
            # A copy: what comes after may change it in place.
            return rows.clone()

        return hook

    def _head_hook(self, path: str, layer: nn.Module) -> Callable[..., Any]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            if not self._stops and not torch.is_grad_enabled():
                return None
            hidden = arguments[0] if arguments else keywords["input"]
            if not self._stops:
                # A node of its own: there may be no embedding before the head, and other readers after it.
                hidden = hidden.view_as(hidden) if hidden.requires_grad else hidden.detach().requires_grad_()
            self._head_calls.append(HeadCall(path, layer, hidden))
            if self._stops:
                raise HeadReached
            return (hidden,), {}

        return hook

    def _logits_hook(self, _: nn.Module, __: tuple[Any, ...], logits: Tensor) -> None:
        if torch.is_grad_enabled():
            self._head_calls[-1].see_logits(logits)

    @property
    def reached_head(self) -> bool:
        """Whether a head was called since the last `add`, or the model has none."""
        return bool(self._head_calls) or not self.heads

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
        self.batches += 1
        try:
            added = loss is not None and self._add(_checked_loss(loss), num_targets)
        finally:
            self._forget()
        self.skipped += not added
        return added

    def _forget(self) -> None:
        self._embedding_calls, self._head_calls = [], []

    def _add(self, loss: Tensor, num_targets: int | None) -> bool:
        if not bool(torch.isfinite(loss.detach())):
            return False
        embedded, heads = self._embedding_calls, self._head_calls
        inputs = [call.rows for call in embedded] + [call.reached for call in heads if call.reached.requires_grad]
        # Here, for those that are never called are found at the end.
        if not inputs:
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
        gradients = torch.autograd.grad(loss, inputs, torch.full_like(loss, scale), allow_unused=True)
        targets = [int(call.is_target.sum()) for call in heads]
        if num_targets is None and not heads:
            raise ValueError(_never_called("head", next(iter(self.heads))) if self.heads else _UNKNOWN_NUMBER)
        number = sum(targets) if num_targets is None else num_targets
        with torch.autocast(loss.device.type, enabled=False):
            parts: list[tuple[str, str, Tensor]] = []
            for call, gradient in zip(embedded, gradients[: len(embedded)], strict=True):
                if gradient is not None:
                    flat = wide(gradient.reshape(-1, gradient.shape[-1])) * (call.scale * number / scale)
                    parts.append(("gradients", call.path, flat.T @ flat))
                    energies = flat.new_zeros(self.vocab_size)
                    energies.index_add_(0, call.ids.flatten(), flat.square().sum(dim=1))
                    parts.append(("gradient_energies", call.path, energies))
            for head, count in zip(heads, targets, strict=True):
                hidden = wide(head.hidden)
                if count < len(hidden):
                    hidden = hidden.where(head.is_target.unsqueeze(1), 0)
                parts += [("hidden", head.path, hidden.T @ hidden), ("hidden_mean", head.path, hidden.sum(0))]
                if (probabilities := head.probabilities_of_targets(count)) is not None:
                    parts.append(("probabilities", head.path, probabilities[0]))
                    parts.append(("squared_probabilities", head.path, probabilities[1]))
        if not all(bool(torch.isfinite(part).all()) for _, _, part in parts):
            return False
        for kind, path, part in parts:
            self.sums[kind, path] += part.to(self.sums[kind, path].device)
        for head, count in zip(heads, targets, strict=True):
            self.positions[head.path] += count
            self.scored[head.path] += count if head.probabilities is not None else 0
        for call in embedded:
            self.calls[call.path] += 1
            if self.given_counts is None:
                self.counted += torch.bincount(call.ids.flatten(), minlength=self.vocab_size).cpu()
        self.num_targets += number
        return True


def summed(collector: Collector) -> dict[str, Any]:
    """What all processes have collected together, as the attributes of `Statistics`.

    Args:
        collector: All processes call this, with collectors of the same tables.

    Raises:
        ValueError: If there was no batch, or none with finite values, or a table was never called.
    """
    numbers = [collector.batches, collector.skipped, collector.num_targets]
    tallies = [collector.positions, collector.scored, collector.calls]
    numbers += [number for tally in tallies for number in tally.values()]
    sums = iter(sum_over_processes(torch.tensor(numbers)).tolist())
    batches, skipped, num_targets = (int(next(sums)) for _ in range(3))
    positions, scored, calls = ({path: int(next(sums)) for path in tally} for tally in tallies)
    if not batches:
        raise ValueError(
            "there is no data to collect statistics from: the dataloader yields nothing. Give one with batches; a "
            "generator that was read before is empty, make it anew"
        )
    if batches == skipped:
        raise ValueError(
            f"each of the {batches} batches has a NaN or infinite loss, gradient or hidden state: no statistics can be "
            "collected. The training diverged, or the loss is a mean over no targets; try precision='32-true'"
        )
    _check_called(collector, positions, calls)
    if skipped:
        rank_zero_warn(
            f"{skipped} of {batches} batches were left out of the statistics: a NaN or infinite loss, gradient or "
            "hidden state"
        )
    counts = sum_over_processes(collector.counted) if collector.given_counts is None else collector.given_counts
    over = {"gradients": dict.fromkeys(calls, num_targets), "probabilities": scored}
    over |= {"gradient_energies": over["gradients"], "squared_probabilities": scored}
    over |= {"hidden": positions, "hidden_mean": positions}
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in over}
    for (kind, path), total in collector.sums.items():
        mean = sum_over_processes(total).cpu() / max(1, over[kind][path])
        if over[kind][path] and (not kind.startswith("gradient") or calls[path]):
            # Products are symmetric but for rounding.
            found[kind][path] = (mean + mean.T) / 2 if mean.dim() == 2 else mean
    return {"token_counts": counts, **found, "num_targets": num_targets, "skipped_batches": skipped}


def _check_called(collector: Collector, positions: dict[str, int], calls: dict[str, int]) -> None:
    for modules in collector.tables:
        for role, called in (("embedding", calls), ("head", positions)):
            paths = [path for path in modules if path in called]
            if paths and not any(called[path] for path in paths):
                raise ValueError(_never_called(role, paths[0]))


def _never_called(role: str, path: str) -> str:
    return (
        f"{role} {path!r} was never called with gradients enabled{' at a target' * (role == 'head')}, so it has no "
        "statistics: compute a loss that goes through it (the full softmax, not a sampled one), or name only the other "
        "modules, as in tables=['encoder']"
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards as before.

    Parameters go on to require gradients, which nobody asks for: with frozen ones some products are slower.
    """
    modes = [(part, part.training) for part in model.modules()]
    dropouts: list[tuple[nn.RNNBase, float]] = []
    try:
        model.eval()
        for part in model.modules():
            # cuDNN has no backward pass in evaluation mode.
            if isinstance(part, nn.RNNBase) and any(parameter.is_cuda for parameter in part.parameters()):
                dropouts.append((part, part.dropout))
                part.training, part.dropout = True, 0.0
        yield
    finally:
        for recurrent, dropout in dropouts:
            recurrent.dropout = dropout
        for part, mode in modes:
            part.training = mode


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"the loss must be a scalar tensor, the mean over the batch's targets; it is {what}")
    return loss


def _checked_counts(token_counts: Any, name: str, vocab_size: int) -> Tensor:
    counts = checked_counts(token_counts, {name: vocab_size})
    wide = counts.double()
    return counts.long() if torch.equal(wide, wide.round()) else wide
