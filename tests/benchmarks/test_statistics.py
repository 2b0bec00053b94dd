"""What statistics cost beside the passes through the model that they need, both sides in turns in one process.

Run `pytest tests/benchmarks -k statistics -s --benchmark-only`.
"""

from __future__ import annotations

import os

import pytest
import torch
from measure import Side, in_turns
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import collect_statistics

pytestmark = pytest.mark.timeout(1800)

VOCAB_SIZE, DIM, SEQUENCES, STEPS, ROUNDS, BATCHES = 33_278, 256, 20, 35, 4, 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCAB_SIZE, DIM)
        self.lstm = nn.LSTM(DIM, DIM, 2, batch_first=True)
        self.decoder = nn.Linear(DIM, VOCAB_SIZE)


def loss_fn(model: Model, ids: Tensor, rows: Tensor | None = None) -> Tensor:
    rows = model.encoder(ids[:, :-1]) if rows is None else rows
    logits = model.decoder(model.lstm(rows)[0])
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def test_the_cost_of_statistics(benchmark) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    batches = torch.randint(VOCAB_SIZE, (BATCHES, SEQUENCES, STEPS + 1))

    def passes() -> None:
        for ids in batches:
            rows = model.encoder(ids[:, :-1]).detach().requires_grad_()
            torch.autograd.grad(loss_fn(model, ids, rows), rows)

    sides = {
        "passes": Side(passes),
        "statistics": Side(lambda: collect_statistics(model, batches, loss_fn)),
    }
    found = benchmark.pedantic(lambda: in_turns(sides, ROUNDS, os.cpu_count() or 1), rounds=1)
    assert found["statistics"].ratio > 1 / 1.3
    # Sums over the vocabulary and the dimensions, and logits in small pieces; the logits alone take 93 MB.
    assert found["statistics"].peak_bytes < found["passes"].peak_bytes + 40e6


# Beside a body of next to nothing the head is all that is measured; a block of 512 tokens of a large vocabulary.
LARGE_VOCABULARY, LARGE_DIM, BLOCK, PIECE_BYTES = 262_144, 640, 512, 1.2e9


def test_the_cost_of_a_large_vocabulary(benchmark) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 1, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=LARGE_VOCABULARY, hidden_size=LARGE_DIM, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(LARGE_VOCABULARY, (1, BLOCK))
    counts = torch.ones(LARGE_VOCABULARY)

    def passes() -> None:
        rows = model.model.embed_tokens(ids).detach().requires_grad_()
        torch.autograd.grad(model(inputs_embeds=rows, labels=ids, use_cache=False).loss, rows)

    sides = {
        "passes": Side(passes),
        "statistics": Side(lambda: collect_statistics(model, [{"input_ids": ids}], token_counts=counts)),
    }
    found = benchmark.pedantic(lambda: in_turns(sides, 1, 1), rounds=1)
    assert found["statistics"].ratio > 1 / 1.15
    # Some logits and their gradient, of the batch's 0.5 GB of each; the moments take 13 MB, the sums of tokens 20 MB.
    assert found["statistics"].peak_bytes < PIECE_BYTES
