"""A small model that is compressed and sharded when it is built, and its trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from typing_extensions import override

from lightning_embcompress.calibration.statistics import Statistics
from lightning_embcompress.integrations.sharding import compress_or_restore, shard_tables
from toys import quiet_trainer

VOCAB_SIZE, DIM = 103, 16
# Samples of all processes together.
BATCH_SIZE = 8
PQ = {"method": "product_quantization", "ratio": 2}
SHARED_BASIS = {"method": "shared_basis", "ratio": 2, "loss": True}
CASES: dict[str, dict[str, Any]] = {
    "group_reduce": {"method": "group_reduce", "ratio": 2, "tied": True, "units": "tables", "directory": True},
    "layers": {**SHARED_BASIS, "tied": False, "units": "layers", "directory": False},
    "tensor_train": {"method": "tensor_train", "max_rank": 1, "tied": True, "units": "root", "directory": False},
    "product_quantization": {**PQ, "tied": True, "units": "group", "directory": True},
    "rare": {**PQ, "rare_bits": 2, "rare_fraction": 0.5, "tied": True, "units": "tables", "directory": False},
}
MORE_CASES: dict[str, dict[str, Any]] = {
    f"{method}-{units}-{'tied' if tied else 'untied'}-{'directory' if directory else 'file'}": {
        "method": method,
        **({"max_rank": 1} if method == "tensor_train" else {"ratio": 1.5}),
        "tied": tied,
        "units": units,
        "directory": directory,
    }
    for method in ("cp", "low_rank", "tensor_train_matrix", "tucker", "weighted_low_rank", "group_reduce")
    for units, tied in (("tables", True), ("layers", False), ("root", True), ("group", True))
    for directory in (True, False)
}


class ShardedModel(LightningModule):
    """Embedding, two layers and softmax; in float64, where the order of sums does not show."""

    def __init__(self, case: dict[str, Any], ckpt_path: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters("case")
        self.case, self.ckpt_path = dict(case), ckpt_path
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(VOCAB_SIZE, DIM, dtype=torch.float64)
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM, dtype=torch.float64) for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB_SIZE, bias=True, dtype=torch.float64)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        if case["tied"]:
            self.head.weight = self.embedding.weight

    @override
    def configure_model(self) -> None:
        others = ("tied", "units", "directory", "loss")
        options = {name: value for name, value in self.case.items() if name not in others}
        counts = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
        options |= {"statistics": statistics(counts)} if self.case.get("loss") else {"token_counts": counts}
        compress_or_restore(self, ckpt_path=self.ckpt_path, **options)
        if self.device_mesh is None or isinstance(self, FSDPModule):
            return
        mesh, units = self.device_mesh["data_parallel"], self.case["units"]
        if units == "tables":
            shard_tables(self, mesh=mesh)
        elif units == "group":
            fully_shard([self.embedding, self.head], mesh=mesh)
        elif units == "layers":
            for layer in (self.embedding, self.head):
                fully_shard(layer, mesh=mesh)
        for layer in self.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)

    @override
    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        logits: Tensor = self.head(hidden)
        return logits

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, targets = batch
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def statistics(counts: Tensor) -> Statistics:
    """Moments of an embedding and a head as no data have them."""
    roots = torch.randn(2, DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    moments = {path: root @ root.T for path, root in zip(("embedding", "head"), roots, strict=True)}
    return Statistics(
        counts,
        hidden={"head": moments["head"]},
        hidden_mean={"head": roots[1, 0]},
        gradients={"embedding": moments["embedding"]},
        num_targets=1000,
    )


def data(rank: int = 0, processes: int = 1) -> DataLoader[tuple[Tensor, ...]]:
    """Four steps an epoch, of the same samples in sum for any number of processes."""
    generator = torch.Generator().manual_seed(1)
    samples = TensorDataset(*torch.randint(0, VOCAB_SIZE, (2, 4 * BATCH_SIZE, 5), generator=generator))
    # Lightning's own would shuffle.
    sampler: DistributedSampler[Any] = DistributedSampler(samples, processes, rank, shuffle=False)
    return DataLoader(samples, BATCH_SIZE // processes, sampler=sampler)


def trainer(
    folder: Path, strategy: Any = "auto", accelerator: str = "cpu", devices: int = 1, *callbacks: Any, **options: Any
) -> Trainer:
    """Two epochs; the last checkpoint of every epoch is kept."""
    keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
    chosen = {"accelerator": accelerator, "devices": devices, "strategy": strategy, "max_epochs": 2}
    return quiet_trainer(folder, keep, *callbacks, enable_checkpointing=True, **chosen, **options)


class FSDPOnCPU(FSDPStrategy):
    """Lightning's FSDP asks for a GPU; on CPUs torch can train by it and save directories, though not single files."""

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def strategy_of(name: str, accelerator: str, directory: bool, processes: int) -> Any:
    """`fsdp2` or `fsdp`, that writes checkpoints as a directory or as one file."""
    if name == "fsdp":
        strategy = FSDPOnCPU if accelerator == "cpu" else FSDPStrategy
        return strategy(state_dict_type="sharded" if directory else "full")
    return ModelParallelStrategy(processes, 1, save_distributed_checkpoint=directory)


def whole(value: Any) -> Any:
    """A copy of tensors in a nest of mappings, shards put together; all processes have to call it."""
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def result(model: LightningModule, fitted: Trainer) -> dict[str, Any]:
    """What two trainings are compared by: parameters, buffers, the optimizer's state and the validation loss."""
    found = {"val_loss": float(fitted.callback_metrics["val_loss"])}
    if isinstance(fitted.model, FullyShardedDataParallel):
        # Shards of the optimizer's state are flat; whether it was restored shows in the parameters.
        with FullyShardedDataParallel.summon_full_params(fitted.model):
            tensors = [*model.named_parameters(), *model.named_buffers()]
            return {"state": whole(dict(tensors)), **found}
    names = {parameter: name for name, parameter in model.named_parameters()}
    (optimizer,) = fitted.optimizers
    states = {names[parameter]: whole(state) for parameter, state in optimizer.state.items()}
    return {"state": whole(model.state_dict()), "optimizer": states, **found}
