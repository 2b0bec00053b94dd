"""The numbers of a trellis as levels of coefficients: in which unit, and what is lost."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_embcompress.methods.quantizers.trellis import decode, encode, spread

# Values of a row, rows, and rounds in which unit and codes are found in turns.
_LENGTH, _ROWS, _ROUNDS = 128, 128, 3


def fit_unit(values: Tensor, weights: Tensor, bits: int, window: int) -> tuple[float, float]:
    """What a number of the trellis stands for, and the part of the weighted energy of values that is lost.

    Args:
        values: `[count]` numbers, at least one: what rows are made of.
        weights: `[count]` positive weights.
        bits: Bits of a value.
        window: Bits of a window.
    """
    take = torch.linspace(0, len(values) - 1, _LENGTH * _ROWS).long()
    # Neighbours may be of one row.
    take = take.view(_LENGTH, _ROWS).T
    values, weights = values[take].double(), weights[take].double()
    energy = float((weights * values.square()).sum())
    if not energy > 0:
        return 0.0, 0.0
    unit = float((energy / weights.sum()).sqrt()) / spread() * (1 - 4.0**-bits) ** 0.5
    lost = energy
    for _ in range(_ROUNDS):
        codes = encode(values / unit, [bits] * _LENGTH, torch.ones(_LENGTH), window)
        numbers = decode(codes, [bits] * _LENGTH, window).double()
        best = float((weights * values * numbers).sum() / (weights * numbers.square()).sum())
        lost, unit = float((weights * (values - best * numbers).square()).sum()), best
    return unit, lost / energy
