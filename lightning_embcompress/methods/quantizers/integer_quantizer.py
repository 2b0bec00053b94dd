"""Symmetric integers with a scale for each group of neighbouring values: `w ≈ s · q`.

`q` is one of the integers `-2^(bits-1) .. 2^(bits-1) - 1`. A matrix `[n, columns]` is cut into groups of `group_size`
neighbouring values of a row; of a matrix whose rows are shorter than that, whole rows share a group. Scales have the
shape `[⌈n / group_rows⌉, ⌈columns / group_columns⌉]`, see `group_shape`; functions that take scales also take those of
`[n, ⌈columns / group_columns⌉]`, a row of scales for every row, as they are gathered for some rows of a matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_embcompress.methods.numerics.gram import compute_dtype, row_chunks
from lightning_embcompress.utils.graphs import is_exporting

# Scales that are tried for a group, as parts of the one that covers its largest magnitude. Above 1 the largest value is
# met exactly instead of clipped by half a step; two bits want the least (Max 1960, for normal values).
_SHRINKS = (1.07, 1.0, 0.93, 0.87, 0.81, 0.75, 0.69, 0.63, 0.57, 0.51, 0.45)


def group_shape(columns: int, group_size: int) -> tuple[int, int]:
    """Rows and columns of a group.

    Example:
        >>> group_shape(200, 64), group_shape(10, 64)
        ((1, 64), (6, 10))
    """
    columns = max(1, columns)
    return max(1, group_size // columns), min(columns, group_size)


def scales_shape(n: int, columns: int, group_size: int) -> tuple[int, int]:
    """Shape of the scales of a matrix `[n, columns]`.

    Example:
        >>> scales_shape(100, 200, 64), scales_shape(100, 10, 64)
        ((100, 4), (17, 1))
    """
    group_rows, group_columns = group_shape(columns, group_size)
    return -(-n // group_rows), -(-columns // group_columns)


def expand_scales(scales: Tensor, n: int, columns: int, group_size: int) -> Tensor:
    """The scale of every value, `[n, columns]`.

    Args:
        scales: Of the groups of a matrix `[n, columns]`, or a row of them for every row.
        n: Rows of the matrix.
        columns: Columns of the matrix.
        group_size: Values that share a scale.

    Raises:
        ValueError: If the scales are of another matrix.
    """
    group_rows, group_columns = group_shape(columns, group_size)
    shape = _check_scales(scales, n, columns, group_size)
    if scales.shape[0] != n:
        scales = scales.repeat_interleave(group_rows, dim=0)[:n]
    if shape[1] == 1:
        return scales.expand(n, columns)
    return repeated(scales, columns, group_columns)


def repeated(scales: Tensor, columns: int, group_columns: int) -> Tensor:
    """`[n, columns]` of which value `[row, column]` is the scale of its group, `[row, column // group_columns]`."""
    if torch.compiler.is_compiling():
        # Of what is expanded, and then cut off in a group, `torch.compile` reads other memory on CPUs (torch 2.13).
        return scales[:, torch.arange(columns, device=scales.device) // group_columns]
    return scales.unsqueeze(2).expand(-1, -1, group_columns).flatten(1)[:, :columns]


@torch.library.custom_op("lightning_embcompress::narrowed", mutates_args=())
def _narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype, copy=True)


@_narrowed.register_fake
def _(values: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(values, dtype=dtype)


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in a narrower dtype, rounded also where a graph makes them wide again.

    `torch.compile` leaves both conversions out, and with them the rounding: the largest value of a group lies between
    two integers, and would then be rounded to the other one.

    Args:
        values: Any floats, without a gradient.
        dtype: A floating dtype.
    """
    if torch.compiler.is_compiling() and not is_exporting():
        found: Tensor = _narrowed(values, dtype)
        return found
    return values.to(dtype)


