"""Training for few bits: what is quantized when, resuming, order, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_embcompress import EmbeddingCompression, load_compressed, load_from_checkpoint, save_compressed
from lightning_embcompress.body_quantization import Body, body_of, body_weights
from lightning_embcompress.callbacks import QuantizationAware
from lightning_embcompress.factorizations import LatentCodes, Quantization
from lightning_embcompress.plan import plan_of
from lightning_embcompress.quantization import convert, converted, prepare

MakeTrainer = Callable[..., Trainer]
WORKERS = Path(__file__).parent / "workers"


@pytest.fixture
def recurrent(foreign: SimpleNamespace) -> type[LightningModule]:
    """The plain module of these tests with an LSTM in its middle."""

    class Recurrent(foreign.Foreign):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.LSTM(foreign.dim, foreign.dim, batch_first=True)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden, _ = self.mix(self.norm(self.encoder(inputs)))
            return self.decoder(self.dropout(hidden))  # type: ignore[no-any-return]

    return Recurrent


def _adam(module: LightningModule) -> Any:
    return torch.optim.Adam(module.parameters(), lr=0.01)


def _two_groups(module: LightningModule) -> Any:
    decayed = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in module.parameters() if parameter.dim() == 1]
    return torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], 0.01)


def _momentum(module: LightningModule) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def _run(
    make_trainer: MakeTrainer,
    foreign: SimpleNamespace,
    build: Callable[[], Any],
    callbacks: list[Callback],
    folder: Path,
    configure: Any = _adam,
    **fit: Any,
) -> SimpleNamespace:
    seed_everything(0, verbose=False)
    model = build()
    model.optimizers_of = configure
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = make_trainer(*callbacks, keep, max_epochs=4, enable_checkpointing=True, default_root_dir=folder)
    trainer.fit(model, **foreign.loaders(), **fit)
    report = json.loads((folder / "report.json").read_text())
    return SimpleNamespace(model=model, optimizer=trainer.optimizers[0].state_dict(), report=report, trainer=trainer)


CASES: dict[str, Any] = {
    "minmax": (_adam, "low_rank", {"body": "int8", "freeze_observers_at": 2}),
    "learned": (_two_groups, "group_reduce", {"bits": "int3", "ranges": "learned", "freeze_observers_at": 2}),
    "learned body": (_momentum, "low_rank", {"ranges": "learned", "body": "int4", "at_epoch": 2}),
    "codes": (_adam, "transform_coding", {"body": "float16", "freeze_observers_at": 2}),
}


# Compression is due at epoch 1, quantization at 1 or 2, freezing at 2: checkpoints are of before, between, and after.
@pytest.mark.parametrize("case", CASES)
def test_resuming_equals_the_uninterrupted_run(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, tmp_path: Path, recurrent: Any, case: str
) -> None:
    configure, method, options = CASES[case]

    def callbacks() -> list[Callback]:
        # However they are listed.
        return [
            QuantizationAware(**{"at_epoch": 1, "group_size": 16, **options}),
            EmbeddingCompression(method, ratio=3, at_epoch=1, statistics_batches=2),
        ]

    whole = _run(make_trainer, foreign, recurrent, callbacks(), tmp_path / "whole", configure)
    assert body_of(whole.model) is not None or "body" not in options
    assert all(module.is_prepared for module in _factorizations(whole.model))
    for epoch in (0, 1, 2):
        ckpt = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        resumed = _run(make_trainer, foreign, recurrent, callbacks(), tmp_path / f"{epoch}", configure, ckpt_path=ckpt)
        torch.testing.assert_close(dict(resumed.model.state_dict()), dict(whole.model.state_dict()), rtol=0, atol=0)
        torch.testing.assert_close(resumed.optimizer, whole.optimizer, rtol=0, atol=0)
        assert plan_of(resumed.model) == plan_of(whole.model)
        assert resumed.report == whole.report
        trained = [name for name, parameter in whole.model.named_parameters() if parameter.requires_grad]
        assert trained == [name for name, parameter in resumed.model.named_parameters() if parameter.requires_grad]
    _check_files(foreign, make_trainer, tmp_path, recurrent, whole)


def _factorizations(model: nn.Module) -> list[Any]:
    return [module.factorization for module in model.modules() if hasattr(module, "factorization")]


def _check_files(
    foreign: SimpleNamespace, make_trainer: MakeTrainer, folder: Path, recurrent: Any, run: SimpleNamespace
) -> None:
    """Checkpoints of the training are tested as they are; what is saved is converted, and reads the same."""
    ckpt = folder / "whole" / "epoch=3.ckpt"
    data = foreign.loaders()["val_dataloaders"]
    (tested,) = make_trainer().test(run.model, data, verbose=False)
    (from_file,) = make_trainer(QuantizationAware()).test(recurrent(), data, ckpt_path=ckpt, verbose=False)
    assert from_file == tested
    loaded = load_from_checkpoint(recurrent, ckpt)
    assert plan_of(loaded) == plan_of(run.model)
    save_compressed(loaded, folder / "saved")
    assert plan_of(loaded) == plan_of(run.model)
    packed: Any = recurrent()
    load_compressed(folder / "saved", packed)
    assert not any(factors.is_prepared for factors in _factorizations(packed))
    (from_saved,) = make_trainer().test(packed, data, verbose=False)
    assert from_saved["val_loss"] == pytest.approx(tested["val_loss"], rel=1e-6)
    said = run.report["quantization"]
    with converted(loaded):
        sizes = [table.stored_bytes for table in plan_of(loaded).tables]
    assert [table["stored_bytes"] for table in said["tables"]] == sizes
    assert sum(sizes) < 0.6 * sum(table["stored_bytes"] for table in run.report["tables"])
    # The file has a checksum of its own besides.
    weights = (folder / "saved" / "model.safetensors").stat().st_size
    assert weights <= said["model"]["stored_bytes"] + 200 * len(packed.state_dict())
    assert said["perplexity"]["epoch"] in (1, 2)
    assert said["perplexity"]["before"] != said["perplexity"]["after"]
