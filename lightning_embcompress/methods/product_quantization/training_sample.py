"""The rows that codebooks are trained on, by how many of the centroids they may use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcompress.utils.division import agree

# Rows for every centroid that k-means is trained on: a sample of more finds hardly better centroids.
_ROWS_PER_CENTROID = 64


@dataclass(frozen=True)
class Groups:
    """Rows by how many of the centroids they may use.

    Attributes:
        rows: Ids of the rows of every group.
        limits: Centroids of every group: it uses the first ones.
    """

    rows: Sequence[Tensor]
    limits: Sequence[int]


@dataclass(frozen=True)
class Sample:
    """The rows that a codebook is trained on: how long that takes does not grow with the table.

    Attributes:
        rows: Their ids, ascending; those of high weight are sure to be among them.
        weights: Of the rows, such that sums over any of them are right on average.
        groups: The same rows by how many of the centroids they may use.
    """

    rows: Tensor
    weights: Tensor
    groups: Groups

    @classmethod
    def of(cls, weights: Tensor, groups: Groups, num_centroids: int) -> Sample:
        """Draw some rows for every centroid, the same in all processes.

        Example:
            >>> sample = Sample.of(torch.ones(1000), Groups([torch.arange(1000)], [4]), num_centroids=4)
            >>> sample.rows.shape, round(float(sample.weights.sum()), -2)
            (torch.Size([256]), 1000.0)
        """
        rows, drawn = _sample(weights, _ROWS_PER_CENTROID * num_centroids, torch.Generator().manual_seed(0))
        agree(rows, drawn)
        return cls(rows, drawn, restricted_groups(groups, rows, weights.numel()))


def _sample(weights: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Priority sampling without replacement (Duffield, Lund and Thorup 2007).

    Returns:
        Ids of the rows, ascending, and weights whose sums over any rows are right on average.
    """
    vocab_size = weights.numel()
    if count >= vocab_size:
        return torch.arange(vocab_size, device=weights.device), weights
    uniform = torch.rand(vocab_size, generator=generator, dtype=torch.float64).to(weights.device)
    priorities, order = (weights.double() / (1 - uniform)).topk(count + 1)
    rows = order[:-1].sort().values
    return rows, weights[rows].clamp(min=float(priorities[-1]))


def restricted_groups(groups: Groups, rows: Tensor, vocab_size: int) -> Groups:
    """The positions of some rows, ascending, by the groups that they are in."""
    group = torch.empty(vocab_size, dtype=torch.long, device=rows.device)
    for index, members in enumerate(groups.rows):
        group[members] = index
    return Groups(
        [(group[rows] == index).nonzero().flatten() for index in range(len(groups.rows))], list(groups.limits)
    )
