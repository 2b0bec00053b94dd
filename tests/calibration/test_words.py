"""Padding is left out of counts, moments and targets, by whatever says that it is padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_embcompress.calibration.statistics import collect_statistics
from toys import VOCAB_SIZE, gpt2

PAD = 3
WORDS = torch.tensor([[9, 8, 7, PAD, PAD, PAD], [6, 5, 4, 9, 8, PAD]])
MASK = (WORDS != PAD).long()


class Reader(nn.Module):
    """Reads ids with a mask that it is given under one of its names, and predicts the ids themselves."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB_SIZE, 8, padding_idx=padding_idx)
        self.head = nn.Linear(8, VOCAB_SIZE)

    def forward(self, ids: Tensor, key_padding_mask: Any = None, mask: Any = None) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Reader()

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(ids)


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids.masked_fill(MASK == 0, -100).flatten())


SAYING = {
    "by position": lambda model, batch: _loss(model(batch, MASK == 0), batch),
    "by name": lambda model, batch: _loss(model(batch, key_padding_mask=MASK == 0), batch),
    "a mask of words": lambda model, batch: _loss(model(batch, mask=MASK.bool()), batch),
    "a mask of padding": lambda model, batch: _loss(model(batch, mask=MASK == 0), batch),
    "to be added": lambda model, batch: _loss(model(batch, mask=torch.where(MASK == 1, 0.0, -1e9)), batch),
}


@pytest.mark.parametrize("how", SAYING)
def test_what_a_module_is_told(how: str) -> None:
    found = collect_statistics(Reader(), [WORDS], SAYING[how])
    assert torch.equal(found.token_counts, torch.bincount(WORDS[MASK == 1], minlength=VOCAB_SIZE))
    assert found.num_targets == 8


def test_what_the_batch_or_a_module_outside_or_the_embedding_says() -> None:
    expected = torch.bincount(WORDS[MASK == 1], minlength=VOCAB_SIZE)
    batch = {"ids": WORDS, "attention_mask": MASK}
    found = collect_statistics(Reader(), [batch], lambda model, batch: _loss(model(batch["ids"]), batch["ids"]))
    assert torch.equal(found.token_counts, expected)
    found = collect_statistics(Outer(), [WORDS], lambda model, batch: _loss(model(batch, MASK), batch))
    assert torch.equal(found.token_counts, expected)
    # The gradient at the row of padding_idx is nothing to the table, though the loss has one.
    every = lambda model, batch: F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())  # noqa: E731
    model = Reader(padding_idx=PAD)
    found = collect_statistics(model, [WORDS], every)
    assert torch.equal(found.token_counts, expected)
    assert found.gradient_energies["table"][PAD] == 0
    # A mask of something else is no mask of words: what it leaves out are many ids.
    found = collect_statistics(
        Reader(), [WORDS], lambda model, batch: every(model, batch) + 0 * model(batch, mask=WORDS > 5).sum()
    )
    assert found.token_counts.sum() == 2 * WORDS.numel()


@pytest.mark.parametrize("batch_first", [True, False])
def test_what_attention_is_told_inside_a_model(batch_first: bool) -> None:
    class Attending(Reader):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=batch_first)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, ids: Tensor) -> Tensor:
            mask = ids == PAD if batch_first else (ids == PAD).T
            return self.head(self.encoder(self.table(ids), src_key_padding_mask=mask))

    ids = WORDS if batch_first else WORDS.T
    loss = lambda model, batch: F.cross_entropy(model(batch).flatten(0, 1), batch.flatten(), ignore_index=PAD)  # noqa: E731
    found = collect_statistics(Attending(), [ids], loss)
    assert torch.equal(found.token_counts, torch.bincount(WORDS[MASK == 1], minlength=VOCAB_SIZE))
    assert found.num_targets == 8


@pytest.mark.parametrize("side", ["right", "left"])
def test_causal_models(side: str) -> None:
    ids, mask = (WORDS, MASK) if side == "right" else (WORDS.flip(1), MASK.flip(1))
    model = gpt2(vocab_size=VOCAB_SIZE)
    found = collect_statistics(model, [{"input_ids": ids, "attention_mask": mask}])
    assert found.token_counts[PAD] == 0
    assert found.token_counts.sum() == 8
    assert found.num_targets == 2 + 4
    # Labels that forget it change nothing.
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    assert collect_statistics(model, [given]).num_targets == (3 + 5 if side == "right" else 2 + 4)
    # Without a mask the id of padding says it, unless it stands for something else, too.
    padded = gpt2(vocab_size=VOCAB_SIZE, pad_token_id=PAD)
    found = collect_statistics(padded, [{"input_ids": WORDS}])
    assert found.token_counts.sum() == 8
    assert found.num_targets == 2 + 4
    ending = gpt2(vocab_size=VOCAB_SIZE, pad_token_id=PAD, eos_token_id=PAD)
    assert collect_statistics(ending, [{"input_ids": WORDS}]).token_counts[PAD] == 4


def test_both_sides_of_a_translation() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    named = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=VOCAB_SIZE, **sizes, **heads, **named))
    target = torch.tensor([[20, 21, -100, -100, -100, -100], [22, 23, 24, 25, 26, -100]])
    # The decoder reads as many ids as the encoder, and is given no mask: that of the encoder is not its own.
    found = collect_statistics(model, [{"input_ids": WORDS, "attention_mask": MASK, "labels": target}])
    read = torch.tensor([2, 20, 21, 2, 22, 23, 24, 25, 26])
    assert torch.equal(found.token_counts, torch.bincount(torch.cat([WORDS[MASK == 1], read]), minlength=VOCAB_SIZE))
    assert found.num_targets == 7


def test_positions_whose_loss_is_not_seen() -> None:
    """As with a sampled softmax, whose validation is left at the head."""
    from lightning_embcompress.calibration.collector import Collector

    model = Reader()
    with Collector(model, [["table"], ["head"]]) as collector:
        for batch in ((WORDS, WORDS.masked_fill(MASK == 0, -100)), {"ids": WORDS, "attention_mask": MASK}):
            collector.begin(batch)
            loss = model.table(WORDS).square().mean()
            with collector.stopping_at_head():
                model(WORDS)
            assert collector.add(loss)
    assert collector.num_targets == 2 * 8
    hidden = torch.tanh(model.table(WORDS[MASK == 1])).double()
    torch.testing.assert_close(collector.sums["hidden", "head"], 2 * (hidden.T @ hidden).detach(), rtol=1e-5, atol=1e-6)
