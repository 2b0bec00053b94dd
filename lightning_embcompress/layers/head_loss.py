r"""The full softmax loss from hidden states: the logits of all tokens are never there at once.

As in Liger Kernel (Hsu et al. 2024, arXiv 2410.10989) and "Cut your losses" (Wijmans et al. 2024, arXiv 2411.09009) the
gradients of a sum of losses need not wait for the backward pass. With `G = softmax(z) - onehot(y)` of the logits of a
few tokens, the gradients of their hidden states and their share of the gradients of the head's parameters follow at
once; only a factor is missing, by which the backward pass multiplies them. So a chunk of logits is computed, used and
forgotten. The head is called as it is, whatever it is made of, and autograd differentiates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from torch.nn.modules.module import _has_any_global_hook

from lightning_embcompress.layers.compressed import CompressedLinear
from lightning_embcompress.layers.full_softmax import full_softmax_loss, summed_loss
from lightning_embcompress.layers.fused_loss import fused_cross_entropy
from lightning_embcompress.methods.kernels.choice import uncompiled
from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX
from lightning_embcompress.utils.storage import holds_views, is_sharded

# Logits of a chunk: as many as the head has parameters, whose gradients are added up after each chunk, within these
# bounds. On a CPU the least are 16 MiB of float32, for a large cache; other devices are to be busy.
_CPU_LEAST_ELEMENTS, _MOST_ELEMENTS = 2**22, 2**24
_LEAST_TOKENS = 64
SummedLoss: TypeAlias = Callable[[Tensor, slice, Tensor], Tensor]
"""Sum of losses of the logits of some positions, whose gradient it writes, see `head_loss_sum`."""

# Others replace it for all layers at once.
_LINEAR_FORWARD = nn.Linear.forward
# Of the gradient at float16 logits: small probabilities would be zero. Sums over the tokens of a chunk, as that of a
# bias, must stay below 2^16: no loss scale of the training changes them.
_HALF_SCALE, _HALF_BOUND = 16.0, 2**15


# How many tokens there are decides how they are cut: compiled it would be over and over, and no faster.
@uncompiled
def head_softmax_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of a head in nats per token and the number of tokens; 0, not NaN, for no tokens.

    The head is called with a few tokens at a time, with gradients enabled as they are outside. Gradients of the hidden
    states and of all parameters of the head that require one are computed at once, and added up in float32 (float64 for
    float64 parameters): with gradients enabled, the loss takes the memory of one chunk and of these gradients, and no
    more time than with all logits. Hooks of the head see every chunk. Without gradients each chunk goes through
    :func:`torch.nn.functional.cross_entropy`, by which others recognise a loss.

    Of a vocabulary of more than 262,144 words (2^24 logits for 64 tokens), the logits are computed tile by tile, see
    :func:`~lightning_embcompress.fused_cross_entropy`, unless `chunk_tokens` is given or the head has hooks.

    A head that FSDP has sharded is called once, with all tokens, as its parameters are there for one call only.

    Args:
        head: A :class:`~lightning_embcompress.layers.compressed.CompressedLinear`, an :class:`torch.nn.Linear`, or any
            module that gives ``[n, vocab_size]`` logits for ``[n, dim]`` hidden states, row by row.
        hidden: What the head reads, floating point, shape ``[*, dim]``.
        targets: Ids of the true tokens, int64, shape ``[*]``; -100 is ignored.
        chunk_tokens: Tokens of a call of the head; None for as many as give 2^24 logits, on a CPU 2^22 or as many as
            the head has parameters, but at least 64.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits), and the number of targets that are not ignored, an
        int64 scalar. It can be differentiated once: a backward pass with ``create_graph=True`` raises a RuntimeError.

    Raises:
        ValueError: If the shapes do not fit, ``chunk_tokens`` is not positive, or the head reads tensors that require a
            gradient and are not among its parameters.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(8, 100)
        >>> loss, count = head_softmax_loss(head, torch.zeros(2, 5, 8), torch.randint(100, (2, 5)), chunk_tokens=3)
        >>> loss.backward()
        >>> head.weight.grad.shape, count
        (torch.Size([100, 8]), tensor(10))
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden states of shape {tuple(hidden.shape)} need targets of shape {tuple(hidden.shape[:-1])}, one for "
            f"each; the targets have {tuple(targets.shape)}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, it is {chunk_tokens}; leave it out to go by memory")
    if _is_gathered_by_calls(head):
        return full_softmax_loss(head(hidden), targets)
    flat, ids = hidden.flatten(0, -2), targets.flatten()
    count = ids.ne(IGNORE_INDEX).sum()
    parameters = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    if torch.is_grad_enabled() and (hidden.requires_grad or parameters):
        if chunk_tokens is None and _is_too_wide(head):
            return fused_cross_entropy(head, flat, ids, reduction="sum") / count.clamp(min=1), count
        storage_order = kept_order(head)
        if storage_order is not None:
            ids = kept_targets(ids, storage_order)
        loss = head_loss_sum(
            head,
            flat,
            lambda logits, part, out: summed_loss(logits, ids[part], out),
            chunk_tokens,
            as_kept=storage_order is not None,
            divisor=count.clamp(min=1),
        )
        return loss, count
    return _without_gradients(head, flat, ids, chunk_tokens) / count.clamp(min=1), count


def kept_order(head: nn.Module) -> Tensor | None:
    """`[vocab_size]` where the logits of ids are that a head gives as its rows are kept; None if it has no other order.

    Nor if it has hooks, which are to see the logits as they are outside of a loss.
    """
    return head.factorization.storage_order if _is_compressed(head) else None


def kept_targets(targets: Tensor, storage_order: Tensor) -> Tensor:
    """Targets by where their rows are kept, see `kept_order`; those that are ignored stay what they are."""
    scored = targets.ne(IGNORE_INDEX)
    # Not by indexing, which takes -1 for the last one.
    return torch.where(scored, storage_order.index_select(0, torch.where(scored, targets, 0)), IGNORE_INDEX)


def _is_compressed(head: nn.Module) -> TypeGuard[CompressedLinear]:
    """Whether it computes what a `CompressedLinear` does, and nobody watches."""
    known = isinstance(head, CompressedLinear) and type(head).forward is CompressedLinear.forward
    return known and not _is_watched(head)


def _is_too_wide(head: nn.Module) -> bool:
    """Whether the logits of the fewest tokens of a call are too many, but known tile by tile."""
    if not isinstance(head, CompressedLinear | nn.Linear) or type(head) not in (CompressedLinear, nn.Linear):
        return False
    return not _is_watched(head) and _LEAST_TOKENS * head.out_features > _MOST_ELEMENTS


def _is_watched(head: nn.Module) -> bool:
    """Whether others see, or change, what goes through it, or through all modules."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return any(hooks) or "forward" in vars(head) or _has_any_global_hook()  # type: ignore[no-untyped-call]


