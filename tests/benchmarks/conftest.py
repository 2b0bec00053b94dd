"""Text and a trained model that benchmarks share; they skip where there are none."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SHARED = Path(__file__).parents[3] / "shared" / "data"


class WikiText:
    """WikiText-2 as the trained model reads it: words by falling count, `<eos>` at the end of every line."""

    def __init__(self) -> None:
        occurrences = collections.Counter(self._words("train"))
        vocabulary = sorted(occurrences, key=lambda word: (-occurrences[word], word))
        self.counts = torch.tensor([occurrences[word] for word in vocabulary])
        self._index = {word: position for position, word in enumerate(vocabulary)}
        self.saved: dict[str, Any] = torch.load(SHARED / "models" / "wikitext2_lstm256.pt", weights_only=True)

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The trained model's tensors in float32."""
        return {name: tensor.float() for name, tensor in self.saved["state_dict"].items()}

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
