"""What other packages offer for the same: measured beside where they are installed.

tensorly-torch has tensorized embeddings, of which the cores are drawn at random, because only their speed is measured;
torchao and bitsandbytes have tables in 8 and 4 bits, here by the ways that work on a CPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_embcompress.bench.cases import Subject
from lightning_embcompress.bench.measure import Case

PACKAGES = {"tensorly-torch": "tltorch", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}
"""Peers by the names of their packages, and what is imported of each."""

# Copies of a table that there are while it is quantized.
_QUANTIZING_COPIES = 3
_GROUP_SIZE, _INT4_ROWS = 32, 16
_MOST_RANK = 4096
# Where the vocabulary is cut, and how much narrower each part is than the one before (Grave et al. 2017).
_CUTS, _NARROWER = (0.04, 0.2), 4.0


def installed_peers() -> dict[str, str]:
    """Versions of the peers that are installed.

    Example:
        >>> set(installed_peers()) <= set(PACKAGES)
        True
    """
    return {
        package: importlib.metadata.version(package)
        for package, module in PACKAGES.items()
        if importlib.util.find_spec(module) is not None
    }


def peer_cases(subject: Subject, what: str, max_memory: int | None = None) -> Iterator[Case | dict[str, Any]]:
    """The cases of the peers that are installed.

    Args:
        subject: The table.
        what: One of `speed_cases.WHAT`.
        max_memory: Bytes that may be taken; peers that need more to be made are left out.

    Yields:
        A case, or an entry with a `note` that says why there is none.
    """
    made: list[tuple[str, Callable[[Subject, str], Iterator[Case]], int]] = []
    here = installed_peers()
    copies = _QUANTIZING_COPIES * subject.table.nbytes
    if what in ("lookup", "lookup_backward") and "tensorly-torch" in here:
        made.append(("tensorly-torch", _tensorized, 4 * subject.stored_bytes))
    if what in ("lookup", "logits") and "torchao" in here:
        made.append(("torchao", _torchao, copies))
    if what in ("lookup", "logits") and "bitsandbytes" in here:
        made.append(("bitsandbytes", _bitsandbytes, copies))
    if what == "loss":
        made.append(("nn.AdaptiveLogSoftmaxWithLoss", _adaptive, subject.table.nbytes // 2))
    for name, cases, needs in made:
        if max_memory is not None and needs > max_memory:
            note = f"needs about {needs / 1e9:.1f} GB, {max_memory / 1e9:.1f} GB are free"
            yield {"what": what, "name": name, "note": note}
            continue
        try:
            for case in cases(subject, what):
                case.run()
                for leaf in case.leaves:
                    leaf.grad = None
                yield case
        # Their interfaces change, and some kernels are for other processors: what is wrong is shown in its place.
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            first = str(error).strip().partition("\n")[0]
            yield {"what": what, "name": name, "note": f"{type(error).__name__}: {first[:100]}"}


def _tensorized(subject: Subject, what: str) -> Iterator[Case]:
    tltorch: Any = importlib.import_module("tltorch")

    vocab_size, dim = subject.table.shape
    layer, size = None, 0
    # The largest rank that takes no more bytes than the factors: parameters grow with it.
    low, high = 1, _MOST_RANK
    while low <= high:
        rank = (low + high) // 2
        with torch.device("meta"):
            trial = _parameter_bytes(tltorch.FactorizedEmbedding(vocab_size, dim, factorization="blocktt", rank=rank))
        if trial <= subject.stored_bytes:
            low = rank + 1
        else:
            high = rank - 1
    layer = tltorch.FactorizedEmbedding(vocab_size, dim, factorization="blocktt", rank=max(1, high))
    size = _parameter_bytes(layer)
    name = f"tensorly-torch, TT-matrix of rank {max(1, high)}"
    if what == "lookup":
        yield _lookup_case(subject, name, layer, size, check=False)
        return
    gradient = torch.randn(*subject.ids.shape, dim)

    def run() -> None:
        layer(subject.ids).backward(gradient)

    yield Case(
        what,
        name,
        run,
        size,
        leaves=list(layer.parameters()),
        bytes=subject.lookup_bytes(size, with_gradients=True),
    )


def _torchao(subject: Subject, what: str) -> Iterator[Case]:
    ao: Any = importlib.import_module("torchao.quantization")
    table = subject.table
    layers: list[tuple[str, nn.Module, Any]] = []
    if what == "lookup":
        # A dtype that its stubs do not know.
        width: Any = torch.int4  # type: ignore[attr-defined]
        four_bits = ao.IntxWeightOnlyConfig(weight_dtype=width, granularity=ao.PerGroup(_GROUP_SIZE))
        layers.append(("int8", _embedding(table), ao.Int8WeightOnlyConfig()))
        layers.append((f"int4, groups of {_GROUP_SIZE}", _embedding(table), four_bits))
    else:
        prototype: Any = importlib.import_module("torchao.prototype.quantization.int4.inference_workflow")
        four_bits = prototype.PrototypeInt4WeightOnlyConfig(group_size=_GROUP_SIZE, set_inductor_config=False)
        layers.append(("int8", _linear(table), ao.Int8WeightOnlyConfig()))
        # Its products are of whole groups of rows.
        padded = F.pad(table, (0, 0, 0, -len(table) % _INT4_ROWS))
        layers.append((f"int4, groups of {_GROUP_SIZE}", _linear(padded), four_bits))
    for name, layer, config in layers:
        if "int4" in name and table.shape[1] % _GROUP_SIZE:
            continue
        ao.quantize_(layer, config, filter_fn=lambda module, _: isinstance(module, nn.Embedding | nn.Linear))
        weight: Any = layer.weight
        parts = [getattr(weight, part, None) for part in getattr(weight, "tensor_data_names", ())]
        size = sum(part.nbytes for part in parts if isinstance(part, Tensor))
        yield _case(subject, what, f"torchao {name}", layer, size)


def _embedding(table: Tensor) -> nn.Module:
    """An embedding of a copy of a table, without gradients."""
    return nn.Embedding(len(table), table.shape[1], _weight=table.clone()).requires_grad_(False)


def _linear(table: Tensor) -> nn.Module:
    """A head of a copy of a table, without gradients."""
    layer = nn.Linear(table.shape[1], len(table), bias=False, device="meta")
    layer.weight = nn.Parameter(table.clone(), requires_grad=False)
    return layer


def _bitsandbytes(subject: Subject, what: str) -> Iterator[Case]:
    bnb: Any = importlib.import_module("bitsandbytes")

    vocab_size, dim = subject.table.shape
    weights = {"weight": subject.table}
    if what == "lookup":
        layers = [("bitsandbytes int8", bnb.nn.Embedding8bit(vocab_size, dim))]
        layers.append(("bitsandbytes NF4", bnb.nn.EmbeddingNF4(vocab_size, dim)))
    else:
        eight = bnb.nn.Linear8bitLt(dim, vocab_size, bias=False, has_fp16_weights=False)
        four = bnb.nn.Linear4bit(dim, vocab_size, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layers = [("bitsandbytes int8", eight), ("bitsandbytes NF4", four)]
    for name, layer in layers:
        layer.load_state_dict(weights)
        # Moving it quantizes it.
        layer.to("cpu").requires_grad_(False)
        weight = layer.weight
        state = getattr(weight, "quant_state", None)
        size = weight.nbytes + (vocab_size * 4 if state is None else state.absmax.nbytes)
        yield _case(subject, what, name, layer, size)


def _adaptive(subject: Subject, what: str) -> Iterator[Case]:
    vocab_size, dim = subject.table.shape
    cutoffs = sorted({max(1, int(vocab_size * cut)) for cut in _CUTS})
    if cutoffs[-1] >= vocab_size:
        return
    head = nn.AdaptiveLogSoftmaxWithLoss(dim, vocab_size, cutoffs, div_value=_NARROWER)
    hidden = subject.hidden.detach().requires_grad_()
    # Ids are sorted by frequency, as it wants them.
    targets = subject.targets
    bounds = [*cutoffs, vocab_size]
    counts = [int(((targets >= low) & (targets < high)).sum()) for low, high in zip(cutoffs, bounds[1:], strict=True)]
    logits = len(targets) * (cutoffs[0] + len(cutoffs))
    logits += sum(count * (high - low) for count, low, high in zip(counts, cutoffs, bounds[1:], strict=True))

    def run() -> Tensor:
        loss: Tensor = head(hidden, targets).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    size = _parameter_bytes(head)
    yield Case(
        what,
        "nn.AdaptiveLogSoftmaxWithLoss",
        run,
        size,
        leaves=[hidden, *head.parameters()],
        bytes=2 * size + hidden.nbytes,
        exponentials=2 * logits,
        needs=size + 3 * 4 * logits,
    )


def _case(subject: Subject, what: str, name: str, layer: nn.Module, size: int) -> Case:
    if what == "lookup":
        return _lookup_case(subject, name, layer, size, check=True)

    def run() -> Any:
        with torch.no_grad():
            return layer(subject.states)[..., : len(subject.table)]

    return Case(what, name, run, size, bytes=subject.logit_bytes(size), flops=0, check=subject.logit_error)


def _lookup_case(subject: Subject, name: str, layer: nn.Module, size: int, check: bool) -> Case:
    def run() -> Any:
        with torch.no_grad():
            return layer(subject.ids)

    moved = subject.lookup_bytes(size, with_gradients=False)
    if check:
        return Case("lookup", name, run, size, bytes=moved, check=subject.row_error)
    return Case("lookup", name, run, size, bytes=moved)


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
