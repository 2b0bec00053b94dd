r"""The softmax cross-entropy over tiles of the vocabulary: neither all logits nor all tokens' gradients are ever there.

With the normalizer :math:`\log Z = \log \sum_v e^{z_v}`, added up tile by tile (Milakov and Gimelshein 2018, arXiv
1805.02867), the loss of a target :math:`y` is :math:`\log Z - z_y`, and with label smoothing :math:`\epsilon`

.. math:: L = \log Z - (1 - \epsilon) z_y - \frac{\epsilon}{V} \sum_v z_v, \qquad
    \frac{\partial L}{\partial z_v} = e^{z_v - \log Z} - (1 - \epsilon) [v = y] - \frac{\epsilon}{V} .

The backward pass computes the logits of a tile once more, their gradient, and from that the gradient of the tile's own
rows, which is then complete (as in "Cut your losses", Wijmans et al. 2024, arXiv 2411.09009). So the memory is that of
one tile; the price is a fourth product beside the three that every linear layer takes, and a second exponential.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from lightning_embcompress.layers.compressed import head_tiles
from lightning_embcompress.layers.decoding import normalizers
from lightning_embcompress.methods.kernels.choice import uncompiled
from lightning_embcompress.methods.kernels.online_softmax import softmax_gradient
from lightning_embcompress.methods.numerics.gram import compute_dtype
from lightning_embcompress.methods.tiles import Places, Tile, Tiles
from lightning_embcompress.metrics.perplexity import IGNORE_INDEX

# Logits of a tile: on a CPU 4 MiB of float32 stay in the cache of a core or two while they are read several times;
# other devices are to be busy.
_CPU_TILE_ELEMENTS, _TILE_ELEMENTS = 2**20, 2**24
_LEAST_ROWS = 128
# Of the gradients at the losses for float16 logits, and of their sum over all tokens: products of it with hidden states
# must stay below 2^16.
_HALF_SCALE, _HALF_BOUND = 16.0, 2.0**11
Reduction: TypeAlias = Literal["mean", "sum", "none"]


# Shapes and their number depend on the targets: compiled it would be many small graphs, and no faster.
@uncompiled
def fused_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    tile_rows: int | None = None,
) -> Tensor:
    """Return the cross-entropy of a softmax head, whose logits are computed a tile of the vocabulary at a time, twice.

    It takes the memory of one tile, of the hidden states' products with what all tiles share, and of the gradients. The
    head is not called: hooks of it see nothing. Where all logits of a few tokens at a time fit into memory,
    :func:`~lightning_embcompress.layers.full_softmax.head_softmax_loss` computes them only once.

    Args:
        head: A :class:`~lightning_embcompress.layers.compressed.CompressedLinear` of any method, or an
            :class:`torch.nn.Linear`.
        hidden: What the head reads, floating point, shape ``[*, dim]``.
        targets: Ids of the true tokens, int64, shape ``[*]``.
        reduction: ``"mean"`` over the targets that are not ignored, 0 if there is none, ``"sum"``, or ``"none"``.
        ignore_index: The id of targets that count nothing; their tokens are left out of all products.
        label_smoothing: From 0 to 1, what of the mass of a target is given to all tokens in equal parts.
        tile_rows: Rows of a tile; None for as many as give 2^20 logits, 2^24 on a GPU, and at least 128.

    Returns:
        The loss in nats, float32 (float64 for float64 logits): a scalar, or of the shape of the targets. It can be
        differentiated once: a backward pass with ``create_graph=True`` raises a RuntimeError.

    Raises:
        TypeError: If the head is something else, or its weight is computed in a hook, as in pruning.
        ValueError: If the shapes do not fit, or an argument or a target is out of its range.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(8, 100)
        >>> hidden, targets = torch.randn(2, 5, 8, requires_grad=True), torch.randint(100, (2, 5))
        >>> loss = fused_cross_entropy(head, hidden, targets, tile_rows=30)
        >>> expected = torch.nn.functional.cross_entropy(head(hidden).flatten(0, -2), targets.flatten())
        >>> torch.testing.assert_close(loss, expected)
        >>> loss.backward()
    """
    check_shapes(hidden, targets)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', it is {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, it is {label_smoothing}")
    if tile_rows is not None and tile_rows < 1:
        raise ValueError(f"tile_rows must be at least 1, it is {tile_rows}; leave it out to go by memory")
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.flatten()
    scored = ids.ne(ignore_index)
    if not bool(scored.all()):
        flat, ids = flat[scored], ids[scored]
    if tile_rows is None:
        elements = _CPU_TILE_ELEMENTS if flat.device.type == "cpu" else _TILE_ELEMENTS
        tile_rows = max(_LEAST_ROWS, elements // max(1, len(flat)))
    tiles = head_tiles(head, flat, tile_rows)
    vocab_size = tiles.tiles[-1].stop
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(
            f"targets must be from 0 to {vocab_size - 1}, or ignore_index={ignore_index}; they go from "
            f"{int(ids.min())} to {int(ids.max())}"
        )
    function: Any = _TiledLosses
    losses: Tensor = function.apply(
        tiles.tiles, len(tiles.shared), Places.of(ids, tiles), label_smoothing, *tiles.shared, *tiles.owned
    )
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / max(1, len(ids))
    if len(ids) == len(scored):
        return losses.view(targets.shape)
    return losses.new_zeros(len(scored)).masked_scatter(scored, losses).view(targets.shape)


def check_shapes(hidden: Tensor, targets: Tensor) -> None:
    """Refuse targets that are not one for each hidden state.

    Raises:
        ValueError: Naming both shapes.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden states of shape {tuple(hidden.shape)} need targets of shape {tuple(hidden.shape[:-1])}, one for "
            f"each; the targets have {tuple(targets.shape)}"
        )


