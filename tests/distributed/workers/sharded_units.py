"""What can be a unit of FSDP2, what is refused, and what is read outside of `forward`. Argument: an empty folder."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_model import CASES, DIM, VOCAB_SIZE, ShardedModel, strategy_of, trainer, whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_embcompress.compression.plan import compress, densify, plan_of
from lightning_embcompress.integrations.saved import save_compressed
from lightning_embcompress.integrations.sharding import compress_or_restore, is_sharded, shard_tables
from lightning_embcompress.layers.sizes import model_bytes
from lightning_embcompress.modules import LSTMLanguageModel
from toys import Losses


def compressed(tied: bool = True) -> ShardedModel:
    model = ShardedModel({**CASES["group_reduce"], "tied": tied})
    compress(model, "low_rank", ratio=2)
    return model


def check_tied_tables(mesh: Any) -> None:
    expected = compressed()
    ids = torch.tensor([[3, 1, 1], [102, 0, 7]])

    # One table in two units is an error, of torch, and does not become two tables.
    model = compressed()
    fully_shard(model.embedding, mesh=mesh)
    with pytest.raises(Exception, match="mesh"):
        fully_shard(model.head, mesh=mesh)
    with pytest.raises(ValueError, match="'embedding' is part of another unit"):
        shard_tables(model, mesh=mesh)

    # In the unit above, the table is there while `forward` runs, and not otherwise.
    model = compressed()
    fully_shard(model, mesh=mesh)
    assert torch.allclose(model(ids), expected(ids))
    # As it is after a step of training.
    model.reshard()
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        model.embedding.factorization.rows(ids)

    # As a unit of its own it is there whenever it is read.
    model = compressed()
    assert not is_sharded(model)
    shard_tables(model, mesh=mesh)
    shard_tables(model, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert is_sharded(model)
    assert torch.allclose(model(ids), expected(ids))
    table, same = (one.embedding.factorization for one in (model, expected))
    assert plan_of(model) == plan_of(expected)
    assert torch.equal(table.materialize(), same.materialize())
    assert torch.equal(table.rows(ids), same.rows(ids))
    for one in (model, expected):
        # Between two processes with the same batch, the mean gradient is that of one.
        rows = one.embedding.factorization.rows(ids)
        (one(ids).square().mean() + (rows * torch.arange(DIM)).mean()).backward()
    for (name, sharded), parameter in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert isinstance(parameter.grad, Tensor), name
        assert torch.allclose(whole(sharded.grad), parameter.grad, rtol=1e-12, atol=1e-15), name


def check_bytes_and_exports(mesh: Any, folder: Path) -> None:
    """A sharded model is as large as it was whole, and is not exported by one process."""
    for tied in (True, False):
        for make in (compressed, lambda tied: ShardedModel({**CASES["group_reduce"], "tied": tied})):
            model = make(tied)
            expected = model_bytes(model)
            shard_tables(model, mesh=mesh)
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert model_bytes(model) == expected
            modules = dict(model.named_modules())
            with pytest.raises(ValueError, match=r"cannot be saved by save_compressed: .* Save a full checkpoint"):
                save_compressed(model, folder / "saved")
            assert not (folder / "saved").exists()
            with pytest.raises(ValueError, match=r"ShardedModel is sharded, and cannot be made dense: .* a full"):
                densify(model)
            with pytest.raises(ValueError, match=r"is sharded, and cannot be compressed: .* Save a full checkpoint"):
                compress(model, "low_rank", ratio=2)
            assert dict(model.named_modules()) == modules


def check_refusals(mesh: Any, folder: Path) -> None:
    case = CASES["group_reduce"]
    model = ShardedModel(case)
    with torch.no_grad():
        model.embedding.weight[dist.get_rank()] += 1
    with pytest.raises(ValueError, match="'embedding' is not the same in all processes: call seed_everything"):
        compress_or_restore(model, "low_rank", ratio=2)
    assert not plan_of(model).tables

    model = ShardedModel(case)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="is sharded already: call compress_or_restore before fully_shard"):
        compress_or_restore(model, "low_rank", ratio=2)

    # Said in one process, and the other does not wait for it.
    files = [folder / "missing.ckpt", folder / "dense.ckpt"]
    if dist.get_rank() == 0:
        torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": {}}, files[1])
    dist.barrier()
    own: tuple[type[Exception], str] = (FileNotFoundError, "missing.ckpt")
    if dist.get_rank() == 1:
        own = (ValueError, "is the checkpoint of a dense model")
    with pytest.raises(own[0], match=own[1]):
        compress_or_restore(ShardedModel(case), "low_rank", ratio=2, ckpt_path=files[dist.get_rank()])


class ShardedLSTM(LSTMLanguageModel):
    """Its training step reads single rows of the softmax, and its bias, by itself."""

    @override
    def configure_model(self) -> None:
        compress_or_restore(self, "group_reduce", ratio=2, token_counts=torch.arange(self.vocab_size, 0, -1))
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            shard_tables(self, mesh=mesh)
            fully_shard(self.lstm, mesh=mesh)
            fully_shard(self, mesh=mesh)
            for step in ("training_step", "validation_step"):
                register_fsdp_forward_method(self, step)


def check_sampled_softmax(folder: Path) -> None:
    ids = torch.randint(0, VOCAB_SIZE, (6, 4, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for strategy, processes in ((strategy_of("fsdp2", "cpu", False, 2), 2), ("auto", 1)):
        torch.manual_seed(0)
        sampled: dict[str, Any] = {"softmax": "sampled", "num_sampled": 20, "dropout": 0.0}
        model = ShardedLSTM(VOCAB_SIZE, DIM, 24, DIM, **sampled).double()
        seen = Losses()
        # Both processes have the same batches, and train as one.
        loader = DataLoader([(part[:, :-1], part[:, 1:]) for part in ids], batch_size=None)
        fitted = trainer(folder, strategy, "cpu", processes, seen, use_distributed_sampler=False)
        torch.manual_seed(1)
        fitted.fit(model, loader, loader)
        losses.append([*seen.values, float(fitted.callback_metrics["val_loss"])])
    assert len(losses[0]) == 2 * len(ids) + 1
    assert torch.allclose(*map(torch.tensor, losses), rtol=1e-6), losses


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    check_tied_tables(mesh)
    check_bytes_and_exports(mesh, Path(sys.argv[1]))
    check_refusals(mesh, Path(sys.argv[1]))
    check_sampled_softmax(Path(sys.argv[1]))
    dist.barrier()
    if dist.get_rank() == 0:
        sys.stdout.write("all held\n")
    # A thread of gloo that is left can abort the interpreter at its end.
