"""Rounding column after column: what one loses is carried to where the next ones can make up for it.

Errors `e` of a row cost `eᵀ H e`. When a column is rounded, the columns behind it move to where the whole costs least
with what has been lost so far (GPTQ, Frantar et al. 2022, there for the inputs of a layer; Babai's nearest plane).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Added to the diagonal of `H`, relative to its mean: directions that cost nothing must have an inverse.
DAMPING = 1e-6
# Columns whose errors reach the columns behind them in one product.
_COLUMNS = 32


def feedback_factor(cost: Tensor) -> Tensor:
    """Upper triangle `R` with `H⁻¹ = Rᵀ R`: an error of column `k` over `R_kk`, times row `k`, is what others move.

    An error that the columns behind it make up for costs `1 / R_kk²` of its square.

    Args:
        cost: `[columns, columns]` symmetric `H` in the order in which columns are rounded.
    """
    size = len(cost)
    mean = float(cost.diagonal().mean()) if size else 0.0
    if mean <= 0:
        return torch.eye(size, dtype=cost.dtype)
    damped = (cost + cost.T) / 2 + DAMPING * mean * torch.eye(size, dtype=cost.dtype)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor


def carry_errors(wanted: Tensor, nearest: Callable[[int, Tensor], Tensor], factor: Tensor) -> Tensor:
    """Round the columns of some rows one after the other.

    Args:
        wanted: `[columns, rows]` values, a column after the other in memory; overwritten with what they become.
        nearest: Called with the number of a column and `[rows]` values, gives what they are rounded to.
        factor: `[columns, columns]` of `feedback_factor`, in the dtype and on the device of the values.
    """
    columns = len(wanted)
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        errors = torch.empty(stop - start, wanted.shape[1], dtype=wanted.dtype, device=wanted.device)
        for k in range(start, stop):
            found = nearest(k, wanted[k])
            errors[k - start] = (wanted[k] - found) / factor[k, k]
            wanted[k] = found
            wanted[k + 1 : stop].addr_(factor[k, k + 1 : stop], errors[k - start], alpha=-1)
        wanted[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return wanted
