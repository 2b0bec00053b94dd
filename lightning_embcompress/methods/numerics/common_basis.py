"""One basis for several blocks: orthonormal directions in which all of their moments are as diagonal as can be.

The eigenvectors of the moment of all rows are the best basis of one block. Blocks that keep different amounts of it
have a better one in common: a component that only a few of them keep should suit those. For second moments `G_b` and
orthonormal `u_k` the loss is `½ Σ_b Σ_k D_bk u_kᵀ G_b u_k`, `D_bk` the part of its energy that a component loses in a
block. Where it follows from reverse water-filling, `D_bk = min(1, θ_b / e_bk)`, its minimum is the joint approximate
diagonalisation of Flury (1984, Common Principal Components in k Groups) and Pham (2001); where components are kept or
dropped it is a sum of heterogeneous quadratic forms. Both are minimised by turning all pairs of directions at once by
quasi-Newton steps (Ablin, Cardoso and Gramfort 2019, Beyond Pham's algorithm for joint diagonalization).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Steps, at most, and the part of the loss that one has to gain for the next to be taken.
_STEPS, _TOLERANCE = 12, 1e-3
# Of the curvature: so much of the energies is added, and no two directions turn by more than this, in radians.
_RIDGE, _LARGEST_TURN = 1e-2, 0.5
_SHORTEST_STEP = 1e-2


@dataclass(frozen=True)
class Valued:
    """What blocks lose whose components have some energies.

    Attributes:
        loss: In total.
        parts: `[blocks, dim]` what is lost of each more of an energy.
        order: `[dim]` components in the order in which blocks keep them.
    """

    loss: float
    parts: Tensor
    order: Tensor


def common_basis(moments: Tensor, value: Callable[[Tensor], Valued]) -> Tensor:
    """Directions in which blocks lose the least together.

    Args:
        moments: `[blocks, dim, dim]` second moments in the directions to begin with, float32 or float64, which are
            turned in place.
        value: Called with `[blocks, dim]` float64 energies, half the diagonals, what is lost of them.

    Returns:
        `[dim, dim]` float64 orthonormal columns, on the CPU; of all steps the best.

    Example:
        >>> turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
        >>> moment = turn @ torch.diag(torch.tensor([4.0, 1.0])) @ turn.T
        >>> def value(energies: Tensor) -> Valued:
        ...     return Valued(float(energies.log().sum()), 1 / energies, energies.sum(dim=0).argsort(descending=True))
        >>> basis = common_basis(torch.stack([moment, 3 * moment]), value)
        >>> (basis.T @ moment.double() @ basis).round().abs()
        tensor([[4., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    basis = torch.eye(moments.shape[1], dtype=torch.float64)
    step = 1.0
    now = value(_energies(moments))
    best, found = now.loss, basis[:, now.order]
    for _ in range(_STEPS):
        direction, lost = _direction(moments, now.parts), _lost(moments, now.parts)
        turn = _turn(moments, step * direction)
        while _lost(moments, now.parts) >= lost:
            _turn(moments, -step * direction)
            step /= 2
            if step < _SHORTEST_STEP:
                return found
            turn = _turn(moments, step * direction)
        basis, step = basis @ turn, min(1.0, 2 * step)
        now = value(_energies(moments))
        if now.loss >= best:
            break
        gain, best, found = 1 - now.loss / best, now.loss, basis[:, now.order]
        if gain < _TOLERANCE:
            break
    return found


def _energies(moments: Tensor) -> Tensor:
    return 0.5 * moments.diagonal(dim1=1, dim2=2).double().cpu()


def _lost(moments: Tensor, parts: Tensor) -> float:
    """What is lost if the parts stay what they are."""
    return float((_energies(moments) * parts).sum())


def _direction(moments: Tensor, parts: Tensor) -> Tensor:
    """`[dim, dim]` antisymmetric: angles by which pairs of directions turn, gradient over curvature."""
    diagonals = 2 * _energies(moments)
    # Σ_b D_bk (G_b)_kl, and Σ_b D_bk (G_b)_ll.
    products = torch.zeros_like(moments[0])
    for moment, part in zip(moments, parts.to(moments), strict=True):
        products.addcmul_(part.unsqueeze(1), moment)
    angles = (products - products.T).cpu().double()
    crossed, own = parts.T @ diagonals, (parts * diagonals).sum(dim=0)
    both = crossed + crossed.T
    curvature = (both - own.unsqueeze(1)).sub_(own).clamp_(min=0).add_(both, alpha=_RIDGE)
    return angles.div_(curvature.clamp_(min=1e-300)).clamp_(-_LARGEST_TURN, _LARGEST_TURN)


def _turn(moments: Tensor, angles: Tensor) -> Tensor:
    """Turn moments in place by antisymmetric angles (their negative turns back): Cayley's transform, the rotation."""
    identity = torch.eye(len(angles), dtype=angles.dtype)
    rotation: Tensor = torch.linalg.solve(identity - angles / 2, identity + angles / 2)
    turn = rotation.to(moments)
    for moment in moments:
        torch.mm(turn.T, moment @ turn, out=moment)
    return rotation
