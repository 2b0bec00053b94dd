"""A language model that was trained on real text, where it is at hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_embcompress import EmbeddingCompression, compress
from lightning_embcompress.compression.plan import plan_of

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
MODEL, TEXT = SHARED / "models" / "wikitext2_lstm256.pt", SHARED / "wikitext-2"

pytestmark = pytest.mark.skipif(
    not (MODEL.is_file() and TEXT.is_dir()), reason=f"needs {MODEL.name} and WikiText-2 in {SHARED}"
)

STREAMS, STEPS, WINDOWS = 40, 35, 2


class Trained(LightningModule):
    """The trained model, with time first and its state carried from window to window."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = nn.Embedding(config["vocab_size"], config["dim"])
        self.lstm = nn.LSTM(config["dim"], config["dim"], config["layers"])
        self.decoder = nn.Linear(config["dim"], config["vocab_size"])
        self.state: Any = None

    def _loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        hidden, self.state = self.lstm(self.encoder(inputs), self.state)
        return nn.functional.cross_entropy(self.decoder(hidden).flatten(0, 1), targets.flatten())

    def on_validation_epoch_start(self) -> None:
        self.state = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("val_loss", loss, batch_size=batch[1].numel())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture(scope="module")
def trained() -> SimpleNamespace:
    """Weights, token counts of the training text, and windows of validation text."""
    saved = torch.load(MODEL, weights_only=True)
    words = (TEXT / "train.txt").read_text(encoding="utf-8").replace("\n", " <eos> ").split()
    counted = Counter(words)
    ids = {word: i for i, word in enumerate(sorted(counted, key=lambda word: (-counted[word], word)))}
    assert len(ids) == saved["config"]["vocab_size"]
    valid = (TEXT / "valid.txt").read_text(encoding="utf-8").replace("\n", " <eos> ").split()
    # From all over the text, as articles differ much.
    length = len(valid) // STREAMS
    streams = [valid[i * length : i * length + STEPS * WINDOWS + 1] for i in range(STREAMS)]
    text = torch.tensor([[ids[word] for word in stream] for stream in streams]).T
    return SimpleNamespace(
        weights={name: value.float() for name, value in saved["state_dict"].items()},
        config=saved["config"],
        counts=torch.tensor([counted[word] for word in ids]),
        windows=list(zip(text[:-1].split(STEPS), text[1:].split(STEPS), strict=True)),
    )


def test_frequency_pays_and_groups_pay_more(trained: SimpleNamespace, make_trainer: Callable[..., Trainer]) -> None:
    loader: Any = DataLoader(trained.windows, batch_size=None)
    perplexities = {}
    for method in ("low_rank", "weighted_low_rank"):
        model = Trained(trained.config)
        model.load_state_dict(trained.weights)
        plan = compress(model, method, ratio=4, token_counts=trained.counts)
        assert plan.ratio >= 4
        (logged,) = make_trainer().validate(model, loader, verbose=False)
        perplexities[method] = math.exp(logged["val_loss"])
    model = Trained(trained.config)
    model.load_state_dict(trained.weights)
    callback = EmbeddingCompression("group_reduce", ratio=4, token_counts=trained.counts)
    # Not trained on: one step at a learning rate of zero.
    make_trainer(callback, max_steps=1, num_sanity_val_steps=0, check_val_every_n_epoch=9).fit(model, loader, loader)
    assert plan_of(model).ratio >= 4
    measured = callback.state_dict()["perplexity"]
    assert measured["final"] == measured["compressed"]
    # Measured: 167.4 dense, then 227.6, 185.0 and 174.7, which is 4.4 % above it.
    assert measured["dense"] == pytest.approx(167.44, rel=1e-3)
    assert measured["compressed"] < 1.06 * measured["dense"]
    assert measured["compressed"] < 0.97 * perplexities["weighted_low_rank"] < 0.9 * perplexities["low_rank"]
