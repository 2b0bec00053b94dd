"""Bases turned towards those of before, so that an optimizer's state for their coefficients goes on to fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcompress.utils.division import deal


def alignment(basis: Tensor, reference: Tensor) -> Tensor:
    """Rotation `Q` that brings an orthonormal basis closest to a reference, `min ‖Q B − B_ref‖` (Procrustes).

    The product of `U Qᵀ` and `Q B` stays what it is, while coefficients keep the meaning they had: an optimizer's
    state for them goes on to fit, and no sign or order of eigenvectors flips from one refinement to the next.

    Args:
        basis: `[rank, dim]` orthonormal rows.
        reference: `[rank, dim]`.

    Returns:
        `[rank, rank]` orthogonal, float32 or wider.
    """
    dtype = torch.promote_types(basis.dtype, torch.float32)
    left, _, right = torch.linalg.svd(reference.to(dtype) @ basis.to(dtype).T)
    rotation: Tensor = left @ right
    return rotation


def aligned_bases(bases: Sequence[Tensor | None], references: Sequence[Tensor]) -> list[Tensor | None]:
    """Bases of blocks, each turned towards a reference, see `alignment`; processes share the blocks.

    Args:
        bases: `[rank, dim]` orthonormal rows of every block, or None.
        references: As many, of the same shapes.

    Returns:
        `[rank, dim]` of every block, or None.
    """
    turned = [None if basis is None else torch.empty_like(basis) for basis in bases]
    units = [
        (out, basis, reference)
        for out, basis, reference in zip(turned, bases, references, strict=True)
        if out is not None and basis is not None
    ]

    def compute(unit: int) -> None:
        out, basis, reference = units[unit]
        out.copy_(alignment(basis, reference) @ basis)

    deal([[unit[0]] for unit in units], [basis.shape[0] ** 2 for _, basis, _ in units], compute)
    return turned
