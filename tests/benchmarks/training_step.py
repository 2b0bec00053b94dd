"""Most memory of training a language model for some steps, in a process of its own."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from measure import PeakMemory
from torch import Tensor

from lightning_embcompress.modules import LSTMLanguageModel

VOCAB_SIZE, DIM, BATCH_SIZE, SEQ_LEN = 33_278, 256, 40, 35


def language_model(vocab_size: int = VOCAB_SIZE, dim: int = DIM) -> LSTMLanguageModel:
    torch.manual_seed(0)
    return LSTMLanguageModel(vocab_size, dim, dim, num_layers=2)


class Training:
    """Steps of Adam on one batch: forward, backward and update.

    Args:
        model: What is trained.
        whole_logits: Whether the loss is torch's own, of the logits of all tokens.
    """

    def __init__(self, model: LSTMLanguageModel, whole_logits: bool = False) -> None:
        self.model, self.whole_logits = model.train(), whole_logits
        model.log = lambda *_, **__: None  # type: ignore[method-assign]
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        ids = torch.randint(model.vocab_size, (BATCH_SIZE, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
        self.batch = (ids[:, :-1], ids[:, 1:])

    def loss(self) -> Tensor:
        if not self.whole_logits:
            return self.model.training_step(self.batch, 0)
        logits, _ = self.model(self.batch[0])
        return F.cross_entropy(logits.flatten(0, 1), self.batch[1].flatten())

    def __call__(self) -> Any:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def main(path: str, whole_logits: bool) -> None:
    torch.set_num_threads(1)
    # What libraries allocate once is of neither side.
    Training(language_model(100, 16), whole_logits)()
    with PeakMemory() as memory:
        training = Training(torch.load(path, weights_only=False, mmap=True), whole_logits)
        for _ in range(3):
            training()
    sys.stdout.write(f"{memory.bytes}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "whole")
