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


def resident() -> tuple[float, float]:
    """Megabytes of this process: of its own, and of files that it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in lines if line.startswith("Rss")}
    return found["RssAnon"], found["RssFile"]


def drawn(folder: Path, batches: int, seed: int) -> list[torch.Tensor]:
    """Batches of 2,048 ids in proportion to the counts."""
    order = torch.from_numpy(np.load(folder / "counts.npy")).argsort(descending=True)
    steps = torch.arange(1, len(order) + 1).double().reciprocal_().cumsum_(0)
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(batches, 2048, generator=generator, dtype=torch.float64).mul_(steps[-1])
    return list(order[torch.searchsorted(steps, places)])


def serve(folder: Path, batches: int = 400) -> None:
    """Opening, memory and speed of lookups from disk, and the speed of those in memory, in turn."""
    from lightning_embcompress import load_compressed

    path, rows = folder / "small", np.load(folder / "counts.npy", mmap_mode="r").shape[0]
    ids = drawn(folder, batches, seed=1)
    before = resident()
    start = time.perf_counter()
    disk = load_compressed(path, rows="mmap", row_cache=rows // 100 * 4 * 256).get_submodule("embedding")
    print(f"opening {time.perf_counter() - start:.2f} s")
    for batch in ids[: batches // 2]:
        disk(batch)
    cache = disk.factorization.cache
    kept = cache._kept.nbytes / 1e6
    print(f"resident beyond what was there: {resident()[0] - before[0]:.0f} MB, of which {kept:.0f} MB of cache")
    memory = load_compressed(path).get_submodule("embedding")
    cache.hits = cache.lookups = 0
    seconds: dict[str, list[float]] = {"disk": [], "memory": []}
    for batch in ids[batches // 2 :]:
        for name, layer in (("disk", disk), ("memory", memory)):
            start = time.perf_counter()
            with torch.no_grad():
                layer(batch)
            seconds[name].append(time.perf_counter() - start)
    assert torch.allclose(disk(ids[0]).float(), memory(ids[0]).float(), atol=1e-3)
    found = {name: sorted(own)[len(own) // 2] for name, own in seconds.items() if own}
    print({name: f"{1e3 * one:.2f} ms" for name, one in found.items()}, f"hit rate {cache.hit_rate:.3f}")
    print(f"speed of disk over memory: {found['memory'] / found['disk']:.2f}")


def compare(folder: Path, rows: int = 100_000) -> None:
    """Whether the codes of the first rows are those that compressing in memory finds."""
    from safetensors.torch import load_file

    from lightning_embcompress import load_compressed
    from lightning_embcompress.methods.registry import SharedBasisBlocks, TransformCodingConfig

    table = load_file(folder / "table.safetensors")["embedding.weight"]
    counts = torch.from_numpy(np.load(folder / "counts.npy"))
    most = int(table.numel() * 3 / 8)
    found = SharedBasisBlocks.decompose(table, most, counts, TransformCodingConfig())
    del table
    stored = load_compressed(folder / "small").get_submodule("embedding").factorization
    alike = [torch.equal(one, other) for one, other in zip(found._block_codes(), stored._block_codes(), strict=True)]
    same_blocks = torch.equal(found.block_of_row[:rows], stored.block_of_row[:rows])
    print(f"blocks of the first {rows:,} rows equal: {same_blocks}; codes of all rows equal: {all(alike)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "serve", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--dim", type=int, default=256)
    said = parser.parse_args()
    start = time.perf_counter()
    if said.what == "make":
        make(said.folder, said.rows, said.dim)
    else:
        {"serve": serve, "compare": compare}[said.what](said.folder)
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
