"""Tables in the formats that other programs keep them in: their values as they are read again, and their bytes.

Every format is a function of a table `[vocab_size, dim]` to the table as it is read, float32, and the bytes that it
takes with all scales and zero points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_embcompress.integrations.export.gguf import GRIDS
from lightning_embcompress.methods.numerics.grid_rounding import fit_grid

Format: TypeAlias = Callable[[Tensor], tuple[Tensor, int]]

# Levels of IQ4_NL (llama.cpp, `kvalues_iq4nl`).
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Levels of NF4 (Dettmers et al. 2023, QLoRA, appendix E): quantiles of the normal distribution, one of them zero.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_ROWS = 2**13


def gguf_blocks(kind: str) -> Format:
    """A format of llama.cpp by gguf's own `quantize` and `dequantize`: `Q8_0`, `Q5_0`, `Q4_0` and the like."""

    def store(table: Tensor) -> tuple[Tensor, int]:
        from gguf import GGMLQuantizationType, quants

        number = GGMLQuantizationType[kind]
        packed = quants.quantize(table.float().numpy(), number)
        return torch.from_numpy(quants.dequantize(packed, number)), packed.nbytes

    return store


def iq4_nl(table: Tensor) -> tuple[Tensor, int]:
    """`IQ4_NL` of llama.cpp, which gguf reads and does not write.

    As `quantize_row_iq4_nl_impl` without importances: a block of 32 weighs its errors by the squares of its values, and
    takes of 15 scales the one that fits best, then the least-squares scale of the levels found, as float16.
    """
    from gguf import GGMLQuantizationType, quants

    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32)
    parts = [_iq4_nl_blocks(part.float().reshape(-1, 32), levels) for part in table.split(_ROWS)]
    packed = torch.cat(parts).reshape(table.shape[0], -1).numpy()
    return torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType.IQ4_NL)), packed.nbytes


def _iq4_nl_blocks(blocks: Tensor, levels: Tensor) -> Tensor:
    """`[blocks, 18]` bytes: a float16 scale, then two codes a byte, the first half of a block in the lower bits."""
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    weights = blocks.square()
    best, scale = torch.full_like(largest, -1), torch.zeros_like(largest)
    for extra in range(-7, 8):
        inverse = torch.where(largest == 0, 0, (extra + levels[0]) / largest)
        found = levels[_nearest_level(blocks * inverse, levels)]
        fit = (weights * found * blocks).sum(dim=1, keepdim=True)
        square = (weights * found.square()).sum(dim=1, keepdim=True)
        gain = torch.where(square > 0, fit.square() / square, 0)
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fit / square, scale)
    scale = torch.where(largest == 0, 0, scale)
    codes = _nearest_level(torch.where(scale == 0, 0, blocks / scale), levels).to(torch.uint8)
    return torch.cat([scale.half().view(torch.uint8), codes[:, :16] | codes[:, 16:] << 4], dim=1)


def _nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)


def rounded(bits: int, group_size: int = 32) -> Format:
    """Round to nearest integers with a zero point of as many bits and a float16 scale for every group."""

    def store(table: Tensor) -> tuple[Tensor, int]:
        groups = table.float().reshape(-1, group_size)
        low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).half().float()
        step = scale.clamp(min=torch.finfo(torch.float16).tiny)
        zero = (-low / step).round().clamp(0, 2**bits - 1)
        codes = ((groups / step).round() + zero).clamp(0, 2**bits - 1)
        size = (groups.numel() * bits + groups.shape[0] * (bits + 16)) // 8
        return ((codes - zero) * scale).reshape(table.shape), size

    return store


def symmetric(table: Tensor, group_size: int = 32) -> tuple[Tensor, int]:
    """Round to nearest integers from -8 to 7, as compressed-tensors: the range of a float16 scale covers all values."""
    groups = table.float().reshape(-1, group_size)
    scale = (groups.abs().amax(1, keepdim=True) / 7.5).half().float()
    codes = (groups / scale.clamp(min=torch.finfo(torch.float16).tiny)).round().clamp(-8, 7)
    return (codes * scale).reshape(table.shape), (groups.numel() * 4 + groups.shape[0] * 16) // 8


def in_metric(kind: str, matrix: Tensor) -> Format:
    """A type of llama.cpp as `embcompress export gguf` finds it.

    Args:
        kind: Of `GRIDS`.
        matrix: `[dim, dim]` second moment of the metric of the loss.
    """

    def store(table: Tensor) -> tuple[Tensor, int]:
        found = fit_grid(table, GRIDS[kind], matrix)
        groups = found.scales.numel() * (2 if found.minimums is None else 4)
        return found.materialize(), (found.codes.numel() * (len(found.grid.levels) - 1).bit_length()) // 8 + groups

    return store


def nf4(table: Tensor, group_size: int = 64) -> tuple[Tensor, int]:
    """NormalFloat of 4 bits, as bitsandbytes: the largest magnitude of 64 values, in float32, times 16 levels."""
    groups = table.float().reshape(-1, group_size)
    scale = groups.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS)
    codes = _nearest_level(groups / scale.clamp(min=torch.finfo(torch.float32).tiny), levels)
    return (levels[codes] * scale).reshape(table.shape), groups.numel() // 2 + 4 * scale.numel()


def hqq(table: Tensor, group_size: int = 64) -> tuple[Tensor, int]:
    """Integers of 4 bits of torchao with HQQ (`Int4WeightOnlyConfig`): a bfloat16 scale and zero for every group."""
    from torchao.quantization import quant_primitives

    find: Any = quant_primitives._choose_qparams_and_quantize_affine_hqq
    options = {"nbits": 4, "group_size": group_size, "compute_dtype": torch.bfloat16, "device": "cpu"}
    parts = []
    for part in table.split(_ROWS):
        codes, *others, _ = find(part.float(), **options)
        scale, zero = (one.reshape(-1, 1).float() for one in others)
        # In the form of its kernels, where the zero is the value of code 8.
        parts.append(((codes.reshape(-1, group_size).float() - 8) * scale + zero).reshape(part.shape))
    return torch.cat(parts), table.numel() // 2 + 4 * (table.numel() // group_size)


FORMATS: dict[str, Format] = {
    "Q8_0 (llama.cpp)": gguf_blocks("Q8_0"),
    "Q5_1 (llama.cpp)": gguf_blocks("Q5_1"),
    "Q5_0 (llama.cpp)": gguf_blocks("Q5_0"),
    "Q4_1 (llama.cpp)": gguf_blocks("Q4_1"),
    "Q4_0 (llama.cpp)": gguf_blocks("Q4_0"),
    "IQ4_NL (llama.cpp)": iq4_nl,
    "int4, symmetric (round to nearest)": symmetric,
    "NF4 (bitsandbytes)": nf4,
    "int4, HQQ (torchao)": hqq,
    **{f"int{bits}, zero points (round to nearest)": rounded(bits) for bits in (4, 3, 2)},
}
"""By what is written in a table of results."""


def store_as(form: Format) -> Callable[[nn.Module, Sequence[Any]], int]:
    """What `sweep` takes as another way to store the tables."""

    def store(_: nn.Module, tables: Sequence[Any]) -> int:
        total = 0
        for table in tables:
            values, size = form(table.weight.detach())
            with torch.no_grad():
                table.weight.copy_(values)
            total += size
        return total

    return store
