"""How much smaller a model is, as a metric."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_embcompress.layers.sizes import compressed_tables, dense_table_bytes, model_bytes


class CompressionRatio(Metric):
    """Dense bytes over stored bytes of a model, all metadata of its compressed tables included.

    Args:
        tables_only: Compare the compressed tables alone instead of the whole model.

    Example:
        >>> from lightning_embcompress import compress
        >>> model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000))
        >>> _ = compress(model, "low_rank", ratio=4)
        >>> ratio = CompressionRatio(tables_only=True)
        >>> ratio.update(model)
        >>> bool(ratio.compute() >= 4)
        True
    """

    is_differentiable = False
    higher_is_better = True
    # So that `forward`, too, keeps the last model instead of the mean of all.
    full_state_update = True
    dense_bytes: Tensor
    stored_bytes: Tensor

    def __init__(self, tables_only: bool = False) -> None:
        """Start from no model at all."""
        super().__init__()
        self.tables_only = tables_only
        # Every process holds the same model: the mean, not the sum, is its size.
        self.add_state("dense_bytes", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")
        self.add_state("stored_bytes", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")

    def update(self, model: nn.Module) -> None:
        """Measure a model; the last one counts."""
        if self.tables_only:
            tables = [factors for _, factors in compressed_tables(model)]
            dense: float = sum(map(dense_table_bytes, tables))
            stored: float = sum(factors.stored_bytes() for factors in tables)
        else:
            whole = model_bytes(model)
            dense, stored = whole["dense_bytes"], whole["stored_bytes"]
        self.dense_bytes = torch.tensor(float(dense), dtype=torch.float64, device=self.device)
        self.stored_bytes = torch.tensor(float(stored), dtype=torch.float64, device=self.device)

    def compute(self) -> Tensor:
        """The ratio, 1 for a model that is not compressed; NaN if no model was given."""
        return self.dense_bytes / self.stored_bytes
