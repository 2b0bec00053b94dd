"""Refinement: what it aims at, what it keeps, and the file it reads."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_embcompress import EmbeddingCompression
from lightning_embcompress.callbacks.solving import open_table, write_table
from lightning_embcompress.layers.compressed import CompressedLayer
from lightning_embcompress.methods.registry import BlockLowRank, GroupReduceConfig, LowRank
from toys import DIM, VOCAB_SIZE, loaders_of, model_of

MakeTrainer = Callable[..., Trainer]
COUNTS = torch.arange(150, 0, -1) ** 2
METHODS: dict[str, dict[str, Any]] = {
    "low_rank": {"ratio": 2},
    "weighted_low_rank": {"ratio": 2},
    "group_reduce": {"ratio": 2, "groups": 3},
}


class Note(Callback):
    """Notes tables, parameters and optimizer state at the start of every epoch."""

    def __init__(self) -> None:
        self.tables: list[dict[str, Tensor]] = []
        self.parameters: list[dict[str, int]] = []
        self.states: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        tables = {}
        for name in ("encoder", "decoder"):
            layer = getattr(pl_module, name)
            compressed = isinstance(layer, CompressedLayer)
            tables[name] = layer.factorization.materialize() if compressed else layer.weight.detach().clone()
        self.tables.append(tables)
        self.parameters.append({name: id(parameter) for name, parameter in pl_module.named_parameters()})
        state = trainer.optimizers[0].state
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        # Not all keys need be parameters of the model: that is what is tested.
        self.states.append(
            {
                names.get(id(parameter), "unknown"): {
                    key: torch.as_tensor(value).clone() for key, value in held.items()
                }
                for parameter, held in state.items()
            }
        )


def _error(table: Tensor, target: Tensor, weights: Tensor) -> float:
    lost = ((table - target).double().square().sum(dim=1) * weights).sum()
    return float(lost / (target.double().square().sum(dim=1) * weights).sum())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_it_moves_towards_what_was_left_out(make_trainer: MakeTrainer, method: str, tied: bool) -> None:
    before, after = Note(), Note()
    # Rows are weighted by counts alone: the best there is is known then.
    arguments = {"token_counts": COUNTS, "statistics_batches": 0, **METHODS[method]}
    callback = EmbeddingCompression(method, at_epoch=1, refine_at_epochs=[2, 3], **arguments)
    make_trainer(before, callback, after, max_epochs=4).fit(model_of("tied" if tied else "untied"), **loaders_of())
    weights = torch.ones(150).double() if method == "low_rank" else COUNTS.double()
    for name in ("encoder", "decoder"):
        residual = before.tables[1][name] - after.tables[1][name]
        assert residual.norm() > 0.1
        for epoch in (2, 3):
            moved = before.tables[epoch][name]
            assert not torch.equal(moved, after.tables[epoch - 1][name])
            # T = Ŵ + R, and R <- T - Ŵ_new: computed here from tables alone.
            target = moved + residual
            solved = after.tables[epoch][name]
            now, then = _error(solved, target, weights), _error(moved, target, weights)
            assert now < 0.999 * then, (name, epoch)
            if "low_rank" in method:
                # The best there is at that rank, by another way (Eckart-Young).
                values = torch.linalg.svdvals(weights.sqrt().unsqueeze(1) * target.double()).square()
                rank = int(torch.linalg.matrix_rank(solved))
                assert now == pytest.approx(float(values[rank:].sum() / values.sum()), rel=1e-3)
            residual = target - solved


def test_in_place_it_keeps_parameters_and_their_state(make_trainer: MakeTrainer) -> None:
    before, after = Note(), Note()
    callback = EmbeddingCompression("low_rank", ratio=2, at_epoch=1, refine_at_epochs=[2])
    trainer = make_trainer(before, callback, after)
    trainer.fit(model_of(), **loaders_of())
    assert before.parameters[1] != after.parameters[1]
    assert before.parameters[2] == after.parameters[2]
    torch.testing.assert_close(after.states[2], before.states[2], rtol=0, atol=0)
    # At compression the tables' own state went, everything else stayed.
    assert set(before.states[1]) - set(after.states[1]) == {"encoder.weight", "decoder.weight"}
    assert "decoder.bias" in after.states[1]
    assert "unknown" not in after.states[1]


def test_changed_shapes_are_spliced(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: LowRank, target: Tensor, max_bytes: int, *_: Any) -> LowRank:
        return LowRank.decompose(target, max_bytes // 2)

    monkeypatch.setattr(LowRank, "refined", other)
    after = Note()
    callback = EmbeddingCompression("low_rank", ratio=2, at_epoch=0, refine_at_epochs=[1])
    trainer, model = make_trainer(callback, after), model_of("tied")
    trainer.fit(model, **loaders_of())
    optimized = trainer.optimizers[0].param_groups[0]["params"]
    assert [id(parameter) for parameter in optimized] == [id(parameter) for parameter in model.parameters()]
    assert set(map(id, trainer.optimizers[0].state)) == set(map(id, optimized))
    assert model.encoder.factorization is model.decoder.factorization
    assert not torch.equal(model.encoder.factorization.materialize(), after.tables[1]["encoder"])
    assert not {name for name in after.states[1] if ".factorization." in name}


def _harm(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"decoder-epoch1.bin' is missing: .* resume without refine_at_epochs"),
        ("truncated", r"decoder-epoch1.bin' is not the one that was written .*9600 bytes of a table of 150 x 16"),
        ("overwritten", r"decoder-epoch1.bin' is not the one that was written for this checkpoint"),
    ],
)
def test_a_residual_that_cannot_be_read(make_trainer: MakeTrainer, tmp_path: Path, how: str, message: str) -> None:
    class Harm(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                (path,) = (tmp_path / "residuals").glob("*/decoder-epoch1.bin")
                _harm(path, how)
                self.tables = {name: value.clone() for name, value in pl_module.state_dict().items()}

    harm, model = Harm(), model_of()
    callback = EmbeddingCompression("low_rank", ratio=2, at_epoch=1, refine_at_epochs=[2])
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        make_trainer(harm, callback).fit(model, **loaders_of())
    torch.testing.assert_close(dict(model.state_dict()), harm.tables, rtol=0, atol=0)


def test_factors_that_diverged_are_refused_before_any_table_is_changed(make_trainer: MakeTrainer) -> None:
    class Diverge(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                pl_module.decoder.factorization.coefficients.data[4] = torch.nan
                self.encoder = pl_module.encoder.factorization.materialize()

    diverge, model = Diverge(), model_of()
    callback = EmbeddingCompression("low_rank", ratio=2, at_epoch=1, refine_at_epochs=[2])
    with pytest.raises(ValueError, match=r"table 'decoder' has NaN or infinite values in 1 .*\(rows 4\)"):
        make_trainer(diverge, callback).fit(model, **loaders_of())
    assert torch.equal(model.encoder.factorization.materialize(), diverge.encoder)


def test_a_layer_that_other_code_replaced(make_trainer: MakeTrainer) -> None:
    class Replace(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.decoder = nn.Linear(DIM, VOCAB_SIZE)

    callback = EmbeddingCompression("low_rank", ratio=2, refine_at_epochs=[1])
    with pytest.raises(ValueError, match=r"table 'decoder' was compressed, but is a Linear now"):
        make_trainer(Replace(), callback).fit(model_of(), **loaders_of())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_residual_files(tmp_path: Path, dtype: torch.dtype) -> None:
    table = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    factors = BlockLowRank.decompose(table, table.nbytes // 2 + 600, None, GroupReduceConfig(groups=2))
    path = tmp_path / "made" / "table.bin"
    checksum = write_table(path, table, factors, sign=-1)
    residual = open_table(path, factors)
    assert checksum == zlib.crc32(path.read_bytes())
    assert residual.dtype == dtype
    assert path.stat().st_size == table.nbytes
    torch.testing.assert_close(residual, (table.double() - factors.materialize().double()).to(dtype))
    write_table(tmp_path / "target.bin", residual, factors, sign=1)
    target = open_table(tmp_path / "target.bin", factors)
    rounding = 2 * torch.finfo(dtype).eps * table.abs().max().item()
    torch.testing.assert_close(target, table, rtol=0, atol=rounding)
    assert [file.name for file in path.parent.iterdir()] == ["table.bin"]
