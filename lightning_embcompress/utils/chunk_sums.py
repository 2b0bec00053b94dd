"""Checksums of the chunks of a file, so that a part of it can be read and trusted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHUNK_BYTES = 2**16
"""Bytes of a chunk: few enough to be read with a row, many enough for their sums to be small."""
_DIGEST_BYTES = 8
SUFFIX = ".sums"
"""Behind the name of the file that the sums are of."""


class ChunkSums:
    """Checksums of a file, chunk by chunk, and which chunks were compared with them.

    Args:
        size: Bytes of the file.
        digests: `[chunks, 8]` uint8: BLAKE2b of every chunk.

    Raises:
        ValueError: If they are not as many as a file of this size has chunks.
    """

    def __init__(self, size: int, digests: Tensor) -> None:
        """Nothing has been compared."""
        if digests.shape != (-(-size // CHUNK_BYTES), _DIGEST_BYTES):
            raise ValueError(f"there are sums of {len(digests)} chunks, and not of {size} bytes")
        self.size, self.digests = size, digests
        self._is_read = torch.zeros(len(digests), dtype=torch.bool, device="cpu")

    def unread(self, starts: Tensor, stops: Tensor) -> Iterator[tuple[int, int, int]]:
        """Chunks of `[n]` ranges of bytes that were not compared yet: their numbers, where they begin and end."""
        first, last = starts // CHUNK_BYTES, (stops - 1) // CHUNK_BYTES
        # Most ranges are short: within a chunk, or across the border of two.
        ends = torch.cat([first, last])
        if bool(self._is_read[ends].all()) and bool((last - first <= 1).all()):
            return
        for start, stop in zip(first.tolist(), last.tolist(), strict=True):
            for chunk in range(start, stop + 1):
                if not self._is_read[chunk]:
                    yield chunk, chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, self.size)

    def holds(self, chunk: int, content: bytes | bytearray) -> bool:
        """Whether a chunk is what it was; it is not looked at again then."""
        is_same = _digest(content) == bytes(self.digests[chunk].tolist())
        self._is_read[chunk] = is_same
        return is_same

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> ChunkSums:
        """Those of a file as it is now."""
        found, size = bytearray(), 0
        with open(path, "rb") as file:
            while content := file.read(CHUNK_BYTES):
                found += _digest(content)
                size += len(content)
        digests = torch.frombuffer(found, dtype=torch.uint8) if found else torch.empty(0, dtype=torch.uint8)
        return cls(size, digests.view(-1, _DIGEST_BYTES))

    def save(self, path: Path) -> None:
        """Write them to a file of their own."""
        of_all = hashlib.sha256(self.digests.numpy().tobytes()).hexdigest()
        save_file({"digests": self.digests}, path, {"size": str(self.size), "sha256": of_all})

    @classmethod
    def load(cls, path: Path) -> ChunkSums:
        """Read what `save` wrote.

        Raises:
            ValueError: If it is damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                digests, said = file.get_tensor("digests").clone(), file.metadata() or {}
            if hashlib.sha256(digests.numpy().tobytes()).hexdigest() != said.get("sha256"):
                raise ValueError("they are not those that were written")
            return cls(int(said["size"]), digests)
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"{str(path)!r} is damaged ({' '.join(str(error).split())[:200]}): remove it, and the checksums are "
                "computed whenever the model is loaded"
            ) from error


def _digest(content: bytes | bytearray) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
