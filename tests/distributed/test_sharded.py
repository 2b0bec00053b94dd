"""Models that are compressed and then sharded: they train, resume and load as if they were whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_embcompress import load_from_checkpoint
from lightning_embcompress.compression.plan import Plan, compress, plan_of
from lightning_embcompress.integrations.checkpoint import structure_from_checkpoint
from lightning_embcompress.integrations.sharding import compress_or_restore

WORKERS = Path(__file__).parent / "workers"
sys.path.insert(0, str(WORKERS))
from sharded_model import CASES, MORE_CASES, VOCAB_SIZE, ShardedModel, data, result, statistics, trainer  # noqa: E402

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def _compare(one: Any, other: Any, atol: float) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            _compare(one[name], other[name], atol)
    elif isinstance(one, Tensor) and not one.is_floating_point():
        assert torch.equal(one, other)
    else:
        torch.testing.assert_close(one, other, rtol=0.0, atol=atol, check_dtype=False)


def _tables(plan: Plan) -> list[tuple[Any, ...]]:
    return [(table.modules, table.method, table.options, table.spec, table.weighted_error) for table in plan.tables]


def _check_run(folder: Path, name: str, atol: float) -> None:
    found = torch.load(folder / f"{name}.pt")
    case = (CASES | MORE_CASES)[name]
    model = ShardedModel(case)
    fitted = trainer(folder / f"{name}-alone")
    fitted.fit(model, data(), data())
    alone = result(model, fitted)

    # The same training in one process, with the same batches in sum.
    assert {key for key, _ in model.named_parameters()} <= found["whole"]["state"].keys()
    for part in found["whole"].keys() & alone.keys():
        one, other = found["whole"][part], alone[part]
        if isinstance(one, dict):
            # FSDP names what layers share once, and buffers that are not saved too.
            both = one.keys() & other.keys()
            one, other = ({key: side[key] for key in both} for side in (one, other))
        _compare(one, other, atol)
    # The second epoch moved what the first left.
    assert abs(found["val_loss_before"] - alone["val_loss"]) > 1e-3

    # A run that was resumed, to the last bit.
    _compare(found["resumed"], found["whole"], 0.0)

    for epoch in range(2):
        checkpoint = folder / name / f"epoch={epoch}.ckpt"
        assert checkpoint.is_dir() == case["directory"]
        # FSDP has made the factors float32.
        assert _tables(structure_from_checkpoint(checkpoint)) == _tables(plan_of(model))
    if not case["directory"]:
        loaded = load_from_checkpoint(ShardedModel, checkpoint)
        _compare(dict(loaded.state_dict()), dict(model.state_dict()), atol)
    (values,) = trainer(folder / f"{name}-alone").validate(
        model, data(), ckpt_path=folder / f"{name}-alone" / "epoch=0.ckpt", verbose=False
    )
    assert found["val_loss_before"] == pytest.approx(values["val_loss"], abs=atol)


def _run(torchrun: Callable[..., str], folder: Path, names: list[str], strategy: str, accelerator: str) -> None:
    torchrun(WORKERS / "sharded.py", folder, ",".join(names), strategy, accelerator, timeout=500)
    # FSDP goes on in float32, where Adam makes much of rounding; everything else is in float64.
    for name in names:
        _check_run(folder, name, 1e-12 if strategy == "fsdp2" else 1e-3)


@pytest.mark.distributed
@pytest.mark.slow
def test_fsdp2_trains_and_resumes_as_one_process(torchrun: Callable[..., str], tmp_path: Path) -> None:
    names = ["group_reduce", "layers", "tensor_train", "product_quantization"]
    _run(torchrun, tmp_path, names, "fsdp2", "cpu")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
    ("strategy", "names"),
    [("fsdp2", ["rare", *MORE_CASES]), ("fsdp", [name for name, case in CASES.items() if case["directory"]])],
)
def test_all_methods_units_and_kinds_of_checkpoints(
    strategy: str, names: list[str], torchrun: Callable[..., str], tmp_path: Path
) -> None:
    _run(torchrun, tmp_path, names, strategy, "cpu")


@pytest.mark.distributed
@pytest.mark.slow
@two_gpus
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_gpus_train_and_resume_as_one_process(strategy: str, torchrun: Callable[..., str], tmp_path: Path) -> None:
    torchrun(WORKERS / "sharded.py", tmp_path, ",".join(CASES), strategy, "cuda", timeout=500)
    for name in CASES:
        _check_run(tmp_path, name, 1e-9 if strategy == "fsdp2" else 1e-3)


@pytest.mark.distributed
@pytest.mark.slow
def test_units_refusals_and_reading_outside_of_forward(torchrun: Callable[..., str], tmp_path: Path) -> None:
    assert "all held" in torchrun(WORKERS / "sharded_units.py", tmp_path)


def test_one_process_compresses_as_compress_does() -> None:
    counts = torch.arange(VOCAB_SIZE)
    for given in ({"token_counts": counts}, {"statistics": statistics(counts)}):
        one, other = ShardedModel(CASES["layers"]), ShardedModel(CASES["layers"])
        plan = compress_or_restore(one, "shared_basis", ratio=2, **given)
        assert plan == compress(other, "shared_basis", ratio=2, **given) == plan_of(one)
        assert (plan.predicted_loss is None) == ("token_counts" in given)
        _compare(dict(one.state_dict()), dict(other.state_dict()), 0.0)
    with pytest.raises(ValueError, match="give statistics"):
        compress_or_restore(ShardedModel(CASES["layers"]), "auto", ratio=2, token_counts=counts)


def test_what_is_compressed_stays_as_it_is() -> None:
    model = ShardedModel(CASES["group_reduce"])
    plan = compress_or_restore(model, "low_rank", ratio=2)
    factors = model.embedding.factorization
    # A file that is not there any more is not looked for.
    assert compress_or_restore(model, "group_reduce", ratio=3, ckpt_path="gone.ckpt") == plan
    assert model.embedding.factorization is factors


def test_checkpoints_record_the_plan_and_give_it_back(tmp_path: Path) -> None:
    model, fresh = ShardedModel(CASES["group_reduce"]), ShardedModel(CASES["group_reduce"])
    plan = compress_or_restore(model, "group_reduce", ratio=2, token_counts=torch.arange(VOCAB_SIZE))
    checkpoint: dict[str, Any] = {"pytorch-lightning_version": "2.6.0", "state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert Plan.from_dict(checkpoint["embcompress"]) == plan
    torch.save(checkpoint, tmp_path / "one.ckpt")
    # The checkpoint says how; what is asked for beside it is for a new start.
    assert compress_or_restore(fresh, "low_rank", ratio=9, ckpt_path=tmp_path / "one.ckpt") == plan
    fresh.load_state_dict(checkpoint["state_dict"])
    ids = torch.arange(VOCAB_SIZE)
    assert torch.equal(fresh(ids), model(ids))
    # Of a dense model it says nothing.
    dense = ShardedModel(CASES["group_reduce"])
    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": dense.state_dict()}, tmp_path / "dense.ckpt")
    with pytest.raises(ValueError, match=r"dense\.ckpt' is the checkpoint of a dense model"):
        compress_or_restore(dense, "low_rank", ratio=2, ckpt_path=tmp_path / "dense.ckpt")
    assert type(dense.embedding) is nn.Embedding