def group_scales(
    weight: Tensor,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype = torch.float16,
    *,
    search: bool = False,
) -> Tensor:
    """Scales of the groups of a matrix.

    By default the range of the integers covers that of the values, `s = 2 max |w| / (2^bits − 1)`, as torchao maps
    symmetrically. With `search` a group gets the scale of least squared error among some that cover less, of either
    sign: integers reach one further down than up, and a negative scale turns that side to the larger values.

    Args:
        weight: `[n, columns]` matrix of any floating dtype.
        bits: Bits of an integer, 2 to 8.
        group_size: Values that share a scale.
        scale_dtype: Dtype of the scales. A group whose values are too small for it gets 0, one whose values are too
            large infinity, which `to_codes` refuses.
        search: Whether to look for scales that lose less than those that cover everything.

    Returns:
        `[⌈n / group_rows⌉, ⌈columns / group_columns⌉]` in `scale_dtype`.

    Raises:
        ValueError: If `bits` or `group_size` is out of its range.

    Example:
        >>> group_scales(torch.tensor([[1.5, -3.0, 0.0, 0.5]]), bits=2, group_size=2)
        tensor([[2.0000, 0.3333]], dtype=torch.float16)
    """
    _check_integers(bits, group_size)
    if not search:
        largest = _largest(weight, group_size)
        return narrowed(largest.mul_(2 / (2**bits - 1)), scale_dtype)
    out = torch.empty(scales_shape(*_shape(weight), group_size), dtype=scale_dtype, device=weight.device)
    group_rows = group_shape(weight.shape[1], group_size)[0]
    for rows, groups in _aligned_chunks(weight, group_rows):
        out[groups] = _searched(weight[rows], bits, group_size, scale_dtype)
    return out