@uncompiled
def head_loss_sum(
    head: nn.Module,
    hidden: Tensor,
    summed: SummedLoss,
    chunk_tokens: int | None = None,
    *,
    as_kept: bool = False,
    divisor: Tensor | None = None,
) -> Tensor:
    """Return the sum of any loss whose gradient at the logits of a head is known, computed as `head_softmax_loss` is.

    Args:
        head: See `head_softmax_loss`; it, or the hidden states, must require a gradient.
        hidden: What it reads, floating point, shape ``[N, dim]``.
        summed: Called for every chunk with its logits ``[n, vocab_size]``, without a graph, with which of the positions
            they are, and with a tensor of the same shape to write the gradient to; gives the sum of the losses.
        chunk_tokens: See `head_softmax_loss`.
        as_kept: Whether logits come in the order in which a compressed head keeps its rows, see `kept_order`.
        divisor: What the sum is divided by, a scalar: sooner than by whoever gets it, it costs nothing.

    Returns:
        The sum, a scalar that can be differentiated once.

    Raises:
        ValueError: If the head reads tensors that require a gradient and are not among its parameters.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(8, 100)
        >>> def square(logits, part, gradient):
        ...     gradient.copy_(2 * logits)
        ...     return logits.square().sum()
        >>> head_loss_sum(head, torch.zeros(5, 8), square).backward()
        >>> head.weight.grad.shape
        torch.Size([100, 8])
    """
    head, tensors = _read_once(head)
    parameters = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    total, gradients = _with_gradients(head, hidden, summed, tensors, chunk_tokens, as_kept, divisor)
    function: Any = _Differentiated
    result: Tensor = function.apply(total, gradients, hidden, *parameters.values())
    return result


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


