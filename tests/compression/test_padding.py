"""The row of `padding_idx`: what it was in the dense table, in both roles, whatever is trained, stored or refined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_embcompress import EmbeddingCompression, compress, densify
from lightning_embcompress.compression.plan import Plan, apply_plan, plan_of
from lightning_embcompress.layers.fused_loss import fused_cross_entropy
from lightning_embcompress.methods.registry import Quantization
from lightning_embcompress.quantization.aware import convert_qat, prepare_qat, quantize_tables
from toys import DIM, VOCAB_SIZE, adam, check_resuming, compress_toy, falling_counts, loaders, model_of, normal

PADDING = 7


def _model(tied: bool = False, row: Tensor | None = None) -> Any:
    model = model_of("tied" if tied else "untied", padding_idx=PADDING, dropout=0.0)
    with torch.no_grad():
        # A common direction, which factors have to follow: a row of zeros does not lie on it.
        model.encoder.weight += 0.5
        model.encoder.weight[PADDING] = 0 if row is None else row
    return model


def _step(model: nn.Module, inputs: Tensor) -> None:
    optimizer = adam(model)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), inputs.roll(-1).flatten()).backward()
        optimizer.step()


def _row(model: Any) -> Tensor:
    return model.encoder(torch.tensor([1, PADDING]))[1].detach()


IDS = torch.tensor([[1, 2, PADDING, 40], [99, PADDING, 0, 3]])
ROWS = {"zero": None, "learned": normal(DIM, dtype=torch.float32)}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["group_reduce", "transform_coding", "product_quantization"])
def test_it_stays_whatever_happens_to_the_factors(method: str, tied: bool, row: str) -> None:
    model = _model(tied, ROWS[row])
    expected = torch.zeros(DIM) if ROWS[row] is None else ROWS[row]
    plan = compress_toy(model, method)
    assert plan.tables[0].ratio >= 2
    assert torch.equal(_row(model), expected)
    assert ("encoder.factorization.padding_rows" in model.state_dict()) == (row == "learned")
    _step(model, IDS)
    assert torch.equal(_row(model), expected)

    again = _model(tied, torch.ones(DIM))
    apply_plan(again, Plan.from_dict(plan_of(model).to_dict()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(_row(again), expected)
    assert torch.equal(again(IDS), model(IDS))

    prepare_qat(model, Quantization(bits=8, group_size=16))
    assert torch.equal(_row(model), expected)
    _step(model, IDS)
    convert_qat(model)
    assert torch.equal(_row(model), expected)

    before = model(IDS)
    densify(model)
    assert torch.equal(model.encoder.weight[PADDING], expected)
    torch.testing.assert_close(model(IDS), before, rtol=1e-4, atol=1e-4)


def test_without_training() -> None:
    model = _model(row=ROWS["learned"])
    compress_toy(model, "low_rank")
    quantize_tables(model, Quantization(bits=4, group_size=16))
    assert torch.equal(_row(model), ROWS["learned"])
    # A dense table that is quantized as it is.
    model = _model(row=ROWS["learned"])
    prepare_qat(model, Quantization(bits=4, group_size=16), tables=["encoder"])
    assert torch.equal(_row(model), ROWS["learned"])


def test_a_tied_softmax_gives_its_logit_by_every_way_to_read_it() -> None:
    model = _model(tied=True, row=ROWS["learned"])
    compress_toy(model, "group_reduce", groups=3, token_counts=falling_counts(seed=0))
    head, hidden = model.decoder, normal(5, DIM, seed=1, dtype=torch.float32).requires_grad_()
    logits, targets = head(hidden), torch.tensor([1, PADDING, 2, 3, PADDING])
    own = hidden @ ROWS["learned"] + (0 if head.bias is None else head.bias[PADDING])
    torch.testing.assert_close(logits[:, PADDING], own)
    stored = head(hidden, in_storage_order=True)
    torch.testing.assert_close(stored[:, head.factorization.storage_order], logits)
    torch.testing.assert_close(head.topk(hidden, 4).logits, logits.topk(4).values)
    loss, tiled = F.cross_entropy(logits, targets), fused_cross_entropy(head, hidden, targets, tile_rows=32)
    torch.testing.assert_close(tiled, loss)
    inputs = [hidden, *head.factorization.parameters()]
    for one, other in zip(torch.autograd.grad(tiled, inputs), torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_it_is_stored_within_the_budget() -> None:
    for row in ROWS.values():
        model = _model(row=row)
        most = 2 * (VOCAB_SIZE * DIM * 4) // 3
        assert compress(model, "low_rank", size=most).stored_bytes <= most


def test_what_was_made_before_there_were_such_rows_reads_factors() -> None:
    model, other = _model(), _model(row=torch.ones(DIM))
    compress_toy(model, "low_rank")
    record = plan_of(model).to_dict()
    for table in record["tables"]:
        table["spec"].pop("padding", None)
    apply_plan(other, Plan.from_dict(record))
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([PADDING])
    assert torch.equal(other.encoder(ids), other.encoder.factorization.rows(ids))


@pytest.mark.parametrize(
    "hostile",
    [[0], {"ids": [], "stored": False}, {"ids": [VOCAB_SIZE], "stored": True}, {"ids": [1, 1], "stored": True}],
)
def test_damaged_records_are_refused(hostile: Any) -> None:
    model = _model()
    compress_toy(model, "low_rank")
    record = plan_of(model).to_dict()
    record["tables"][0]["spec"]["padding"] = hostile
    with pytest.raises(ValueError, match="'padding'"):
        Plan.from_dict(record)


class _Rows(Callback):
    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.rows.append(_row(pl_module))


@pytest.mark.parametrize("method", ["group_reduce", "transform_coding"])
def test_refined_and_resumed(tmp_path: Path, method: str) -> None:
    row, noted = ROWS["learned"], _Rows()
    # The row comes from the checkpoint, not from the model that is resumed.
    rows = iter([row, None])

    def make() -> list[Any]:
        given: dict[str, Any] = {"token_counts": falling_counts(), "statistics_batches": 0, "ratio": 2}
        return [
            _model(tied=True, row=next(rows)),
            noted,
            EmbeddingCompression(method, refine_at_epochs=[1, 2], **given),
        ]

    model = check_resuming(tmp_path, make, (1,), data=loaders()).module
    assert len(noted.rows) == 4 * 12
    assert all(torch.equal(one, row) for one in noted.rows)
    densify(model)
    assert torch.equal(model.encoder.weight[PADDING], row)
