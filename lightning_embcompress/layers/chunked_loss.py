r"""Losses over a vocabulary whose gradient at the logits is known, a few tokens at a time.

As in Liger Kernel (Hsu et al. 2024, arXiv 2410.10989) and "Cut your losses" (Wijmans et al. 2024, arXiv 2411.09009) the
gradients of a sum of losses need not wait for the backward pass. The gradient at the logits of a few tokens, such as
:math:`\mathrm{softmax}(z) - \mathrm{onehot}(y)` of the cross-entropy, follows from these logits alone, and so do the
gradients of their hidden states and their share of the gradients of the head's parameters; only a factor is missing, by
which the backward pass multiplies them. So a chunk of logits is computed, used and forgotten. The head is called as it
is, whatever it is made of, and autograd differentiates it. Losses differ in their
:class:`~lightning_embcompress.layers.objective.Objective`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.nn.modules.module import _has_any_global_hook

from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.layers.objective import Objective
from lightning_embcompress.methods.kernels.choice import uncompiled
from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.utils.storage import holds_views, is_sharded

# Logits of a chunk: as many as the head has parameters, whose gradients are added up after each chunk, within these
# bounds. On a CPU the least are 16 MiB of float32, for a large cache; other devices are to be busy.
_CPU_LEAST_ELEMENTS, MOST_ELEMENTS = 2**22, 2**24
LEAST_TOKENS = 64
# Others replace it for all layers at once.
_LINEAR_FORWARD = nn.Linear.forward
# Of the gradient at float16 logits: small probabilities would be zero. Sums over the tokens of a chunk, as that of a
# bias, must stay below 2^16: no loss scale of the training changes them.
_HALF_SCALE, _HALF_BOUND = 16.0, 2**15


class ChunkedLoss(NamedTuple):
    """A loss in nats per token.

    Attributes:
        loss: The weighted sum of the terms, a scalar that can be differentiated once.
        terms: ``[terms]``, means over targets, without a gradient.
        num_targets: Those that are not ignored, int64.
    """

    loss: Tensor
    terms: Tensor
    num_targets: Tensor


@uncompiled
def loss_of_logits(logits: Tensor, objective: Objective, *, overwrite: bool = False) -> ChunkedLoss:
    """Return a loss of logits, whose gradient is computed with it if there is to be one.

    Args:
        logits: Unnormalised scores, floating point, shape ``[*, vocab_size]``.
        objective: The loss of them.
        overwrite: Whether the gradient may be kept in the memory of the logits, which then hold it instead: for logits
            that nobody reads any more.
    """
    flat = logits.flatten(0, -2)
    count = objective.count(len(flat))
    number = count.clamp(min=1)
    total, terms = _sums(flat, objective, slice(None), overwrite)
    return ChunkedLoss(total / number, terms / number, count)


def _sums(logits: Tensor, objective: Objective, part: slice, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """The sum of the losses of some positions, with a graph if their logits have one, and the sums of its terms."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        terms = objective.summed(logits.detach(), None, part)
        return objective.weighted(terms), terms
    # Not scaled yet, small probabilities would be zero in float16.
    kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    overwrite = overwrite and kept == logits.dtype
    # The same memory, with the same count of changes: autograd raises where an overwritten tensor is needed.
    gradient = logits.detach() if overwrite else torch.empty_like(logits, dtype=kept, requires_grad=False)
    terms = objective.summed(logits.detach(), gradient, part)
    function: Any = _Differentiated
    total: Tensor = function.apply(objective.weighted(terms), [gradient], overwrite, logits)
    return total, terms


