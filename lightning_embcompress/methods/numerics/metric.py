"""The metric of the loss: what a change of a table's rows costs in nats.

To second order the mean loss of a trained model grows by `½ Σ_i q_i δ_iᵀ M δ_i` when row `i` of a table changes by
`δ_i`. At an embedding `M = E[g gᵀ]`, `g` the gradient of a token's loss at the embedding's output (the empirical Fisher
information); at a softmax `M = E[h hᵀ]`, `h` the hidden state that feeds it. `q_i` is how often row `i` counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.gram import compute_dtype, row_units
from lightning_embcompress.utils.division import deal

# Eigenvalues below this part of the largest are raised to it: directions that the statistics have not seen are not
# free, and their inverse has to be finite.
_FLOOR = 1e-6


@dataclass(frozen=True)
class Metric:
    """Rows weighted by `q_i`, directions by `M`.

    Attributes:
        matrix: `[dim, dim]` symmetric second moment `M`, float64, on the CPU.
        weights: `[vocab_size]` positive row weights `q`, float64, by which a table is approximated; those that follow
            from counts are 1 in total.
        expected: `[vocab_size]` row weights by which the loss is predicted; None for those of the approximation.

    Example:
        >>> metric = Metric(torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([0.5, 0.5]))
        >>> metric.loss(torch.zeros(2, 2), torch.ones(2, 2))
        2.5
    """

    matrix: Tensor
    weights: Tensor
    expected: Tensor | None = None

    @property
    def predicting(self) -> Tensor:
        """`[vocab_size]` row weights by which the loss is predicted."""
        return self.weights if self.expected is None else self.expected

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor, int]:
        matrix = self.matrix.double().cpu()
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        largest = float(values[-1]) if values.numel() else 0.0
        if largest <= 0:
            # Nothing is known of the directions: all count the same.
            return torch.ones_like(values), vectors, values.numel()
        low = values < _FLOOR * largest
        return values.clamp(min=_FLOOR * largest), vectors, int(low.sum())

    @property
    def floored(self) -> int:
        """How many eigenvalues of the matrix were too small, or negative, and were raised to a floor."""
        return self._eigen[2]

    @cached_property
    def root(self) -> Tensor:
        """`C = M^½`, `[dim, dim]` float64."""
        values, vectors, _ = self._eigen
        return (vectors * values.sqrt()) @ vectors.T

    @cached_property
    def inverse_root(self) -> Tensor:
        """`C⁻¹`, `[dim, dim]` float64."""
        values, vectors, _ = self._eigen
        return (vectors / values.sqrt()) @ vectors.T

    def restricted(self, columns: slice) -> Metric:
        """The metric of some of the columns, others unchanged."""
        return Metric(self.matrix[columns, columns], self.weights, self.expected)

    def loss(self, weight: Tensor, approximation: Tensor | Callable[[slice], Tensor]) -> float:
        """Predicted growth of the mean loss, `½ Σ_i q_i δ_iᵀ M δ_i` with the expected `q`, in nats.

        Processes share the rows, see `utils.division`.

        Args:
            weight: `[vocab_size, dim]` table.
            approximation: `[vocab_size, dim]` what takes its place; or what gives some of its rows.
        """
        dtype = compute_dtype(weight.dtype)
        root = self.root.to(weight.device, dtype)
        weights = self.predicting.to(weight.device)
        read = approximation if callable(approximation) else approximation.__getitem__
        units = row_units(*weight.shape)
        sums = [torch.zeros(len(chunks), dtype=torch.float64) for chunks in units]

        def compute(unit: int) -> None:
            for index, chunk in enumerate(units[unit]):
                change = (weight[chunk].to(dtype) - read(chunk).to(weight.device, dtype)) @ root
                sums[unit][index] = (change.square().sum(dim=1).double() * weights[chunk]).sum()

        deal([[part] for part in sums], [float(len(part)) for part in sums], compute)
        return 0.5 * float(torch.cat(sums).sum())


def smoothed_frequencies(token_counts: Tensor, unseen_weight: float | None = None) -> Tensor:
    """How often every token is expected: never 0, and 1 in total.

    Absolute discounting (Ney, Essen and Kneser 1994): each of the `T` distinct tokens among the `N` that were counted
    gives up `D = (n₁ + 1) / (n₁ + 2 n₂ + 1)` of an occurrence, `n₁` of them counted once and `n₂` twice. The `n₀`
    others have `D T / N` together, in equal parts, though none more than 1 occurrence or the smallest count; the rest
    is divided in proportion to the counts.

    Args:
        token_counts: `[vocab_size]` counts `n`.
        unseen_weight: What the tokens that were not counted weigh together, above 0 and below 1, in place of that
            estimate.

    Returns:
        `[vocab_size]` float64.

    Example:
        >>> smoothed_frequencies(torch.tensor([6, 0, 1, 0, 0, 0]))
        tensor([0.6122, 0.0714, 0.1020, 0.0714, 0.0714, 0.0714], dtype=torch.float64)
        >>> smoothed_frequencies(torch.tensor([6, 0, 2, 0]), unseen_weight=0.2)
        tensor([0.6000, 0.1000, 0.2000, 0.1000], dtype=torch.float64)
    """
    counts = token_counts.double()
    is_unseen = counts == 0
    counted = counts[~is_unseen]
    each = 1.0
    if counted.numel():
        once, twice = int((counted <= 1).sum()), int(((counted > 1) & (counted <= 2)).sum())
        given = (once + 1) / (once + 2 * twice + 1) * counted.numel()
        rest = max(1e-300, 1 - given / float(counted.sum()))
        each = min(1.0, float(counted.min()), given / rest / max(1, int(is_unseen.sum())))
    smoothed = counts.where(~is_unseen, each)
    return weigh_unseen(smoothed / smoothed.sum(), is_unseen, unseen_weight)


def weigh_unseen(weights: Tensor, is_unseen: Tensor, unseen_weight: float | None) -> Tensor:
    """Row weights of which those of unseen tokens are a given part, as they are to each other.

    Args:
        weights: `[vocab_size]` positive, 1 in total.
        is_unseen: `[vocab_size]` which.
        unseen_weight: What they weigh together; None for what they do.

    Returns:
        `[vocab_size]`, 1 in total; the weights themselves where all tokens are unseen, or none.
    """
    if unseen_weight is None or bool(is_unseen.all()) or not bool(is_unseen.any()):
        return weights
    part = float(weights[is_unseen].sum())
    return weights * torch.where(is_unseen, unseen_weight / part, (1 - unseen_weight) / (1 - part))
