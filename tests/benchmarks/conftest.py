"""Text and a trained model that benchmarks share; they skip where there are none."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import Statistics, collect_statistics
from lightning_embcompress.modules import LSTMLanguageModel

SHARED = Path(__file__).parents[3] / "shared" / "data"
SEQ_LEN = 35


class WikiText:
    """WikiText-2 as the trained model reads it: words by falling count, `<eos>` at the end of every line."""

    def __init__(self) -> None:
        occurrences = collections.Counter(self._words("train"))
        vocabulary = sorted(occurrences, key=lambda word: (-occurrences[word], word))
        self.counts = torch.tensor([occurrences[word] for word in vocabulary])
        self._index = {word: position for position, word in enumerate(vocabulary)}
        self.saved: dict[str, Any] = torch.load(SHARED / "models" / "wikitext2_lstm256.pt", weights_only=True)

    def model(self) -> LSTMLanguageModel:
        """The trained model in float32."""
        config = self.saved["config"]
        model = LSTMLanguageModel(
            config["vocab_size"], config["dim"], config["dim"], num_layers=config["layers"], dropout=0.2
        )
        model.load_state_dict({name: tensor.float() for name, tensor in self.saved["state_dict"].items()})
        return model.eval()

    def windows(self, split: str, streams: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets, `[streams, seq_len]`, of windows that follow each other."""
        ids = self.streams(split, streams)
        return [
            (ids[at : at + SEQ_LEN].T, ids[at + 1 : at + SEQ_LEN + 1].T) for at in range(0, count * SEQ_LEN, SEQ_LEN)
        ]

    def statistics(self) -> Statistics:
        """Of 200 windows of the training text."""
        state: Any = None

        def loss(model: LSTMLanguageModel, batch: tuple[Tensor, Tensor]) -> Tensor:
            nonlocal state
            hidden, after = model.hidden_states(batch[0], state)
            state = (after[0].detach(), after[1].detach())
            return nn.functional.cross_entropy(model.decoder(hidden).flatten(0, 1), batch[1].flatten())

        return collect_statistics(self.model(), self.windows("train", 20, 200), loss, token_counts=self.counts)

    @torch.no_grad()
    def perplexity(self, model: LSTMLanguageModel) -> float:
        """Of 56,000 tokens of validation text."""
        model.eval()
        state, total, count = None, 0.0, 0
        for inputs, targets in self.windows("valid", 40, 40):
            hidden, state = model.hidden_states(inputs, state)
            logits = model.decoder(hidden).flatten(0, 1)
            total += float(nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum"))
            count += targets.numel()
        return math.exp(total / count)

    def _words(self, split: str) -> Iterator[str]:
        with (SHARED / "wikitext-2" / f"{split}.txt").open(encoding="utf-8") as lines:
            for line in lines:
                yield from line.split()
                yield "<eos>"

    def streams(self, split: str, count: int) -> Tensor:
        """`[steps, count]` ids: the text in parts of equal length beside each other."""
        ids = torch.tensor([self._index[word] for word in self._words(split)])
        return ids[: len(ids) // count * count].view(count, -1).T.contiguous()


@pytest.fixture(scope="session")
def wikitext() -> WikiText:
    """The text and the model."""
    if not (SHARED / "models" / "wikitext2_lstm256.pt").is_file():
        pytest.skip(f"no trained model in {SHARED}")
    return WikiText()


@pytest.fixture(scope="session")
def statistics(wikitext: WikiText) -> Statistics:
    """What errors in the tables of the model cost."""
    return wikitext.statistics()
