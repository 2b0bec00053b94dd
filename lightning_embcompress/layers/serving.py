"""A compressed model that only predicts: factors laid out for the products of one state, or a few."""

from __future__ import annotations

import torch
from torch import nn

from lightning_embcompress.layers.compressed import CompressedLinear


@torch.no_grad()
def optimize_for_inference(model: nn.Module) -> int:
    """Lay out compressed softmax heads, in place, for decoding a token or a few at a time.

    Rows of a factor are short, and a product of one state with them adds up within every row. Column by column it is
    added up over many rows at once, which on a CPU is 1.3 to 1.9 times as fast. Shapes, values, state dicts and files
    stay what they are; only the strides of parameters change, so that looking up many rows of a tied table takes
    longer.

    Codes of `transform_coding` become bytes that are proportional to their levels (on CPUs): one for a component of up
    to about 5 bits, two for more, takes the place of its codes, 9 bits a weight in all. A product of one state then
    reads a quarter of the bytes that it reads of a dense table in float32. Levels are rounded by less than half of what
    lies between them; state dicts and files stay those of the codes, which come back where a gradient is wanted.

    Training goes on to work, but not faster, and not by an optimizer with `fused=True` that has state from before: its
    kernels take moments to be laid out as their parameters are, and would mix them up without a word. Lay out a copy of
    the model then, or make the optimizer anew. Parameters in memory that processes share are copied out of it.

    Args:
        model: Any module with compressed heads; heads whose factors are packed integers or tensor cores stay as they
            are.

    Returns:
        Number of heads that are laid out.

    Raises:
        ValueError: If factors were made in `torch.inference_mode`.

    Example:
        >>> from lightning_embcompress import compress
        >>> head = nn.Sequential(nn.Linear(64, 2000))
        >>> plan = compress(head, "low_rank", ratio=4, tables=["0"])
        >>> optimize_for_inference(head)
        1
    """
    known = set()
    heads = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    found = {name: head.product_factors() for name, head in heads.items()}
    for name, factors in found.items():
        if any(factor.is_inference() for factor in (*factors, *heads[name].factorization.buffers())):
            raise ValueError(
                f"factors of {name!r} were made in torch.inference_mode, where nobody can give them other strides: "
                "build, load or compress the model outside of it"
            )
    laid_out = sum(head.factorization.lay_out() for head in heads.values())
    for factors in found.values():
        laid_out += bool(factors)
        for factor in factors:
            if id(factor) in known:
                continue
            known.add(id(factor))
            if factor.stride(0) != 1:
                with torch.inference_mode(mode=False):
                    factor.data = factor.data.T.contiguous().T
    return laid_out