def to_codes(weight: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """Integers of a matrix, moved to begin at 0: `clamp(round(w / s)) + 2^(bits-1)`.

    Args:
        weight: `[n, columns]` matrix.
        scales: Of its groups, see `group_scales`. A value whose scale is 0 becomes the integer 0.
        bits: Bits of an integer, 2 to 8.
        group_size: Values that share a scale.

    Returns:
        `[n, columns]` uint8, below `2^bits`.

    Raises:
        ValueError: If `bits` or `group_size` is out of its range, scales are of another matrix or not finite, or values
            are not finite.

    Example:
        >>> to_codes(torch.tensor([[1.5, -3.0]]), torch.tensor([[2.0]]), bits=2, group_size=2)
        tensor([[3, 0]], dtype=torch.uint8)
    """
    check_scales(scales, bits, *_shape(weight), group_size)
    out = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    group_rows = group_shape(weight.shape[1], group_size)[0]
    by_row = scales.shape[0] == weight.shape[0]
    for rows, groups in _aligned_chunks(weight, group_rows):
        part = weight[rows].to(compute_dtype(weight.dtype))
        if not bool(part.isfinite().all()):
            raise ValueError("a value is not finite, and cannot be quantized: look for what made the weights diverge")
        part, expanded = _beside(part, scales[rows if by_row else groups], group_size)
        out[rows] = (integers_of(part, expanded, bits) + 2 ** (bits - 1)).to(torch.uint8).view(out[rows].shape)
    return out


def from_codes(codes: Tensor, scales: Tensor, bits: int, group_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that integers stand for, `s · (code − 2^(bits-1))`.

    Args:
        codes: `[n, columns]` what `to_codes` returned, or some of its rows.
        scales: Of the groups, or a row for every row.
        bits: Bits of an integer.
        group_size: Values that share a scale.
        dtype: Dtype of the result; the product is exact in float32 before it is rounded to it.

    Returns:
        `[n, columns]`.

    Example:
        >>> from_codes(torch.tensor([[3, 0]], dtype=torch.uint8), torch.tensor([[2.0]]), bits=2, group_size=2)
        tensor([[ 2., -4.]])
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    integers, expanded = _beside(codes.to(exact) - 2 ** (bits - 1), scales, group_size)
    return (integers * expanded).to(dtype).view(codes.shape)


def fake_quantize(weight: Tensor, scales: Tensor, bits: int, group_size: int, *, clips: bool = False) -> Tensor:
    """What `from_codes(to_codes(weight))` gives, with gradients.

    Gradients go straight through to the weight (Bengio et al. 2013). Where scales are learned, to those values that
    are within the range, and to the scales those of LSQ (Esser et al., Learned Step Size Quantization, ICLR 2020, eq. 3
    and section 2.2), `round(w / s) − w / s` within the range and its end outside, times `1 / √(N Q)` with `N` values in
    a group and the largest integer `Q`. Scales that are those of the values have nothing outside their range; with
    those that are kept while the values move, `clips` says so.

    Args:
        weight: `[n, columns]` rows of a matrix.
        scales: Of their groups, or a row of scales for every row.
        bits: Bits of an integer, 2 to 8.
        group_size: Values that share a scale.
        clips: Whether values outside the range get no gradient, also where scales are not learned.

    Returns:
        `[n, columns]` in the dtype of the weight.

    Raises:
        ValueError: If the scales are of another matrix.

    Example:
        >>> weight = torch.tensor([[1.4, -3.0]], requires_grad=True)
        >>> fake_quantize(weight, group_scales(weight.detach(), 3, 64), 3, 64)
        tensor([[ 1.7139, -3.4277]], grad_fn=<...>)
    """
    result: Tensor = _FakeQuantize.apply(weight, scales, bits, group_size, clips)  # type: ignore[no-untyped-call]
    return result


def _check_integers(bits: int, group_size: int) -> None:
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, it is {bits!r}")
    if type(group_size) is not int or group_size < 1:
        raise ValueError(f"group_size must be 1 or more, it is {group_size!r}")


def check_scales(scales: Tensor, bits: int, n: int, columns: int, group_size: int) -> None:
    """Check that scales are those of a matrix `[n, columns]`, and finite.

    Raises:
        ValueError: If they are not, or `bits` or `group_size` is out of its range.
    """
    _check_integers(bits, group_size)
    if not bool(scales.isfinite().all()):
        raise ValueError(
            f"a scale is not finite in {scales.dtype}: values that are not finite cannot be quantized, and values that "
            "are too large for such scales need scale_dtype='bfloat16'"
        )
    _check_scales(scales, n, columns, group_size)


def _check_scales(scales: Tensor, n: int, columns: int, group_size: int) -> tuple[int, int]:
    shape = scales_shape(n, columns, group_size)
    if tuple(scales.shape) not in (shape, (n, shape[1])):
        raise ValueError(
            f"the scales of a matrix of {n} x {columns} in groups of {group_size} must be of the shape "
            f"{list(shape)}, or have a row for each of the {n}, they are {list(scales.shape)}"
        )
    return shape


class _FakeQuantize(torch.autograd.Function):
    """Rounding whose gradient is written out: nothing is kept for it but the weight and, where learned, the scales."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, bits: int, group_size: int, clips: bool) -> Tensor:
        ctx.learned, ctx.clips = scales.requires_grad, clips
        ctx.bits, ctx.group_size = bits, group_size
        if ctx.learned or clips:
            ctx.save_for_backward(weight, scales)
        exact, expanded = _beside(weight.to(compute_dtype(weight.dtype)), scales, group_size)
        return integers_of(exact, expanded, bits).mul_(expanded).to(weight.dtype).view(weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (gradient,) = gradients
        if not ctx.learned and not ctx.clips:
            return gradient, None, None, None, None
        weight, scales = ctx.saved_tensors
        dtype, (n, columns) = compute_dtype(weight.dtype), weight.shape
        least, most = -(2 ** (ctx.bits - 1)), 2 ** (ctx.bits - 1) - 1
        # A scale of 0 is the limit of a small one: everything is outside.
        known = torch.where(scales == 0, torch.finfo(torch.float32).tiny, scales.to(dtype))
        ratio = weight.to(dtype) / expand_scales(known, n, columns, ctx.group_size)
        inside = (ratio >= least) & (ratio <= most)
        if not ctx.learned:
            return torch.where(inside, gradient, 0.0), None, None, None, None
        slope = torch.where(inside, ratio.round() - ratio, ratio.clamp(least, most))
        shares = _sum_groups(gradient.to(dtype) * slope, scales.shape[0], ctx.group_size)
        group_rows, group_columns = group_shape(columns, ctx.group_size)
        # The same for rows that were gathered, with a row of scales for each.
        shares = shares / math.sqrt(group_columns * group_rows * most)
        return torch.where(inside, gradient, 0.0), shares.to(scales.dtype), None, None, None


def _beside(values: Tensor, scales: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """A matrix and its scales in shapes that broadcast: those of whole groups where it has no others."""
    n, columns = _shape(values)
    group_rows, group_columns = group_shape(columns, group_size)
    groups = scales_shape(n, columns, group_size)
    scales = scales.to(values.dtype)
    if values.numel() and columns % group_columns == 0 and scales.shape == (n, groups[1]):
        return values.reshape(n, groups[1], group_columns), scales.unsqueeze(2)
    if values.numel() and n % group_rows == 0 and group_rows > 1 and scales.shape == groups:
        return values.reshape(groups[0], group_rows * columns), scales
    return values, expand_scales(scales, n, columns, group_size)


def integers_of(weight: Tensor, expanded: Tensor, bits: int) -> Tensor:
    """`clamp(round(w / s))` as floats; 0 where the scale is 0.

    Args:
        weight: `[*]` values.
        expanded: The scale of each.
        bits: Bits of an integer.
    """
    ratio = weight / torch.where(expanded == 0, torch.inf, expanded)
    return ratio.round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _aligned_chunks(weight: Tensor, group_rows: int) -> list[tuple[slice, slice]]:
    """Slices of rows that end where groups end, and of their groups."""
    n = weight.shape[0]
    groups = row_chunks(-(-n // group_rows), group_rows * weight.shape[1])
    return [(slice(chunk.start * group_rows, min(chunk.stop * group_rows, n)), chunk) for chunk in groups]


def _grouped(values: Tensor, group_size: int, group_rows: int) -> Tensor:
    """`[row groups, group_rows, column groups, group_columns]`, filled up with zeros."""
    n, columns = values.shape
    group_columns = group_shape(columns, group_size)[1]
    right, below = -columns % group_columns, -n % group_rows
    if right or below:
        values = F.pad(values, (0, right, 0, below))
    return values.view(-(-n // group_rows), group_rows, -(-columns // group_columns), group_columns)


def _largest(weight: Tensor, group_size: int) -> Tensor:
    """Largest magnitude of each group, in the compute dtype."""
    shape = scales_shape(*_shape(weight), group_size)
    if not weight.numel():
        return torch.zeros(shape, dtype=compute_dtype(weight.dtype), device=weight.device)
    group_rows = group_shape(weight.shape[1], group_size)[0]
    return _grouped(weight, group_size, group_rows).abs().amax(dim=(1, 3)).to(compute_dtype(weight.dtype))


def _sum_groups(values: Tensor, row_groups: int, group_size: int) -> Tensor:
    group_rows = 1 if row_groups == values.shape[0] else group_shape(values.shape[1], group_size)[0]
    if not values.numel():
        return values.new_zeros(row_groups, scales_shape(*_shape(values), group_size)[1])
    return _grouped(values, group_size, group_rows).sum(dim=(1, 3))


def _searched(weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype) -> Tensor:
    """Scales of least squared error among those tried, and what least squares makes of the best of them."""
    exact = weight.to(compute_dtype(weight.dtype))
    n, columns = _shape(weight)
    covering = _largest(exact, group_size) * (2 / (2**bits - 1))

    def errors_of(scales: Tensor) -> tuple[Tensor, Tensor]:
        expanded = expand_scales(scales.to(exact.dtype), n, columns, group_size)
        integers = integers_of(exact, expanded, bits)
        lost = (integers * expanded - exact).square_()
        return _sum_groups(lost, len(scales), group_size), integers

    best = covering.to(scale_dtype)
    least, integers = errors_of(best)
    for shrink in _SHRINKS:
        for sign in (1.0, -1.0):
            tried = (sign * shrink * covering).to(scale_dtype)
            errors, found = errors_of(tried)
            better = errors < least
            best, least = torch.where(better, tried, best), torch.where(better, errors, least)
            integers = torch.where(expand_scales(better, n, columns, group_size), found, integers)
    # With the integers as they are, the best scale is a projection.
    products = _sum_groups(integers * exact, len(best), group_size)
    squares = _sum_groups(integers.square(), len(best), group_size)
    tried = torch.where(squares > 0, products / squares.clamp(min=1e-300), best.to(exact.dtype)).to(scale_dtype)
    return torch.where(errors_of(tried)[0] < least, tried, best)
