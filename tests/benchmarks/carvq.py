"""Residual vector quantization in groups, corrected by a small network: in the manner of CARVQ (Gou et al. 2025).

After arXiv 2510.12721: rows are cut into vectors of a few components, groups of vectors have codebooks of 16 entries of
their own, several of which are added up, and a network that reads a few numbers a token adds what it can of the rest.
Lengths of vectors and groups, the sizes of the network and its training are ours, so that 1.3, 2.1, 2.8 and 4.4 bits
per weight come out at 576 columns; the paper has 1.6 and more.
"""

from __future__ import annotations

import torch
from formats import Format
from torch import Tensor, nn

_LENGTH, _GROUP, _ENTRIES = 8, 1024, 16
_ITERATIONS = 20
_GROUPS_AT_ONCE = 64
# Numbers a token, width of the network, and its training.
_NUMBERS, _HIDDEN, _EPOCHS, _BATCH, _RATE = 16, 384, 40, 1024, 2e-3


def carvq(stages: int) -> Format:
    """Codes of 4 bits for 8 components in each stage, and the network in float16.

    Args:
        stages: Codebooks that are added up.
    """

    def store(table: Tensor) -> tuple[Tensor, int]:
        vectors = table.float().reshape(-1, _LENGTH)
        groups = vectors.split(_GROUP * _GROUPS_AT_ONCE)
        found = torch.cat([_residual_codes(part, stages) for part in groups]).view(table.shape)
        correction, numbers = _correction(table.float() - found)
        count = -(-len(vectors) // _GROUP)
        codes = stages * (len(vectors) // 2 + 2 * count * _ENTRIES * _LENGTH)
        return found + correction, codes + 2 * numbers

    return store


def _residual_codes(vectors: Tensor, stages: int) -> Tensor:
    """What groups of vectors are read as; the last group may be short."""
    count = -(-len(vectors) // _GROUP)
    padded = torch.zeros(count * _GROUP, _LENGTH)
    padded[: len(vectors)] = vectors
    mass = (torch.arange(count * _GROUP) < len(vectors)).float().view(count, _GROUP, 1)
    rest = padded.view(count, _GROUP, _LENGTH).clone()
    total = torch.zeros_like(rest)
    generator = torch.Generator().manual_seed(0)
    for _ in range(stages):
        filled = min(_GROUP, len(vectors) - (count - 1) * _GROUP)
        start = torch.randperm(filled, generator=generator)[:_ENTRIES].repeat(_ENTRIES)[:_ENTRIES]
        books = rest[:, start]
        for _ in range(_ITERATIONS):
            codes = torch.cdist(rest, books).argmin(dim=2)
            chosen = nn.functional.one_hot(codes, _ENTRIES).float() * mass
            sizes = chosen.sum(dim=1).unsqueeze(2)
            books = torch.where(sizes > 0, chosen.mT @ rest / sizes.clamp(min=1), books)
        books = books.half().float()
        read = books.gather(1, torch.cdist(rest, books).argmin(dim=2, keepdim=True).expand(-1, -1, _LENGTH))
        total, rest = total + read, rest - read
    return total.view(-1, _LENGTH)[: len(vectors)]


def _correction(rest: Tensor) -> tuple[Tensor, int]:
    """What a network makes of some numbers a token, trained on what is left of a table; and how many it has."""
    vocab_size, dim = rest.shape
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = nn.Embedding(vocab_size, _NUMBERS)
        network = nn.Sequential(nn.Linear(_NUMBERS, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, dim))
        parameters = [*tokens.parameters(), *network.parameters()]
        steps = _EPOCHS * -(-vocab_size // _BATCH)
        optimizer = torch.optim.Adam(parameters, lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        unit = rest.square().mean().sqrt().clamp(min=1e-12)
        for _ in range(_EPOCHS):
            for ids in torch.randperm(vocab_size).split(_BATCH):
                error = network(tokens(ids)) - rest[ids] / unit
                optimizer.zero_grad()
                error.square().mean().backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.half().float())
        # The last layer takes the unit with it.
        return network(tokens.weight) * unit, sum(parameter.numel() for parameter in parameters)


CARVQ: dict[str, Format] = {
    f"residual codes and a network (CARVQ), {stages} stages": carvq(stages) for stages in (1, 2, 3, 5)
}
"""By what is written in a table of results."""
