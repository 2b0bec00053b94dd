"""Compressed tables in models that a strategy shards (FSDP2, FSDP): the structure comes before the shards.

Lightning's `ModelParallelStrategy` and `FSDPStrategy` shard a model after `configure_model`, make its optimizers and
read a checkpoint last, straight into the shards. A layer can no longer be replaced then. So tables are compressed, or
take the structure of the checkpoint that is to be read, in `configure_model`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_embcompress.compression.budget import BUDGETS, Budget
from lightning_embcompress.compression.plan import Plan, apply_plan, plan_of
from lightning_embcompress.compression.report import show_plan
from lightning_embcompress.compression.solution import put_in_place, solve
from lightning_embcompress.compression.tasks import plan
from lightning_embcompress.integrations.checkpoint import is_spawned, keep_structure, structure_from_checkpoint
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.methods.config import MethodConfig
from lightning_embcompress.methods.registry import DEFAULT_METHOD, get_config
from lightning_embcompress.tables.finding import Table, find_tables
from lightning_embcompress.utils.division import count_processes, divided, failing_together
from lightning_embcompress.utils.random_state import gather_over_processes
from lightning_embcompress.utils.storage import is_sharded

__all__ = ["compress_or_restore", "is_sharded", "shard_tables"]

# Arguments of `compress` that `plan` takes as they are.
_OF_PLAN = ("tables", "tie", "token_counts", "keep_rows", "statistics")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compress_or_restore(
    module: LightningModule,
    method: MethodConfig | str = DEFAULT_METHOD,
    *,
    ckpt_path: str | os.PathLike[str] | None = None,
    **arguments: Any,
) -> Plan:
    """Compress the tables of a module before it is sharded, or give them the structure of a checkpoint.

    For `configure_model`, in the place of the callbacks: under strategies that shard a model its tables can only be
    compressed at the start. All processes call it, and all get the same factors. Checkpoints record the structure from
    then on. A module that is compressed already stays as it is, so that `configure_model` may run again.

    To go on from a checkpoint (`fit`, `validate`, `test` or `predict` with `ckpt_path`) give the module the same path:
    nothing is solved then, since Lightning reads the factors after the model is sharded. It works under every
    strategy; those that do not shard have `EmbeddingCompression`, which can compress at later epochs too.

    What is compressed before sharding may be wrapped in any way in which a layer's `forward` is called and no
    parameter is in two units, see `shard_tables`.

    Args:
        module: A module whose layers are there and not sharded yet.
        method: See `compress`.
        ckpt_path: The checkpoint, a file or a directory, that the Trainer will be given; None to start afresh.
        **arguments: As for `compress`: `ratio`, `size` or `bits_per_weight`, `tables`, `tie`, `token_counts`,
            `keep_rows`, `statistics`, and options of the method. Counts and statistics have to be the same in all
            processes; nothing is collected here.

    Returns:
        The plan that the module has now.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the request cannot be met, the module is sharded already, the processes hold different tables or
            were spawned, or the checkpoint is of a dense model or does not fit. The module is as it was.
        RuntimeError: If another process has failed.

    Example:
        >>> from torch.distributed.fsdp import FSDPModule, fully_shard
        >>> class LanguageModel(LightningModule):
        ...     def __init__(self, ckpt_path=None):
        ...         super().__init__()
        ...         # Not among the hyper-parameters: a checkpoint need not know what it was resumed from.
        ...         self.ckpt_path = ckpt_path
        ...         self.embedding, self.head = nn.Embedding(2000, 64), nn.Linear(64, 2000)
        ...         self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        ...
        ...     def configure_model(self):
        ...         compress_or_restore(self, "low_rank", ratio=4, ckpt_path=self.ckpt_path)
        ...         # None where nothing is sharded, as in `load_from_checkpoint`.
        ...         if self.device_mesh is not None and not isinstance(self, FSDPModule):
        ...             mesh = self.device_mesh["data_parallel"]
        ...             shard_tables(self, mesh=mesh)
        ...             for layer in self.layers:
        ...                 fully_shard(layer, mesh=mesh)
        ...             fully_shard(self, mesh=mesh)
        >>> model = LanguageModel()
        >>> model.configure_model()  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        Compressed before sharding ... low_rank ... whole model ...
        >>> [type(layer).__name__ for layer in (model.embedding, model.head)]
        ['CompressedEmbedding', 'CompressedLinear']
    """
    if not plan_of(module).tables:
        if is_sharded(module):
            raise ValueError(
                f"the tables of {type(module).__name__} are dense, and it is sharded already: call compress_or_restore "
                "before fully_shard, on a module that is new"
            )
        trainer: Trainer | None = getattr(module, "_trainer", None)
        if trainer is not None and trainer.training and is_spawned(trainer):
            raise ValueError(
                f"compress_or_restore would change {type(module).__name__} in processes that hand nothing but weights "
                "back to the main process, whose module stays dense: call it before Trainer.fit, or use strategy='ddp'"
            )
        if ckpt_path is None:
            _compress(module, method, **arguments)
            title = "Compressed before sharding"
        else:
            with failing_together():
                apply_plan(module, _plan_of_checkpoint(ckpt_path))
            title = "Compressed as in the checkpoint"
        show_plan(module, title)
    keep_structure(module)
    return plan_of(module)


def shard_tables(module: nn.Module, **options: Any) -> None:
    """Make every compressed table of a module a unit of FSDP2, which is gathered whenever rows or logits are computed.

    A table is gathered by `factorization.rows` and `factorization.logits` themselves, so it can be shared by an
    embedding and a softmax, and read outside of their `forward`, as by a sampled softmax or
    `factorization.materialize()`; by all processes alike, as they exchange the shards. Without it:

    - A table belongs to the unit of the module above, such as the LightningModule. It can be tied, but is only there
      while `forward` of that module runs; if `training_step` reads it otherwise, "got mixed torch.Tensor and DTensor"
      is raised. `torch.distributed.fsdp.register_fsdp_forward_method(module, "training_step")` mends it.
    - A layer may be a unit of its own (`fully_shard(module.head)`), if its table is not tied: two units cannot share a
      parameter, and `fully_shard` of the second raises an error about meshes. Tied layers make one unit
      (`fully_shard([module.embedding, module.head])`).

    The bias of a softmax stays with the unit above. A table that is a unit already is left alone. Call it before
    `fully_shard` of the modules above.

    Args:
        module: A module with compressed tables.
        **options: Those of `torch.distributed.fsdp.fully_shard`: `mesh`, `reshard_after_forward`, `mp_policy`, ...

    Raises:
        ValueError: If a table is part of another unit already.

    Example:
        See `compress_or_restore`.
    """
    found = {path: layer for path, layer in module.named_modules() if isinstance(layer, CompressedLayer)}
    for path, layer in found.items():
        factorization = layer.factorization
        if isinstance(factorization, FSDPModule):
            continue
        if is_sharded(factorization):
            raise ValueError(
                f"table {path!r} is part of another unit already: call shard_tables before fully_shard of the modules "
                "above it"
            )
        fully_shard(factorization, **options)
        for method in ("rows", "logits"):
            register_fsdp_forward_method(factorization, method)


def _compress(module: nn.Module, method: MethodConfig | str, **given: Any) -> None:
    """As `compress`, by all processes together."""
    known = {name: given.pop(name) for name in _OF_PLAN if name in given}
    with failing_together():
        size = {name: given.pop(name, None) for name in BUDGETS}
        config = get_config(method, **given)
        budget = Budget.of(config, **size)
        if budget is not None and budget.is_searched:
            raise ValueError(
                "max_perplexity_increase measures the perplexity, which cannot be done before sharding: give a ratio, "
                "a size or bits_per_weight"
            )
        found = find_tables(module, known.get("tables", "auto"))
    _check_alike(found)
    with divided():
        tasks = plan(module, config, budget, **known)
    # Layers that are made afterwards start from the same random numbers in all processes, whichever has solved what.
    with isolate_rng():
        solution = solve(tasks, together=True)
    put_in_place(module, solution)


def _check_alike(tables: Sequence[Table]) -> None:
    """Refuse tables that the processes have not in common: the factors would be of some of each."""
    if count_processes() == 1:
        return
    own = [(table.name, table.shape, str(table.weight.dtype), _checksum(table.weight)) for table in tables]
    said = gather_over_processes(own)
    if any(len(other) != len(own) for other in said):
        names = "; ".join(f"process {rank}: {[name for name, *_ in other]}" for rank, other in enumerate(said))
        raise ValueError(
            f"the processes have different numbers of tables to compress ({names}): build the same model with the same "
            "layers in all, or name the same tables"
        )
    for index, table in enumerate(tables):
        if any(other[index] != said[0][index] for other in said):
            raise ValueError(
                f"table {table.name!r} is not the same in all processes: call seed_everything before the model is "
                "built, or load the same weights in all"
            )


def _checksum(weight: Tensor) -> int:
    """Sum of the bits of a table: exact, whatever the order of the terms."""
    return int(weight.detach().contiguous().view(_INTEGERS[weight.element_size()]).sum())


def _plan_of_checkpoint(path: str | os.PathLike[str]) -> Plan:
    plan = structure_from_checkpoint(path)
    if not plan.tables:
        raise ValueError(
            f"{str(path)!r} is the checkpoint of a dense model, which cannot be read into compressed tables: load its "
            "weights before, as in Class.load_from_checkpoint(path), and start without ckpt_path, so that they are "
            "compressed; or leave compress_or_restore out to go on with dense tables"
        )
    return plan