# How many tokens there are decides how they are cut: compiled it would be over and over, and no faster.
@uncompiled
def loss_of_head(
    head: nn.Module, hidden: Tensor, objective: Objective, *, chunk_tokens: int | None = None
) -> ChunkedLoss:
    """Return a loss of the logits that a head gives, which are never there at once.

    The head is called with a few tokens at a time, with gradients enabled as they are outside. Gradients of the hidden
    states and of all parameters of the head that require one are computed at once, and added up in float32 (float64 for
    float64 parameters): with gradients enabled, the loss takes the memory of one chunk and of these gradients, and no
    more time than with all logits. Hooks of the head see every chunk. A head that FSDP has sharded is called once, with
    all tokens, as its parameters are there for one call only.

    Args:
        head: A :class:`~lightning_embcompress.layers.compressed.CompressedLinear`, an :class:`torch.nn.Linear`, or any
            module that gives ``[n, vocab_size]`` logits for ``[n, dim]`` hidden states, row by row.
        hidden: What the head reads, floating point, shape ``[*, dim]``.
        objective: The loss of its logits.
        chunk_tokens: Tokens of a call of the head; None for as many as give 2^24 logits, on a CPU 2^22 or as many as
            the head has parameters, but at least 64.

    Raises:
        ValueError: If ``chunk_tokens`` is not positive, or the head reads tensors that require a gradient and are not
            among its parameters.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, it is {chunk_tokens}; leave it out to go by memory")
    if is_gathered_by_calls(head):
        return loss_of_logits(head(hidden), objective)
    flat = hidden.flatten(0, -2)
    count = objective.count(len(flat))
    if not wants_gradients(head, hidden):
        found = [_sums(head(flat[part]), objective, part) for part in token_chunks(head, flat, chunk_tokens)]
        total, terms = (torch.stack(sums).sum(0) / count.clamp(min=1) for sums in zip(*found, strict=True))
        return ChunkedLoss(total, terms, count)
    order = head.factorization.storage_order if _is_compressed(head) else None
    in_order = None if order is None else objective.reordered(order)
    called, tensors = _read_once(head)
    terms, gradients = _with_gradients(
        called,
        flat,
        objective if in_order is None else in_order,
        tensors,
        chunk_tokens,
        in_storage_order=in_order is not None,
    )
    function: Any = _Differentiated
    trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
    loss: Tensor = function.apply(objective.weighted(terms), gradients, False, flat, *trained)
    return ChunkedLoss(loss, terms, count)


def wants_gradients(head: nn.Module, hidden: Tensor) -> bool:
    """Whether a loss of the logits that a head gives is to be differentiated."""
    return torch.is_grad_enabled() and (hidden.requires_grad or any(one.requires_grad for one in head.parameters()))


def _is_compressed(head: nn.Module) -> TypeGuard[CompressedLinear]:
    """Whether it computes what a `CompressedLinear` does, and nobody watches."""
    known = isinstance(head, CompressedLinear) and type(head).forward is CompressedLinear.forward
    return known and not is_watched(head)


def is_watched(head: nn.Module) -> bool:
    """Whether others see, or change, what goes through it, or through all modules."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return any(hooks) or "forward" in vars(head) or _has_any_global_hook()  # type: ignore[no-untyped-call]


def is_gathered_by_calls(head: nn.Module) -> bool:
    """Whether FSDP has the parameters in other places than in `head.parameters()`, if not while the head is called."""
    return is_sharded(head) or any(isinstance(part, FSDPModule) for part in head.modules()) or holds_views(head)