def _is_gathered_by_calls(head: nn.Module) -> bool:
    """Whether FSDP has the parameters in other places than in `head.parameters()`, if not while the head is called."""
    return is_sharded(head) or any(isinstance(part, FSDPModule) for part in head.modules()) or holds_views(head)


def token_chunks(head: nn.Module, hidden: Tensor, chunk_tokens: int | None = None) -> Iterator[slice]:
    """Which tokens a head is called with at a time; once with none, if there are none.

    All at once if the head's parameters are there for one call only, as those that FSDP has sharded.

    Args:
        head: See `head_softmax_loss`.
        hidden: What it reads, shape ``[N, dim]``.
        chunk_tokens: See `head_softmax_loss`.
    """
    if _is_gathered_by_calls(head):
        chunk_tokens = max(1, len(hidden))
    if chunk_tokens is None:
        vocab_size = getattr(head, "out_features", None)
        elements = _MOST_ELEMENTS
        if hidden.device.type == "cpu":
            elements = min(elements, max(_CPU_LEAST_ELEMENTS, sum(one.numel() for one in head.parameters())))
        fitting = elements // max(1, vocab_size) if isinstance(vocab_size, int) else 0
        chunk_tokens = max(_LEAST_TOKENS, fitting)
    # Of equal size: a small rest costs as much as a whole chunk where most of the work is by parameters.
    tokens = len(hidden)
    number = max(1, -(-tokens // chunk_tokens))
    for index in range(number):
        yield slice(tokens * index // number, tokens * (index + 1) // number)


def _without_gradients(head: nn.Module, hidden: Tensor, targets: Tensor, chunk_tokens: int | None) -> Tensor:
    total: Tensor | None = None
    for part in token_chunks(head, hidden, chunk_tokens):
        mean, count = full_softmax_loss(head(hidden[part]), targets[part])
        total = mean * count if total is None else total + mean * count
    assert total is not None
    return total


def _with_gradients(
    head: nn.Module,
    hidden: Tensor,
    summed: SummedLoss,
    tensors: dict[str, Tensor],
    chunk_tokens: int | None,
    as_kept: bool,
    divisor: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Sum of the losses over a divisor, and its gradients at the hidden states and at tensors that require one."""
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
    is_product = _is_product(head, hidden)
    for part in parts:
        states = hidden.detach()[part].requires_grad_(not is_product)
        with torch.set_grad_enabled(not is_product):
            logits: Tensor = functional_call(head, called, (states,), {"as_kept": True} if as_kept else None)
        if total is None and not is_product:
            _check_own(logits, [states, *leaves.values()])
        half = logits.dtype == torch.float16
        if buffer is None or len(buffer) < len(logits):
            buffer = torch.empty_like(logits, dtype=torch.float32 if half else logits.dtype, requires_grad=False)
        gradient = buffer[: len(logits)]
        loss = summed(logits.detach(), part, gradient)
        total = loss if total is None else total + loss
        # In 16 bits divided by in the end, where it rounds less.
        early = gradient.dtype == compute_dtype(gradient.dtype) and not half
        if half:
            gradient *= half_scale
        elif early and divisor is not None:
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
        if not early and divisor is not None and known is not None:
            known /= divisor
    assert total is not None
    return total if divisor is None else total / divisor, [at_hidden, *sums]


def _is_product(head: nn.Module, hidden: Tensor) -> bool:
    """Whether a head is a product alone, whose gradients are added up without a tensor for every chunk."""
    if type(head) is not nn.Linear or nn.Linear.forward is not _LINEAR_FORWARD or _is_watched(head):
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
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # `once_differentiable` raises only where `scale` requires a gradient, and takes these for constants else.
            raise RuntimeError(
                "head_softmax_loss can be differentiated only once, but create_graph=True asks for more: use "
                "torch.nn.functional.cross_entropy(head(hidden).flatten(0, -2), targets.flatten())"
            )
        # Not in place: the graph may be kept, and run once more. As they are where nothing is to be multiplied: a GPU
        # would have to be waited for to know.
        alone = scale.device.type == "cpu" and float(scale) == 1
        scaled = [
            (gradient if alone else gradient * scale).to(dtype) if gradient is not None else None
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled
