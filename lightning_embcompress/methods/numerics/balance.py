"""Factors that lose little when they are rounded: scale and directions moved between coefficients and basis.

A product `U B` is the same as `(U T) (T⁻¹ B)`, but what it loses to integers is not. Rounding errors of coefficients
grow with the largest ones of a group, and cost `½ Σ_i q_i e_iᵀ H e_i`, `H = B M Bᵀ`. With the weighted second moment
`S = Σ_i q_i u_i u_iᵀ`, and errors as large as the mean square of the coefficients, the least of
`tr(Tᵀ S T) tr(T⁻¹ H T⁻ᵀ)` over all `T` is `(tr (S^½ H S^½)^½)²`, by the inequality of Cauchy and Schwarz. It is reached
where components have the standard deviation `λ^¼` in the common eigenbasis, `λ` what they are worth: scale is shared
equally. A rotation on top of that changes no sum, but makes all components about as large, so that no group is as
coarse as its largest component demands (random orthogonal, as in QuIP, Chee et al. 2023, and QuaRot, Ashkboos et al.
2024). Once the factors are stored, nothing of it costs bytes or time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import gram_matrix, project
from lightning_embcompress.utils.division import deal

# Components that are worth less than this part of the best one are scaled as if they were worth it.
_FLOOR = 1e-9


def balanced_factors(
    coefficients: Sequence[Tensor],
    basis: Tensor,
    matrix: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
    *,
    exponent: float = 0.5,
) -> tuple[list[Tensor], Tensor]:
    """Factors of the same products that lose less when they are rounded, see the top of the module.

    Blocks of rows share the basis, each its leading rows. Components are mixed within runs that the same blocks keep,
    so that this stays so.

    Args:
        coefficients: `[n_b, rank_b]` of every block; one for a table of low rank.
        basis: `[rank, dim]`.
        matrix: `[dim, dim]` second moment `M` of `numerics.metric`; None where all directions count the same.
        weights: `[n_b]` weights `q` of the rows of every block; None where they count the same.
        exponent: Standard deviations of components become `λ^((1 − exponent) / 2)`: 0 lets an error cost the same in
            all, 1 makes all as large, 0.5 is best if values are rounded one by one. With `numerics.error_feedback`,
            which turns differences in cost to account, 0.7 has been measured to be.

    Returns:
        New coefficients of every block and the new basis, in their dtypes.

    Raises:
        ValueError: If a block has more columns than the basis rows, `exponent` is not from 0 to 1, or a factor is not
            finite.

    Example:
        >>> coefficients, basis = torch.randn(100, 8) * torch.logspace(0, -2, 8), torch.randn(8, 16)
        >>> (moved,), turned = balanced_factors([coefficients], basis)
        >>> torch.allclose(moved @ turned, coefficients @ basis, atol=1e-4)
        True
    """
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent must be from 0 to 1, it is {exponent}")
    rank, dim = basis.shape
    for block, part in enumerate(coefficients):
        if part.shape[1] > rank:
            raise ValueError(f"block {block} has {part.shape[1]} coefficients a row, but the basis only {rank} rows")
    if weights is None:
        weights = [torch.ones(len(part), dtype=torch.float64, device=part.device) for part in coefficients]
    ends = sorted({part.shape[1] for part in coefficients} - {0})
    moments = [torch.zeros(end, end, dtype=torch.float64) for end in ends]
    for part, q in zip(coefficients, weights, strict=True):
        if part.shape[1]:
            moments[ends.index(part.shape[1])] += gram_matrix(part, q.to(part.device)).cpu()
    wide = basis.detach().double().cpu()
    metric = torch.eye(dim, dtype=torch.float64) if matrix is None else matrix.double().cpu()
    cost = wide @ metric @ wide.T
    if not all(bool(moment.isfinite().all()) for moment in (*moments, cost)):
        raise ValueError("a factor is not finite, and cannot be balanced: look for what made it diverge")
    forward, inverse = torch.eye(rank, dtype=torch.float64), torch.eye(rank, dtype=torch.float64)

    def compute(_: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for start, end in zip([0, *ends], ends, strict=False):
            run = slice(start, end)
            energy = sum(moment[run, run] for moment in moments if len(moment) >= end)
            assert isinstance(energy, Tensor)
            forward[run, run], inverse[run, run] = _balancing(energy, cost[run, run], exponent)
            rotation = _rotation(end - start, generator)
            forward[run, run] = forward[run, run] @ rotation
            inverse[run, run] = rotation.T @ inverse[run, run]

    # One process decomposes it: rounding may differ between processors.
    deal([[forward, inverse]], [1.0], compute)
    moved = [
        project(part, forward[: part.shape[1], : part.shape[1]].T.to(part.device)) if part.shape[1] else part.clone()
        for part in coefficients
    ]
    return moved, (inverse @ wide).to(basis)


def _balancing(energy: Tensor, cost: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """`T` and its inverse of one run of components: into the common eigenbasis, then scaled."""
    values, vectors = torch.linalg.eigh((cost + cost.T) / 2)
    if not bool(values[-1] > 0) or not bool(energy.diagonal().max() > 0):
        # Nothing is known of what the components are worth.
        identity = torch.eye(len(cost), dtype=torch.float64)
        return identity, identity.clone()
    roots = values.clamp(min=_FLOOR * float(values[-1])).sqrt()
    root, inverse_root = vectors * roots @ vectors.T, vectors / roots @ vectors.T
    seen = root @ energy @ root
    worth, common = torch.linalg.eigh((seen + seen.T) / 2)
    scales = worth.clamp(min=_FLOOR * float(worth[-1])).pow(-exponent / 2)
    # Only ratios matter: as large as the coefficients were, whatever the units of the metric.
    forward = root @ common * scales
    unit = (energy.trace() / (forward.T @ energy @ forward).trace()).sqrt()
    return forward * unit, (common / scales).T @ inverse_root / unit


def _rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix."""
    rotation: Tensor = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    return rotation