def token_chunks(head: nn.Module, hidden: Tensor, chunk_tokens: int | None = None) -> Iterator[slice]:
    """Which tokens a head is called with at a time; once with none, if there are none.

    All at once if the head's parameters are there for one call only, as those that FSDP has sharded.

    Args:
        head: See `loss_of_head`.
        hidden: What it reads, shape ``[N, dim]``.
        chunk_tokens: See `loss_of_head`.
    """
    if is_gathered_by_calls(head):
        chunk_tokens = max(1, len(hidden))
    if chunk_tokens is None:
        vocab_size = getattr(head, "out_features", None)
        elements = MOST_ELEMENTS
        if hidden.device.type == "cpu":
            elements = min(elements, max(_CPU_LEAST_ELEMENTS, sum(one.numel() for one in head.parameters())))
        fitting = elements // max(1, vocab_size) if isinstance(vocab_size, int) else 0
        chunk_tokens = max(LEAST_TOKENS, fitting)
    # Of equal size: a small rest costs as much as a whole chunk where most of the work is by parameters.
    tokens = len(hidden)
    number = max(1, -(-tokens // chunk_tokens))
    for index in range(number):
        yield slice(tokens * index // number, tokens * (index + 1) // number)


def _read_once(head: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A head and what it is to be called with, in the place of its parameters.

    Factors that are prepared for quantization are rounded here, and not for every chunk of tokens.
    """
    parameters: dict[str, Tensor] = dict(head.named_parameters())
    # Whoever watches the head must see it called.
    if not _is_compressed(head) or not head.factorization.is_prepared:
        return head, parameters
    factorization, values = head.factorization.plain()
    rounded = {f"factorization.{name}": value for name, value in values.items()}
    bias = {} if head.bias is None else {"bias": head.bias}
    return CompressedLinear(factorization, head.bias), {**bias, **rounded}


def _with_gradients(
    head: nn.Module,
    hidden: Tensor,
    objective: Objective,
    tensors: dict[str, Tensor],
    chunk_tokens: int | None,
    in_storage_order: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """Means of the terms, and the gradients of the loss at the hidden states and at tensors that require one."""
    # Other tensors of the same values: hooks of the parameters are called once, by the backward pass.
    called = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
    leaves = {name: tensor for name, tensor in called.items() if tensor.requires_grad}
    sums: list[Tensor | None] = [None] * len(leaves)
    at_hidden = torch.zeros_like(hidden, dtype=compute_dtype(hidden.dtype)) if hidden.requires_grad else None
    total: Tensor | None = None
    buffer: Tensor | None = None
    parts = list(token_chunks(head, hidden, chunk_tokens))
    most = max(part.stop - part.start for part in parts)
    # A power of two, so that nothing is rounded by it.
    half_scale = min(_HALF_SCALE, 2.0 ** math.floor(math.log2(_HALF_BOUND / max(1, most))))
    divisor = objective.count(len(hidden)).clamp(min=1)
    is_product = _is_product(head, hidden)
    for part in parts:
        states = hidden.detach()[part].requires_grad_(not is_product)
        with torch.set_grad_enabled(not is_product):
            logits: Tensor = functional_call(
                head, called, (states,), {"in_storage_order": True} if in_storage_order else None
            )
        if total is None and not is_product:
            _check_own(logits, [states, *leaves.values()])
        half = logits.dtype == torch.float16
        if buffer is None or len(buffer) < len(logits):
            buffer = torch.empty_like(logits, dtype=torch.float32 if half else logits.dtype, requires_grad=False)
        gradient = buffer[: len(logits)]
        terms = objective.summed(logits.detach(), gradient, part)
        total = terms if total is None else total + terms
        # In 16 bits divided by in the end, where it rounds less.
        early = gradient.dtype == compute_dtype(gradient.dtype) and not half
        if half:
            gradient *= half_scale
        elif early:
            gradient /= divisor
        given = gradient.to(logits.dtype)
        if is_product:
            if at_hidden is not None:
                torch.mm(given, called["weight"].detach(), out=at_hidden[part])
            _add_products(sums, list(leaves), given, states)
        else:
            inputs = ([] if at_hidden is None else [states]) + list(leaves.values())
            found = list(torch.autograd.grad(logits, inputs, given, allow_unused=True))
            if at_hidden is not None and (first := found.pop(0)) is not None:
                at_hidden[part] = first
            _add(sums, found)
            del found
        # Forgotten before the next chunk is computed.
        del logits, given, states
    for known in (at_hidden, *sums):
        if half and known is not None:
            known /= half_scale
        if not early and known is not None:
            known /= divisor
    assert total is not None
    return total / divisor, [at_hidden, *sums]


def _is_product(head: nn.Module, hidden: Tensor) -> bool:
    """Whether a head is a product alone, whose gradients are added up without a tensor for every chunk."""
    if type(head) is not nn.Linear or nn.Linear.forward is not _LINEAR_FORWARD or is_watched(head):
        return False
    if torch.is_autocast_enabled(hidden.device.type):
        return False
    dtypes = {parameter.dtype for parameter in head.parameters()} | {hidden.dtype, compute_dtype(hidden.dtype)}
    return "weight" in head._parameters and len(dtypes) == 1


def _add_products(sums: list[Tensor | None], names: Sequence[str], gradient: Tensor, states: Tensor) -> None:
    """Add what a chunk gives to the gradients of the weight and the bias of a product, in place."""
    for index, name in enumerate(names):
        before = sums[index]
        if name == "bias":
            sums[index] = gradient.sum(0) if before is None else before.add_(gradient.sum(0))
        else:
            sums[index] = gradient.T @ states if before is None else before.addmm_(gradient.T, states)


def _add(sums: list[Tensor | None], parts: Sequence[Tensor | None]) -> None:
    for index, part in enumerate(parts):
        before = sums[index]
        if part is not None and before is None:
            # A copy: two parameters may have got one tensor, or one the memory of the logits' gradient.
            sums[index] = part.to(compute_dtype(part.dtype), copy=True)
        elif part is not None and before is not None:
            before += part


def _check_own(logits: Tensor, known: list[Tensor]) -> None:
    """Refuse a graph that ends in leaves whose gradients nobody would see."""
    own = {id(tensor) for tensor in known}
    nodes = [logits.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            raise ValueError(
                f"the head computes its logits from a tensor of shape {tuple(leaf.shape)} that requires a gradient and "
                "is not among its parameters, so that it would not be trained: register it as a parameter of the head, "
                "or use full_softmax_loss(head(hidden), targets)"
            )
        following = {following for following, _ in node.next_functions} - seen
        seen |= following
        nodes += following


class _Differentiated(torch.autograd.Function):
    """A scalar whose gradients are known already: the backward pass only multiplies them."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], in_place: bool, *inputs: Tensor) -> Tensor:
        ctx.dtypes, ctx.in_place = [tensor.dtype for tensor in inputs], in_place
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # `once_differentiable` raises only where `scale` requires a gradient, and takes these for constants else.
            raise RuntimeError(
                "the loss can be differentiated only once, but create_graph=True asks for more: use "
                "torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())"
            )
        if ctx.in_place:
            # It counts as a change of the logits: a second backward pass raises.
            return None, None, None, *(gradient.mul_(scale) for gradient in ctx.saved_tensors)
        # Not in place: the graph may be kept, and run once more. As they are where nothing is to be multiplied: a GPU
        # would have to be waited for to know.
        alone = scale.device.type == "cpu" and float(scale) == 1
        scaled = [
            (gradient if alone else gradient * scale).to(dtype) if gradient is not None else None
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, None, *scaled