class _TiledLosses(torch.autograd.Function):
    """Losses of all tokens; the backward pass computes every tile once more."""

    @staticmethod
    def forward(
        ctx: Any, tiles: list[Tile], count: int, targets: Places, label_smoothing: float, *tensors: Tensor
    ) -> Tensor:
        everything = Tiles(tensors[:count], tensors[count:], tiles)
        normalizer, scores, total = normalizers(everything, targets, adds=label_smoothing > 0)
        losses = normalizer - (1 - label_smoothing) * scores
        if total is not None:
            losses -= label_smoothing / tiles[-1].stop * total
        ctx.save_for_backward(normalizer, *tensors)
        ctx.tiles, ctx.count, ctx.targets, ctx.label_smoothing = tiles, count, targets, label_smoothing
        ctx.autocast = _autocast(normalizer.device.type)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused cross-entropy can be differentiated only once, but create_graph=True asks for more: use "
                "torch.nn.functional.cross_entropy(head(hidden).flatten(0, -2), targets.flatten())"
            )
        normalizer, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        shared = [one.detach().requires_grad_(wants) for one, wants in zip(tensors, wanted, strict=True)][: ctx.count]
        owned = tensors[ctx.count :]
        sums = [torch.zeros_like(one, dtype=compute_dtype(one.dtype)) if one.requires_grad else None for one in shared]
        # Every row is written once, by its tile.
        own_gradients = [
            torch.empty_like(one) if wants else None for one, wants in zip(owned, wanted[ctx.count :], strict=True)
        ]
        uniform = ctx.label_smoothing / ctx.tiles[-1].stop
        scale, unit = gradients[0].contiguous(), None
        for index, tile in enumerate(ctx.tiles):
            own = [
                owned[place][start:stop].detach().requires_grad_(own_gradients[place] is not None)
                for place, start, stop in tile.owns
            ]
            with torch.enable_grad(), ctx.autocast:
                logits = tile.logits(*(shared[place] for place in tile.reads), *own)
            leaves = [shared[place] for place in tile.reads if shared[place].requires_grad]
            leaves += [part for part in own if part.requires_grad]
            if not logits.requires_grad:
                continue
            if logits.dtype == torch.float16 and unit is None and len(scale):
                scale, unit = _half_scale(scale)
            # In the memory of the logits, which the derivative of a product does not need: else autograd would say so.
            found, columns = ctx.targets.inside(index, tile)
            values = softmax_gradient(
                logits.detach(), normalizer, scale, found, columns, at_target=1 - ctx.label_smoothing, uniform=uniform
            )
            parts = iter(torch.autograd.grad(logits, leaves, values, allow_unused=True))
            for place in tile.reads:
                total = sums[place]
                if total is not None and (part := next(parts)) is not None:
                    total += part
            for place, start, stop in tile.owns:
                gradient = own_gradients[place]
                if gradient is not None:
                    part = next(parts)
                    gradient[start:stop] = 0 if part is None else part if unit is None else part * unit
        for total in sums:
            if total is not None and unit is not None:
                total *= unit
        found_sums = [None if one is None else one.to(like.dtype) for one, like in zip(sums, shared, strict=True)]
        return None, None, None, None, *found_sums, *own_gradients


def _half_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at the losses, in a unit in which those at float16 logits keep small probabilities.

    As they come, those of a mean over many tokens would make most of them 0. The unit is a power of two, by which
    nothing is rounded.
    """
    _, exponent = torch.frexp(scale.abs().amax())
    size = min(_HALF_SCALE, _HALF_BOUND / len(scale))
    unit = torch.ldexp(torch.ones_like(scale[0]), exponent - math.floor(math.log2(size)))
    return scale / unit, unit


def _autocast(device_type: str) -> AbstractContextManager[None]:
    """What autocast does now, to be done again in the backward pass."""
    context = torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        # Of views that are read once nothing is to be kept.
        cache_enabled=False,
    )
    return cast(AbstractContextManager[None], context)
