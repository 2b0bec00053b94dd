"""Tables, factors and text as trained models and corpora have them, made without data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_embcompress.methods.numerics.metric import Metric, smoothed_frequencies
from lightning_embcompress.methods.registry import SharedBasisBlocks
from lightning_embcompress.utils.files import replacing

VOCABULARY_FILE = "1b_word_vocab.txt"
# Words of the training text of the One Billion Word benchmark, and of a sentence of it on average.
_TOKENS, _SENTENCE = 829_250_940, 25
_HELD_OUT = "heldout-monolingual.tokenized.shuffled/news.en.heldout-{:05d}-of-00050"
_TRAIN = "training-monolingual.tokenized.shuffled/news.en-{:05d}-of-00100"


def fill_table(table: Tensor, seed: int = 0) -> Tensor:
    """Write values with a falling spectrum, in other directions for frequent rows than for rare ones.

    Args:
        table: `[vocab_size, dim]`, the most frequent rows first.
        seed: Of the values.

    Returns:
        The table.
    """
    vocab_size, dim = table.shape
    generator = torch.Generator().manual_seed(seed)
    for rows in table.split(-(-vocab_size // 20)):
        # Components trade places with their neighbours.
        order = (torch.arange(dim) + 48 / 1024 * dim * torch.rand(dim, generator=generator)).argsort()
        rows.normal_(generator=generator).mul_(torch.logspace(0, -1.5, dim)[order])
    return table


def zipf_metric(vocab_size: int, dim: int, seed: int = 0) -> tuple[Metric, Tensor]:
    """The metric of states whose spectrum falls, and `[vocab_size]` counts by Zipf's law."""
    frequencies = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    counts = (_TOKENS * frequencies / frequencies.sum()).long()
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4 * dim, dim, generator=generator) * torch.logspace(0, -1, dim)
    return Metric((states.T @ states / len(states)).double(), smoothed_frequencies(counts)), counts


def drawn_ids(count: int, vocab_size: int, generator: torch.Generator, zipf: bool = True) -> Tensor:
    """`[count]` ids as words come in text, by Zipf's law and the most frequent first; or all alike."""
    if not zipf:
        return torch.randint(vocab_size, (count,), generator=generator)
    # Not `torch.multinomial`, which takes at most 2^24 categories.
    ends = (1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)).cumsum(0)
    uniform = torch.rand(count, dtype=torch.float64, generator=generator) * ends[-1]
    return torch.searchsorted(ends, uniform).clamp(max=vocab_size - 1)


@torch.no_grad()
def made_factors(vocab_size: int, dim: int, ratio: float, groups: int = 20) -> SharedBasisBlocks:
    """Factors as GroupReduce finds them in the metric of the loss, but drawn at random, which is as fast to read.

    Blocks of equal size in the order of frequency but for a tenth of the words; each of 0.88 of the rank before it.
    """
    ends = [vocab_size * (group + 1) // groups for group in range(groups)]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    low, high = 1.0, 100.0 * dim
    while high - low > 1e-3:
        middle = (low + high) / 2
        if _empty(vocab_size, dim, sizes, middle, torch.device("meta")).stored_bytes() <= vocab_size * dim * 4 / ratio:
            low = middle
        else:
            high = middle
    factors = _empty(vocab_size, dim, sizes, low, None)
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -1.5, dim)
    for block in factors.coefficients:
        block.normal_(generator=generator).mul_(spectrum[: block.shape[1]])
    factors.basis.normal_(generator=generator).div_(dim**0.5)
    block_of_row = torch.arange(groups).repeat_interleave(torch.tensor(sizes))
    moved = torch.randperm(vocab_size, generator=generator)[: vocab_size // 10]
    block_of_row[moved] = block_of_row[moved[torch.randperm(len(moved), generator=generator)]]
    factors._index(block_of_row)
    return factors


def _empty(vocab_size: int, dim: int, sizes: list[int], scale: float, device: torch.device | None) -> SharedBasisBlocks:
    ranks = [max(1, min(dim, int(scale * 0.88**group))) for group in range(len(sizes))]
    return SharedBasisBlocks(vocab_size, dim, max(ranks), sizes, [[[0, rank]] for rank in ranks], False, device=device)


def make_corpus(folder: Path, vocab_size: int = 793_471, tokens: int = 2_000_000, seed: int = 0) -> None:
    """Write shards and a vocabulary in the layout of the One Billion Word benchmark, as `OneBillionWord` reads them.

    Words are numbered and drawn by Zipf's law, one independent of the other: a model can learn how frequent they are
    and nothing else. The vocabulary is in the order of frequency, as sampled softmax needs it.

    Args:
        folder: Where; it is made, and must not exist or be empty.
        vocab_size: Words, `<S>` and `<UNK>` among them.
        tokens: Of the training text, about; words that are not drawn are in the vocabulary all the same.
        seed: Of the text.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder {str(folder)!r} exists and is not an empty folder: choose another")
    generator = torch.Generator().manual_seed(seed)
    words = [f"w{index}" for index in range(vocab_size - 2)]
    sentences = -(-tokens // (_SENTENCE + 1))
    # At least a batch in each held-out shard.
    held_out = max(400, sentences // 50)
    shards = {_TRAIN.format(1): sentences, _HELD_OUT.format(0): held_out, _HELD_OUT.format(1): held_out}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder, directory=True) as temporary:
        (temporary / VOCABULARY_FILE).write_text("\n".join(["<S>", "<UNK>", *words]) + "\n", encoding="utf-8")
        for name, count in shards.items():
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8", newline="\n") as file:
                ids = drawn_ids(count * _SENTENCE, len(words), generator).view(count, _SENTENCE)
                file.writelines(" ".join(words[index] for index in line) + "\n" for line in ids.tolist())
