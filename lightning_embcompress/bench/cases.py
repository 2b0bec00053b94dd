"""What is computed with a table, dense and compressed: rows, logits, the best tokens, samples, and losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_embcompress.bench.measure import Case
from lightning_embcompress.layers.compressed import CompressedEmbedding, CompressedLinear
from lightning_embcompress.layers.fused_loss import fused_cross_entropy
from lightning_embcompress.layers.head_loss import head_softmax_loss
from lightning_embcompress.layers.serving import optimize_for_inference
from lightning_embcompress.methods.registry import Factorization

WHAT = ("lookup", "lookup_backward", "logits", "topk", "sample", "loss")
"""What can be measured: rows of ids, without and with gradients; logits, best tokens and samples of a few states; and
the loss of many tokens with its gradients."""

_FLOAT = 4
_LAID_OUT = "laid out for inference"
# Logits that are there at once where a loss is computed naively, in float64.
_NAIVE_ELEMENTS = 2**24
# Tensors of the size of all logits that torch has at once in a cross-entropy with gradients.
_NAIVE_COPIES = 3


@dataclass
class Subject:
    """A table in both forms, and what is asked of it.

    Attributes:
        table: `[vocab_size, dim]` float32.
        factors: What it was compressed to.
        ids: `[*]` ids that are looked up.
        states: `[*, dim]` hidden states whose logits are asked for.
        hidden: `[tokens, dim]` hidden states of a loss.
        targets: `[tokens]` ids of the true tokens.
        k: How many of the best tokens.
        approximates: Whether the factors are those of the table, so that their difference is an error.
    """

    table: Tensor
    factors: Factorization[Any]
    ids: Tensor
    states: Tensor
    hidden: Tensor
    targets: Tensor
    k: int = 10
    approximates: bool = True

    def __post_init__(self) -> None:
        """Make the layers of both forms, which share the tensors."""
        vocab_size, dim = self.table.shape
        weight = nn.Parameter(self.table)
        self.embedding = nn.Embedding(vocab_size, dim, device="meta")
        self.head = nn.Linear(dim, vocab_size, bias=False, device="meta")
        self.embedding.weight = self.head.weight = weight
        self.compressed_embedding = CompressedEmbedding(self.factors)
        self.compressed_head = CompressedLinear(self.factors)
        self.stored_bytes = self.factors.stored_bytes()
        self.distinct = len(torch.unique(self.ids))
        self._served: CompressedLinear | None = None

    @property
    def served_head(self) -> CompressedLinear:
        """A head of a copy of the factors that are laid out for decoding; the head itself where nothing can be."""
        if self._served is None:
            made = CompressedLinear(copy.deepcopy(self.factors))
            self._served = made if optimize_for_inference(made) else self.compressed_head
        return self._served

    def row_error(self, rows: Tensor) -> dict[str, Any]:
        """Relative error of rows that were looked up."""
        return {"error": relative_error(rows, F.embedding(self.ids, self.table))}

    def logit_error(self, logits: Tensor) -> dict[str, Any]:
        """Relative error of the logits of the states."""
        return {"error": relative_error(logits, F.linear(self.states, self.table))}

    def own_error(self, check: Callable[[Tensor], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """A check of the factors, where there is something that they should be."""
        return check if self.approximates else lambda _: {}

    def lookup_bytes(self, parameter_bytes: int, with_gradients: bool) -> int:
        """What a lookup reads and writes beside gradients of parameters: rows as they are stored, and as they come."""
        vocab_size, dim = self.table.shape
        passes = 2 if with_gradients else 1
        return parameter_bytes * self.distinct // vocab_size + passes * self.ids.numel() * dim * _FLOAT

    def logit_bytes(self, parameter_bytes: int) -> int:
        """What a head reads and writes: its parameters, the states, and all logits."""
        return parameter_bytes + self.states.nbytes + len(self.states) * len(self.table) * _FLOAT


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """`‖found - wanted‖ / ‖wanted‖`.

    Example:
        >>> relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
        0.2
    """
    wide = wanted.detach().double()
    return float((found.detach().double() - wide).norm() / wide.norm())


def cases_of(subject: Subject, what: str, dense: bool = True) -> list[Case]:
    """The cases of a dense table and of its factors.

    Args:
        subject: The table in both forms.
        what: One of `WHAT`.
        dense: Whether those of the dense table are wanted.
    """
    return [case for case in _CASES[what](subject) if dense or not case.name.startswith("dense")]


def _lookup(subject: Subject) -> Iterator[Case]:
    table_bytes = subject.table.nbytes
    forms = (
        ("dense torch", subject.embedding, table_bytes, lambda rows: subject.row_error(rows)),
        ("compressed", subject.compressed_embedding, subject.stored_bytes, subject.own_error(subject.row_error)),
    )
    for name, module, size, check in forms:
        yield Case(
            "lookup",
            name,
            _used(module, subject.ids),
            size,
            bytes=subject.lookup_bytes(size, with_gradients=False),
            check=check,
            is_base=module is subject.embedding,
        )


def _lookup_backward(subject: Subject) -> Iterator[Case]:
    gradient = torch.randn(*subject.ids.shape, subject.table.shape[1])
    table_bytes, weight = subject.table.nbytes, subject.embedding.weight
    own = _trained(subject.factors)

    def sparse() -> Tensor:
        return F.embedding(subject.ids, weight, sparse=True)

    forms: list[tuple[str, Callable[[], Tensor], int, Sequence[Tensor], int]] = [
        ("dense torch", lambda: subject.embedding(subject.ids), table_bytes, [weight], table_bytes),
        ("dense torch, sparse gradients", sparse, table_bytes, [weight], 0),
    ]
    if own:
        forms += [
            ("compressed", lambda: subject.compressed_embedding(subject.ids), subject.stored_bytes, own, 0),
            (
                "compressed, sparse gradients",
                lambda: subject.factors.rows(subject.ids, sparse=True),
                subject.stored_bytes,
                own,
                0,
            ),
        ]
    for name, rows, size, leaves, needs in forms:
        yield Case(
            "lookup_backward",
            name,
            _backward(rows, gradient),
            size,
            leaves=leaves,
            bytes=subject.lookup_bytes(size, with_gradients=True),
            needs=needs,
            is_base=name == "dense torch",
        )


def _logits(subject: Subject) -> Iterator[Case]:
    table_bytes = subject.table.nbytes
    forms: list[tuple[str, nn.Module, int]] = [
        ("dense torch", subject.head, table_bytes),
        ("compressed", subject.compressed_head, subject.stored_bytes),
    ]
    if subject.served_head is not subject.compressed_head:
        forms.append((f"compressed, {_LAID_OUT}", subject.served_head, subject.stored_bytes))
    for name, module, size in forms:
        dense = module is subject.head
        yield Case(
            "logits",
            name,
            _used(module, subject.states),
            size,
            bytes=subject.logit_bytes(size),
            check=subject.logit_error if dense else subject.own_error(subject.logit_error),
            is_base=dense,
        )
    yield _laid_out(subject, "logits", lambda logits: logits, subject.logit_bytes(table_bytes))


def _laid_out(subject: Subject, what: str, use: Callable[[Tensor], Any], moved: int, exponentials: int = 0) -> Case:
    """The dense table column by column, as `optimize_for_inference` lays out factors: a copy, made when it is run."""
    made: list[Tensor] = []

    def prepare() -> None:
        if not made:
            made.append(subject.table.T.contiguous().T)

    return Case(
        what,
        f"dense torch, {_LAID_OUT}",
        _in_inference(lambda: use(F.linear(subject.states, made[0]))),
        subject.table.nbytes,
        bytes=moved,
        exponentials=exponentials,
        needs=subject.table.nbytes,
        prepare=prepare,
        check=subject.logit_error if what == "logits" else lambda _: {},
    )


def _topk(subject: Subject) -> Iterator[Case]:
    head, states, k = subject.served_head, subject.states, subject.k

    def best(logits: Tensor) -> Any:
        return logits.topk(k)

    with torch.no_grad():
        wanted = best(head(states))

    def compare(found: Any) -> dict[str, Any]:
        hits = (found[1].unsqueeze(-1) == wanted.indices.unsqueeze(-2)).any(dim=-1)
        return {"recall": float(hits.double().mean()), "error": relative_error(found[0], wanted.values)}

    size, dense = subject.stored_bytes, subject.table.nbytes
    yield Case("topk", "dense torch", _used(subject.head, states, best), dense, bytes=dense, is_base=True)
    yield _laid_out(subject, "topk", best, dense)
    yield Case("topk", "compressed, all logits", _used(head, states, best), size, bytes=size, check=compare)
    run = _in_inference(partial(head.topk, states, k))
    yield Case("topk", "compressed", run, size, bytes=size, check=compare)


def _sample(subject: Subject) -> Iterator[Case]:
    head, states = subject.served_head, subject.states
    logits = len(states) * len(subject.table)

    def draw(logits: Tensor) -> Tensor:
        return torch.multinomial(logits.softmax(dim=-1), 1)

    size, dense = subject.stored_bytes, subject.table.nbytes
    yield Case(
        "sample",
        "dense torch",
        _used(subject.head, states, draw),
        dense,
        bytes=dense,
        exponentials=logits,
        is_base=True,
    )
    yield _laid_out(subject, "sample", draw, dense, logits)
    yield Case(
        "sample", "compressed", _in_inference(partial(head.sample, states)), size, bytes=size, exponentials=logits
    )


def _loss(subject: Subject) -> Iterator[Case]:
    hidden = subject.hidden.detach().requires_grad_()
    targets = subject.targets
    logits = len(targets) * len(subject.table)
    table_bytes = subject.table.nbytes
    # Of a dense head, where they are not counted: inside of one operation, or added up in place.
    products = 6 * logits * subject.table.shape[1]
    forms: list[tuple[str, nn.Module, Callable[[], Tensor], int, int, int | None]] = []

    def add(
        name: str, head: nn.Module, loss: Callable[[], Tensor], passes: int, needs: int, flops: int | None = None
    ) -> None:
        forms.append((name, head, loss, passes, needs, flops))

    heads: list[tuple[str, nn.Module, int]] = [
        ("dense", subject.head, table_bytes),
        ("compressed", subject.compressed_head, subject.stored_bytes),
    ]
    for prefix, head, size in heads:
        if head is subject.compressed_head and not _trained(head):
            continue
        add(f"{prefix}, fused_cross_entropy", head, partial(fused_cross_entropy, head, hidden, targets), 2, size)
        flops = products if head is subject.head else None
        add(f"{prefix}, head_softmax_loss", head, partial(_chunked, head, hidden, targets), 1, 2 * size, flops)
    whole = table_bytes + _NAIVE_COPIES * logits * _FLOAT
    weight = subject.head.weight
    add("dense, F.cross_entropy", subject.head, partial(_naive, subject.head, hidden, targets), 2, whole)
    if hasattr(F, "linear_cross_entropy"):
        linear: Any = F.linear_cross_entropy
        name = "dense, F.linear_cross_entropy"
        add(name, subject.head, partial(linear, hidden, weight, targets), 2, whole)
        options: Any = getattr(nn, "LinearCrossEntropyOptions", None)
        if options is not None:
            in_chunks = partial(linear, hidden, weight, targets, options=options())
            add(name + " in chunks", subject.head, in_chunks, 2, 2 * table_bytes, products)
    references: dict[int, float] = {}

    def check(head: nn.Module) -> Callable[[Tensor], dict[str, Any]]:
        def against(loss: Tensor) -> dict[str, Any]:
            if id(head) not in references:
                references[id(head)] = naive_loss(head, hidden, targets)
            return {"loss": float(loss), "error": abs(float(loss) - references[id(head)])}

        return against

    for name, module, loss, passes, needs, operations in forms:
        size = table_bytes if module is subject.head else subject.stored_bytes
        yield Case(
            "loss",
            name,
            _with_backward(loss),
            size,
            leaves=[hidden, *_trained(module)],
            # Read forward and backward.
            bytes=2 * size + hidden.nbytes,
            exponentials=passes * logits,
            flops=operations,
            needs=needs,
            check=check(module),
            is_base=name == "dense, fused_cross_entropy",
        )


_CASES: dict[str, Callable[[Subject], Iterator[Case]]] = {
    "lookup": _lookup,
    "lookup_backward": _lookup_backward,
    "logits": _logits,
    "topk": _topk,
    "sample": _sample,
    "loss": _loss,
}


@torch.no_grad()
def naive_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> float:
    """The mean cross-entropy of logits that are all computed, a few tokens at a time, and added up in float64.

    Example:
        >>> head, hidden, targets = nn.Linear(4, 9), torch.randn(3, 4), torch.tensor([1, 2, 8])
        >>> abs(naive_loss(head, hidden, targets) - F.cross_entropy(head(hidden), targets).item()) < 1e-5
        True
    """
    vocab_size = int(head.out_features)  # type: ignore[arg-type]
    total = 0.0
    step = max(1, _NAIVE_ELEMENTS // vocab_size)
    for states, ids in zip(torch.split(hidden, step), torch.split(targets, step), strict=True):
        total += float(F.cross_entropy(head(states).double(), ids, reduction="sum"))
    return total / len(targets)


def _chunked(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return head_softmax_loss(head, hidden, targets)[0]


def _naive(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden), targets)


def _with_backward(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        found = loss()
        found.backward()  # type: ignore[no-untyped-call]
        return found.detach()

    return run


def _backward(rows: Callable[[], Tensor], gradient: Tensor) -> Callable[[], None]:
    def run() -> None:
        rows().backward(gradient)  # type: ignore[no-untyped-call]

    return run


def _used(module: nn.Module, given: Tensor, use: Callable[[Tensor], Any] = lambda found: found) -> Callable[[], Any]:
    return _in_inference(lambda: use(module(given)))


def _in_inference(run: Callable[[], Any]) -> Callable[[], Any]:
    def without() -> Any:
        with torch.no_grad():
            return run()

    return without


def _trained(module: nn.Module) -> Sequence[Tensor]:
    return [one for one in module.parameters() if one.requires_grad]
