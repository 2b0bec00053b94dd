"""Rounding to integers in the metric of the loss: what one component loses, the next ones make up for.

Rows of a product `U B` are read through the metric `M` of `numerics.metric`, so that errors `e_i` of the coefficients
cost `½ Σ_i q_i e_iᵀ H e_i` with one `H = B M Bᵀ` for all rows: columns are rounded as in `numerics.feedback`. The
weights of rows play no part: every row is solved by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.balance import balanced_factors
from lightning_embcompress.methods.numerics.feedback import DAMPING, carry_errors, feedback_factor
from lightning_embcompress.methods.numerics.gram import compute_dtype, project, row_units, run_of
from lightning_embcompress.methods.quantizers.integer_quantizer import (
    check_scales,
    expand_scales,
    from_codes,
    group_scales,
    group_shape,
    integers_of,
    to_codes,
)
from lightning_embcompress.utils.division import deal

# Of the balance before feedback, see `balanced_factors`.
_EXPONENT = 0.7


def round_with_feedback(weight: Tensor, scales: Tensor, cost: Tensor, bits: int, group_size: int) -> Tensor:
    """Integers of a matrix in the metric `H`, see the top of the module; those that cost most are rounded first.

    What is made up for can leave the range of the integers: a row for which the nearest integers cost less has those.

    Processes share the rows, see `utils.division`.

    Args:
        weight: `[n, columns]` matrix.
        scales: Of its groups, see `quantizers.integer_quantizer`; they stay what they are.
        cost: `[columns, columns]` symmetric `H`, what errors cost; only ratios matter.
        bits: Bits of an integer, 2 to 8.
        group_size: Values that share a scale.

    Returns:
        `[n, columns]` uint8 codes, as `to_codes` gives them; the same as those where `H` is diagonal.

    Raises:
        ValueError: If the scales or `H` are of another matrix, or a value is not finite.

    Example:
        >>> weight, cost = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> round_with_feedback(weight, torch.ones(1, 1), cost, bits=4, group_size=2) - 8
        tensor([[0, 1]], dtype=torch.uint8)
    """
    n, columns = weight.shape
    check_scales(scales, bits, n, columns, group_size)
    if cost.shape != (columns, columns):
        raise ValueError(f"what errors cost must be of the shape {[columns] * 2}, it is {list(cost.shape)}")
    if not bool(cost.isfinite().all()) or not bool(weight.isfinite().all()):
        raise ValueError("a value is not finite, and cannot be quantized: look for what made the factors diverge")
    codes = torch.empty(n, columns, dtype=torch.uint8, device=weight.device)
    order = cost.diagonal().argsort(descending=True, stable=True).to(weight.device)
    dtype = compute_dtype(weight.dtype)
    ordered = cost.double().cpu()[order.cpu()][:, order.cpu()]
    factor, seen = (part.to(weight.device, dtype) for part in (feedback_factor(ordered), ordered))
    # A process does the same whichever rows are its own: scales are looked up by row.
    scales = scales.to(dtype)
    group_rows = 1 if scales.shape[0] == n else group_shape(columns, group_size)[0]
    units = row_units(n, columns)

    def compute(unit: int) -> None:
        for chunk in units[unit]:
            rows = torch.arange(chunk.start, chunk.stop, device=weight.device) // group_rows
            expanded = expand_scales(scales[rows], len(rows), columns, group_size)[:, order]
            part = weight[chunk][:, order].to(dtype)
            steps = expanded.T.contiguous()

            def nearest(column: int, wanted: Tensor, steps: Tensor = steps) -> Tensor:
                return integers_of(wanted, steps[column], bits) * steps[column]

            # Columns as rows: each step reads and writes what lies together. A copy, also of a matrix of one column.
            columnwise = part.T.clone(memory_format=torch.contiguous_format)
            found = carry_errors(columnwise, nearest, factor).T
            plain = integers_of(part, expanded, bits) * expanded
            lost, before = (((e @ seen) * e).sum(dim=1) for e in (found - part, plain - part))
            found = torch.where((lost < before).unsqueeze(1), found, plain)
            codes[chunk, order] = (integers_of(found, expanded, bits) + 2 ** (bits - 1)).to(torch.uint8)

    runs = [run_of(chunks) for chunks in units]
    deal([[codes[run]] for run in runs], [run.stop - run.start for run in runs], compute)
    return codes


@dataclass(frozen=True)
class IntegerFactors:
    """A product of factors in integers.

    Attributes:
        codes: `[n_b, rank_b]` uint8 codes of the coefficients of every block.
        scales: Their scales.
        basis_codes: `[rank, dim]` uint8 codes of the basis.
        basis_scales: Their scales.
    """

    codes: list[Tensor]
    scales: list[Tensor]
    basis_codes: Tensor
    basis_scales: Tensor


def quantize_factors(
    coefficients: Sequence[Tensor],
    basis: Tensor,
    matrix: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
    *,
    bits: int = 4,
    basis_bits: int = 8,
    group_size: int = 64,
    scale_dtype: torch.dtype = torch.float16,
) -> IntegerFactors:
    """Quantize a trained product `U_b B` without training: what loses least of all that has been compared.

    The factors are balanced and rotated (`numerics.balance`), the basis is rounded, coefficients are fitted to the
    basis as it is stored, by least squares in the metric, and rounded with feedback to scales that were searched for.

    Args:
        coefficients: `[n_b, rank_b]` of every block, which reads the leading rows of the basis.
        basis: `[rank, dim]`.
        matrix: `[dim, dim]` second moment `M` of the metric; None where all directions count the same.
        weights: `[n_b]` weights of the rows of every block; None where they count the same.
        bits: Bits of a coefficient, 2 to 8.
        basis_bits: Bits of a value of the basis, 2 to 8. There are few of them, and all rows share what they lose.
        group_size: Values that share a scale.
        scale_dtype: Dtype of the scales.

    Raises:
        ValueError: If an argument is out of its range, a factor is not finite or does not fit the others.

    Example:
        >>> coefficients, basis = torch.randn(200, 8) * torch.logspace(0, -1, 8), torch.randn(8, 16)
        >>> found = quantize_factors([coefficients], basis, bits=6)
        >>> left = from_codes(found.codes[0], found.scales[0], 6, 64)
        >>> table = left @ from_codes(found.basis_codes, found.basis_scales, 8, 64)
        >>> bool((table - coefficients @ basis).norm() < 0.02 * table.norm())
        True
    """
    moved, turned = balanced_factors(coefficients, basis, matrix, weights, exponent=_EXPONENT)
    basis_scales = group_scales(turned, basis_bits, group_size, scale_dtype, search=True)
    basis_codes = to_codes(turned, basis_scales, basis_bits, group_size)
    stored = from_codes(basis_codes, basis_scales, basis_bits, group_size, torch.float64).cpu()
    metric = torch.eye(basis.shape[1], dtype=torch.float64) if matrix is None else matrix.double().cpu()
    cost, shared = stored @ metric @ stored.T, turned.double().cpu() @ metric @ stored.T
    codes, scales = [], []
    for part in moved:
        run = slice(0, part.shape[1])
        part = project(part, _fit(shared[run, run], cost[run, run]).T.to(part.device))
        found = group_scales(part, bits, group_size, scale_dtype, search=True)
        codes.append(round_with_feedback(part, found, cost[run, run], bits, group_size))
        scales.append(found)
    return IntegerFactors(codes, scales, basis_codes, basis_scales)


def _fit(shared: Tensor, cost: Tensor) -> Tensor:
    """What to multiply coefficients with in the basis as it is stored, `B M B̂ᵀ (B̂ M B̂ᵀ)⁻¹`."""
    if not len(cost):
        return cost
    damping = DAMPING * cost.diagonal().mean() * torch.eye(len(cost), dtype=cost.dtype)
    # A basis of zeros, as it is before training, fits nothing.
    if not bool(cost.diagonal().mean() > 0):
        return torch.eye(len(cost), dtype=cost.dtype)
    fitted: Tensor = torch.linalg.solve(cost + damping, shared + damping, left=False)
    return fitted
