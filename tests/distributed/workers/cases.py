"""Tables that are solved by one process and by several, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_embcompress.compression.budget import Budget
from lightning_embcompress.compression.solution import solve as solve_tasks
from lightning_embcompress.compression.tasks import Task, plan
from lightning_embcompress.methods.numerics import gram
from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies
from lightning_embcompress.methods.registry import Factorization, get_config
from lightning_embcompress.methods.tensor_train import factorization as tensor_train

VOCAB_SIZE, DIM = 900, 160


def small_units() -> None:
    """Cut small tables into as many units as large ones."""
    gram._CHUNK_ELEMENTS = 2**12
    tensor_train._CHUNK_TOKENS = 64


def table(vocab_size: int = VOCAB_SIZE, dim: int = DIM, seed: int = 0) -> Tensor:
    """Rows in few dimensions that differ between clusters, and noise; clusters are scattered over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.randint(0, 4, (vocab_size,), generator=generator)
    bases = torch.randn(4, 12, dim, generator=generator)
    rows = torch.randn(vocab_size, 1, 12, generator=generator) @ bases[cluster]
    return rows.squeeze(1) + 0.3 * torch.randn(vocab_size, dim, generator=generator)


def counts(vocab_size: int = VOCAB_SIZE) -> Tensor:
    """Zipf's law, shuffled."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))
    return (1e5 / (1 + order.double())).long()


def tasks(*weights: Tensor, method: str, ratio: float | None = None, **options: Any) -> list[Task]:
    """One task for every table, in a model of its own."""
    model = nn.Sequential(*(nn.Embedding.from_pretrained(weight, freeze=False) for weight in weights))
    tables = [str(index) for index in range(len(weights))]
    config = get_config(method, **options)
    planned = plan(model, config, Budget.of(config, ratio=ratio), tables, is_preview=True)
    return [replace(task, token_counts=counts(task.table.shape[0])) for task in planned]


def refining(task: Task, target: Tensor, start: Factorization[Any]) -> Task:
    """The same table after it has changed."""
    return replace(task, table=replace(task.table, weight=target), start=start)


def solve(
    method: str, ratio: float | None = None, dtype: torch.dtype = torch.float32, noise: float = 0.02, **options: Any
) -> list[Factorization[Any]]:
    """Solve a table of one method, then refine it to one that has changed a little."""
    weight = table().to(dtype)
    (task,) = tasks(weight, method=method, ratio=ratio, **options)
    (first,) = solve_tasks([task], together=True).factors
    target = (weight + noise * table(seed=5)).to(dtype)
    # The first one is written in place or left as it is: a copy of it is compared, too.
    before = type(first).from_spec(first.spec(), first.dtype)
    before.load_state_dict(first.state_dict())
    before.provenance = first.provenance
    parameters = list(first.parameters())
    (second,) = solve_tasks([refining(task, target, first)], together=True).factors
    if second is first:
        assert all(now is then for now, then in zip(second.parameters(), parameters, strict=True))
        assert not torch.equal(next(second.parameters()), next(before.parameters()))
    second.in_place = second is first
    return [before, second]


def solve_in_loss(method: str, ratio: float, **options: Any) -> list[Factorization[Any]]:
    """Solve a table in a metric of the loss, then one that has changed."""
    weight = table()
    moment = table(seed=9).T @ table(seed=9) / VOCAB_SIZE
    (task,) = tasks(weight, method=method, ratio=ratio, refine_rounds=3, **options)
    task = replace(task, metric=Metric(moment.double(), smoothed_frequencies(counts())))
    (first,) = solve_tasks([task], together=True).factors
    (second,) = solve_tasks([refining(task, table(seed=5), first)], together=True).factors
    return [first, second]


def solve_tables(method: str, ratio: float) -> list[Factorization[Any]]:
    """Three tables at once: more than two processes, of different sizes, one of them refined."""
    weights = [table(vocab_size, 24, seed) for seed, vocab_size in enumerate((60, 200, 110))]
    wanted = tasks(*weights, method=method, ratio=ratio)
    solved = solve_tasks(wanted, together=True).factors
    (refined,) = solve_tasks([refining(wanted[1], table(200, 24, 7), solved[1])], together=True).factors
    return [solved[0], solved[2], refined]


CASES: dict[str, Callable[[], list[Factorization[Any]]]] = {
    "group_reduce": lambda: solve("group_reduce", 4, groups=4, refine_rounds=3, move_fraction=0.5),
    "group_reduce in place": lambda: solve("group_reduce", 6, groups=5, refine_rounds=0),
    "transform_coding": lambda: solve("transform_coding", 8, refine_rounds=3),
    "trellis": lambda: solve("transform_coding", 8, refine_rounds=1, codes="trellis", effort=6),
    "loss": lambda: solve_in_loss("shared_basis", 5),
    "weighted_low_rank": lambda: solve("weighted_low_rank", rank=20),
    "tensor_train": lambda: solve("tensor_train", max_rank=3, shape=[4, 4, 5, 2]),
    "product_quantization": lambda: solve(
        "product_quantization", noise=0.5, subspaces=90, bits=5, rare_bits=3, max_iterations=4
    ),
    "cp": lambda: solve_tables("cp", 4),
}

MORE_CASES: dict[str, Callable[[], list[Factorization[Any]]]] = {
    "low_rank": lambda: solve("low_rank", 5),
    "tucker": lambda: solve_tables("tucker", 4),
    "tensor_train_matrix": lambda: solve_tables("tensor_train_matrix", 4),
    "one group": lambda: solve("group_reduce", 4, groups=1),
    "a single subspace": lambda: solve("product_quantization", noise=0.5, subspaces=1, bits=6),
    **{
        f"{method} in {dtype}": lambda method=method, dtype=dtype: solve(method, 4, dtype)
        for method in ("group_reduce", "weighted_low_rank", "tensor_train", "product_quantization")
        for dtype in (torch.bfloat16, torch.float64)
    },
}


def solve_all(cases: dict[str, Callable[[], list[Factorization[Any]]]]) -> dict[str, list[dict[str, Any]]]:
    """Solve cases by all processes, and give what is compared."""
    return {name: [compared(factors) for factors in case()] for name, case in cases.items()}


def compared(factors: Factorization[Any]) -> dict[str, Any]:
    """What has to be the same, as a file can hold it."""
    return {
        "spec": factors.spec(),
        "provenance": factors.provenance,
        "in_place": getattr(factors, "in_place", None),
        "trains": [parameter.requires_grad for parameter in factors.parameters()],
        "state": dict(factors.state_dict()),
    }
