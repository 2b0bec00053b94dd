r"""How far factors are from the table that they stand for, as a loss.

In the metric of the loss this is what the mean loss is predicted to grow by, in nats,
:math:`\frac12 \sum_i q_i \, \delta_i^\top M \delta_i`, with `q_i` how much token `i` counts and `M` the second moment
of what the table meets (:mod:`lightning_embcompress.calibration.statistics`). Only some rows are read at every step.
The tokens of a batch are drawn by their frequency :math:`f_i`, so the mean of
:math:`\frac12 (q_i / f_i) \, \delta_i^\top M \delta_i` over them is expected to be that sum; over rows that are drawn
with the chances :math:`q_i / \sum_j q_j`, it is :math:`\sum_j q_j` times the mean of
:math:`\frac12 \delta_i^\top M \delta_i`.

Without statistics it is the relative squared error of the rows, :math:`\sum \|\delta_i\|^2 / \sum \|w_i\|^2`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_embcompress.calibration.loss_metric import metric_of
from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.layers.sizes import table_shape
from lightning_embcompress.methods.numerics.metric import smoothed_frequencies
from lightning_embcompress.modules.finetuning.parts import table_rows
from lightning_embcompress.tables.finding import Table


class Reconstruction:
    """The loss of one table.

    It is no module: the table that is stood for is nothing that is trained or kept in checkpoints.

    Args:
        model: The model that is fine-tuned.
        paths: Of the layers in it that read the table.
        original: The layer that reads the table which they should be; only read.
        statistics: Of the model, or of a fine-tuning that holds it; None for the plain error.

    Raises:
        ValueError: If the original is of another shape, or the statistics are of another model.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], original: nn.Module, statistics: Statistics | None = None
    ) -> None:
        """Keep the table, and the metric if there is one."""
        self.path = paths[0]
        self.original = original
        shape, own = table_shape(original), table_shape(model.get_submodule(self.path))
        if shape != own:
            raise ValueError(
                f"Table {self.path!r} of the teacher is {shape[0]} x {shape[1]}, that of the model {own[0]} x {own[1]}:"
                " give the dense model that was compressed, or set reconstruction_weight=0."
            )
        self.device = torch.device("cpu")
        self.root: Tensor | None = None
        if statistics is not None:
            held = [f"model.{path}" for path in paths]
            if {*statistics.hidden, *statistics.gradients} & {*held}:
                # They were collected from a module that holds the model.
                model, paths = nn.ModuleDict({"model": model}), held
            # Only the shape is asked for.
            table = Table(tuple(paths), torch.empty(own, device="meta"))
            metric = metric_of(model, table, statistics)
            self.root = metric.root.float()
            self.chances = metric.predicting.float()
            self.total = float(metric.predicting.sum())
            self.relative = (metric.predicting / smoothed_frequencies(statistics.counts_of(paths))).float()

    def to(self, device: torch.device) -> None:
        """Move what is read."""
        self.device = device
        self.original.to(device)
        if self.root is not None:
            self.root, self.relative = self.root.to(device), self.relative.to(device)

    def of_tokens(self, model: nn.Module, ids: Tensor) -> Tensor:
        """The loss, estimated from tokens of a text.

        Args:
            model: The model that is fine-tuned.
            ids: `[n]` tokens, as often as they occur.

        Returns:
            A scalar, in nats where there are statistics.
        """
        distinct, counts = torch.unique(ids, return_counts=True)
        shares = counts / max(1, len(ids))
        if self.root is not None:
            shares = shares * self.relative[distinct]
        return self._of_rows(model, distinct, shares)

    def of_sample(self, model: nn.Module, number: int, generator: torch.Generator) -> Tensor:
        """The loss, estimated from rows that are drawn.

        Args:
            model: The model that is fine-tuned.
            number: How many are drawn.
            generator: By which, on the CPU.

        Returns:
            A scalar, in nats where there are statistics.
        """
        if self.root is None:
            ids = torch.randint(table_shape(self.original)[0], (number,), generator=generator)
        else:
            # By the sum of chances, for `torch.multinomial` takes no more than 2²⁴ of them.
            bounds = self.chances.double().cumsum(0)
            drawn = torch.rand(number, dtype=torch.float64, generator=generator) * bounds[-1]
            ids = torch.searchsorted(bounds, drawn).clamp_(max=len(bounds) - 1)
        distinct, counts = torch.unique(ids.to(self.device), return_counts=True)
        return self._of_rows(model, distinct, counts * ((1.0 if self.root is None else self.total) / number))

    def _of_rows(self, model: nn.Module, ids: Tensor, shares: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            rows = table_rows(self.original, ids).detach().float()
            change = rows - table_rows(model.get_submodule(self.path), ids).float()
            if self.root is None:
                error = (change.square().sum(-1) * shares).sum()
                return error / (rows.square().sum(-1) * shares).sum().clamp(min=1e-12)
            return 0.5 * ((change @ self.root).square().sum(-1) * shares).sum()
