"""Tables larger than memory: what compressing and serving them takes.

    python tests/benchmarks/large_tables.py make FOLDER --rows 8000000 --dim 256
    /usr/bin/time -v embcompress compress-table FOLDER/table.safetensors FOLDER/small --bits_per_weight 3 \
        --counts FOLDER/counts.npy
    python tests/benchmarks/large_tables.py compare FOLDER     # codes of the first rows, in memory and from disk
    python tests/benchmarks/large_tables.py serve FOLDER       # lookups, memory and opening
"""

from __future__ import annotations

import argparse
import json
import struct
import time
from pathlib import Path

import numpy as np
import torch


def make(folder: Path, rows: int, dim: int) -> None:
    """A table of float16 with a spectrum as of trained ones, longer rows for rare words, and counts of Zipf's law."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, dim + 1).float().pow(-0.6)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    mixing = spectrum.unsqueeze(1) * turn
    counts = (1e9 / torch.arange(1, rows + 1)).long()
    # Not in the order of frequency, but as vocabularies are: nearly.
    order = (torch.arange(rows) * (1 + 0.2 * torch.rand(rows, generator=generator))).argsort()
    header = json.dumps(
        {"embedding.weight": {"dtype": "F16", "shape": [rows, dim], "data_offsets": [0, 2 * rows * dim]}}
    ).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "table.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, rows, 2**15):
            ranks = order[start : start + 2**15]
            length = (1 + torch.log1p(ranks.float()) / 20).unsqueeze(1)
            part = torch.randn(len(ranks), dim, generator=generator) @ mixing * length
            # Rare words are near to a common direction.
            part += (ranks.float() / rows).unsqueeze(1) * turn[0]
            file.write(part.half().numpy().tobytes())
    np.save(folder / "counts.npy", counts[order].numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--dim", type=int, default=256)
    said = parser.parse_args()
    start = time.perf_counter()
    make(said.folder, said.rows, said.dim)
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
