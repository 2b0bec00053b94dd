"""What has become of a table in another format."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_embcompress.methods.numerics.gram import row_chunks
from lightning_embcompress.methods.numerics.grid_rounding import GridCodes, fit_grid
from lightning_embcompress.methods.numerics.metric import Metric
from lightning_embcompress.methods.quantizers.grids import Grid
from lightning_embcompress.utils.progress import progress_bar


@dataclass(frozen=True)
class WrittenTable:
    """A table in a file.

    Attributes:
        name: Of the table in the file.
        shape: `(vocab_size, dim)`.
        before: Type that it had.
        type: Type that it has.
        bits_per_weight: With scales and minimums.
        predicted_loss: Nats that the mean loss grows by, against the table that was there; None without statistics.
        plain_error: Squared error over the squared values.
    """

    name: str
    shape: tuple[int, int]
    before: str
    type: str
    bits_per_weight: float
    predicted_loss: float | None
    plain_error: float


def fit_table(
    name: str, values: Tensor, before: str, type: str, grid: Grid, metric: Metric | None
) -> tuple[WrittenTable, GridCodes]:
    """Find a table in the grid of a type, with progress.

    Args:
        name: Of the table in the file.
        values: `[vocab_size, dim]`.
        before: Type that it had.
        type: Type that it gets.
        grid: Of that type.
        metric: What an error costs; None where all columns count the same.

    Raises:
        ValueError: If it does not fit; the message names the table.
    """
    with progress_bar(f"{name} to {type}", total=len(values), unit="rows") as advance:
        try:
            codes = fit_grid(values, grid, None if metric is None else metric.matrix, advance)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
    lost = total = 0.0
    for chunk in row_chunks(*values.shape):
        part = values[chunk].float()
        lost += float((codes.materialize(chunk) - part).square().sum().double())
        total += float(part.square().sum().double())
    shared = codes.scales.numel() + (0 if codes.minimums is None else codes.minimums.numel())
    bits = (len(grid.levels) - 1).bit_length() + 8 * shared * codes.scales.element_size() / max(1, values.numel())
    predicted = None if metric is None else metric.loss(values, codes.materialize)
    shape = (values.shape[0], values.shape[1])
    return WrittenTable(name, shape, before, type, bits, predicted, lost / max(1e-300, total)), codes
